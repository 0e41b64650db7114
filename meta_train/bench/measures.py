"""What the benchmark measures: smoothed curves, speed-ups, performance profiles, interquartile means with intervals.

Everything is NumPy on arrays of runs, ``[tasks, seeds]`` or ``[seeds, steps]``; nothing here knows an optimizer.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

WORST = -1.0  # what a diverged run's normalised loss counts as, and the least that any run's does
MAX_RATIO = 4.0  # a performance profile's last ratio, as AlgoPerf has it


class Interval(NamedTuple):
    """An estimate with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


def smooth(curves: np.ndarray) -> np.ndarray:
    """A running mean over a fiftieth of the curve, trailing, shorter at the start.

    Args:
        curves: ``[..., steps]``.

    Returns:
        The same shape. What is not finite spoils what comes after it in its own curve, nothing before.

    Example:
        >>> smooth(np.arange(100.0))[:3]
        array([0. , 0.5, 1.5])
    """
    steps = curves.shape[-1]
    width = max(steps // 50, 1)
    padded = np.concatenate([np.zeros((*curves.shape[:-1], width - 1)), curves], axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        sums = np.lib.stride_tricks.sliding_window_view(padded, width, axis=-1).sum(axis=-1)
    return sums / np.minimum(np.arange(1, steps + 1), width)


def envelope(curves: np.ndarray) -> np.ndarray:
    """The best loss so far, ``min(curve[..., : t + 1])``; what is not finite is never best.

    Example:
        >>> envelope(np.array([3.0, 1.0, 2.0, np.nan]))
        array([3., 1., 1., 1.])
    """
    return np.minimum.accumulate(np.where(np.isfinite(curves), curves, np.inf), axis=-1)


def steps_to(curves: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The first step at which each curve is at its target or below.

    Args:
        curves: ``[..., steps]``, smoothed losses.
        targets: ``[...]``.

    Returns:
        ``[...]``, counted from 1; ``inf`` for a curve that never is.

    Example:
        >>> steps_to(np.array([[3.0, 1.0, 2.0], [3.0, 3.0, 3.0]]), np.array([2.0, 2.0]))
        array([ 2., inf])
    """
    reached = envelope(curves) <= np.where(np.isfinite(targets), targets, -np.inf)[..., None]
    return np.where(reached.any(axis=-1), reached.argmax(axis=-1) + 1.0, np.inf)


def targets_of(reference: np.ndarray, floor: float = -np.inf) -> np.ndarray:
    """The losses to reach: the reference's best of each seed, but none below a floor.

    Args:
        reference: ``[seeds, steps]``, smoothed losses.
        floor: the least target, such as the reference's validation loss.

    Returns:
        ``[seeds]``.
    """
    return np.maximum(envelope(reference)[..., -1], floor if np.isfinite(floor) else -np.inf)


def speed_ups(curves: np.ndarray, reference: np.ndarray, floor: float = -np.inf) -> np.ndarray:
    """How many times fewer steps each run takes to the target of the reference's run of the same seed.

    Args:
        curves: ``[seeds, steps]``, smoothed losses.
        reference: ``[seeds, steps]``, the reference's, of the same seeds.
        floor: the least target.

    Returns:
        ``[seeds]``, the steps that the reference takes to the target (:func:`targets_of`) over those that the run
        takes; 0 where it never gets there.
    """
    targets = targets_of(reference, floor)
    own = steps_to(curves, targets)
    return np.divide(steps_to(reference, targets), own, out=np.zeros_like(own), where=np.isfinite(own))


def normalised(initial: np.ndarray, final: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How far the loss came down, the reference's way being 1: ``(initial - final) / (initial - reference)``.

    Args:
        initial: losses before the first step.
        final: losses after the last.
        reference: the reference's losses after its last.

    Returns:
        The same shape, ``nan`` where ``final`` is not finite or the reference made no way.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        way = initial - reference
        value = (initial - final) / way
    return np.where((way > 0) & np.isfinite(value), value, np.nan)


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """The mean of the middle half of the last axis: the lowest and highest ``floor(n / 4)`` are left out.

    Example:
        >>> float(interquartile_mean(np.array([-100.0, 1.0, 2.0, 1000.0])))
        1.5
    """
    cut = values.shape[-1] // 4
    return np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(axis=-1)


def bootstrap(values: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """The interquartile mean over all runs, with the 95% interval of a bootstrap over tasks and seeds.

    A resample draws tasks with replacement, then seeds with replacement for each: the interval says what other tasks of
    this kind would have given, not only other seeds of these.

    Args:
        values: ``[tasks, seeds]``.
        resamples: how many.
        seed: of the resampling.

    Returns:
        The :class:`Interval`, percentiles 2.5 and 97.5.

    Reference: Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", 2021; they
    resample the seeds alone.
    """
    tasks, seeds = values.shape
    random = np.random.default_rng(seed)
    chosen = random.integers(tasks, size=(resamples, tasks, 1))
    drawn = values[chosen, random.integers(seeds, size=(resamples, tasks, seeds))]
    means = interquartile_mean(drawn.reshape(resamples, -1))
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(interquartile_mean(values.reshape(-1))), float(low), float(high))


def rank(row: Mapping[str, Any]) -> tuple[float, float]:
    """How well a contender did on a task: by its speed-up, then, where Adam's loss is not reached, by its own.

    Args:
        row: one of :func:`meta_train.bench.comparison.rows`.
    """
    return row["speed_up"] or 0.0, -math.inf if row["progress"] is None else row["progress"]


def best_baseline(figures: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Of one task's figures the baseline that is first at Adam's best loss, or else furthest down; none at its default.

    Args:
        figures: of :func:`meta_train.bench.comparison.rows`.
    """
    candidates = [row for row in figures if row["baseline"] and "@" not in row["contender"]]
    return max(candidates, key=rank, default=None)


def profile(times: np.ndarray) -> np.ndarray:
    """Each contender's ratios to the fastest on every task, sorted: the corners of its performance profile.

    Args:
        times: ``[contenders, tasks]``, time to the target, ``inf`` where it is never reached.

    Returns:
        ``[contenders, tasks]``, ``times / min over contenders``; ``inf`` on a task whose target nobody reaches. The
        profile at ``tau`` is the share of a row's values that are at most ``tau``.

    Reference: Dolan & Moré, "Benchmarking optimization software with performance profiles", 2002.
    """
    best = times.min(axis=0)
    ratios = np.divide(times, best, out=np.full_like(times, np.inf), where=np.isfinite(times) & (best > 0))
    return np.sort(ratios, axis=1)


def profile_scores(ratios: np.ndarray, largest: float = MAX_RATIO) -> np.ndarray:
    r"""The area under each performance profile, :math:`\frac{1}{\tau_{max} - 1} \int_1^{\tau_{max}} \rho(\tau) d\tau`.

    Args:
        ratios: ``[contenders, tasks]``, of :func:`profile`.
        largest: :math:`\tau_{max}`.

    Returns:
        ``[contenders]``: 1 for who is fastest everywhere, 0 for who is beyond ``largest`` everywhere.

    Example:
        >>> profile_scores(np.array([[1.0, 1.0], [2.5, np.inf]]))
        array([1.  , 0.25])
    """
    return np.mean(np.clip((largest - ratios) / (largest - 1), 0, 1), axis=1)


def number(value: float) -> float | None:
    """A JSON number of six digits; ``None`` for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
