"""``learned-opt bench``: compare rules with tuned optimizers."""

import argparse
import time
from pathlib import Path

from rich.console import Console

import learned_opt
from learned_opt import store
from tasks.data import data_dir

from ..bench import benchmark
from ..bench.tournament import Plan
from ..errors import UsageError
from . import shared


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    quick = arguments.quick
    rules = arguments.rules or ([] if arguments.optimizer else _optimizers())
    suite = arguments.suite or (None if arguments.task else "quick" if quick else "held_out")
    steps = 300 if arguments.steps is None and quick else 1000 if arguments.steps is None else arguments.steps
    seeds = 3 if arguments.seeds is None and quick else 5 if arguments.seeds is None else arguments.seeds
    for name, value in (("steps", steps), ("seeds", seeds)):
        if value < 1:
            raise UsageError(f"--{name} must be at least 1")
    shared.use_cores(arguments.devices)
    shared.keep_compiled()
    names = arguments.baselines.split(",") if arguments.baselines else list(benchmark.QUICK) if quick else None
    plan = Plan(steps, seeds, 1 if quick else 2, timed=True, folder=data_dir() / "bench")
    out = arguments.out or Path("runs") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}"

    entries = benchmark.choose_tasks(suite, arguments.task)
    contenders = benchmark.choose_contenders(names, rules, arguments.optimizer)
    shown = None if arguments.json else Console(stderr=True)
    label = suite or "own tasks"
    result = benchmark.run(label, entries, contenders, plan, out, shown, command=arguments.typed, rules=rules)
    if arguments.json:
        shared.print_json(result)
    return 0


def _optimizers() -> list[str]:
    """The pretrained rules that optimize by themselves: an outer step of local SGD takes what workers did."""
    return [name for name in learned_opt.available() if store.read_record(name)["rule"] != "outer"]
