"""Several processes: a watchdog against a stuck peer, and the anchor in a file to restart from."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils

from ..files import write_atomically
from .transform import REPLICATED, LocalSGDState

FORMAT = "learned-opt anchor 1"
STUCK_EXIT_CODE = 75  # EX_TEMPFAIL: trying again may help
_NATIVE = {  # what safetensors reads back into NumPy
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64"),
}


class Watchdog:
    """End this process, with a message, when a round takes too long: a stuck peer blocks a collective for ever.

    A collective cannot be cancelled from Python, so the process exits (code 75, no cleanup) and is to be started again
    from the last anchor. One watchdog is for one ``with``.

    Args:
        timeout: seconds that a round may take.
        first: seconds until the first :meth:`beat`, for compilation; ``timeout`` if None.
        on_stuck: called with the message in place of printing it and exiting.

    Raises:
        ValueError: if a time is not positive.
        RuntimeError: when it is entered a second time.

    Example:
        >>> with Watchdog(timeout=60.0, first=600.0) as watchdog:
        ...     for _ in range(3):
        ...         pass  # a round, and jax.block_until_ready on its result
        ...         watchdog.beat()
    """

    def __init__(
        self, timeout: float, *, first: float | None = None, on_stuck: Callable[[str], Any] | None = None
    ) -> None:
        first = timeout if first is None else first
        if not timeout > 0 or not first > 0:
            raise ValueError(f"Watchdog: timeout and first must be positive seconds, got {timeout} and {first}")
        self._timeout, self._allowed, self._on_stuck = timeout, first, on_stuck
        self._beats, self._last = 0, time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="local-sgd-watchdog", daemon=True)

    def beat(self) -> None:
        """Say that a round has finished."""
        self._beats, self._last, self._allowed = self._beats + 1, time.monotonic(), self._timeout

    def __enter__(self) -> "Watchdog":
        if self._thread.ident is not None:  # it has been started
            raise RuntimeError("Watchdog: entered before; make a new one for each `with`")
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.is_set():
            left = self._last + self._allowed - time.monotonic()
            if left <= 0:
                message = (
                    f"local SGD watchdog: no round finished within {self._allowed:g} s (rounds so far: {self._beats}); "
                    "a peer is stuck or gone. Start again from the last anchor, on any number of workers."
                )
                if self._on_stuck is not None:
                    self._on_stuck(message)
                    return
                print(message, file=sys.stderr, flush=True)
                os._exit(STUCK_EXIT_CODE)
            self._stop.wait(min(left, 0.5))


def save_anchor(path: str | os.PathLike[str], state: LocalSGDState, metadata: Mapping[str, Any] | None = None) -> None:
    """Write what all workers share (anchor, outer state, counters, statistics) to one safetensors file, atomically.

    A mean on its way (``overlap``, not ``linked``) is shared too, and is taken after the restart.

    One process calls it, at any time: what is written is the last synchronisation's. Each worker's inner state is its
    own, see :func:`save_tree`.

    Args:
        path: of the file; written beside and renamed.
        state: the transform's state, one copy of the replicated parts.
        metadata: a dict that JSON can hold, given back by :func:`load_anchor`.
    """
    shared = {name: getattr(state, name) for name in REPLICATED}
    since = np.asarray(state.since_sync)  # on the host: with several processes the others do not compute along
    shared["step"], shared["since_sync"] = np.asarray(state.step) - since, np.zeros_like(since)
    save_tree(path, shared, metadata)


def load_anchor(path: str | os.PathLike[str], state: LocalSGDState) -> tuple[LocalSGDState, dict[str, Any]]:
    """Read an anchor back into a fresh state, for any number of workers.

    Args:
        path: a file of :func:`save_anchor`.
        state: of ``init`` with the same transform and parameters of the same shapes; gives the tree, and what is each
            worker's own (inner state, compression error), which starts afresh.

    Returns:
        ``(state, metadata)``; the parameters of every worker are ``state.anchor``.

    Raises:
        ValueError: if the file is damaged, or is of other parameters or another outer transform.
        FileNotFoundError: if there is none.
    """
    shared, metadata = load_tree(path, {name: getattr(state, name) for name in REPLICATED})
    return state._replace(**shared), metadata


def check_anchor(state: LocalSGDState) -> None:
    """Refuse to go on when processes hold anchors of different rounds: what they share would no longer be shared.

    Every process calls it, after :func:`load_anchor` say; each JAX process holds its own copy of what is replicated,
    and nothing else compares them.

    Args:
        state: the transform's state, one copy of the replicated parts.

    Raises:
        ValueError: in every process, with the rounds; :func:`newest_anchor` mends it.
    """
    rounds = _rounds(state)
    if len(set(rounds)) > 1:
        me, newest = jax.process_index(), max(rounds)
        raise ValueError(
            f"the anchor of process {me} is of round {rounds[me]}, the newest of round {newest} (process "
            f"{rounds.index(newest)}): newest_anchor(state) brings all to that"
        )


def newest_anchor(state: LocalSGDState) -> LocalSGDState:
    """Bring every process to the newest anchor that one of them holds.

    Every process calls it. What is each worker's own (inner state, compression error) stays, so give it fresh to a
    process that comes back; the parameters of every worker are then ``state.anchor``.

    Args:
        state: the transform's state, one copy of the replicated parts.

    Returns:
        The state; the same where the rounds agree.
    """
    rounds = _rounds(state)
    if len(set(rounds)) == 1:
        return state
    shared = {name: getattr(state, name) for name in REPLICATED}
    leaves, tree = jax.tree.flatten(shared)
    arrays = [_as_numpy(leaf) for leaf in leaves]
    packed = np.concatenate([np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in arrays])  # of every dtype
    source = jax.process_index() == rounds.index(max(rounds))
    received = np.asarray(multihost_utils.broadcast_one_to_all(packed, is_source=source), np.uint8)
    parts = np.split(received, np.cumsum([x.nbytes for x in arrays])[:-1])
    new = [
        _from_numpy(part.view(x.dtype).reshape(x.shape), leaf)
        for part, x, leaf in zip(parts, arrays, leaves, strict=True)
    ]
    return state._replace(**jax.tree.unflatten(tree, new))


def _rounds(state: LocalSGDState) -> list[int]:
    """The round of each process's anchor."""
    mine = np.asarray(state.round)
    return [int(x) for x in np.reshape(multihost_utils.process_allgather(mine), -1)]


def save_tree(path: str | os.PathLike[str], tree: Any, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a pytree of arrays to a safetensors file, atomically: beside it, synced to disk, then renamed.

    Args:
        path: of the file.
        tree: arrays, numbers and PRNG keys at the leaves. Dtypes that safetensors does not read into NumPy (8-bit
            floats, 4-bit integers, complex numbers) are written as their bytes.
        metadata: a dict that JSON can hold.

    Raises:
        ValueError: if a leaf is none of these, or the metadata are no JSON; nothing is written.
    """
    arrays, kinds = {}, {}
    for name, leaf in _named(tree):
        array = np.asarray(_as_numpy(leaf), order="C")
        if array.dtype.hasobject or array.dtype.kind in "USMm" or array.dtype.names:
            raise ValueError(f"save_tree: {name} is no array of numbers but {type(leaf).__name__} ({array.dtype})")
        if array.dtype.name not in _NATIVE:
            kinds[name] = (array.dtype.name, array.shape)
            array = array.reshape(-1).view(np.uint8)
        arrays[name] = array
    try:
        header = {"format": FORMAT, "metadata": json.dumps(dict(metadata or {})), "kinds": json.dumps(kinds)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_tree: the metadata are no JSON: {error}") from None
    data = safetensors.numpy.save(arrays, header)
    write_atomically(path, data)


def load_tree(path: str | os.PathLike[str], like: Any) -> tuple[Any, dict[str, Any]]:
    """Read a pytree of arrays that :func:`save_tree` wrote.

    Args:
        path: of the file.
        like: a pytree with the same structure, shapes and dtypes.

    Returns:
        ``(tree, metadata)``.

    Raises:
        ValueError: if the file is damaged or does not match ``like``.
        FileNotFoundError: if there is none.
    """
    try:
        with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"{path} has format {header.get('format')!r}, this version reads {FORMAT!r}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, AttributeError) as error:  # AttributeError: a dtype that NumPy lacks
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); use an earlier one") from None
    named = _named(like)
    wanted = {name: _as_numpy(leaf) for name, leaf in named}
    if missing := sorted(wanted.keys() ^ arrays.keys()):
        raise ValueError(f"{path} is of another tree (parameters or transform): it differs at {missing[0]}")
    kinds = json.loads(header.get("kinds", "{}"))
    for name, leaf in wanted.items():
        dtype, shape = kinds.get(name, (arrays[name].dtype.name, arrays[name].shape))
        if (leaf.dtype.name, list(leaf.shape)) != (dtype, list(shape)):
            raise ValueError(f"{path}: {name} is {dtype}{list(shape)}, wanted {leaf.dtype}{list(leaf.shape)}")
        if name in kinds:
            arrays[name] = arrays[name].view(leaf.dtype).reshape(leaf.shape)
    leaves = [_from_numpy(arrays[name], leaf) for name, leaf in named]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), json.loads(header["metadata"])


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path) or "/", leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as_numpy(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _from_numpy(array: np.ndarray, leaf: Any) -> jax.Array:
    value = jnp.asarray(array)
    return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else value
