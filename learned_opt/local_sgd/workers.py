"""Workers as lanes of a vmap or as devices: one way to write both."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .transform import REPLICATED, LocalSGDState


def worker_axes(state: Any) -> Any:
    """Return the axes of an optimizer state: 0 for what each worker has of its own, None for what all share.

    Passed to ``jax.vmap`` as ``in_axes`` and ``out_axes`` it keeps the counters unbatched, so that ``lax.cond`` skips
    the synchronisation where none is due.

    Args:
        state: a :class:`LocalSGDState`, or the tuple state of an ``optax.chain`` whose last transform is ``local_sgd``.

    Returns:
        A pytree prefix of ``state`` with leaves 0 and None.

    Raises:
        ValueError: if ``local_sgd`` is absent, or not outermost.
    """
    if isinstance(state, LocalSGDState):
        return LocalSGDState(**{name: None if name in REPLICATED else 0 for name in LocalSGDState._fields})  # type: ignore[arg-type]
    found = sum(isinstance(s, LocalSGDState) for s in _parts(state, LocalSGDState))
    if not found:
        raise ValueError("worker_axes: no local_sgd state in here; build it with local_sgd(...).init(params)")
    if type(state) is tuple and isinstance(state[-1], LocalSGDState) and found == 1:
        return (*(0 for _ in state[:-1]), worker_axes(state[-1]))
    if any(isinstance(s, optax.MultiStepsState) and _holds_local_sgd(s) for s in _parts(state, optax.MultiStepsState)):
        raise ValueError(
            "local_sgd must be outermost: accumulate gradients inside it, "
            "local_sgd(optax.MultiSteps(inner, k), outer, sync_every=schedules.micro_steps(H, k))"
        )
    raise ValueError(
        "local_sgd must be outermost, the last of an optax.chain: what comes after it would move the workers off "
        "the anchor; put clipping and scaling into its inner or outer transform"
    )


def _parts(state: Any, kind: type) -> list[Any]:
    """The states of a kind within a state, and the leaves outside them."""
    return jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, kind))


def _holds_local_sgd(state: Any) -> bool:
    return any(isinstance(s, LocalSGDState) for s in _parts(state, LocalSGDState))


def worker_specs(state: Any, axis_name: str = "workers") -> Any:
    """Return :func:`worker_axes` as partition specs for ``jax.shard_map``: ``P(axis_name)`` or ``P()``."""
    return _specs(worker_axes(state), axis_name)


def spread_workers(
    tree: Any,
    num_workers: int,
    axes: Any = 0,
    *,
    mesh: Mesh | None = None,
    axis_name: str = "workers",
    within: Callable[[tuple[int, ...]], PartitionSpec] = lambda shape: PartitionSpec(),
) -> Any:
    """Return the tree with a leading axis of ``num_workers`` equal copies on what is each worker's own.

    Args:
        tree: parameters or an optimizer state, one copy.
        num_workers: K >= 1.
        axes: a prefix of ``tree`` with leaves 0 (copied) and None (left as it is), as from :func:`worker_axes`.
        mesh: if given, the leaves are put on its devices as :func:`map_workers` returns them, so that the first step
            is compiled for the same layout as the rest.
        axis_name: the workers' axis of the mesh.
        within: ``shape -> spec``, how a leaf of that shape is sharded inside a worker, over the mesh's other axes; not
            at all by default.

    Returns:
        The tree, leaves ``[...]`` become ``[K, ...]`` where the axis is 0.
    """
    if mesh is None:
        return _map_own(lambda x: jnp.broadcast_to(x, (num_workers, *jnp.shape(x))), axes, tree)

    def place(axis: int | None, part: Any) -> Any:
        def one(x: Any) -> jax.Array:
            spec = within(jnp.shape(x))
            sharding = NamedSharding(mesh, spec if axis is None else PartitionSpec(axis_name, *spec))
            return _place(x, sharding, None if axis is None else num_workers)

        return jax.tree.map(one, part)

    return jax.tree.map(place, axes, tree, is_leaf=lambda axis: axis is None)


def map_workers(
    fn: Callable[..., Any], *, in_axes: Any, out_axes: Any, mesh: Mesh | None = None, axis_name: str = "workers"
) -> Callable[..., Any]:
    """Map a worker's function over the workers: on one device, or one worker a device (of any host).

    Args:
        fn: what one worker does, ``(*args) -> outputs``; collectives over ``axis_name`` are allowed.
        in_axes: a tuple with a prefix of each argument: 0 where the leaves have a leading axis of workers, else None.
        out_axes: the same for the outputs. What is None must be equal on all workers.
        mesh: None for ``jax.vmap``; else a mesh with the axis ``axis_name``, for ``jax.shard_map``. What its other axes
            do is left to XLA, as the arrays' shardings say: a worker may be many devices.
        axis_name: the workers' axis.

    Returns:
        A function of the stacked arguments that gives stacked outputs, the same for both kinds.

    Raises:
        ValueError: if the mesh has no axis of that name.
    """
    if mesh is None:
        return jax.vmap(fn, in_axes=in_axes, out_axes=out_axes, axis_name=axis_name)
    if axis_name not in mesh.axis_names:
        raise ValueError(f"map_workers: the mesh has axes {mesh.axis_names}, none of them {axis_name!r}")

    def own_row(x: jax.Array) -> jax.Array:
        if x.shape[0] != 1:
            size = mesh.shape[axis_name]
            raise ValueError(f"map_workers: {x.shape[0] * size} workers on {size} devices; give each device one")
        return x[0]

    def block(*args: Any) -> Any:
        outputs = fn(*_map_own(own_row, tuple(in_axes), args))
        return _map_own(lambda x: x[None], out_axes, outputs)

    in_specs, out_specs = _specs(tuple(in_axes), axis_name), _specs(out_axes, axis_name)
    return jax.shard_map(block, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={axis_name})


def rescue(params: Any, state: LocalSGDState, inner: Any) -> tuple[Any, LocalSGDState]:
    """Put a worker that has diverged on the anchor, with a fresh inner state; leave the others as they are.

    A worker has diverged when its parameters are not all finite, or its inner state holds a NaN. To be called by the
    worker's function after ``optax.apply_updates``. Until the next synchronisation a worker that was rescued counts
    with the steps that it takes from the anchor; what it would send at a synchronisation itself is for
    ``local_sgd(drop_nonfinite=True)``.

    Args:
        params: of one worker.
        state: its state, of ``local_sgd`` itself.
        inner: the worker's transform, as given to ``local_sgd``.

    Returns:
        ``(params, state)``.

    Example:
        >>> from learned_opt.local_sgd import local_sgd
        >>> import optax
        >>> inner = optax.adam(0.1)
        >>> state = local_sgd(inner, sync_every=4).init(jnp.ones(3))
        >>> rescue(jnp.array([0.0, jnp.nan, 0.0]), state, inner)[0]
        Array([1., 1., 1.], dtype=float32)
    """
    sound = jnp.bool_(True)
    for tree, bad in ((params, lambda x: ~jnp.isfinite(x)), (state.inner, jnp.isnan)):
        for leaf in jax.tree.leaves(tree):
            if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                sound &= ~jnp.any(bad(leaf))

    blank = {name: jax.tree.map(jnp.zeros_like, getattr(state, name)) for name in ("error", "value_sum", "samples")}
    own = {"inner": inner.init(state.anchor), **blank}
    kept = optax.tree.where(sound, {name: getattr(state, name) for name in own}, own)
    return optax.tree.where(sound, params, state.anchor), state._replace(**kept)


def _place(x: jax.Array, sharding: NamedSharding, copies: int | None) -> jax.Array:
    # not device_put: with several processes it compares their values, and takes NaN for a difference
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_place(jax.random.key_data(x), sharding, copies), impl=jax.random.key_impl(x))
    data = np.asarray(x)
    data = data if copies is None else np.broadcast_to(data, (copies, *data.shape))
    return jax.make_array_from_callback(data.shape, sharding, lambda index: data[index])


def _specs(axes: Any, axis_name: str) -> Any:
    to_spec = lambda axis: PartitionSpec() if axis is None else PartitionSpec(axis_name)  # noqa: E731
    return jax.tree.map(to_spec, axes, is_leaf=lambda axis: axis is None)


def _map_own(fn: Callable[[jax.Array], Any], axes: Any, tree: Any) -> Any:
    apply = lambda axis, part: part if axis is None else jax.tree.map(fn, part)  # noqa: E731
    return jax.tree.map(apply, axes, tree, is_leaf=lambda axis: axis is None)
