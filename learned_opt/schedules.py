"""How long to step alone and how many samples to take: delay schedules, batch schedules and joint plans.

A delay schedule is a pure function ``(round, step, statistics) -> H``, the local steps of the round that starts now.
:func:`learned_opt.local_sgd` reads it at every start of a round, traced; the same function plans a run on the host
(:func:`make_plan`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Scalar = Any  # a number, or an array of rank 0


class Statistics(NamedTuple):
    """What the last synchronisation measured: floats, equal on all workers; NaN before the first.

    Attributes:
        value: mean over the workers and over the round's steps of ``value=`` (NaN where it is not passed).
        first_value: that of the first round.
        delta_sq: |mean_i d_i|^2, d_i the worker's delta over the round.
        worker_sq: mean_i |d_i|^2.
        custom: what ``local_sgd(statistic=...)`` returns for the new anchor.
    """

    value: Scalar = math.nan
    first_value: Scalar = math.nan
    delta_sq: Scalar = math.nan
    worker_sq: Scalar = math.nan
    custom: Any = ()


SyncSchedule = Callable[[Scalar, Scalar, Statistics], Scalar]
BatchSchedule = Callable[[Scalar, Statistics], Scalar]
LearningRate = float | Callable[[Scalar], Scalar]


def constant(sync_every: int | jax.Array) -> SyncSchedule:
    """Synchronise every H steps: H_r = H.

    Args:
        sync_every: H >= 1, an int or an int32 scalar (which may be traced).

    Returns:
        A delay schedule.

    Raises:
        ValueError: if H is not an integer, or is below 1.

    Example:
        >>> int(constant(8)(0, 0, Statistics()))
        8
    """
    if (
        isinstance(sync_every, bool)
        or jnp.shape(sync_every)
        or not jnp.issubdtype(jnp.result_type(sync_every), jnp.integer)
    ):
        raise ValueError(
            f"sync_every must be an int or a schedule (round, step, statistics) -> int, got {sync_every!r}"
        )
    if not isinstance(sync_every, jax.core.Tracer) and sync_every < 1:
        raise ValueError(f"sync_every must be at least 1, got {sync_every}")
    return lambda round_, step, statistics: sync_every


def post_local(switch_step: int, sync_every: int = 16) -> SyncSchedule:
    """Mini-batch averaging first, local SGD after: H_r = 1 while step < switch_step, then H.

    The round before the switch is not stretched over it: H_r counts from a round that starts at or after the switch.

    Args:
        switch_step: when the learning rate first falls, in the paper.
        sync_every: H afterwards; 16 in the paper.

    Returns:
        A delay schedule.

    Reference:
        Lin, Stich, Patel, Jaggi, "Don't use large mini-batches, use local SGD", 2020.
    """
    _at_least_one("post_local: sync_every", sync_every)
    return lambda round_, step, statistics: jnp.where(step < switch_step, 1, sync_every)


def square_root_growth(initial: float = 1.0, *, rounds: float = 1.0) -> SyncSchedule:
    """Grow the delay as the square root of the round: H_r = floor(H_0 sqrt(1 + r / rounds)).

    After R rounds some (2/3) H_0 R^{3/2} steps are done, so that T steps take O(T^{2/3}) rounds.

    Args:
        initial: H_0 >= 1.
        rounds: how many rounds pass before the growth shows.

    Returns:
        A delay schedule.

    Reference:
        Growing delays under decaying steps: Haddadpour et al., "Local SGD with periodic averaging", 2019.
    """
    return power_growth(initial, power=0.5, rounds=rounds)


def power_growth(initial: float = 1.0, *, power: float, rounds: float = 1.0) -> SyncSchedule:
    """Grow the delay as a power of the round: H_r = floor(H_0 (1 + r / rounds)^power).

    Args:
        initial: H_0 >= 1.
        power: 0 is constant, 1/2 the square root, 1 linear growth, with which T steps take O(sqrt(T)) rounds.
        rounds: how many rounds pass before the growth shows.

    Returns:
        A delay schedule.

    Reference:
        For power 1: Spiridonoff, Olshevsky, Paschalidis, "Communication-efficient SGD: from local SGD to one-shot
        averaging", 2021.
    """
    _at_least_one("power_growth: initial", initial)
    if rounds <= 0:
        raise ValueError(f"power_growth: rounds must be positive, got {rounds}")
    return lambda round_, step, statistics: _floor(initial * (1 + _float(round_) / rounds) ** power)


def stich(total_steps: int, workers: int, batch_size: int, *, scale: float = 1.0) -> SyncSchedule:
    r"""Keep to the delay that still gives linear speed-up: H = max(1, floor(scale · sqrt(T / (P b)))).

    Constants: the paper proves the order alone, H = O(sqrt(T / (P b))) for strongly convex, smooth functions with steps
    eta_t = 4 / (mu (a + t)), a > max(16 L / mu, H); ``scale`` is yours to choose.

    Args:
        total_steps: T, a worker's steps in the whole run.
        workers: P.
        batch_size: b, of one worker.
        scale: factor in front.

    Returns:
        A delay schedule (constant).

    Example:
        >>> int(stich(10_000, workers=4, batch_size=4)(0, 0, Statistics()))
        25

    Reference:
        Stich, "Local SGD converges fast and communicates little", 2019.
    """
    for name, number in (("total_steps", total_steps), ("workers", workers), ("batch_size", batch_size)):
        _at_least_one(f"stich: {name}", number)
    return constant(max(1, math.floor(scale * math.sqrt(total_steps / (workers * batch_size)))))


def stich_learning_rate(mu: float, smoothness: float, sync_every: int) -> Callable[[Scalar], Scalar]:
    """Return the step sizes of Stich's theorem: eta_t = 4 / (mu (a + t)), a = max(16 L / mu, H) + 1.

    Args:
        mu: strong convexity.
        smoothness: L.
        sync_every: H.

    Returns:
        ``step -> learning rate``, for ``optax.sgd``.

    Reference:
        Stich, "Local SGD converges fast and communicates little", 2019. The theorem asks a > max(16 L / mu, H).
    """
    shift = max(16 * smoothness / mu, sync_every) + 1
    return lambda step: 4 / (mu * (shift + step))


def patel_dieuleveut(
    learning_rate: LearningRate, mu: float, workers: int, *, scale: float = 1.0, maximum: int = 2**20
) -> SyncSchedule:
    """Step alone for as long as averaging would not notice near the optimum: N_t = max(1, floor(c / (eta_t mu P))).

    Constants: near the optimum the variance that P workers leave after averaging, about eta sigma^2 / (mu P), dominates
    the bias of the third derivative up to a delay of order 1 / (eta mu P); c = 1 puts N at the knee, measured for
    logistic regression (P=16, eta mu P = 1/8.6: N=4 costs 1.15 times the error of N=1, N=8 1.5 times, N=16 2.4 times).
    Take c = 1/2 to stay before it.

    Args:
        learning_rate: eta, a number or a schedule of the step.
        mu: strong convexity, at the optimum.
        workers: P.
        scale: c.
        maximum: largest N.

    Returns:
        A delay schedule: under eta_t = O(1/t) it grows linearly.

    Reference:
        Patel, Dieuleveut, "Communication trade-offs for synchronized distributed SGD with large step size", 2019.
    """
    if not mu > 0:
        raise ValueError(f"patel_dieuleveut: mu must be positive, got {mu}")
    _at_least_one("patel_dieuleveut: workers", workers)
    return lambda round_, step, statistics: _floor(scale / (_rate(learning_rate, step) * mu * workers), maximum)


def distance_aware(
    learning_rate: LearningRate,
    mu: float,
    workers: int,
    noise: float,
    *,
    scale: float = 1.0,
    distance: Callable[[Statistics], Scalar] = lambda statistics: statistics.custom,
    maximum: int = 2**20,
) -> SyncSchedule:
    """Step alone for longer while far away: N = floor(c max(|w - w*|^2, eta sigma^2 / (mu P)) / (eta^2 sigma^2)).

    Constants: a round's noise eta^2 sigma^2 N is kept below a share c of the squared distance to the optimum; at the
    stationary distance eta sigma^2 / (mu P) this is :func:`patel_dieuleveut`'s c / (eta mu P).

    Args:
        learning_rate: eta, a number or a schedule of the step.
        mu: strong convexity.
        workers: P.
        noise: sigma^2, the trace of the covariance of one worker's gradient.
        scale: c.
        distance: statistics -> |w - w*|^2 or an estimate of it; by default what ``local_sgd(statistic=...)`` returned.
            It must come from replicated numbers: workers that disagree wait for one another for ever.
        maximum: largest N.

    Returns:
        A delay schedule.

    Reference:
        Derived from the bounds of Patel, Dieuleveut, 2019; not a formula of theirs.
    """
    if not mu > 0 or not noise > 0:
        raise ValueError(f"distance_aware: mu and noise must be positive, got {mu} and {noise}")
    _at_least_one("distance_aware: workers", workers)

    def schedule(round_: Scalar, step: Scalar, statistics: Statistics) -> Scalar:
        eta = _rate(learning_rate, step)
        near = eta * noise / (mu * workers)
        return _floor(scale * jnp.maximum(distance(statistics), near) / (eta**2 * noise), maximum)

    return schedule


def quadratic(learning_rate: LearningRate, alpha: float, *, minimum: int = 1, maximum: int = 2**20) -> SyncSchedule:
    """Grow the delay as the learning rate falls: H_r = max(H_min, floor((alpha / eta_t)^2)).

    Args:
        learning_rate: eta, a number or a schedule of the step.
        alpha: to be tuned; the paper's values are of the order of the peak learning rate over the root of H_min.
        minimum: H_min.
        maximum: largest H.

    Returns:
        A delay schedule.

    Reference:
        Gu, Lyu, Arora, Zhang, Huang, "A quadratic synchronization rule for distributed deep learning", 2024.
    """
    _at_least_one("quadratic: minimum", minimum)
    rule = lambda step: _floor((alpha / _rate(learning_rate, step)) ** 2, maximum)  # noqa: E731
    return lambda round_, step, statistics: jnp.maximum(rule(step), minimum)


def adacomm(initial: int, *, maximum: int | None = None) -> SyncSchedule:
    """Communicate more as the loss falls: tau_j = ceil(tau_0 sqrt(F_j / F_0)).

    F is the loss passed as ``update(..., value=loss)``, averaged over the workers and the round. Constants: tau_0 is
    tuned by a short run; the loss must be positive, and its floor is taken to be near 0.

    Args:
        initial: tau_0 >= 1, kept while no loss is known.
        maximum: largest tau; tau_0 if None, since the loss may rise at first.

    Returns:
        A delay schedule.

    Example:
        >>> int(adacomm(16)(5, 80, Statistics(value=0.5, first_value=2.0)))
        8

    Reference:
        Wang, Joshi, "Adaptive communication strategies to achieve the best error-runtime trade-off in local-update
        SGD", 2019.
    """
    _at_least_one("adacomm: initial", initial)
    most = initial if maximum is None else maximum

    def schedule(round_: Scalar, step: Scalar, statistics: Statistics) -> Scalar:
        ratio = jnp.asarray(statistics.value) / statistics.first_value
        ratio = jnp.where(jnp.isfinite(ratio), jnp.maximum(ratio, 0), 1)
        return jnp.clip(jnp.ceil(initial * jnp.sqrt(ratio)), 1, most).astype(jnp.int32)

    return schedule


# ---- batch sizes: functions (step, statistics) -> samples a worker takes at that step ----


def constant_batch(size: int) -> BatchSchedule:
    """Take b samples a step: b_t = b.

    Args:
        size: b >= 1.

    Returns:
        A batch schedule.
    """
    _at_least_one("constant_batch: size", size)
    return lambda step, statistics: size


def geometric_batch(initial: int, *, factor: float, every: int, maximum: int) -> BatchSchedule:
    """Grow the batch geometrically: b_t = min(b_max, floor(b_0 · factor^floor(t / every))).

    Args:
        initial: b_0 >= 1.
        factor: above 1 it grows.
        every: steps between growths.
        maximum: b_max.

    Returns:
        A batch schedule.

    Example:
        >>> [int(geometric_batch(4, factor=2.0, every=10, maximum=16)(t, Statistics())) for t in (0, 9, 10, 25, 99)]
        [4, 4, 8, 16, 16]

    Reference:
        Smith, Kindermans, Ying, Le, "Don't decay the learning rate, increase the batch size", 2018.
    """
    for name, number in (("initial", initial), ("every", every), ("maximum", maximum)):
        _at_least_one(f"geometric_batch: {name}", number)

    def schedule(step: Scalar, statistics: Statistics) -> Scalar:
        return _floor(initial * jnp.asarray(factor, jnp.float32) ** (step // every), maximum)

    return schedule


def stepwise_batch(sizes: Sequence[int], boundaries: Sequence[int]) -> BatchSchedule:
    """Change the batch at given steps: b_t = sizes[number of boundaries <= t].

    Args:
        sizes: one more than boundaries.
        boundaries: steps, ascending.

    Returns:
        A batch schedule.

    Raises:
        ValueError: if the lengths do not fit, the boundaries do not ascend or a size is below 1.
    """
    if len(sizes) != len(boundaries) + 1 or list(boundaries) != sorted(set(boundaries)) or min(sizes) < 1:
        raise ValueError(
            f"stepwise_batch: needs sizes >= 1, one more than ascending boundaries, got {sizes} and {boundaries}"
        )
    table = np.asarray(sizes, np.int32)
    steps = np.asarray(boundaries, np.int32)
    return lambda step, statistics: jnp.asarray(table)[jnp.sum(jnp.asarray(step) >= steps)]


def noise_scale_batch(
    minimum: int,
    maximum: int,
    *,
    scale: float = 1.0,
    noise_scale: Callable[[Statistics], Scalar] = lambda statistics: statistics.custom,
) -> BatchSchedule:
    """Let the batch follow the gradient noise: b = clip(ceil(c · B_noise), b_min, b_max), B_noise = tr Sigma / |G|^2.

    Args:
        minimum: b_min, also while the noise scale is unknown.
        maximum: b_max.
        scale: c; 1 is the knee between few steps and few samples (1 / P for a worker's share of it).
        noise_scale: statistics -> B_noise, as from :func:`gradient_noise`, smoothed over rounds.

    Returns:
        A batch schedule.

    Reference:
        McCandlish, Kaplan, Amodei et al., "An empirical model of large-batch training", 2018.
    """
    _at_least_one("noise_scale_batch: minimum", minimum)
    if maximum < minimum:
        raise ValueError(f"noise_scale_batch: maximum {maximum} is below minimum {minimum}")

    def schedule(step: Scalar, statistics: Statistics) -> Scalar:
        size = jnp.ceil(scale * jnp.asarray(noise_scale(statistics)))
        size = jnp.where(jnp.isnan(size), minimum, size)
        return jnp.clip(size, minimum, maximum).astype(jnp.int32)

    return schedule


class GradientNoise(NamedTuple):
    """Unbiased estimates: ``signal`` of |G|^2 and ``noise`` of tr Sigma (one sample's gradient covariance)."""

    signal: Scalar
    noise: Scalar


def gradient_noise(small_sq: Scalar, big_sq: Scalar, small_batch: float, big_batch: float) -> GradientNoise:
    """Estimate the gradient's square and its noise from squared norms at two batch sizes.

    |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b),    tr Sigma = (|g_b|^2 - |g_B|^2) / (1/b - 1/B).

    With P workers, the mean over workers of |g_i|^2 and the |.|^2 of the mean gradient serve (``Statistics.worker_sq``
    and ``delta_sq`` after a round of one plain SGD step, divided by eta^2). Average both over time before dividing: the
    ratio of single estimates is heavy-tailed.

    Args:
        small_sq: |g_b|^2.
        big_sq: |g_B|^2.
        small_batch: b.
        big_batch: B > b.

    Returns:
        A :class:`GradientNoise`; B_noise = noise / signal.

    Raises:
        ValueError: if not B > b > 0.

    Reference:
        McCandlish et al., "An empirical model of large-batch training", 2018, appendix A.
    """
    if not big_batch > small_batch > 0:
        raise ValueError(f"gradient_noise: needs big_batch > small_batch > 0, got {big_batch} and {small_batch}")
    signal = (big_batch * big_sq - small_batch * small_sq) / (big_batch - small_batch)
    return GradientNoise(signal, (small_sq - big_sq) / (1 / small_batch - 1 / big_batch))


def learning_rate_for_batch(
    base: float, base_batch: float, batch: Scalar, *, rule: str = "linear", noise_scale: Scalar | None = None
) -> Scalar:
    """Return the learning rate that goes with a batch size.

    linear: eta_0 b / b_0;    sqrt: eta_0 sqrt(b / b_0);    noise: eta_0 (1 + B/b_0) / (1 + B/b), B the noise scale.

    ``linear`` suits SGD well below the noise scale, ``sqrt`` Adam-like rules; ``noise`` is linear there and constant
    above it.

    Args:
        base: eta_0, right for ``base_batch``.
        base_batch: b_0.
        batch: b.
        rule: ``"linear"``, ``"sqrt"`` or ``"noise"``.
        noise_scale: B, for ``"noise"``.

    Returns:
        The learning rate.

    Raises:
        ValueError: if the rule is unknown or the noise scale is missing.

    Example:
        >>> learning_rate_for_batch(0.1, 8, 32)
        0.4

    Reference:
        Goyal et al., 2017 (linear); Malladi et al., 2022 (square root); McCandlish et al., 2018 (noise).
    """
    if rule == "linear":
        return base * (batch / base_batch)
    if rule == "sqrt":
        return base * (batch / base_batch) ** 0.5
    if rule == "noise":
        if noise_scale is None:
            raise ValueError("learning_rate_for_batch: rule='noise' needs noise_scale=")
        return base * (1 + noise_scale / base_batch) / (1 + noise_scale / batch)
    raise ValueError(f"learning_rate_for_batch: rule must be 'linear', 'sqrt' or 'noise', got {rule!r}")


# ---- joint plans and the input pipeline (host side) ----


class Plan(NamedTuple):
    """Delays and batch sizes of a run, round by round.

    Attributes:
        delays: int64 [R], steps of each round.
        batches: int64 [T], samples that a worker takes at each step, T = sum(delays). The last may be smaller, so that
            sum(batches) is what was asked for.
    """

    delays: np.ndarray
    batches: np.ndarray


def make_plan(total_samples: int, sync_every: SyncSchedule | int, batch_size: BatchSchedule | int) -> Plan:
    """Lay out a run in which each worker takes exactly ``total_samples`` samples, whatever the schedules.

    Args:
        total_samples: of one worker.
        sync_every: a delay or a delay schedule that needs no statistics.
        batch_size: a batch size or a batch schedule that needs no statistics.

    Returns:
        A :class:`Plan`; feed ``plan_delays(plan)`` to :func:`learned_opt.local_sgd`, the plan to :func:`plan_batches`.

    Raises:
        ValueError: if a schedule answers below 1.

    Example:
        >>> plan = make_plan(20, 2, geometric_batch(2, factor=2.0, every=2, maximum=8))
        >>> plan.delays.tolist(), plan.batches.tolist()
        ([2, 2, 1], [2, 2, 4, 4, 8])
    """
    _at_least_one("make_plan: total_samples", total_samples)
    delay = sync_every if callable(sync_every) else constant(sync_every)
    batch = batch_size if callable(batch_size) else constant_batch(batch_size)
    delays: list[int] = []
    batches: list[int] = []
    left = total_samples
    while left > 0:
        steps = int(delay(len(delays), len(batches), Statistics()))
        if steps < 1:
            raise ValueError(f"make_plan: the delay schedule gave {steps} for round {len(delays)}")
        taken = 0
        while taken < steps and left > 0:
            size = int(batch(len(batches), Statistics()))
            if size < 1:
                raise ValueError(f"make_plan: the batch schedule gave {size} for step {len(batches)}")
            batches.append(min(size, left))
            left -= batches[-1]
            taken += 1
        delays.append(taken)
    return Plan(np.asarray(delays), np.asarray(batches))


def plan_delays(plan: Plan) -> SyncSchedule:
    """Return a plan's delays as a delay schedule; after the last round it stays at the last delay."""
    table = np.asarray(plan.delays, np.int32)
    return lambda round_, step, statistics: jnp.asarray(table)[jnp.minimum(round_, len(table) - 1)]


def bucket(size: int, buckets: Sequence[int]) -> int:
    """Return the smallest bucket that holds ``size``: few shapes, so few compilations.

    Raises:
        ValueError: if none does.
    """
    fitting = [b for b in buckets if b >= size]
    if not fitting:
        raise ValueError(f"bucket: {size} samples fit in none of {sorted(buckets)}; add a larger one")
    return min(fitting)


class PlannedBatch(NamedTuple):
    """One step's samples: ``indices`` int32 [workers, bucket] and ``mask`` bool [workers, bucket], False on padding."""

    indices: np.ndarray
    mask: np.ndarray


def plan_batches(
    plan: Plan, num_examples: int, workers: int, *, seed: int, buckets: Sequence[int] | None = None
) -> Iterator[PlannedBatch]:
    """Draw a plan's batches: each epoch is a permutation dealt to the workers, nothing is drawn twice in it.

    Args:
        plan: of :func:`make_plan`.
        num_examples: of the data set, at least ``workers``.
        workers: P.
        seed: of the permutations; batch t depends on (seed, t) alone.
        buckets: padded sizes to choose from; one, the largest batch, if None.

    Yields:
        A :class:`PlannedBatch` a step. Padding repeats index 0 under a False mask: use :func:`masked_mean`.
    """
    if num_examples < workers:
        raise ValueError(f"plan_batches: {num_examples} examples cannot be dealt to {workers} workers")
    sizes = [int(plan.batches.max())] if buckets is None else list(buckets)
    share = num_examples // workers
    epoch, order, start = -1, np.zeros(0, int), 0
    for size in plan.batches.tolist():
        indices = np.zeros((workers, bucket(size, sizes)), np.int32)
        places = np.arange(start, start + size)
        for turn in np.unique(places // share):
            if turn != epoch:
                epoch, order = int(turn), np.random.default_rng([seed, int(turn)]).permutation(num_examples)
            here = places // share == turn
            indices[:, :size][:, here] = order[: share * workers].reshape(workers, share)[:, places[here] % share]
        mask = np.broadcast_to(np.arange(indices.shape[1]) < size, indices.shape)
        start += size
        yield PlannedBatch(indices, mask)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean of the entries where mask is True (0 where there is none); padding may hold anything."""
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)


def _floor(x: Scalar, maximum: int = 2**20) -> Scalar:
    # a hair's breadth of tolerance: 0.1 * 30 is 3 to a reader, if not to float32
    return jnp.clip(jnp.floor(jnp.asarray(x) * (1 + 1e-6)), 1, maximum).astype(jnp.int32)


def _float(x: Scalar) -> jax.Array:
    return jnp.asarray(x, jnp.result_type(float))


def _rate(learning_rate: LearningRate, step: Scalar) -> Scalar:
    return learning_rate(step) if callable(learning_rate) else learning_rate


def _at_least_one(what: str, number: Any) -> None:
    if number < 1:
        raise ValueError(f"{what} must be at least 1, got {number}")
