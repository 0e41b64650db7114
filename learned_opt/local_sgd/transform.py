"""Local SGD as an Optax transform: workers step alone, and meet every ``sync_every`` steps."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import communication, schedules
from .fragments import fragment_labels, is_parameter, merge, pick
from .mean import WorkerMean, tracked_axes, vary, varying, wide

Params = Any
Mean = Callable[[Any], Any]
InnerPolicy = Callable[[Any, Mean, Params], Any]


class LocalSGDState(NamedTuple):
    """State of :func:`local_sgd`. Scalars but for the trees; the first eight fields are equal on all workers.

    Attributes:
        step: int32, local steps taken.
        round: int32, synchronisations done.
        since_sync: int32, steps since the last one.
        period: int32, the steps that the present round will take; fixed when the round starts.
        bytes: uint32 [2], what one worker has contributed to collectives; see ``communication.total_bytes``.
        statistics: :class:`~learned_opt.schedules.Statistics` of the last round.
        anchor: the parameters as last synchronised.
        outer: state of the outer transform (a tuple of one state a fragment where there are several).
        inner: state of the worker's inner transform.
        error: what compression has left unsent, the params' tree in float32 or wider (``()`` without compression).
        value_sum: float, sum of the round's ``value=`` so far.
        samples: float, sum of the round's ``samples=`` so far.
    """

    step: jax.Array
    round: jax.Array
    since_sync: jax.Array
    period: jax.Array
    bytes: jax.Array
    statistics: schedules.Statistics
    anchor: Params
    outer: Any
    inner: Any
    error: Any
    value_sum: jax.Array
    samples: jax.Array


REPLICATED = LocalSGDState._fields[:8]

INNER_POLICIES: dict[str, InnerPolicy] = {
    "keep": lambda state, mean, params: state,
    "average": lambda state, mean, params: mean(state),
}


def local_sgd(
    inner: optax.GradientTransformation | optax.MultiSteps,
    outer: optax.GradientTransformation | None = None,
    *,
    sync_every: int | jax.Array | schedules.SyncSchedule,
    axis_name: str | tuple[str, ...] = "workers",
    inner_state: str | InnerPolicy = "keep",
    compression: str | communication.Compression | None = None,
    error_feedback: bool | float = True,
    fragments: int | Any = 1,
    statistic: Callable[[Params], Any] | None = None,
    drop_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Let every worker step alone with ``inner``, and apply ``outer`` to the mean of what they did every H steps.

    Worker i steps from the anchor x_0 for H local steps, x_i <- x_i + inner(grad_i). Then

    .. math:: d = \sum_i w_i (x_0 - x_i) / \sum_i w_i, \qquad x_0 \leftarrow x_0 + \mathrm{outer}(d), \qquad x_i = x_0

    so that ``d`` takes a gradient's place in ``outer``. ``outer=None`` is plain averaging, equal to
    ``optax.sgd(1.0)``; ``optax.sgd(0.7, momentum=0.9, nesterov=True)`` is DiLoCo's; ``optax.sgd(alpha, momentum=beta)``
    is SlowMo's for a constant inner step; ``optax.adam`` and learned rules are as good. Workers are the lanes of
    ``vmap(axis_name=...)`` or the devices of a ``shard_map`` axis; collectives run at synchronisations only.

    It must be outermost (last in an ``optax.chain``): the update it emits at a synchronisation puts every worker on
    the anchor, which a later transform would undo. :func:`~learned_opt.local_sgd.worker_axes` refuses other places.

    Leaves that are neither floating nor complex are no parameters: they stay exactly as they are, whatever the inner
    and outer transforms make of them. The parts of complex leaves are averaged, and sent, alike.

    Gradients are accumulated inside, by ``inner=optax.MultiSteps(tx, k)``. A step is then a call of ``update``, k of
    them to a step of ``tx``, and ``inner_state="reset"`` would drop what is half accumulated:
    ``sync_every=schedules.micro_steps(H, k)`` counts in steps of ``tx``, so that a round ends where nothing is.

    Args:
        inner: a worker's own transform; it gets every extra argument of ``update`` as it is.
        outer: the transform of the mean delta. If it takes extra arguments it gets those of ``update`` at the
            synchronising step, arrays of floats (such as ``value=``) averaged over the workers, the rest as they are.
        sync_every: steps a round, H >= 1: an int (or int32 scalar), or a schedule of (round, step, statistics), see
            :mod:`learned_opt.schedules`. It is read when a round starts and must be equal on all workers.
        axis_name: the mapped axis of the workers, or a tuple of axes: a mesh axis and that of a ``vmap`` inside it make
            several workers a device (JAX 0.10 sums over both under ``shard_map(check_vma=False)`` only).
        inner_state: what becomes of the inner state at a synchronisation. ``"keep"``: nothing. ``"average"``: floating
            leaves are averaged, counters, keys and flags kept. ``"reset"``: ``inner.init`` at the new anchor, counters
            too. Or a function ``(inner_state, mean, anchor) -> inner_state``, ``mean(tree)`` averaging as above.
        compression: of the delta: ``None``, ``"bf16"``, ``"int8"`` or a ``communication.Compression``.
        error_feedback: whether what compression drops is added to the worker's next delta, or a factor in [0, 1].
        fragments: 1: all parameters at every synchronisation. n > 1: the leaves are dealt into n fragments of similar
            size, and synchronisation r moves fragment r mod n alone, so that a parameter's own delay is n H. Or a
            pytree of ints 0..n-1, one for each leaf of the parameters.
        statistic: ``anchor -> pytree`` of arrays, evaluated after every synchronisation, for schedules to read at
            ``statistics.custom``.
        drop_nonfinite: give weight 0 to a worker whose delta or mean loss is not finite, in place of passing its NaN on
            to all. Its own parameters stay NaN, which no update can mend: see :func:`~learned_opt.local_sgd.rescue`.

    Returns:
        An Optax transform with state :class:`LocalSGDState`. ``update(grads, state, params, *, worker_weight=None,
        samples=None, **extra_args)``: ``worker_weight``, a scalar >= 0, is the worker's w_i (default 1); a worker of
        weight 0 counts for nothing, whatever its values, and takes the others' anchor. If all weights are 0 the anchor
        stays. ``samples``, a scalar >= 0, is how many samples this step's gradient is of: a worker then weighs as the
        sum over the round says (times ``worker_weight``), and at a step of none it stays where it is, its inner state
        too, so that a slow worker may skip steps. Give it at every step or at none.
        Updates are in float32 or wider, so that low-precision parameters land on the anchor exactly; parameters in
        float32 land within rounding of it, and the rounding does not accumulate.

    Raises:
        ValueError: at construction if ``sync_every < 1`` or an option is unknown; while tracing, before any step runs,
            if the axis does not exist, ``params`` are missing, or a replicated part of the state or the schedule
            differs across devices (as far as ``shard_map`` with ``check_vma=True`` tells; without it, devices agree on
            the longest period).

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from learned_opt.local_sgd import local_sgd, map_workers, spread_workers, worker_axes
        >>> opt = local_sgd(optax.sgd(0.1), optax.sgd(0.7, momentum=0.9, nesterov=True), sync_every=4)
        >>> params = jnp.zeros(3)
        >>> state = opt.init(params)
        >>> axes = worker_axes(state)
        >>> def step(params, state, target):
        ...     grads = params - target
        ...     updates, state = opt.update(grads, state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> step = jax.jit(map_workers(step, in_axes=(0, axes, 0), out_axes=(0, axes)))
        >>> params, state = spread_workers(params, 2), spread_workers(state, 2, axes)
        >>> for _ in range(8):
        ...     params, state = step(params, state, jnp.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
        >>> int(state.round), bool(jnp.allclose(params[0], params[1]))
        (2, True)

    Reference:
        Stich, "Local SGD converges fast and communicates little", 2019; Wang et al., "SlowMo", 2020; Douillard et al.,
        "DiLoCo", 2023, and "Streaming DiLoCo", 2025; Karimireddy et al., "Error feedback fixes SignSGD", 2019.
    """
    schedule, constant = _schedule(sync_every)
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    if not axes or not all(isinstance(name, str) for name in axes):
        raise ValueError(f"axis_name must be a name or a tuple of names, got {axis_name!r}")
    code = communication.resolve(compression)
    policies = INNER_POLICIES | {"reset": lambda state, mean, params: inner.init(params)}
    if not callable(inner_state) and inner_state not in policies:
        raise ValueError(f"inner_state must be one of {sorted(policies)} or a function, got {inner_state!r}")
    if inner_state in ("average", "reset") and fragments != 1:
        raise ValueError(
            f"inner_state={inner_state!r} concerns all parameters at once: with fragments use 'keep' or a function"
        )
    policy = inner_state if callable(inner_state) else policies[inner_state]
    if isinstance(fragments, int) and fragments < 1:
        raise ValueError(f"fragments must be at least 1, got {fragments}")
    if not 0 <= error_feedback <= 1:
        raise ValueError(f"error_feedback must be True, False or a number within 0 to 1, got {error_feedback!r}")

    outer_wants_args = isinstance(outer, optax.GradientTransformationExtraArgs)
    if isinstance(inner, optax.MultiSteps):  # it passes extra arguments on, which Optax's wrapper would drop
        inner = optax.GradientTransformationExtraArgs(inner.init, inner.update)
    inner = optax.with_extra_args_support(inner)
    step_outer = optax.with_extra_args_support(optax.scale(-1.0) if outer is None else outer)

    def next_period(round_: jax.Array, step: jax.Array, statistics: schedules.Statistics) -> jax.Array:
        period = jnp.asarray(schedule(round_, step, statistics))
        if period.shape or not jnp.issubdtype(period.dtype, jnp.number):
            raise ValueError(f"sync_every: a schedule must return one number, got {period.dtype}{list(period.shape)}")
        if not isinstance(period, jax.core.Tracer) and period < 1:
            raise ValueError(f"sync_every must be at least 1, got {period} for round {round_}")
        return jnp.maximum(period, 1).astype(jnp.int32)

    def init(params: Params) -> LocalSGDState:
        zero = functools.partial(jnp.zeros, (), jnp.int32)  # each its own array: one buffer cannot be donated twice
        nan = functools.partial(jnp.full, (), jnp.nan, jnp.result_type(float))
        params = _arrays(params)
        labels, count = fragment_labels(fragments, params)
        parts = [pick(params, labels, part) for part in range(count)]
        custom = jax.tree.map(jnp.array, statistic(params)) if statistic else ()
        statistics = schedules.Statistics(nan(), nan(), nan(), nan(), custom)
        return LocalSGDState(
            step=zero(),
            round=zero(),
            since_sync=zero(),
            period=next_period(zero(), zero(), statistics),
            bytes=communication.zero_bytes(),
            statistics=statistics,
            anchor=jax.tree.map(jnp.array, params),
            outer=step_outer.init(parts[0]) if count == 1 else tuple(step_outer.init(part) for part in parts),
            inner=inner.init(params),
            error=jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p)), params) if code and error_feedback else (),
            value_sum=jnp.zeros(()),
            samples=jnp.zeros(()),
        )

    def update(
        grads: Any,
        state: LocalSGDState,
        params: Params = None,
        *,
        worker_weight: Any = None,
        samples: Any = None,
        **extra: Any,
    ) -> tuple[Any, LocalSGDState]:
        if params is None:
            raise ValueError("local_sgd: update needs params: opt.update(grads, state, params)")
        params = jax.tree.map(jnp.asarray, params)
        tracked = tracked_axes(axes)
        _check_replicated(state, tracked)
        local, inner_new = inner.update(grads, state.inner, params, **extra)
        local = jax.tree.map(_local_update, params, local)
        done = jnp.asarray(1.0 if samples is None else samples, state.samples.dtype)
        if samples is not None:
            inner_new = jax.tree.map(lambda new, old: jnp.where(done > 0, new, old), inner_new, state.inner)
            local = jax.tree.map(lambda u: jnp.where(done > 0, u, jnp.zeros_like(u)), local)
        value = extra.get("value")  # None where it is not passed
        if value is not None and jnp.shape(value):
            raise ValueError(
                f"local_sgd: value must be the loss of one worker, a scalar, not of shape {jnp.shape(value)}"
            )
        # at a step of no samples the loss may be anything
        told = jnp.where(done > 0, done * jnp.asarray(0.0 if value is None else value, done.dtype), 0.0)
        state = state._replace(
            step=state.step + 1,
            since_sync=state.since_sync + 1,
            inner=inner_new,
            value_sum=state.value_sum + told,
            samples=state.samples + done,
        )
        labels, count = fragment_labels(fragments, params)

        def carry_on() -> tuple[Any, LocalSGDState]:
            return vary(local, tracked), _vary_workers(state, tracked)

        def synchronise(part: int) -> tuple[Any, LocalSGDState]:
            sent: list[int] = []
            weight = None if worker_weight is None else jnp.asarray(worker_weight, state.value_sum.dtype)
            if samples is not None:
                weight = state.samples if weight is None else weight * state.samples
            anchor = pick(state.anchor, labels, part)
            deltas = jax.tree.map(
                lambda a, p, u: a.astype(wide(p)) - (p.astype(wide(p)) + u),
                *(anchor, pick(params, labels, part), pick(local, labels, part)),
            )

            loss = state.value_sum / jnp.where(state.samples > 0, state.samples, 1)
            size = jnp.asarray(optax.tree.norm(deltas, squared=True), state.value_sum.dtype)
            if drop_nonfinite:  # a sum of squares is finite only if all are
                weight = jnp.where(jnp.isfinite(size) & jnp.isfinite(loss), 1.0 if weight is None else weight, 0.0)
            if value is None:
                loss = jnp.full_like(loss, jnp.nan)
            send = WorkerMean(axes, weight, sent)
            total, scalars = send.scalars(jnp.stack([loss, size]))

            if code is None:
                mean, error = send.mean(deltas, total), state.error
            else:
                mean, left = send.compressed_mean(
                    deltas,
                    pick(state.error, labels, part) if error_feedback else None,
                    code,
                    total,
                    float(error_feedback),
                )
                error = merge(state.error, left) if error_feedback else ()

            outer_extra = send.mean(extra, total) if outer_wants_args else {}
            outer_old = state.outer if count == 1 else state.outer[part]
            delta = jax.tree.map(lambda d, a: d.astype(a.dtype), mean, anchor)
            outward, outer_new = step_outer.update(delta, outer_old, anchor, **outer_extra)
            anchor_new = optax.apply_updates(anchor, outward)
            if weight is not None:  # with nobody left there is nothing to learn from
                anchor_new, outer_new = jax.tree.map(
                    lambda new, old: jnp.where(total > 0, new, old), (anchor_new, outer_new), (anchor, outer_old)
                )

            whole = merge(state.anchor, anchor_new)
            landing = jax.tree.map(
                lambda a, p: a.astype(wide(p)) - p.astype(wide(p)), anchor_new, pick(params, labels, part)
            )
            first = jnp.where(jnp.isnan(state.statistics.first_value), scalars[0], state.statistics.first_value)
            statistics = schedules.Statistics(
                value=scalars[0],
                first_value=first,
                delta_sq=jnp.asarray(optax.tree.norm(mean, squared=True), size.dtype),
                worker_sq=scalars[1],
                custom=statistic(whole) if statistic else (),
            )
            inner_next = policy(state.inner, lambda tree: send.mean(tree, total), whole)
            period = next_period(state.round + 1, state.step, statistics)
            if tracked & varying(period):
                raise ValueError(
                    "sync_every: the schedule's answer differs across workers; let it read its arguments (round, step, "
                    "statistics) and replicated values alone"
                )
            if not constant and not tracked:  # nothing proves them equal: a worker that disagreed would hang the rest
                period = jax.lax.pmax(period, axes)
                sent.append(period.dtype.itemsize)
            return vary(merge(local, landing), tracked), _vary_workers(
                state._replace(
                    round=state.round + 1,
                    since_sync=jnp.zeros_like(state.since_sync),
                    period=period,
                    bytes=communication.add_bytes(state.bytes, sum(sent)),
                    statistics=statistics,
                    anchor=whole,
                    outer=outer_new
                    if count == 1
                    else tuple(outer_new if i == part else o for i, o in enumerate(state.outer)),
                    inner=inner_next,
                    error=error,
                    value_sum=jnp.zeros_like(state.value_sum),
                    samples=jnp.zeros_like(state.samples),
                ),
                tracked,
            )

        due = state.since_sync >= state.period
        if count == 1:
            return jax.lax.cond(due, lambda: synchronise(0), carry_on)
        branches = [carry_on, *(lambda part=part: synchronise(part) for part in range(count))]
        return jax.lax.switch(jnp.where(due, 1 + state.round % count, 0), branches)

    return optax.GradientTransformationExtraArgs(init, update)


def _arrays(params: Params) -> Params:
    def one(path: Any, leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise ValueError(
                f"local_sgd: params{jax.tree_util.keystr(path)} is {leaf.dtype}, to which no update can be added; "
                "keep it out of the parameters"
            )
        return leaf

    return jax.tree_util.tree_map_with_path(one, params)


def _local_update(param: jax.Array, update: Any) -> jax.Array:
    if update is None or not is_parameter(param):  # not even 0.0 may be added to a large integer
        return jnp.zeros_like(param)
    return jnp.asarray(update).astype(wide(param))


def _schedule(sync_every: Any) -> tuple[schedules.SyncSchedule, bool]:
    """Return the schedule that ``sync_every`` stands for, and whether it is a constant."""
    if callable(sync_every):
        return sync_every, False
    return schedules.constant(sync_every), True


def _check_replicated(state: LocalSGDState, tracked: frozenset[str]) -> None:
    for name in REPLICATED:
        if any(tracked & varying(leaf) for leaf in jax.tree.leaves(getattr(state, name))):
            raise ValueError(
                f"local_sgd: state.{name} differs across workers, so they would not meet; pass the state with the "
                "specs of worker_specs(state), from one init before the map"
            )


def _vary_workers(state: LocalSGDState, tracked: frozenset[str]) -> LocalSGDState:
    own = {name: vary(getattr(state, name), tracked) for name in LocalSGDState._fields if name not in REPLICATED}
    return state._replace(**own)
