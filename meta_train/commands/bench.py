"""``learned-opt bench``: compare rules with tuned optimizers."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import learned_opt
from learned_opt import store
from learned_opt.kinds import optimizes
from tasks import Workload
from tasks.suites import Entry
from tasks.workloads import SUITES

from ..bench import benchmark, user_code
from ..bench.tournament import Plan
from ..bench.workloads import command, search
from ..bench.workloads.protocol import RULESETS
from ..errors import UsageError
from . import shared


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    shared.use_cores(arguments.devices)  # before a user's file may call JAX
    shared.keep_compiled()
    tasks = [user_code.task(spec) for spec in arguments.task]
    own = [task for task in tasks if isinstance(task, Workload)]
    if own or arguments.suite in SUITES:
        return _on_workloads(arguments, own, tasks)
    for flag in ("ruleset", "finished", "trials"):
        if getattr(arguments, flag):
            raise UsageError(f"--{flag} is for workloads: --suite {', '.join(SUITES)}, or a --task that is one")
    quick = arguments.quick
    rules = arguments.rules or ([] if arguments.optimizer else _optimizers())
    suite = arguments.suite or (None if arguments.task else "quick" if quick else "held_out")
    steps = 300 if arguments.steps is None and quick else 1000 if arguments.steps is None else arguments.steps
    seeds = 3 if arguments.seeds is None and quick else 5 if arguments.seeds is None else arguments.seeds
    for name, value in (("steps", steps), ("seeds", seeds)):
        if value < 1:
            raise UsageError(f"--{name} must be at least 1")
    names = arguments.baselines.split(",") if arguments.baselines else list(benchmark.QUICK) if quick else None
    plan = Plan(steps, seeds, 1 if quick else 2, timed=True, folder=shared.cache("bench", arguments.runs))
    out = arguments.out or Path("runs") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}"

    mine = [task for task in tasks if isinstance(task, Entry)]
    entries = benchmark.choose_tasks(suite, mine)
    contenders = benchmark.choose_contenders(names, rules, arguments.optimizer, num_steps=steps, own=mine)
    shown = None if arguments.json else Console(stderr=True)
    label = suite or "own tasks"
    result = benchmark.run(label, entries, contenders, plan, out, shown, command=arguments.typed, rules=rules)
    if arguments.json:
        shared.print_json(result)
    return 0


def _on_workloads(arguments: argparse.Namespace, own: Sequence[Workload], tasks: Sequence[Any]) -> int:
    if len(own) < len(tasks) or (arguments.suite and arguments.suite not in SUITES):
        raise UsageError("workloads and small tasks are compared in different ways: bench them one after the other")
    if arguments.quick or arguments.steps is not None:
        flag = "quick" if arguments.quick else "steps"
        raise UsageError(f"--{flag} is for small tasks: a workload has its own budget")
    if arguments.finished and arguments.runs is not None and not arguments.runs.is_dir():
        raise UsageError(f"there is no folder {arguments.runs} of finished runs")
    seeds = 1 if arguments.seeds is None else arguments.seeds
    trials = search.TRIALS if arguments.trials is None else arguments.trials
    for name, value in (("seeds", seeds), ("trials", trials)):
        if value < 1:
            raise UsageError(f"--{name} must be at least 1")
    ruleset = command.check_ruleset(arguments.ruleset or RULESETS[0])
    if arguments.trials is not None and ruleset != "tuned":
        raise UsageError("--trials is for --ruleset tuned: under nothing-set every optimizer has one setting")
    rules = arguments.rules or ([] if arguments.optimizer else _optimizers())
    out = arguments.out or Path("runs") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}"
    chosen = command.choose_workloads(arguments.suite, own)
    names = arguments.baselines.split(",") if arguments.baselines else None
    optimizers = command.choose_optimizers(names, rules, arguments.optimizer, chosen)
    plan = command.Plan(
        ruleset,
        seeds,
        trials,
        timed=True,
        folder=shared.cache("bench", arguments.runs),
        only_finished=arguments.finished,
    )
    shown = None if arguments.json else Console(stderr=True)
    result = command.run(
        arguments.suite or "own workloads", chosen, optimizers, plan, out, shown, command=arguments.typed
    )
    if arguments.json:
        shared.print_json(result)
    return 0


def _optimizers() -> list[str]:
    """The pretrained rules that optimize by themselves."""
    return [name for name in learned_opt.available() if optimizes(store.read_record(name)["rule"])]
