"""A benchmark's results compared: by task, and over all tasks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import measures
from .contenders import REFERENCE
from .measures import number
from .tournament import Result


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The benchmark's figures, one dict for each task and contender, tasks where learned rules do worst first.

    Args:
        results: from :func:`meta_train.bench.tournament.run_suite`.

    Returns:
        Dicts of JSON values. ``progress`` is the normalised final loss, how far the training loss came down, tuned
        Adam's way being 1: ``(initial - final) / (initial - Adam's final)``, of means over the seeds. ``speed_up`` is
        in how many times fewer steps than tuned Adam the best loss of tuned Adam is reached, the median over the seeds;
        0 where it is not reached. ``speed_up_time`` is the same by the clock.
    """
    table = []
    for result in results:
        timing = result.timing
        table.append(
            {
                "task": result.task,
                "contender": result.contender,
                "baseline": result.baseline,
                "learning_rate": number(result.learning_rate),
                "on_grid_edge": bool(result.on_edge),
                "final_loss": number(float(np.mean(result.final))),
                "final_loss_stderr": number(_stderr(result.final)),
                "valid_loss": number(float(np.mean(result.valid))),
                "valid_loss_stderr": number(_stderr(result.valid)),
                "valid_ratio": _valid_ratio(result, reference_of(results, result.task)),
                "initial_loss": number(float(np.mean(result.initial))),
                **_relative(result, reference_of(results, result.task)),
                "diverged": result.diverged,
                "seeds": len(result.final),
                "milliseconds": None if timing is None else number(timing.step),
                "gradient_milliseconds": None if timing is None else number(timing.gradient),
                "state_bytes": result.state_bytes,
                "num_params": result.num_params,
            }
        )
    return sorted(table, key=lambda row: _worst(table, row["task"]))


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One dict of JSON values for each contender, over all tasks, best score first.

    Args:
        results: from :func:`meta_train.bench.tournament.run_suite`; the reference must be among them.

    Returns:
        Dicts. ``loss``, ``steps`` and ``time`` are ``[interquartile mean, low, high]``; ``at_least_adam`` is the share
        of tasks whose ``progress`` is at least 1; ``valid`` is the geometric mean of the validation loss over tuned
        Adam's, over the tasks with data, ``None`` where it has none on one of them; ``score`` and ``score_time`` are
        areas under the performance profiles; ``worst`` is the task with the least progress and that.
    """
    tasks, names = tasks_and_contenders(results)
    figures = {(row["task"], row["contender"]): row for row in rows(results)}
    found = {(result.task, result.contender): result for result in results}
    ratios = profiles(results)
    scores = dict(zip(names, measures.profile_scores(ratios), strict=True))
    timed = all(result.timing for result in results)
    by_clock = dict(zip(names, measures.profile_scores(profiles(results, by_clock=True)), strict=True)) if timed else {}
    with_data = [task for task in tasks if figures[task, REFERENCE]["valid_ratio"] is not None]
    table = []
    for name in names:
        mine = [found[task, name] for task in tasks]
        theirs = [found[task, REFERENCE] for task in tasks]
        pairs = list(zip(mine, theirs, strict=True))
        loss = [_per_seed(own, reference) for own, reference in pairs]
        steps = np.stack([measures.speed_ups(own.curves, ref.curves, floor_of(ref)) for own, ref in pairs])
        progress = {task: figures[task, name]["progress"] for task in tasks}
        worst = min(tasks, key=lambda task: -math.inf if progress[task] is None else progress[task])
        entry = {
            "contender": name,
            "baseline": mine[0].baseline,
            "loss": _interval(np.stack(loss)),
            "at_least_adam": number(float(np.mean([value is not None and value >= 1 for value in progress.values()]))),
            "steps": _interval(steps),
            "score": number(scores[name]),
            "valid": _geometric([figures[task, name]["valid_ratio"] for task in with_data]),
            "worst": [worst, progress[worst]],
            "diverged": sum(result.diverged for result in mine),
            "runs": sum(len(result.final) for result in mine),
            "state_bytes_per_param": number(float(np.mean([r.state_bytes / max(r.num_params, 1) for r in mine]))),
        }
        if timed:
            slower = np.array([_slower(result) for result in mine])
            entry["time"] = _interval(steps / slower[:, None])
            entry["score_time"] = number(by_clock[name])
            entry["step_time"] = number(float(np.exp(np.mean(np.log(slower)))))  # geometric mean, Adam's being 1
        table.append(entry)
    return sorted(table, key=lambda row: -row["score"])


def profiles(results: Sequence[Result], by_clock: bool = False) -> np.ndarray:
    """The corners of all performance profiles.

    Args:
        results: from :func:`meta_train.bench.tournament.run_suite`.
        by_clock: by the time that the steps take, and not by their number.

    Returns:
        ``[contenders, tasks]`` as :func:`meta_train.bench.measures.profile`, contenders in the order of the results. A
        task's target is tuned Adam's best loss, not below :func:`floor_of`; the time to it is the median over seeds.
    """
    tasks, names = tasks_and_contenders(results)
    found = {(result.task, result.contender): result for result in results}
    matrix = np.full((len(names), len(tasks)), np.inf)
    for column, task in enumerate(tasks):
        reference = found[task, REFERENCE]
        targets = measures.targets_of(reference.curves, floor_of(reference))
        for line, name in enumerate(names):
            cost = _slower(found[task, name]) if by_clock else 1.0
            matrix[line, column] = cost * np.median(measures.steps_to(found[task, name].curves, targets))
    return measures.profile(matrix)


def floor_of(reference: Result) -> float:
    """The least training loss that counts: tuned Adam's validation loss at the end, the mean over its seeds.

    Below it a network only learns the examples by heart: who is sooner at a training loss of 1e-7 where validation
    stays at 0.1 has not learned more. Where there are no data, or training losses stay above, nothing changes.

    Args:
        reference: tuned Adam's result on a task.

    Returns:
        The floor; minus infinity where the loss is a synthetic function's, or the validation loss is not finite.
    """
    floor = float(np.mean(reference.valid))
    return floor if reference.has_data and math.isfinite(floor) else -math.inf


def lost(row: Mapping[str, Any]) -> bool:
    """Whether a contender lost a task: it ended behind tuned Adam, never reached its best loss, or had a run diverge.

    Args:
        row: one of :func:`rows`.
    """
    return row["progress"] is None or row["progress"] < 1 or not row["speed_up"] or row["diverged"] > 0


def reference_of(results: Sequence[Result], task: str) -> Result | None:
    """Tuned Adam's result on a task."""
    return next((r for r in results if r.task == task and r.contender == REFERENCE), None)


def tasks_and_contenders(results: Sequence[Result]) -> tuple[list[str], list[str]]:
    """Tasks and contenders, in the order of the results."""
    return list(dict.fromkeys(r.task for r in results)), list(dict.fromkeys(r.contender for r in results))


def _valid_ratio(result: Result, reference: Result | None) -> float | None:
    """The validation loss over tuned Adam's; ``None`` without data or where one is not a positive number."""
    if reference is None or not result.has_data:
        return None
    own, theirs = (float(np.mean(one.valid)) for one in (result, reference))
    return number(own / theirs) if own > 0 and theirs > 0 else None


def _geometric(ratios: Sequence[float | None]) -> float | None:
    known = [ratio for ratio in ratios if ratio is not None]
    return number(math.exp(sum(map(math.log, known)) / len(known))) if known and len(known) == len(ratios) else None


def _slower(result: Result) -> float:
    """A step's time, Adam's being 1."""
    return result.timing.step / result.timing.reference if result.timing else math.nan


def _relative(result: Result, reference: Result | None) -> dict[str, float | None]:
    """What is told relative to tuned Adam."""
    if reference is None:
        return {"progress": None, "speed_up": None, "speed_up_time": None}
    floor = floor_of(reference)
    means = [np.mean(values) for values in (result.initial, *(np.maximum(r.final, floor) for r in (result, reference)))]
    steps = float(np.median(measures.speed_ups(result.curves, reference.curves, floor)))
    return {
        "progress": number(float(measures.normalised(*means))),
        "speed_up": number(steps),
        "speed_up_time": number(steps / _slower(result)),
    }


def _per_seed(result: Result, reference: Result) -> np.ndarray:
    """``[seeds]``, normalised losses for the means; one that is not finite counts as -1, and none as less."""
    floor = floor_of(reference)
    ends = (np.maximum(one.final, floor) for one in (result, reference))
    values = measures.normalised(result.initial, *ends)
    return np.maximum(np.nan_to_num(values, nan=measures.WORST), measures.WORST)


def _interval(values: np.ndarray) -> list[float | None]:
    return [number(value) for value in measures.bootstrap(values)]


def _worst(table: Sequence[dict[str, Any]], task: str) -> tuple[float, float]:
    """The rank of the learned rule that did worst on the task, at its tuned rate where it has one."""
    ours = [row for row in table if row["task"] == task and not row["baseline"]]
    tuned = [row for row in ours if "@" not in row["contender"]]
    return min(map(measures.rank, tuned or ours), default=(math.inf, math.inf))


def _stderr(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
