"""Results on workloads as figures: by workload, and over a suite, all relative to the reference NAdamW."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import measures
from ..measures import number
from . import statistics
from .optimizers import REFERENCE
from .protocol import Result


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One dict of JSON values for each workload and optimizer, workloads where learned rules do worst first.

    Args:
        results: of :func:`meta_train.bench.workloads.protocol.run_suite`.

    Returns:
        Dicts. ``valid_loss`` and ``train_loss`` are means over seeds, at the end of the budget (the training loss over
        its last twentieth); ``ratio``, ``p`` and ``verdict`` compare the validation loss with the reference's
        (:func:`meta_train.bench.workloads.statistics.on_workload`); ``steps_to_target`` is the median over seeds of the
        first look at or below the seed's target, ``None`` where it is never reached; ``target`` is their
        mean, and ``seconds_to_target`` the steps times the milliseconds a step.
    """
    table = []
    for result in results:
        reference = _reference(results, result)
        goals = targets(results, result)
        compared = statistics.on_workload(result.final, reference.final)
        pairs = zip(result.curves, goals, strict=True)
        steps = float(np.median([_steps_to(curves.steps, curves.valid, goal) for curves, goal in pairs]))
        train = [float(np.mean(curves.train[-max(len(curves.train) // 20, 1) :])) for curves in result.curves]
        table.append(
            {
                "workload": result.workload.name,
                "dataset": result.workload.dataset,
                "optimizer": result.optimizer.name,
                "kind": result.optimizer.kind,
                "valid_loss": number(float(np.mean(result.final))),
                "train_loss": number(float(np.mean(train))),
                "ratio": number(compared.ratio),
                "ratio_low": number(compared.low),
                "ratio_high": number(compared.high),
                "p": number(compared.p),
                "verdict": compared.verdict,
                "target": number(float(np.mean(goals))),
                "steps_to_target": number(steps),
                "seconds_to_target": number(steps * result.milliseconds / 1000),
                "milliseconds": number(result.milliseconds),
                "run_seconds": number(float(np.mean([curves.seconds for curves in result.curves]))),
                "compile_seconds": number(float(np.mean([curves.compile_seconds for curves in result.curves]))),
                "diverged": sum(curves.diverged for curves in result.curves),
                "seeds": len(result.curves),
                "trials": len(result.trials),
                "steps_spent": result.steps_spent,
                "on_edge": sorted(result.edges),
                "settings": {name: number(float(value)) for name, value in result.settings.items()},
                "state_bytes": result.curves[0].state_bytes,
                "num_params": result.curves[0].num_params,
                "steps": result.workload.steps,
                "looks": [int(step) for step in result.curves[0].steps],
                "valid_curves": [[number(float(loss)) for loss in curves.valid] for curves in result.curves],
            }
        )
    return sorted(table, key=lambda row: _worst(table, row["workload"]))


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One dict of JSON values for each optimizer over the suite, the lowest validation losses first.

    Args:
        results: of :func:`meta_train.bench.workloads.protocol.run_suite`.

    Returns:
        Dicts. ``ratio`` is the geometric mean, every data set weighing the same, of the validation loss over the
        reference's, with the exact test over data sets (:func:`meta_train.bench.workloads.statistics.over_suite`);
        ``better``, ``level`` and ``worse`` count workloads by their own test; ``reached`` counts targets;
        ``score_steps`` and ``score_seconds`` are areas under the performance profiles; ``seconds_spent`` is that of the
        training steps, of all trials and of one network, over the suite.
    """
    table = rows(results)
    names = list(dict.fromkeys(result.optimizer.name for result in results))
    workloads = list(dict.fromkeys(row["workload"] for row in table))
    found = {(row["workload"], row["optimizer"]): row for row in table}
    scores = {by: _scores(found, workloads, names, by) for by in ("steps_to_target", "seconds_to_target")}
    overall = []
    for name in names:
        mine = [found[workload, name] for workload in workloads]
        logs: dict[str, list[float]] = {}
        for row in mine:
            logs.setdefault(row["dataset"], []).append(math.inf if row["ratio"] is None else math.log(row["ratio"]))
        compared = statistics.over_suite(logs)
        verdicts = [row["verdict"] for row in mine]
        spent = [_product(row["steps_spent"], row["milliseconds"]) for row in mine]
        overall.append(
            {
                "optimizer": name,
                "kind": mine[0]["kind"],
                "ratio": number(compared.ratio),
                "ratio_low": number(compared.low),
                "ratio_high": number(compared.high),
                "p": number(compared.p),
                "verdict": compared.verdict,
                **{verdict: verdicts.count(verdict) for verdict in ("better", statistics.LEVEL, "worse")},
                "reached": sum(row["steps_to_target"] is not None for row in mine),
                "workloads": len(mine),
                "score_steps": number(scores["steps_to_target"][name]),
                "score_seconds": number(scores["seconds_to_target"][name]),
                "step_time": number(_mean_slower(found, workloads, name)),
                "seconds_spent": None if None in spent else number(sum(value for value in spent if value)),
                "trials": sum(row["trials"] for row in mine),
                "on_edge": sum("learning_rate" in row["on_edge"] for row in mine),
                "diverged": sum(row["diverged"] for row in mine),
            }
        )
    return sorted(overall, key=lambda row: (row["ratio"] is None, row["ratio"] or 0.0))


def targets(results: Sequence[Result], result: Result) -> list[float]:
    """Each seed's target: the workload's, else the reference's validation loss at the end of that seed's budget."""
    known = result.workload.target
    return [loss if known is None else known for loss in map(float, _reference(results, result).final)]


def _reference(results: Sequence[Result], result: Result) -> Result:
    return next(
        other for other in results if other.optimizer.name == REFERENCE and other.workload.name == result.workload.name
    )


def _steps_to(steps: np.ndarray, valid: np.ndarray, goal: float) -> float:
    """The first look at or below the target; a rounding error above it counts as there."""
    reached = valid <= goal * (1 + 1e-6) if goal > 0 else valid <= goal
    return float(steps[np.argmax(reached)]) if reached.any() else math.inf


def _scores(found: dict, workloads: Sequence[str], names: Sequence[str], by: str) -> dict[str, float]:
    """Areas under the performance profiles; ``nan`` where steps were not timed."""
    costs = [[found[workload, name][by] for workload in workloads] for name in names]
    if by == "seconds_to_target" and any(row["milliseconds"] is None for row in found.values()):
        return dict.fromkeys(names, math.nan)
    matrix = np.array([[math.inf if cost is None else cost for cost in line] for line in costs])
    return dict(zip(names, map(float, measures.profile_scores(measures.profile(matrix))), strict=True))


def _mean_slower(found: dict, workloads: Sequence[str], name: str) -> float:
    """A step's time over the reference's, the geometric mean over workloads."""
    pairs = [
        (found[workload, name]["milliseconds"], found[workload, REFERENCE]["milliseconds"]) for workload in workloads
    ]
    if any(own is None or other is None for own, other in pairs):
        return math.nan
    return math.exp(sum(math.log(own / other) for own, other in pairs) / len(pairs))


def _worst(table: Sequence[dict[str, Any]], workload: str) -> float:
    """Minus the highest ratio of a learned rule on the workload: what sorts the worst first."""
    ours = [row for row in table if row["workload"] == workload and row["kind"] == "learned"]
    return -max((math.inf if row["ratio"] is None else row["ratio"] for row in ours), default=0.0)


def _product(steps: int, milliseconds: float | None) -> float | None:
    return None if milliseconds is None else steps * milliseconds / 1000
