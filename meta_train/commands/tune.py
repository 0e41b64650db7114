"""``learned-opt tune``: tune a network's hyperparameters while it trains."""

import argparse
import time
from pathlib import Path

from rich.console import Console

from ..errors import UsageError
from ..train import tune
from . import shared


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    settings = ("problem", "dataset", "optimizer", "cycles", "learning_rate", "method", "seed")
    shared.keep_compiled()
    config = tune.TuneConfig(**{name: getattr(arguments, name) for name in settings})
    out = arguments.out or Path("runs") / f"tune-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        result = tune.run(config, out, Console(stderr=True))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if arguments.json:
        shared.print_json(result)
    else:
        Console().print(tune.table(result))
        print(f"written:   {out}/result.json, schedule.json, curves.png")
    return 0
