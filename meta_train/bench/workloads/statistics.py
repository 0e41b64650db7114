"""Which differences a test shows: paired over seeds on a workload, over data sets on a suite. The rest is level."""

import itertools
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = "level"
SIGNIFICANCE = 0.05


class Comparison(NamedTuple):
    """A difference of log validation losses to the reference, below 0 where the optimizer is better.

    Attributes:
        ratio: the geometric mean of the validation loss over the reference's.
        low: of the 95% interval of that.
        high: likewise.
        p: two-sided.
        verdict: ``"better"``, ``"worse"`` or ``"level"``.
    """

    ratio: float
    low: float
    high: float
    p: float
    verdict: str


def on_workload(own: np.ndarray, reference: np.ndarray) -> Comparison:
    r"""A paired t-test over seeds: each has its own initial parameters and batches, the same for both.

    Args:
        own: ``[seeds]``, validation losses, above 0; ``inf`` for a run that diverged.
        reference: ``[seeds]``, the reference's.

    Returns:
        The :class:`Comparison`; with one seed the interval is unbounded and the verdict level, unless a run of one of
        the two alone diverged.

    Example:
        >>> on_workload(np.array([1.0, 1.1, 1.0]), np.array([2.0, 2.2, 2.1])).verdict
        'better'
    """
    if not np.isfinite(own).all() or not np.isfinite(reference).all():
        worse, better = not np.isfinite(own).all(), not np.isfinite(reference).all()
        verdict = LEVEL if worse == better else "worse" if worse else "better"
        return Comparison(np.inf if worse else 0.0, 0.0, np.inf, 1.0 if verdict == LEVEL else 0.0, verdict)
    logs = np.log(own) - np.log(reference)
    mean = float(logs.mean())
    if len(logs) < 2 or np.ptp(logs) == 0:
        same = len(logs) > 1 and mean == 0
        low, high = (1.0, 1.0) if same else (0.0, np.inf)
        return Comparison(float(np.exp(mean)), low, high, 1.0, LEVEL)
    p = float(stats.ttest_1samp(logs, 0.0).pvalue)
    half = float(stats.t.ppf(1 - SIGNIFICANCE / 2, len(logs) - 1) * stats.sem(logs))
    return _compared(mean, mean - half, mean + half, p)


def over_suite(logs: dict[str, list[float]]) -> Comparison:
    """An exact test over data sets: the sign of a whole data set's mean difference is what chance may flip.

    Workloads on one data set are one observation, and so are the seeds of a workload. With ``n`` data sets no p is
    below ``2 / 2**n``: fewer than six can show no difference, whatever it is.

    Args:
        logs: a data set to the mean log ratios of its workloads, the optimizer's validation loss over the reference's.

    Returns:
        The :class:`Comparison`, every data set weighing the same; the interval is that of a t-distribution over them.

    Example:
        >>> over_suite({"a": [-0.1, -0.2], "b": [-0.1]}).verdict
        'level'

    Reference: Fisher, "The design of experiments", 1935.
    """
    means = np.array([np.mean(values) for values in logs.values()])
    if not np.isfinite(means).all():
        return Comparison(np.inf, 0.0, np.inf, 1.0, LEVEL)
    observed, number = abs(means.mean()), len(means)
    signs = np.array(list(itertools.product((1, -1), repeat=number)))
    p = float(np.mean(np.abs((signs * means).mean(axis=1)) >= observed - 1e-12))
    mean = float(means.mean())
    if number < 2 or np.ptp(means) == 0:
        return _compared(mean, -np.inf, np.inf, p)
    half = float(stats.t.ppf(1 - SIGNIFICANCE / 2, number - 1) * stats.sem(means))
    return _compared(mean, mean - half, mean + half, p)


def _compared(mean: float, low: float, high: float, p: float) -> Comparison:
    verdict = LEVEL if p >= SIGNIFICANCE else "better" if mean < 0 else "worse"
    with np.errstate(over="ignore"):
        return Comparison(float(np.exp(mean)), float(np.exp(low)), float(np.exp(high)), p, verdict)
