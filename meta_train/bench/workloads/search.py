"""The ruleset *tuned*: the same number of quasi-random trials for everybody, and more where the best is on an edge."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from scipy.stats import qmc

from .optimizers import Optimizer, Range

TRIALS = 12
EXTENSION = 4  # more trials beyond an edge on which the best one lies
EXTENSIONS = 2  # times, at most
_EDGE = 0.1  # share of a range, in its own scale, that counts as its edge


class Trial(NamedTuple):
    """One setting and how well it did.

    Attributes:
        settings: of the optimizer.
        score: the validation loss at the end, ``inf`` for a run that diverged.
    """

    settings: dict[str, float]
    score: float


def settings(optimizer: Optimizer, number: int = TRIALS) -> list[dict[str, float]]:
    """The settings of the trials: the optimizer's own, then points of a scrambled Halton sequence.

    Args:
        optimizer: any. One with nothing to set has one trial.
        number: of trials.

    Returns:
        At most ``number`` settings, the same at every call.

    Example:
        >>> from meta_train.bench.workloads.baselines import baselines
        >>> nadamw = baselines()[0]
        >>> [round(s["learning_rate"], 5) for s in settings(nadamw, 3)][0]
        0.004

    Reference: Dahl et al., "Benchmarking neural network training algorithms", 2023, arXiv:2306.07179.
    """
    if not optimizer.space:
        return [dict(optimizer.setting)]
    points = qmc.Halton(len(optimizer.space), seed=0).random(max(number - 1, 0))
    return [dict(optimizer.setting)] + [placed(optimizer.space, optimizer.setting, point) for point in points]


def trials(optimizer: Optimizer, number: int, score: Callable[[dict[str, float], int], float]) -> list[Trial]:
    """All trials: those of :func:`settings`, and more where the best of them lies on an edge (:func:`more_settings`).

    Args:
        optimizer: any with a space.
        number: of trials, before there are more.
        score: ``(settings, the trial's number from 1) -> validation loss at the end``.

    Returns:
        The trials in order.
    """
    done: list[Trial] = []
    wanted, times = settings(optimizer, number), 0
    while wanted:
        for one in wanted:
            loss = score(one, len(done) + 1)
            done.append(Trial(one, loss if math.isfinite(loss) else math.inf))
        wanted = more_settings(optimizer, done, times)
        times += 1
    return done


def placed(space: Mapping[str, Range], fixed: Mapping[str, float], point: np.ndarray) -> dict[str, float]:
    """The setting at a point of the unit cube; what is not searched keeps its fixed value."""
    found = dict(fixed)
    for (name, (low, high, linear)), share in zip(space.items(), point, strict=True):
        value = low + share * (high - low) if linear else low * (high / low) ** share
        found[name] = float(f"{value:.4g}")
    return found


def climb(score: Callable[[float], float], usual: float, most: int = 6) -> dict[float, float]:
    """Tries the usual rate, half and twice it, and goes downhill by factors of two until the best has worse neighbours.

    Args:
        score: of a rate, the lower the better; ``inf`` for a run that diverged.
        usual: the first rate.
        most: rates, at most.

    Returns:
        The score of every rate tried.

    Example:
        >>> climb(lambda rate: abs(rate - 0.5), 2.0)
        {2.0: 1.5, 1.0: 0.5, 4.0: 3.5, 0.5: 0.0, 0.25: 0.25}
    """
    found = {rate: score(rate) for rate in (usual, usual / 2, usual * 2)}
    while len(found) < most:
        best = min(found, key=found.__getitem__)
        missing = [rate for rate in (best / 2, best * 2) if rate not in found]
        if not missing:
            break
        found[missing[0]] = score(missing[0])
    return found


def best(trials: list[Trial]) -> int:
    """The number of the trial with the lowest score; the first of them."""
    return int(np.argmin([trial.score for trial in trials]))


def searched(space: Mapping[str, Range], trials: list[Trial]) -> dict[str, Range]:
    """The space, widened to hold what was tried beyond it."""
    found = {}
    for name, (low, high, linear) in space.items():
        tried = [trial.settings[name] for trial in trials if linear or trial.settings[name] > 0]
        found[name] = Range(min([low, *tried]), max([high, *tried]), linear)
    return found


def edges(space: Mapping[str, Range], trials: list[Trial]) -> dict[str, int]:
    """On which edges of what was searched the best trial lies.

    Args:
        space: of the first trials.
        trials: all of them.

    Returns:
        A setting's name to -1, in the lowest tenth of its range, or 1, in the highest.

    Example:
        >>> trials = [Trial({"learning_rate": rate}, score) for rate, score in ((0.01, 2.0), (0.1, 1.5), (0.99, 1.0))]
        >>> edges({"learning_rate": Range(0.01, 1.0)}, trials)
        {'learning_rate': 1}
    """
    found = {}
    for name, bounds in searched(space, trials).items():
        share = _share(bounds, trials[best(trials)].settings[name])
        if share < _EDGE or share > 1 - _EDGE:
            found[name] = -1 if share < _EDGE else 1
    return found


def more_settings(optimizer: Optimizer, trials: list[Trial], times: int) -> list[dict[str, float]]:
    """Settings to try beyond the edge of the learning rate that the best trial lies on; none if it lies on none.

    The other settings' edges are reported and call for nothing: a best trial lies on some edge of five more often than
    not, while the rate decides.

    Args:
        optimizer: any.
        trials: all so far.
        times: how often this was done before.

    Returns:
        ``EXTENSION`` settings like the best one, with rates up to a factor of the root of the range beyond the edge; or
        none.
    """
    side = edges(optimizer.space, trials).get("learning_rate")
    if side is None or times >= EXTENSIONS:
        return []
    first = optimizer.space["learning_rate"]
    low, high, _ = searched(optimizer.space, trials)["learning_rate"]
    factor = math.sqrt(first.high / first.low) ** (side / EXTENSION)
    start = high if side > 0 else low
    around = trials[best(trials)].settings
    rates = [start * factor**number for number in range(1, EXTENSION + 1)]
    return [{**around, "learning_rate": float(f"{rate:.4g}")} for rate in rates]


def _share(bounds: Range, value: float) -> float:
    low, high, linear = bounds
    if value <= 0 and not linear:
        return 0.0
    return (value - low) / (high - low) if linear else math.log(value / low) / math.log(high / low)
