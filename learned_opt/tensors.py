"""From a rule for one tensor to an Optax transform: one scaffold for every rule.

A rule says what it accumulates for a tensor and how it steps; this file does the rest. Tensors of one shape are stacked
and go through one compiled body, and are taken from the stacks by one too. States mirror the parameters, name by name.
What has had no gradient rests.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import NamedSharding, PartitionSpec

from .features import clean, compute_dtype
from .kernels import on_cpu
from .layouts import Layout, View, outputs_last, seen, unseen, view_of

Tree = Any

_LIMIT = 1e15  # of a gradient's size: its square is still a float32
_LEAST = 1e-18  # below which it counts as 0: squares would be, and the unit of a tensor of such 1
_NEVER = 255  # of `idle`: no gradient yet
_FADE = 0.9  # an update's factor for each step without a gradient, Adam's for its first moment


class RuleState(NamedTuple):
    """State of a learned rule.

    Attributes:
        step: int32 scalar, updates done.
        shared: what concerns all tensors: running means of the loss, an LSTM's memory. ``()`` for most rules.
        tensors: what the rule accumulates, a tree over the parameters or a NamedTuple of such.
        idle: uint8, a tree over the parameters: steps since an entry's gradient last was neither zero nor non-finite,
            255 where it never was. ``()`` where nothing rests.
    """

    step: jax.Array
    shared: Any
    tensors: Any
    idle: Tree


class Group(NamedTuple):
    """All tensors of one shape.

    Attributes:
        gradient: ``[k, *shape]``, finite.
        param: ``[k, *shape]``.
        tensors: the rule's accumulators, each ``[k, ...]``.
        idle: ``[k, *shape]``, or ``()``.
        rows: which of all tensors these are, ``k`` places.
        tables: ``[k]``, which of them are embeddings.
    """

    gradient: jax.Array
    param: jax.Array
    tensors: Any
    idle: Any
    rows: np.ndarray
    tables: np.ndarray


class Direction(NamedTuple):
    """A rule tensor by tensor, from which others are built.

    Attributes:
        init: ``key -> theta``.
        start: ``parameter -> accumulators``, a NamedTuple.
        step: ``(theta, gradient, parameter, accumulators) -> (update, accumulators)`` of one tensor; the update points
            downhill.
        settle: ``(count, accumulators) -> accumulators``, a list, stacks by group: what is done once for all tensors.
    """

    init: Callable[[jax.Array], Any]
    start: Callable[[jax.Array], Any]
    step: Callable[..., tuple[jax.Array, Any]]
    settle: Callable[[jax.Array, list], list]


def each(step: Callable, groups: Sequence[Group], *rows: Tree) -> list:
    """``step(gradient, param, accumulators, *row)`` of every tensor, compiled once a shape; results by group.

    Args:
        step: for one tensor.
        groups: all of them.
        *rows: trees of arrays ``[tensors, ...]``, a row for each tensor.
    """

    def of_group(group: Group):
        own = [jax.tree.map(lambda x: x[group.rows], row) for row in rows]
        return one_by_one(step, group.gradient, group.param, group.tensors, *own)

    return [of_group(group) for group in groups]


def one_by_one(step: Callable, *stacks: Tree) -> Tree:
    """``step`` of every tensor of stacks."""
    if jax.tree.leaves(stacks)[0].shape[0] == 1:  # by itself: a fifth faster in meta-training than as a stack of one
        return jax.tree.map(lambda x: x[None], step(*jax.tree.map(lambda x: x[0], stacks)))
    if on_cpu():  # a whole stack would leave the caches at every operation
        return jax.lax.map(lambda tensor: step(*tensor), stacks)
    return jax.vmap(step)(*stacks)


def in_order(values: Sequence[jax.Array], groups: Sequence[Group]) -> jax.Array:
    """``[tensors, ...]`` of what groups gave, ``[k, ...]`` each."""
    return jnp.concatenate(values)[np.argsort(np.concatenate([group.rows for group in groups]))]


def rule_transform(
    name: str,
    *,
    start: Callable[[jax.Array], Any],
    update: Callable[..., tuple[list, Any]],
    start_shared: Callable[[Any], Any] = lambda dtype: (),
    rest: bool = True,
    stack: bool = True,
    reads_params: bool = True,
    reads_loss: bool = False,
    layout: Layout | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The Optax transform of a rule.

    Gradients are cleaned (a non-finite entry counts as 0). Then, with ``rest``, **what has no gradient rests**:
    with :math:`k` the steps since an entry last had a gradient that was neither zero nor non-finite, its update is
    multiplied by :math:`0.9^k`, and by 0 before the first: it fades as Adam's does. Without this a rule that normalises
    its output moves unused heads, frozen parts and rare tokens' embeddings at full speed.

    Parameters without a gradient (``None``) or without elements are passed over.

    Args:
        name: of the rule, for messages.
        start: ``parameter -> accumulators``, an array or a NamedTuple of arrays, of the same structure for all tensors.
        update: ``(groups, step, shared, value) -> ([(updates, accumulators) for each group], shared)``; see
            :func:`each`. ``value`` is the loss, or ``None``.
        start_shared: ``dtype -> shared``, the dtype being the widest that any tensor is computed in.
        rest: see above. Adam and its kin need none: their updates fade by themselves.
        stack: whether tensors of one shape are one group; otherwise each is a group by itself. Stacks compile faster,
            and cost two copies of all that is stacked.
        reads_params: whether ``update`` needs the parameters.
        reads_loss: whether it needs the loss.
        layout: how parameters are seen, :func:`~learned_opt.layouts.outputs_last` by default.

    Returns:
        An Optax transform; its state is a :class:`RuleState`.
    """
    layout = layout or outputs_last

    def start_of(p):
        return start(p), jnp.full_like(p, _NEVER, jnp.uint8) if rest else ()

    struct: Any = jax.tree.structure(jax.eval_shape(start_of, jax.ShapeDtypeStruct((), jnp.float32)))

    def init_fn(params):
        check_params(params)
        params = jax.tree.map(as_array, params)
        tree: Any
        leaves, tree = jax.tree.flatten(params)
        views = [view_of(layout, path, leaf) for path, leaf in jax.tree.leaves_with_path(params)]
        started = [struct.flatten_up_to(_started(start_of, p, view)) for p, view in zip(leaves, views, strict=True)]
        columns = zip(*started, strict=True) if started else [()] * struct.num_leaves
        tensors, idle = struct.unflatten([tree.unflatten(x) for x in columns])
        return RuleState(jnp.zeros((), jnp.int32), start_shared(common_dtype(params)), tensors, idle)

    def update_fn(updates, state, params=None, *, value=None, **extra_args):
        del extra_args
        params = updates if params is None and not reads_params else params
        if params is None:
            raise ValueError(f"{name} reads the parameters: call update(gradients, state, params)")
        if not isinstance(state, RuleState):
            raise ValueError(
                f"{name} was given a state of {type(state).__name__}, not of RuleState: one that an earlier release "
                "saved, or of another optimizer; start from a new init(params)"
            )
        tree: Any
        given, tree = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
        paths = [path for path, _ in jax.tree.leaves_with_path(updates, is_leaf=lambda x: x is None)]
        moving = [i for i, g in enumerate(given) if g is not None and jnp.size(g)]
        views = tuple((i, view_of(layout, paths[i], given[i])) for i in moving)
        at = tree.flatten_up_to(where_gradients(updates, params))
        run = functools.partial(core, tree, views)
        return automatic(run, (updates, state), at, required_loss(value, name) if reads_loss else None)

    @functools.partial(jax.jit, static_argnums=(0, 1))  # for updates outside of any other jit
    def core(tree, views, carried, at, value):
        views = dict(views)
        updates, state = carried
        given = tree.flatten_up_to(updates)
        for i, view in views.items():
            given[i], at[i] = seen(given[i], view), seen(at[i], view)
        columns = [tree.flatten_up_to(x) for x in struct.flatten_up_to((state.tensors, state.idle))]
        groups, members = _gather(given, at, columns, struct, views, stack)
        results, shared = update(groups, state.step, state.shared, value)
        for group, where, (u, tensors) in zip(groups, members, results, strict=True):
            u, idle = one_by_one(_rested, u, group.gradient, group.idle) if rest else (u, ())
            stacks = [u.astype(given[where[0]].dtype), *struct.flatten_up_to((tensors, idle))]
            leads = [views[i].shape[: views[i].layers] for i in where]
            taken = _unstack(stacks, [math.prod(shape) for shape in leads], state.step)
            for i, shape, rows in zip(where, leads, taken, strict=True):
                u, *new = (x.reshape(shape + x.shape[1:]) for x in rows)
                given[i] = unseen(u, views[i])
                for column, x in zip(columns, new, strict=True):
                    column[i] = x
        tensors, idle = struct.unflatten([tree.unflatten(x) for x in columns])
        return tree.unflatten(given), RuleState(optax.safe_increment(state.step), shared, tensors, idle)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- checks


def check_params(params: Tree) -> None:
    """Refuse parameters that no gradient descent can move.

    Raises:
        ValueError: naming the first leaf that is not of a real floating dtype.
    """
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = _dtype(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"learned rules update real floating-point parameters, but params{jax.tree_util.keystr(path)} is "
                f"{dtype}: leave it out with optax.multi_transform, beside optax.set_to_zero()"
            )


def common_dtype(params: Tree) -> jnp.dtype:
    """The dtype for what concerns all tensors: the widest that any is computed in."""
    dtypes = [compute_dtype(_dtype(x)) for x in jax.tree.leaves(params)]
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))


def where_gradients(updates: Tree, params: Tree) -> Tree:
    """``params`` as arrays, ``None`` where there is no gradient: there an unfiltered Equinox model holds functions."""
    tree: Any
    given, tree = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
    pairs = zip(given, tree.flatten_up_to(params), strict=True)
    return tree.unflatten([None if g is None else jnp.asarray(p) for g, p in pairs])


def required_loss(value: Any, rule: str) -> jax.Array:
    """The loss, or a ``ValueError`` that tells how to pass it."""
    how = f"{rule} reads the loss: call update(gradients, state, params, value=loss)"
    if value is None:
        raise ValueError(
            f"{how}, the transform's own: Flax's TrainState.apply_gradients and optax.split_real_and_imaginary drop it"
        )
    if not isinstance(value, int | float | np.generic | np.ndarray | jax.Array) or jnp.size(value) != 1:
        raise ValueError(f"{how}; the loss is one number, not {_shown(value)}")
    return jnp.reshape(jnp.asarray(value), ())


def _shown(value) -> str:
    return f"an array of shape {value.shape}" if hasattr(value, "shape") else repr(value)[:60]


# --- groups


def _gather(given, at, columns, struct, views: dict[int, View], stack: bool) -> tuple[list[Group], list[list[int]]]:
    """Groups of the tensors that move, and which leaves each holds."""
    by_kind: dict[Any, list[int]] = {}
    counts = {i: math.prod(view.shape[: view.layers]) for i, view in views.items()}
    rows = dict(zip(views, np.split(np.arange(sum(counts.values())), np.cumsum(list(counts.values()))), strict=False))
    for i, view in views.items():
        arrays = (given[i], at[i], *(column[i] for column in columns))
        kind = tuple(_kind(x, view.layers) for x in arrays) if stack else i
        by_kind.setdefault(kind, []).append(i)

    def stacked(column, where):
        return jnp.concatenate([column[i].reshape(counts[i], *column[i].shape[views[i].layers :]) for i in where])

    groups = []
    for where in by_kind.values():
        g, p, *state = (stacked(column, where) for column in (given, at, *columns))
        dtype, state = compute_dtype(p.dtype), struct.unflatten(state)
        numbers = np.concatenate([rows[i] for i in where])
        tables = np.concatenate([np.full(counts[i], views[i].table) for i in where])
        tensors, idle = state
        g = clean(g, _LIMIT, dtype)
        g = jnp.where(jnp.abs(g) < _LEAST, jnp.zeros((), dtype), g)
        groups.append(Group(g, p.astype(dtype), tensors, idle, numbers, tables))
    return groups, list(by_kind.values())


def _unstack(stacks: list[jax.Array], counts: list[int], step: jax.Array) -> list[list[jax.Array]]:
    """The arrays of every tensor: ``counts`` rows of each stack.

    On CPUs XLA compiles a loop for every slice whose place it knows: 14 s of the 28 that the step of an 8-layer
    transformer takes under ``celo2`` (``benchmarks/compile.py``). One loop serves all if the place is an argument, of
    calls that are not inlined, and comes from what only the run knows.
    """
    if len(counts) == 1 or not on_cpu():
        ends = np.cumsum(counts)
        return [[x[end - n : end] for x in stacks] for n, end in zip(counts, ends, strict=True)]
    taken, place = [], jnp.minimum(step, 0)
    with set_xla_metadata(inlineable="false"):
        for n in counts:
            rows, place = _take(stacks, place, n)
            taken.append(rows)
    return taken


@functools.partial(jax.jit, static_argnums=2)
def _take(stacks: list[jax.Array], place: jax.Array, n: int) -> tuple[list[jax.Array], jax.Array]:
    return [jax.lax.dynamic_slice_in_dim(x, place, n) for x in stacks], place + n


def _kind(x: jax.Array, lead: int) -> tuple:
    """What stacked tensors must have in common: shape, dtype, and inside ``shard_map`` the devices it varies over."""
    return x.shape[lead:], x.dtype, jax.typeof(x).manual_axis_type


def _over_axes(start: Callable, lead: int) -> Callable:
    return start if lead == 0 else jax.vmap(_over_axes(start, lead - 1))


def _dtype(x: Any) -> jnp.dtype:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def as_array(p: Any) -> jax.Array:
    """A parameter as an array, be it a NumPy array, a number, or only its shape and dtype."""
    return jnp.zeros(p.shape, p.dtype) if isinstance(p, jax.ShapeDtypeStruct) else jnp.asarray(p)


# --- rest


def _rested(u: jax.Array, gradient: jax.Array, idle: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The update, faded, and the steps without a gradient, 254 of which are as many as any more."""
    older = jnp.where(idle >= _NEVER - 1, idle, idle + jnp.uint8(1))
    idle = jnp.where(gradient != 0, jnp.uint8(0), older)
    return u * jnp.where(idle == _NEVER, 0, jnp.exp(math.log(_FADE) * idle.astype(u.dtype))), idle


# --- explicit meshes


def _started(start_of: Callable, p: jax.Array, view: View) -> Any:
    """What a rule starts from; on an explicit mesh what is of the seen shape is sharded likewise, and all else not."""

    def start(p):
        return _over_axes(start_of, view.layers)(seen(p, view))

    sharding = jax.typeof(p).sharding
    if not sharding.mesh.explicit_axes:
        return start(p)
    rank = len(view.shape)
    own = [sharding.spec[axis] for axis in view.order][:rank]  # of axes that become one the first one's

    def like(x):
        same = x.shape[x.ndim - rank :] == view.shape
        spec = PartitionSpec(*(None,) * (x.ndim - rank), *own) if same else PartitionSpec()
        return NamedSharding(sharding.mesh, spec)

    out = jax.tree.map(like, jax.eval_shape(start, jax.ShapeDtypeStruct(p.shape, p.dtype)))
    with jax.sharding.use_abstract_mesh(sharding.mesh):
        return jax.sharding.auto_axes(start, axes=sharding.mesh.explicit_axes, out_sharding=out)(p)


def automatic(core: Callable, carried: Tree, *arguments: Tree) -> Tree:
    """``core(carried, *arguments)``, of the type and sharding of ``carried``, with no axis of a mesh explicit.

    Statistics of rows and columns and products of matrices have no one sharding that follows from the parameters';
    XLA finds one.
    """
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, carried)
    mesh = next((s.mesh for s in jax.tree.leaves(shardings) if s.mesh.explicit_axes), None)
    if mesh is None:
        return core(carried, *arguments)
    out = jax.tree.map(lambda s: NamedSharding(mesh, s.spec), shardings)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(core, axes=mesh.explicit_axes, out_sharding=out)(carried, *arguments)
