"""One run of one optimizer on one workload: a plain loop that may be killed at any time and goes on where it was."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tasks.base import TaskFamily, Workload, only
from tasks.workloads import valid_keys

from ...errors import UserError
from .. import cache
from .optimizers import Optimizer

_VERSION = 1  # of what a run does: another number leaves the results kept so far unused

_SAVED_EVERY = 20.0  # seconds, at least, between two checkpoints


class NotFinishedError(Exception):
    """A run that was not to be run is not among the kept ones."""


class Curves(NamedTuple):
    """What a run gives.

    Attributes:
        train: ``[steps]``, training losses; ``inf`` from where the run was given up, at a loss that is not finite.
        steps: ``[looks]``, after how many steps the validation loss was looked at.
        valid: ``[looks]``, validation losses, the mean over the same batches for all; likewise ``inf``.
        seconds: of the steps alone, as the machine was then.
        compile_seconds: from nothing to the first step; less where JAX's cache held what another process had compiled.
        state_bytes: of the optimizer's state.
        num_params: of the network.
    """

    train: np.ndarray
    steps: np.ndarray
    valid: np.ndarray
    seconds: float
    compile_seconds: float
    state_bytes: int
    num_params: int

    @property
    def final(self) -> float:
        """The validation loss at the end of the budget."""
        return float(self.valid[-1])

    @property
    def diverged(self) -> bool:
        """Whether the run was given up, or ended no better than it began."""
        return not np.isfinite(self.valid[-1]) or bool(self.valid[-1] >= self.train[0])


class Program(NamedTuple):
    """An optimizer's compiled step on a workload.

    Attributes:
        key: the hash of the start, the step and the look at the validation loss, of their constants and the data.
        init: ``seed -> carry``, parameters and optimizer state.
        step: ``(carry, settings, seed, step's number) -> (carry, loss)``; the carry given is used up.
        valid: ``carry -> validation loss``.
        compile: compiles, once, what :func:`program` only traced; the seconds that this takes.
        state_bytes: of the optimizer's state.
        num_params: of the network.
    """

    key: str
    init: Callable[[Mapping[str, float], int], Any]
    step: Callable[[Any, Mapping[str, float], int, int], tuple[Any, jax.Array]]
    valid: Callable[[Any], float]
    compile: Callable[[], float]
    state_bytes: int
    num_params: int


def program(workload: Workload, optimizer: Optimizer, device: jax.Device | None = None) -> Program:
    """Traces an optimizer on a workload: once for all settings and seeds. It is compiled when it is first run.

    Args:
        workload: any.
        optimizer: any.
        device: where; by default JAX's own.

    Returns:
        The :class:`Program`.
    """
    device = device or jax.local_devices()[0]
    family, steps = family_of(workload), workload.steps
    cfg = family.sample(jax.random.key(0))  # the one task that all meet, where the family leaves something to draw

    def transform(settings):
        return optax.with_extra_args_support(optimizer.make(settings, steps))

    def init(settings, data, key):
        params = family.task(data, cfg).init(jax.random.fold_in(key, 0))
        return params, transform(settings).init(params)

    def step(carry, settings, data, key, number):
        params, state = carry
        task = family.task(data, cfg)
        k_batch, k_loss = jax.random.split(jax.random.fold_in(key, number + 1))
        batch = task.batch(k_batch, "train")
        loss, grads = jax.value_and_grad(lambda p: task.loss(p, k_loss, batch)[0])(params)
        updates, state = transform(settings).update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), loss

    def valid(carry, data, key):
        params = carry[0] if optimizer.evaluate is None else optimizer.evaluate(carry[1], carry[0])
        task = family.task(data, cfg)
        k_batch, k_loss = jax.random.split(key)
        return task.loss(params, k_loss, task.batch(k_batch, "valid"))[0]

    began = time.perf_counter()
    with jax.default_device(device):
        data = jax.device_put(family.data, device)
        settings = {name: jnp.float32(value) for name, value in optimizer.setting.items()}
        key = jax.random.key(0)
        shapes = jax.eval_shape(init, settings, data, key)
        lowered = jax.jit(step, donate_argnums=0).lower(shapes, settings, data, key, jnp.int32(0))
        starting, looking = jax.jit(init).lower(settings, data, key), jax.jit(valid).lower(shapes, data, key)
        texts = [cache.text_hash(traced.as_text()) for traced in (starting, lowered, looking)]
    traced = time.perf_counter() - began
    keys = list(valid_keys())

    @functools.cache
    def compiled():
        began = time.perf_counter()
        with jax.default_device(device):
            stepping = lowered.compile()
            start, look = starting.compile(), looking.compile()
        return stepping, start, look, traced + time.perf_counter() - began

    def cast(values):
        return {name: np.float32(values[name]) for name in optimizer.setting}

    def mean_valid(carry):
        with jax.default_device(device):
            return float(np.mean([np.asarray(compiled()[2](carry, data, k)) for k in keys], dtype=np.float64))

    def run_step(carry, values, seed, number):
        return compiled()[0](carry, cast(values), data, _key(seed, device), np.int32(number))

    return Program(
        key=cache.key(texts=texts, data=_contents(workload), workload=_facts(workload)),
        init=lambda values, seed: compiled()[1](cast(values), data, _key(seed, device)),
        step=run_step,
        valid=mean_valid,
        compile=lambda: compiled()[3],
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes[1])),
        num_params=sum(leaf.size for leaf in jax.tree.leaves(shapes[0])),
    )


def run(
    made: Program,
    workload: Workload,
    settings: Mapping[str, float],
    seed: int,
    folder: Path | None = None,
    show: Callable[[int, float], None] | None = None,
    only_finished: bool = False,
) -> Curves:
    """Trains for the whole budget, or reads what an earlier run left.

    The run is kept under the hash of its program, data, settings and seed. On the way its state is written beside and
    renamed every twenty seconds or more, at a look at the validation loss, so that a killed run goes on from there and
    ends as it would have.

    Args:
        made: of :func:`program`.
        workload: the same.
        settings: of the optimizer.
        seed: of the initial parameters and the batches; the same for all optimizers.
        folder: where runs are kept, or ``None``.
        show: called with ``(steps done, validation loss)`` after every look.
        only_finished: read what an earlier run left, and run nothing.

    Returns:
        The curves.

    Raises:
        NotFinishedError: with ``only_finished``, where there is nothing to read.
        UserError: a validation loss that is not above 0.
    """
    key = cache.key(
        version=_VERSION,
        program=made.key,
        settings={name: float(np.float32(value)) for name, value in settings.items()},
        seed=seed,
        jax=jax.__version__,
        platform=jax.local_devices()[0].platform,
    )
    if (kept := cache.load(folder, key)) is not None:
        return _curves(kept, made)
    if only_finished:
        raise NotFinishedError(f"{workload.name}, seed {seed}: not run to its end yet")
    train = np.full(workload.steps, np.inf)
    looks = _looks(workload)
    valid = np.full(len(looks), np.inf)
    begin, seconds, carry = 0, 0.0, None
    if (half := cache.load(folder, f"{key}.part")) is not None:
        carry = _restored(half, functools.partial(made.init, settings, seed))
        if carry is not None:
            begin, seconds = int(half["begin"]), float(half["seconds"])
            train[:begin], done = half["train"], int(half["looks"])
            valid[:done] = half["valid"]
    if carry is None:
        carry = made.init(settings, seed)
    saved = time.monotonic()
    for index, end in enumerate(looks):
        if end <= begin and np.isfinite(valid[index]):
            continue
        started = time.perf_counter()
        losses = []
        for number in range(begin, end):
            carry, loss = made.step(carry, settings, seed, number)
            losses.append(loss)
        train[begin:end] = [float(loss) for loss in jax.device_get(losses)]
        seconds += time.perf_counter() - started
        begin = end
        valid[index] = made.valid(carry)
        if valid[index] <= 0:
            raise UserError(
                f"{workload.name}: a validation loss of {valid[index]:.4g}: they are compared by their ratios, so they "
                "must be above 0; add a constant, or take the exponential of a likelihood a symbol"
            )
        if show:
            show(end, valid[index])
        if not np.isfinite(train[:end]).all() or not np.isfinite(valid[index]):
            valid[index] = np.inf
            break
        if time.monotonic() - saved > _SAVED_EVERY and end < workload.steps:
            leaves = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(carry))}
            about = {"begin": np.asarray(begin), "seconds": np.asarray(seconds), "looks": np.asarray(index + 1)}
            cache.store(folder, f"{key}.part", {**leaves, **about, "train": train[:begin], "valid": valid[: index + 1]})
            saved = time.monotonic()
    arrays = {"train": train, "steps": np.asarray(looks), "valid": valid, "seconds": np.asarray(seconds)}
    cache.store(folder, key, arrays | {"compile_seconds": np.asarray(made.compile())})
    if folder is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / f"{key}.part.npz")
    return _curves(arrays | {"compile_seconds": np.asarray(made.compile())}, made)


@functools.lru_cache(maxsize=2)
def family_of(workload: Workload) -> TaskFamily:
    """A workload's family, made once for the optimizers that meet on it."""
    return only(workload.make())


def _curves(arrays: Mapping[str, np.ndarray], made: Program) -> Curves:
    return Curves(
        train=arrays["train"].astype(np.float64),
        steps=arrays["steps"],
        valid=arrays["valid"].astype(np.float64),
        seconds=float(arrays["seconds"]),
        compile_seconds=float(arrays["compile_seconds"]),
        state_bytes=made.state_bytes,
        num_params=made.num_params,
    )


def _looks(workload: Workload) -> list[int]:
    """After how many steps the validation loss is looked at: every so many, and after the last."""
    return sorted({*range(workload.every, workload.steps + 1, workload.every), workload.steps})


def _restored(half: Mapping[str, np.ndarray], init: Callable[[], Any]) -> Any:
    """The carry that was written, or ``None`` where it is not one of this program."""
    leaves, structure = jax.tree.flatten(init())
    found = [half.get(f"leaf_{i}") for i in range(len(leaves))]
    fits = all(a is not None and a.shape == b.shape and a.dtype == b.dtype for a, b in zip(found, leaves, strict=True))
    if not fits:
        return None
    return jax.tree.unflatten(structure, [jax.device_put(a, b.sharding) for a, b in zip(found, leaves, strict=True)])


def _facts(workload: Workload) -> dict[str, Any]:
    return {"steps": workload.steps, "every": workload.every}


@functools.lru_cache(maxsize=8)
def _contents(workload: Workload) -> str:
    return cache.contents(family_of(workload).data)


@functools.lru_cache(maxsize=64)
def _key(seed: int, device: jax.Device) -> jax.Array:
    with jax.default_device(device):
        return jax.random.key(seed)
