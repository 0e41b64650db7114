"""What `learned-opt bench` does: who meets on what, the runs, the files, the tables."""

import functools
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

from learned_opt.files import write_atomically
from tasks import data, manifest, suites
from tasks.suites import Entry

from .. import claim
from ..train.config import ConfigError
from ..train.progress import progress
from . import user_code
from .contenders import FEW, QUICK, REFERENCE, baselines, pretrained
from .report import files, page, terminal
from .tournament import Contender, Plan, run_suite

__all__ = ["FEW", "QUICK", "choose_contenders", "choose_tasks", "run"]


def choose_tasks(suite: str | None, own: Sequence[Entry] = ()) -> list[Entry]:
    """The tasks of a held-out suite and the user's own.

    Args:
        suite: its name; ``None`` for the user's own tasks alone.
        own: of :func:`meta_train.bench.user_code.task`.

    Raises:
        ConfigError: no such suite, a data set of it is not here, or two tasks of one name.
    """
    try:
        entries = list(suites.suite(suite, held_out=True)) if suite else []
        data.require(entry.dataset for entry in entries)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return user_code.distinct([*entries, *own], "task")


def choose_contenders(
    names: Sequence[str] | None,
    rules: Sequence[str],
    optimizers: Sequence[str] = (),
    *,
    num_steps: int = 10,
    own: Sequence[Entry] = (),
) -> list[Contender]:
    """Baselines, saved rules and the user's own optimizers.

    Args:
        names: of the baselines; ``None`` for all. Adam is always one: all is relative to it.
        rules: names or folders of saved rules.
        optimizers: ``FILE.py:FUNCTION``, see :func:`meta_train.bench.user_code.optimizer`.
        num_steps: how many steps are planned.
        own: the user's tasks, on the first of which the user's optimizers are tried.

    Raises:
        ConfigError: no such baseline, or a mistake in a user's file.
        StoreError: as ``learned_opt.load``.
    """
    known = {contender.name: contender for contender in baselines()}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"unknown baseline {name!r}; baselines: {', '.join(known)}")
    chosen = [contender for name, contender in known.items() if names is None or name in (*names, REFERENCE)]
    chosen += [pretrained(rule) for rule in rules]
    params = user_code.parameters(own[0]) if own else None
    chosen += [user_code.optimizer(spec, num_steps, params) for spec in optimizers]
    return user_code.distinct(chosen, "optimizer")


def run(
    label: str,
    entries: Sequence[Entry],
    contenders: Sequence[Contender],
    plan: Plan,
    out: Path,
    console: Console | None,
    *,
    command: str = "",
    rules: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs a benchmark, writes ``report.html``, ``results.csv``, ``results.json`` and ``curves.png``, shows tables.

    Args:
        label: of the tasks, in titles; a suite's name where they are its entries.
        entries: the tasks.
        contenders: the optimizers.
        plan: how.
        out: folder for the files, made if missing, and claimed while the run lives.
        console: where tables are shown; ``None`` shows none.
        command: what makes the same again.
        rules: the saved rules among the contenders, as they were given.

    Returns:
        ``out``, ``about``, ``summary`` and ``figures``, JSON values.

    Raises:
        ConfigError: tuned Adam, to which all is relative, diverged on a task.
        ClaimError: another process holds ``out``.
    """
    with claim.claim(out):
        return _run(label, entries, contenders, plan, out, console, command, rules)


def _run(label, entries, contenders, plan, out: Path, console: Console | None, command: str, rules) -> dict[str, Any]:
    bar = functools.partial(progress, console or Console(stderr=True), f"bench {label}")
    with bar(len(entries) * len(contenders)) as show:
        results = run_suite(entries, contenders, plan, show=show)
    if lost := [r.task for r in results if r.contender == REFERENCE and not np.isfinite(r.final).any()]:
        raise ConfigError(f"{REFERENCE}, the reference, diverged with every rate on {', '.join(lost)}")
    about = {
        "suite": label,
        "steps": plan.steps,
        "seeds": plan.seeds,
        "tuning_seeds": plan.tuning_seeds,
        "rules": list(rules),
        "manifest": _frozen(label, entries),
        "machine": machine_of(),
        "jax": jax.__version__,
        "versions": f"Python {platform.python_version()}, JAX {jax.__version__}, Optax {optax.__version__}",
        "command": command,
        "contenders": {contender.name: contender.about for contender in contenders},
    }
    figures, overview = files.write(out, results, about)
    write_atomically(out / "report.html", page.render(results, figures, overview, about))
    if console is not None:
        shown = Console()
        seeds = f"{plan.seeds} seeds" if plan.seeds > 1 else "one seed"
        shown.print(terminal.tables(figures, overview, f"{label}: {plan.steps} steps, {seeds}"))
        shown.print(
            f"written:   {out}/report.html, results.csv, results.json, curves.png", highlight=False, soft_wrap=True
        )
    return {"out": str(out), "about": about, "summary": overview, "figures": figures}


def _frozen(suite: str, entries: Sequence[Entry]) -> str | None:
    """The hash of the frozen suites, where the tasks are one of them, unchanged."""
    frozen = manifest.frozen()
    names = frozen["suites"].get(suite)
    if names != [entry.name for entry in entries]:
        return None
    same = all(manifest.record(entry) == frozen["entries"][entry.name] for entry in entries)
    return frozen["sha256"] if same else None


def machine_of() -> str:
    """The devices, in words."""
    device = jax.local_devices()[0]
    return f"{jax.local_device_count()} × {device.device_kind} ({platform.machine()})"
