"""The two rulesets on a suite of workloads: runs, choices, what they cost, and how long a step takes."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np

from tasks.base import Workload

from .. import cache
from ..timing import machine
from ..tournament import on_devices
from . import search
from .optimizers import REFERENCE, Optimizer
from .training import Curves, NotFinishedError, Program, program, run

RULESETS = ("nothing-set", "tuned")
TUNING_SEED = 1_000_000  # of the trials; the reported seeds are 0, 1, ...
_WARM = 12  # steps before any is timed: one beyond the first correction of SOAP's basis
_TURN = 10  # steps of one turn: one period of SOAP's basis
_TURNS = 10


class Result(NamedTuple):
    """One optimizer on one workload.

    Attributes:
        workload: the workload.
        optimizer: the optimizer.
        settings: those that are reported.
        curves: one for each seed.
        trials: all that were tried, the tuned ruleset's; empty for the other.
        edges: of :func:`meta_train.bench.workloads.search.edges`.
        steps_spent: steps of all trials, and of one reported run.
        milliseconds: of one step, ``nan`` where it was not timed.
    """

    workload: Workload
    optimizer: Optimizer
    settings: Mapping[str, float]
    curves: Sequence[Curves]
    trials: Sequence[search.Trial]
    edges: Mapping[str, int]
    steps_spent: int
    milliseconds: float

    @property
    def final(self) -> np.ndarray:
        """``[seeds]``, validation losses at the end of the budget."""
        return np.array([curves.final for curves in self.curves])


class Plan(NamedTuple):
    """How a suite is run.

    Attributes:
        ruleset: ``"nothing-set"``, one setting for all workloads; or ``"tuned"``, trials on every one.
        seeds: reported runs of each.
        trials: of the tuned ruleset.
        timed: whether steps are timed.
        folder: where runs are kept, or ``None``; those that it holds are not computed again.
        only_finished: run nothing: report what is kept, as :func:`comparable` has it.
    """

    ruleset: str = "nothing-set"
    seeds: int = 1
    trials: int = search.TRIALS
    timed: bool = True
    folder: Path | None = None
    only_finished: bool = False


Show = Callable[[str], Any]


def run_suite(
    workloads: Sequence[Workload], optimizers: Sequence[Optimizer], plan: Plan, show: Show = lambda text: None
) -> list[Result]:
    """Runs every optimizer on every workload, one on each local device; steps are timed with all else at rest.

    Args:
        workloads: the suite.
        optimizers: who takes part; the reference must be one of them.
        plan: how.
        show: called with a line about what was done.

    Returns:
        Results, workloads outermost, both in the order of the arguments.

    Raises:
        ValueError: an unknown ruleset, or no reference.
    """
    if plan.ruleset not in RULESETS:
        raise ValueError(f"unknown ruleset {plan.ruleset!r}; rulesets: {', '.join(RULESETS)}")
    if REFERENCE not in {optimizer.name for optimizer in optimizers}:
        raise ValueError(f"targets are {REFERENCE!r}'s: it must be one of the optimizers")
    results = []
    for workload in workloads:
        programs: dict[str, Program] = {}

        def one(
            optimizer: Optimizer,
            device: jax.Device,
            go_on: Callable[[], None],
            workload: Workload = workload,
            programs: dict = programs,
        ) -> Result | None:
            def told(text: str) -> None:
                go_on()
                show(text)

            told(f"{workload.name}: {optimizer.name}: tracing")
            made = programs[optimizer.name] = program(workload, optimizer, device)
            try:
                return _result(workload, optimizer, made, plan, told)
            except NotFinishedError:
                return None

        done = [result for _, result in sorted(on_devices(one, optimizers), key=lambda pair: pair[0])]
        mine = [result for result in done if result is not None]
        if REFERENCE not in {result.optimizer.name for result in mine}:
            continue
        if plan.timed:
            who = [result.optimizer for result in mine]
            times = step_times(workload, who, programs, plan.folder, show, plan.only_finished)
            mine = [result._replace(milliseconds=times[result.optimizer.name]) for result in mine]
        results += mine
    return comparable(results)


def comparable(results: Sequence[Result]) -> list[Result]:
    """What of unfinished results may be compared: the optimizers of the workload that has most, where all are done.

    Args:
        results: of any workloads and optimizers; finished ones are given back as they are.

    Returns:
        For every workload left the same optimizers.
    """
    done: dict[str, list[str]] = {}
    for result in results:
        done.setdefault(result.workload.name, []).append(result.optimizer.name)
    most = max(done.values(), key=len, default=[])
    whole = {workload for workload, names in done.items() if set(most) <= set(names)}
    return [r for r in results if r.workload.name in whole and r.optimizer.name in most]


def step_times(
    workload: Workload,
    optimizers: Sequence[Optimizer],
    programs: Mapping[str, Program],
    folder: Path | None = None,
    show: Show = lambda text: None,
    only_finished: bool = False,
) -> dict[str, float]:
    """Times a step of each optimizer from a warmed state: 100 steps, ten turns of ten, one optimizer after another.

    Whatever else slows the machine down for a while so meets them all alike. Ten steps are one period of SOAP's basis,
    so that every turn holds one correction of it.

    Args:
        workload: the workload.
        optimizers: those to time.
        programs: theirs, by name.
        folder: where times are kept, by machine and by who was timed beside whom.
        show: called with a line about what is done.
        only_finished: time nothing: take what is kept.

    Returns:
        Milliseconds a step, the median over the turns; ``nan`` with ``only_finished`` where nothing is kept.
    """
    names = [optimizer.name for optimizer in optimizers]
    versions = [jax.__version__, jaxlib.__version__]
    timed = [programs[name].key for name in names]
    key = cache.key(timed=timed, machine=machine(), versions=versions, turns=[_WARM, _TURN, _TURNS])
    if (kept := cache.load(folder, key)) is not None:
        return dict(zip(names, map(float, kept["milliseconds"]), strict=True))
    if only_finished:
        return dict.fromkeys(names, float("nan"))
    show(f"{workload.name}: timing steps")
    carries = {o.name: programs[o.name].init(o.setting, 0) for o in optimizers}
    numbers = dict.fromkeys(names, 0)
    taken: dict[str, list[float]] = {name: [] for name in names}

    def turn(optimizer: Optimizer, steps: int) -> float:
        carry, first = carries[optimizer.name], numbers[optimizer.name]
        began = time.perf_counter()
        for number in range(first, first + steps):
            carry, _ = programs[optimizer.name].step(carry, optimizer.setting, 0, number)
        jax.block_until_ready(carry)
        carries[optimizer.name], numbers[optimizer.name] = carry, first + steps
        return 1000 * (time.perf_counter() - began) / steps

    for optimizer in optimizers:
        turn(optimizer, _WARM)
    for _ in range(_TURNS):
        for optimizer in optimizers:
            taken[optimizer.name].append(turn(optimizer, _TURN))
    times = {name: float(np.median(taken[name])) for name in names}
    cache.store(folder, key, {"milliseconds": np.array([times[name] for name in names])})
    return times


def _result(workload: Workload, optimizer: Optimizer, made: Program, plan: Plan, show: Show) -> Result:
    def trained(settings: Mapping[str, float], seed: int, label: str) -> Curves:
        def look(done: int, loss: float) -> None:
            show(f"{workload.name}: {optimizer.name}: {label}: step {done} of {workload.steps}, validation {loss:.4g}")

        return run(made, workload, settings, seed, plan.folder, look, plan.only_finished)

    def score(settings: Mapping[str, float], number: int) -> float:
        return trained(settings, TUNING_SEED, f"trial {number}").final

    tuned = plan.ruleset == "tuned" and optimizer.space
    trials = search.trials(optimizer, plan.trials, score) if tuned else []
    chosen = trials[search.best(trials)].settings if trials else dict(optimizer.setting)
    return Result(
        workload,
        optimizer,
        chosen,
        [trained(chosen, seed, f"seed {seed}") for seed in range(plan.seeds)],
        trials,
        search.edges(optimizer.space, trials) if trials else {},
        workload.steps * (len(trials) + 1),
        float("nan"),
    )
