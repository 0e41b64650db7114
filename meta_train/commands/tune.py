"""``learned-opt tune``: tune a network's hyperparameters while it trains."""

import argparse
import time
from pathlib import Path

from rich.console import Console

from ..bench import user_code
from ..errors import UsageError
from ..train import tune
from . import shared


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if (arguments.problem is None) == (arguments.network is None):
        raise UsageError("tune: name a preset, or one of your own by --network FILE.py:FUNCTION")
    settings = ("dataset", "optimizer", "cycles", "learning_rate", "method", "seed", "constants")
    shared.keep_compiled()
    network = None
    if arguments.network is not None:
        if arguments.dataset is not None:
            raise UsageError("tune: --dataset is for presets; a network of your own brings its data")
        network = user_code.network(arguments.network)[1]
    config = tune.TuneConfig(
        problem=arguments.network or arguments.problem, **{name: getattr(arguments, name) for name in settings}
    )
    out = arguments.out or Path("runs") / f"tune-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        result = tune.run(config, out, Console(stderr=True), network)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if arguments.json:
        shared.print_json(result)
    else:
        Console().print(tune.table(result))
        print(f"written:   {out}/result.json, schedule.json, curves.png, report.html")
    done = result["cycles_done"] == config.cycles and (result["constants"] or not config.constants)
    return 0 if done else 130
