"""How long to step alone: delay schedules.

A delay schedule is a pure function ``(round, step, statistics) -> H``, the local steps of the round that starts now.
:func:`learned_opt.local_sgd` reads it at every start of a round, traced; the same function plans a run on the host
(:func:`learned_opt.schedules.make_plan`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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


def micro_steps(sync_every: int | jax.Array | SyncSchedule, every_k: int) -> SyncSchedule:
    """Count a schedule's delays in steps of k micro-steps each: H'_r = k H_r, for gradients that are accumulated.

    With ``local_sgd(optax.MultiSteps(tx, k), sync_every=micro_steps(H, k))`` the workers meet after every H steps of
    ``tx``, where no gradient is half accumulated. A ``should_skip_update_fn`` and steps of ``samples=0`` shift
    that: do without.

    Args:
        sync_every: H, or a schedule of (round, step, statistics), whose step counts steps of ``tx`` too.
        every_k: k >= 1, the ``every_k_schedule`` of :class:`optax.MultiSteps`, an int.

    Returns:
        A delay schedule.

    Raises:
        ValueError: if k is no int of at least 1, or H not as for :func:`constant`.

    Example:
        >>> int(micro_steps(post_local(10, 4), every_k=8)(3, 80, Statistics()))
        32
    """
    if isinstance(every_k, bool) or not isinstance(every_k, int):
        raise ValueError(f"micro_steps: every_k must be an int, got {every_k!r}")
    at_least_one("micro_steps: every_k", every_k)
    schedule = sync_every if callable(sync_every) else constant(sync_every)
    return lambda round_, step, statistics: every_k * schedule(round_, step // every_k, statistics)


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
    at_least_one("post_local: sync_every", sync_every)
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
    at_least_one("power_growth: initial", initial)
    if rounds <= 0:
        raise ValueError(f"power_growth: rounds must be positive, got {rounds}")
    return lambda round_, step, statistics: floor(initial * (1 + _float(round_) / rounds) ** power)


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
        at_least_one(f"stich: {name}", number)
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
    logistic regression (P=16, eta mu P = 1/8.6: N=4 costs 1.16 times the error of N=1, N=8 1.5 times, N=16 2.4 times).
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
    at_least_one("patel_dieuleveut: workers", workers)
    return lambda round_, step, statistics: floor(scale / (_rate(learning_rate, step) * mu * workers), maximum)


def distance_aware(
    learning_rate: LearningRate,
    mu: float,
    workers: int,
    noise: float,
    *,
    scale: float = 1.0,
    distance: Callable[[Statistics], Scalar] = lambda statistics: statistics.custom,
    maximum: int | None = None,
) -> SyncSchedule:
    """Step alone for longer while far away: N = floor(c max(|w - w*|^2, eta sigma^2 / (mu P)) / (eta^2 sigma^2)).

    Constants: a round's noise eta^2 sigma^2 N is kept below a share c of the squared distance to the optimum; at the
    stationary distance eta sigma^2 / (mu P) this is :func:`patel_dieuleveut`'s c / (eta mu P). N is at most
    ceil(1 / (eta mu)), the time in which the distance shrinks e-fold: without that, a round planned from afar goes on
    long after it has arrived. Measured from |w - w*| = 10 (P=16, logistic regression, 512 steps, the true distance),
    against the best constant delay of as many rounds: 0.81 to 0.89 of its error with a constant step (19 to 126
    rounds), 0.92 to 1.11 with a decaying one (10 to 77); nothing for least squares, where delays cost little anyway.

    Args:
        learning_rate: eta, a number or a schedule of the step.
        mu: strong convexity.
        workers: P.
        noise: sigma^2, the trace of the covariance of one worker's gradient.
        scale: c; 2 to 8 in those runs.
        distance: statistics -> |w - w*|^2 or an estimate of it; by default what ``local_sgd(statistic=...)`` returned.
            It must come from replicated numbers: workers that disagree wait for one another for ever. While it is
            unknown, not a number, the delay is 1.
        maximum: largest N, in place of ceil(1 / (eta mu)).

    Returns:
        A delay schedule.

    Reference:
        Derived from the bounds of Patel, Dieuleveut, 2019; not a formula of theirs.
    """
    if not mu > 0 or not noise > 0:
        raise ValueError(f"distance_aware: mu and noise must be positive, got {mu} and {noise}")
    at_least_one("distance_aware: workers", workers)

    def schedule(round_: Scalar, step: Scalar, statistics: Statistics) -> Scalar:
        eta = _rate(learning_rate, step)
        near = eta * noise / (mu * workers)
        most = jnp.ceil(1 / (eta * mu) - 1e-6) if maximum is None else maximum
        return floor(scale * jnp.maximum(or_nan(distance(statistics)), near) / (eta**2 * noise), most)

    return schedule


def quadratic(learning_rate: LearningRate, alpha: float, *, minimum: int = 1, maximum: int = 2**20) -> SyncSchedule:
    """Grow the delay as the learning rate falls: H_r = max(H_min, floor((alpha / eta_t)^2)).

    Args:
        learning_rate: eta, a number or a schedule of the step.
        alpha: to be tuned; H leaves H_min where the learning rate falls below alpha over the root of H_min.
        minimum: H_min.
        maximum: largest H; give one where the rate falls to 0, or the last round never ends.

    Returns:
        A delay schedule.

    Reference:
        Gu, Lyu, Arora, Zhang, Huang, "A quadratic synchronization rule for distributed deep learning", 2024.
    """
    at_least_one("quadratic: minimum", minimum)
    rule = lambda step: floor((alpha / _rate(learning_rate, step)) ** 2, maximum)  # noqa: E731
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
    at_least_one("adacomm: initial", initial)
    most = initial if maximum is None else maximum

    def schedule(round_: Scalar, step: Scalar, statistics: Statistics) -> Scalar:
        ratio = jnp.asarray(statistics.value) / statistics.first_value
        ratio = jnp.where(jnp.isfinite(ratio), jnp.maximum(ratio, 0), 1)
        return jnp.clip(jnp.ceil(initial * jnp.sqrt(ratio)), 1, most).astype(jnp.int32)

    return schedule


def or_nan(statistic: Any) -> Any:
    """A statistic; NaN for the ``()`` that ``custom`` is where nothing was asked for."""
    return math.nan if isinstance(statistic, tuple) else statistic


def floor(x: Scalar, maximum: Scalar = 2**20) -> Scalar:
    """Round down to an int32 in [1, maximum], a millionth forgiven: 0.1 * 30 is 3 to a reader, if not to float32.

    What is not a number counts as 1.
    """
    x = jnp.nan_to_num(jnp.asarray(x), nan=1, posinf=jnp.inf, neginf=-jnp.inf)
    return jnp.clip(jnp.floor(x * (1 + 1e-6)), 1, maximum).astype(jnp.int32)


def _float(x: Scalar) -> jax.Array:
    return jnp.asarray(x, jnp.result_type(float))


def _rate(learning_rate: LearningRate, step: Scalar) -> Scalar:
    return learning_rate(step) if callable(learning_rate) else learning_rate


def at_least_one(what: str, number: Any) -> None:
    """Raise a ValueError that names ``what`` if the number is below 1."""
    if number < 1:
        raise ValueError(f"{what} must be at least 1, got {number}")
