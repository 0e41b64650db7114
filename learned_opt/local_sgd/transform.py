"""Local SGD as an Optax transform: workers step alone, and meet every ``sync_every`` steps.

A round has two halves. *Send*: the mean over the workers of how far each has moved from the anchor. *Take*: the outer
step of that mean. Both are at the round's last step, or ``overlap`` steps lie between them.
"""

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


class Outbox(NamedTuple):
    """What a worker sends at the end of a round; each worker's own.

    Attributes:
        deltas: anchor less parameters, the params' tree in float32 or wider.
        error: what compression had left unsent before, likewise; ``()`` without compression.
        loss: float, the mean of the round's ``value=``.
        size: float, the squared norm of the deltas.
        weight: float, what the worker counts for.
    """

    deltas: Any
    error: Any
    loss: jax.Array
    size: jax.Array
    weight: Any


class Flight(NamedTuple):
    """What the workers' messages come to, not yet used; equal on all workers.

    Attributes:
        mean: the mean delta, the params' tree in float32 or wider.
        total: float, the sum of the weights.
        scalars: float [2], the mean loss and the mean squared norm of a worker's delta.
    """

    mean: Any
    total: jax.Array
    scalars: jax.Array


class LocalSGDState(NamedTuple):
    """State of :func:`local_sgd`. Scalars but for the trees; the first ten fields are equal on all workers.

    Attributes:
        step: int32, local steps taken.
        round: int32, synchronisations done.
        since_sync: int32, steps since the last one.
        period: int32, the steps that the present round will take; fixed when the round starts.
        bytes: uint32 [2], what one worker has contributed to collectives; see ``communication.total_bytes``.
        statistics: :class:`~learned_opt.schedules.Statistics` of the last round.
        anchor: the parameters as last synchronised.
        outer: state of the outer transform (a tuple of one state a fragment where there are several).
        flight: a :class:`Flight`, the mean that was sent and is not taken yet (``()`` without overlap).
        waiting: bool, whether there is one (``()`` without overlap).
        inner: state of the worker's inner transform.
        error: what compression has left unsent, the params' tree in float32 or wider (``()`` without compression).
        value_sum: float, sum of the round's ``value=`` so far.
        samples: float, sum of the round's ``samples=`` so far.
        outbox: an :class:`Outbox` for :class:`~learned_opt.local_sgd.Link` to send (``()`` without ``linked``).
    """

    step: jax.Array
    round: jax.Array
    since_sync: jax.Array
    period: jax.Array
    bytes: jax.Array
    statistics: schedules.Statistics
    anchor: Params
    outer: Any
    flight: Any
    waiting: Any
    inner: Any
    error: Any
    value_sum: jax.Array
    samples: jax.Array
    outbox: Any


REPLICATED = LocalSGDState._fields[:10]


class Halves(NamedTuple):
    """What a :class:`~learned_opt.local_sgd.Link` does between the steps of a linked transform, for one worker each.

    Attributes:
        overlap: steps between the two.
        axis_name: the workers' axis.
        count: ``params -> number of fragments``.
        pick: ``(tree, params, part) -> the tree, the other fragments masked``.
        send: ``message -> (flight, error, bytes)``: the collective; the last is an int.
        take: ``(part, params, state, flight, error) -> (params, state)``: the outer step; no collective.
    """

    overlap: int
    axis_name: tuple[str, ...]
    count: Callable[[Any], int]
    pick: Callable[[Any, Any, int], Any]
    send: Callable[[Outbox], tuple[Flight, Any, int]]
    take: Callable[[int, Params, LocalSGDState, Flight, Any], tuple[Params, LocalSGDState]]


class LocalSGD(optax.GradientTransformationExtraArgs):
    """The transform that :func:`local_sgd` returns: ``init``, ``update``, and ``halves`` where it is linked."""

    halves: Halves | None = None


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
    overlap: int = 0,
    mixing: float = 0.0,
    linked: bool = False,
) -> LocalSGD:
    r"""Let every worker step alone with ``inner``, and apply ``outer`` to the mean of what they did every H steps.

    Worker i steps from the anchor x_0 for H local steps, x_i <- x_i + inner(grad_i). Then

    .. math:: d = \sum_i w_i (x_0 - x_i) / \sum_i w_i, \qquad x_0 \leftarrow x_0 + \mathrm{outer}(d), \qquad x_i = x_0

    so that ``d`` takes a gradient's place in ``outer``. ``outer=None`` is plain averaging, equal to
    ``optax.sgd(1.0)``; ``optax.sgd(0.7, momentum=0.9, nesterov=True)`` is DiLoCo's; ``optax.sgd(alpha, momentum=beta)``
    is SlowMo's for a constant inner step; ``optax.adam`` and learned rules are as good. Workers are the lanes of
    ``vmap(axis_name=...)`` or the devices of a ``shard_map`` axis; collectives run at synchronisations only.

    With ``overlap=tau`` the mean of what the workers had done at step t is used at step t + tau only, by workers that
    have gone on meanwhile and are drawn to the anchor by a share:

    .. math:: x_0 \leftarrow x_0 + \mathrm{outer}(d_t), \qquad x_i \leftarrow \alpha x_i + (1 - \alpha) x_0

    which is Streaming DiLoCo's (fragments, tau, alpha). In one program this is the arithmetic; that the message travels
    while the steps go on is done by :class:`~learned_opt.local_sgd.Link` with ``linked=True``.

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
            synchronising step, arrays of floats (such as ``value=``) averaged over the workers that take it, the rest
            as they are.
        sync_every: steps a round, H >= 1: an int (or int32 scalar), or a schedule of (round, step, statistics), see
            :mod:`learned_opt.schedules`. It is read when a round starts and must be equal on all workers.
        axis_name: the mapped axis of the workers, or a tuple of axes: a mesh axis and that of a ``vmap`` inside it make
            several workers a device (JAX 0.10 sums over both under ``shard_map(check_vma=False)`` only). ``()``: one
            worker, no map, see :func:`~learned_opt.local_sgd.lookahead`.
        inner_state: what becomes of the inner state at a synchronisation. ``"keep"``: nothing. ``"average"``: floating
            leaves are averaged, counters, keys and flags kept. ``"reset"``: ``inner.init`` at the new anchor, counters
            too. Or a function ``(inner_state, mean, anchor) -> inner_state``, ``mean(tree)`` averaging as above.
        compression: of the delta: ``None``, ``"bf16"``, ``"int8"`` or a ``communication.Compression``.
        error_feedback: whether what compression drops is added to the worker's next delta, or a factor in [0, 1].
        fragments: 1: all parameters at every synchronisation. n > 1: the leaves are dealt into n fragments of similar
            size, and synchronisation r moves fragment r mod n alone, so that a parameter's own delay is n H and its
            ``outer`` steps once in n rounds, which is what ``outer``'s schedules count. Or a pytree of ints 0..n-1, one
            for each leaf of the parameters.
        statistic: ``anchor -> pytree`` of arrays, evaluated after every synchronisation, for schedules to read at
            ``statistics.custom``.
        drop_nonfinite: give weight 0 to a worker whose delta or mean loss is not finite, in place of passing its NaN on
            to all. Its own parameters stay NaN, which no update can mend: see :func:`~learned_opt.local_sgd.rescue`.
        overlap: steps tau from a round's message to its use, less than ``sync_every``; 0: none. Rounds of a schedule
            have at least tau + 1 steps. One message is on its way at a time. ``outer`` then gets none of ``update``'s
            extra arguments but ``value=``, the mean loss of the round (NaN where there was none).
        mixing: alpha in [0, 1), the share of a worker's own parameters where it takes a round's result; 0: it is put on
            the anchor, and what it did since its message is lost.
        linked: ``update`` then has no collective: a worker leaves its message in the state, for a
            :class:`~learned_opt.local_sgd.Link` to carry.

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
        "DiLoCo", 2023, and "Streaming DiLoCo with overlapping communication", 2025 (arXiv:2501.18512); Karimireddy et
        al., "Error feedback fixes SignSGD", 2019.
    """
    schedule, constant = _schedule(sync_every)
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    if not all(isinstance(name, str) for name in axes):
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
    if isinstance(overlap, bool) or not isinstance(overlap, int) or overlap < 0:
        raise ValueError(f"overlap must be a number of steps, 0 or more, got {overlap!r}")
    if constant and isinstance(sync_every, int) and overlap >= sync_every:
        raise ValueError(f"overlap must be less than sync_every={sync_every}, got {overlap}: one message at a time")
    if not 0 <= mixing < 1:
        raise ValueError(f"mixing must be within 0 (the anchor) to 1 (a worker's own parameters), got {mixing!r}")
    if overlap and inner_state != "keep":
        raise ValueError(f"inner_state={inner_state!r} happens when workers meet: with overlap use 'keep'")
    if linked and not overlap:
        raise ValueError("linked=True sends between steps: it needs overlap, at least 1")

    feedback = bool(code and error_feedback)
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
        return jnp.maximum(jnp.nan_to_num(period, nan=1), 1 + overlap).astype(jnp.int32)  # NaN: nothing measured yet

    def zeros(params: Params) -> Any:
        return jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p)), params)

    def init(params: Params) -> LocalSGDState:
        zero = functools.partial(jnp.zeros, (), jnp.int32)  # each its own array: one buffer cannot be donated twice
        nan = functools.partial(jnp.full, (), jnp.nan, jnp.result_type(float))
        params = _arrays(params)
        labels, count = fragment_labels(fragments, params)
        parts = [pick(params, labels, part) for part in range(count)]
        custom = jax.tree.map(jnp.array, statistic(params)) if statistic else ()
        statistics = schedules.Statistics(nan(), nan(), nan(), nan(), custom)
        scalar = functools.partial(jnp.zeros, ())
        return LocalSGDState(
            step=zero(),
            round=zero(),
            since_sync=zero(),
            period=next_period(zero(), zero(), statistics),
            bytes=communication.zero_bytes(),
            statistics=statistics,
            anchor=jax.tree.map(jnp.array, params),
            outer=step_outer.init(parts[0]) if count == 1 else tuple(step_outer.init(part) for part in parts),
            flight=Flight(zeros(params), scalar(), jnp.zeros(2)) if overlap and not linked else (),
            waiting=jnp.zeros((), bool) if overlap and not linked else (),
            inner=inner.init(params),
            error=zeros(params) if feedback else (),
            value_sum=scalar(),
            samples=scalar(),
            outbox=Outbox(zeros(params), zeros(params) if feedback else (), scalar(), scalar(), scalar())
            if linked
            else (),
        )

    def pack(anchor: Any, ends: Any, error: Any, state: LocalSGDState, weight: Any, told: bool) -> Outbox:
        """What a worker sends: a fragment's delta from the anchor to where it ends."""
        deltas = jax.tree.map(lambda a, e: a.astype(e.dtype) - e, anchor, ends)
        loss = state.value_sum / jnp.where(state.samples > 0, state.samples, 1)
        size = jnp.asarray(optax.tree.norm(deltas, squared=True), state.value_sum.dtype)
        if drop_nonfinite:  # a sum of squares is finite only if all are
            weight = jnp.where(jnp.isfinite(size) & jnp.isfinite(loss), 1.0 if weight is None else weight, 0.0)
        return Outbox(deltas, error, loss if told else jnp.full_like(loss, jnp.nan), size, weight)

    def send(message: Outbox) -> tuple[Flight, Any, WorkerMean]:
        """The mean of the messages, and what compression left of this one."""
        mean_of = WorkerMean(axes, message.weight, [])
        total, scalars = mean_of.scalars(jnp.stack([message.loss, message.size]))
        if code is None:
            mean, left = mean_of.mean(message.deltas, total), ()
        else:
            mean, left = mean_of.compressed_mean(
                message.deltas, message.error if feedback else None, code, total, float(error_feedback)
            )
        return Flight(mean, total, scalars), left if feedback else (), mean_of

    def remember(state: LocalSGDState, left: Any) -> LocalSGDState:
        """The state with what compression left unsent."""
        return state._replace(error=merge(state.error, left)) if feedback else state

    def sent(state: LocalSGDState) -> LocalSGDState:
        """The state once a round's message is on its way."""
        return state._replace(
            round=state.round + 1,
            since_sync=jnp.zeros_like(state.since_sync),
            value_sum=jnp.zeros_like(state.value_sum),
            samples=jnp.zeros_like(state.samples),
        )

    def take(
        part: int, ends: Any, state: LocalSGDState, flight: Flight, weighted: bool, extra: Any, mean_of: WorkerMean
    ) -> tuple[Any, LocalSGDState]:
        """Where the fragment of a worker that ends there goes, and the state after the outer step of the mean."""
        labels, count = fragment_labels(fragments, state.anchor)
        tracked = tracked_axes(axes)
        anchor = pick(state.anchor, labels, part)
        outer_old = state.outer if count == 1 else state.outer[part]
        delta = jax.tree.map(lambda d, a: d.astype(a.dtype), flight.mean, anchor)

        def learned(new: Any, old: Any) -> Any:  # with nobody left there is nothing to learn from
            return optax.tree.where(flight.total > 0, new, old) if weighted else new

        outward, outer_new = step_outer.update(delta, outer_old, anchor, **extra)
        anchor_new, outer_new = learned((optax.apply_updates(anchor, outward), outer_new), (anchor, outer_old))
        whole = merge(state.anchor, anchor_new)
        landing = jax.tree.map(lambda a, e: a.astype(e.dtype), anchor_new, ends)
        if mixing:
            landing = jax.tree.map(lambda a, e: (1 - mixing) * a + mixing * e, landing, ends)
        told = flight.scalars[0]
        statistics = schedules.Statistics(
            value=told,
            first_value=jnp.where(jnp.isnan(state.statistics.first_value), told, state.statistics.first_value),
            delta_sq=jnp.asarray(optax.tree.norm(flight.mean, squared=True), told.dtype),
            worker_sq=flight.scalars[1],
            custom=statistic(whole) if statistic else (),
        )
        statistics = learned(statistics, state.statistics)

        def mean(tree):
            return learned(mean_of.mean(tree, flight.total), tree)

        inner_next = policy(state.inner, mean, whole)
        period = next_period(state.round, state.step - state.since_sync, statistics)  # where the round began
        if tracked & varying(period):
            raise ValueError(
                "sync_every: the schedule's answer differs across workers; let it read its arguments (round, step, "
                "statistics) and replicated values alone"
            )
        if axes and not constant and not tracked:  # nothing proves them equal: one that disagreed would hang the rest
            period = jax.lax.pmax(period, axes)
            mean_of.sent.append(period.dtype.itemsize)
        return landing, state._replace(
            period=period,
            bytes=communication.add_bytes(state.bytes, sum(mean_of.sent)),
            statistics=statistics,
            anchor=whole,
            outer=outer_new if count == 1 else tuple(outer_new if i == part else o for i, o in enumerate(state.outer)),
            inner=inner_next,
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

        def branch(local: Any, state: LocalSGDState) -> tuple[Any, LocalSGDState]:
            return vary(local, tracked), _vary_workers(state, tracked)

        def ends_of(part: int) -> Any:
            fragment = pick(params, labels, part), pick(local, labels, part)
            return jax.tree.map(lambda p, u: p.astype(wide(p)) + u, *fragment)

        def message_of(part: int) -> Outbox:
            weight = None if worker_weight is None else jnp.asarray(worker_weight, state.value_sum.dtype)
            if samples is not None:
                weight = state.samples if weight is None else weight * state.samples
            error = pick(state.error, labels, part) if feedback else ()
            return pack(pick(state.anchor, labels, part), ends_of(part), error, state, weight, value is not None)

        def land(
            part: int, state: LocalSGDState, flight: Flight, weighted: bool, outer_extra: Any, mean_of: WorkerMean
        ) -> tuple[Any, LocalSGDState]:
            landing, state = take(part, ends_of(part), state, flight, weighted, outer_extra, mean_of)
            back = jax.tree.map(lambda a, p: a - p.astype(a.dtype), landing, pick(params, labels, part))
            return branch(merge(local, back), state)

        def for_outer(mean_of: WorkerMean, total: jax.Array) -> Any:
            if samples is None:
                return mean_of.mean(extra, total)
            weight = jnp.where(done > 0, 1 if mean_of.weight is None else mean_of.weight, 0)
            awake = mean_of._replace(weight=weight)  # those of a worker that skips the step may be anything
            return awake.mean(extra, awake.scalars(jnp.zeros(0, total.dtype))[0])

        def synchronise(part: int) -> tuple[Any, LocalSGDState]:
            message = message_of(part)
            flight, left, mean_of = send(message)
            outer_extra = for_outer(mean_of, flight.total) if outer_wants_args else {}
            return land(part, sent(remember(state, left)), flight, message.weight is not None, outer_extra, mean_of)

        def depart(part: int) -> tuple[Any, LocalSGDState]:
            message = message_of(part)
            if linked:
                weight = jnp.ones_like(message.loss) if message.weight is None else message.weight
                whole = Outbox(merge(state.outbox.deltas, message.deltas), state.error, *message[2:4], weight)
                return branch(local, sent(state)._replace(outbox=whole))
            flight, left, mean_of = send(message)
            after = sent(remember(state, left))._replace(
                flight=flight._replace(mean=merge(state.flight.mean, flight.mean)),
                waiting=jnp.ones_like(state.waiting),
                bytes=communication.add_bytes(state.bytes, sum(mean_of.sent)),
            )
            return branch(local, after)

        def arrive(part: int) -> tuple[Any, LocalSGDState]:
            flight = state.flight._replace(mean=pick(state.flight.mean, labels, part))
            outer_extra = {"value": flight.scalars[0]} if outer_wants_args else {}
            after = state._replace(waiting=jnp.zeros_like(state.waiting))
            return land(part, after, flight, True, outer_extra, WorkerMean(axes, None, []))

        due = state.since_sync >= state.period
        last = synchronise if not overlap else depart
        branches: list[Callable[[], Any]] = [
            lambda: branch(local, state),
            *(functools.partial(last, part) for part in range(count)),
        ]
        which = jnp.where(due, 1 + state.round % count, 0)
        if overlap and not linked:
            branches += [functools.partial(arrive, part) for part in range(count)]
            taken = state.waiting & (state.since_sync >= overlap)
            which = jnp.where(taken, 1 + count + (state.round - 1) % count, which)
        if len(branches) == 2:
            return jax.lax.cond(due, branches[1], branches[0])
        return jax.lax.switch(which, branches)

    def take_linked(
        part: int, params: Params, state: LocalSGDState, flight: Flight, left: Any
    ) -> tuple[Params, LocalSGDState]:
        state = remember(state, left)
        mine = pick(params, fragment_labels(fragments, params)[0], part)
        ends = jax.tree.map(lambda p: p.astype(wide(p)), mine)
        outer_extra = {"value": flight.scalars[0]} if outer_wants_args else {}
        landing, state = take(part, ends, state, flight, True, outer_extra, WorkerMean(axes, None, []))
        landing = jax.tree.map(lambda a, p: a.astype(p.dtype), landing, mine)
        tracked = tracked_axes(axes)
        return vary(merge(params, landing), tracked), _vary_workers(state, tracked)

    def send_linked(message: Outbox) -> tuple[Flight, Any, int]:
        flight, left, mean_of = send(message)
        return flight, left, sum(mean_of.sent)

    opt = LocalSGD(init, update)
    if linked:
        opt.halves = Halves(
            overlap,
            axes,
            lambda params: fragment_labels(fragments, params)[1],
            lambda tree, params, part: pick(tree, fragment_labels(fragments, params)[0], part),
            send_linked,
            take_linked,
        )
    return opt


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
