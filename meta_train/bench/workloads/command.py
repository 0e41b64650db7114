"""What ``learned-opt bench`` does on workloads: who takes part, the runs, the files, the table."""

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from tasks import data, workloads
from tasks.base import Workload
from tasks.workloads import manifest

from ... import claim
from ...train.config import ConfigError
from .. import user_code
from ..benchmark import machine_of
from ..contenders import Contender
from . import report
from .baselines import baselines
from .optimizers import REFERENCE, Optimizer, Range, Settings, pretrained
from .protocol import RULESETS, Plan, run_suite

DEFAULT = (REFERENCE, "adamw", "muon", "soap")  # baselines, where none are named


def choose_workloads(suite: str | None, own: Sequence[Workload] = ()) -> list[Workload]:
    """The workloads of a suite and the user's own.

    Raises:
        ConfigError: no such suite, or two workloads of one name.
    """
    try:
        chosen = list(workloads.suite(suite)) if suite else []
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return user_code.distinct([*chosen, *own], "workload")


def choose_optimizers(
    names: Sequence[str] | None, rules: Sequence[str], own: Sequence[str] = (), on: Sequence[Workload] = ()
) -> list[Optimizer]:
    """Baselines and saved rules with their controls.

    Args:
        names: of the baselines; ``None`` for the four main ones, ``("all",)`` for all. The reference is always one.
        rules: names or folders of saved rules.
        own: ``FILE.py:FUNCTION``, see :func:`meta_train.bench.user_code.optimizer`; without our schedule.
        on: the workloads, on the first of which the user's optimizers are tried.

    Raises:
        ConfigError: no such baseline, a mistake in a user's file, or two optimizers of one name.
        UserError: a baseline of a package that is not installed, or a rule that is no optimizer by itself.
        StoreError: as ``learned_opt.load``.
    """
    known = {optimizer.name: optimizer for optimizer in baselines()}
    wanted = DEFAULT if names is None else tuple(known) if tuple(names) == ("all",) else (REFERENCE, *names)
    for name in wanted:
        if name not in known:
            raise ConfigError(f"unknown baseline {name!r} on workloads; baselines: {', '.join(known)}, or all")
    chosen = [optimizer for name, optimizer in known.items() if name in wanted]
    for optimizer in chosen:  # what it needs may be missing: better now than after the rows before it
        jax.eval_shape(lambda tree, o=optimizer: o.make(o.setting, 10).init(tree), {"w": jnp.ones((3, 2))})
    for rule in rules:
        chosen += pretrained(rule)
    if own:
        planned = (on[0].steps, user_code.parameters(on[0])) if on else ()
        chosen += [_own(user_code.optimizer(spec, *planned)) for spec in own]
    return user_code.distinct(chosen, "optimizer")


def run(
    label: str,
    chosen: Sequence[Workload],
    optimizers: Sequence[Optimizer],
    plan: Plan,
    out: Path,
    console: Console | None,
    command: str = "",
) -> dict[str, Any]:
    """Runs a suite, writes its files and shows its table.

    Args:
        label: of the workloads, in titles.
        chosen: the workloads.
        optimizers: who takes part.
        plan: how.
        out: folder for the files, made if missing, and claimed while the run lives.
        console: where progress and the table are shown; ``None`` shows nothing but progress on stderr.
        command: what makes the same again.

    Returns:
        ``out``, ``about``, ``summary`` and ``figures``, JSON values.

    Raises:
        ConfigError: nothing is finished, and nothing was to be run; or the reference diverged on all workloads.
        ClaimError: another process holds ``out``.
        DataError: a data set is not here.
    """
    data.require(workload.dataset for workload in chosen)  # before hours of those that are here
    with claim.claim(out):
        return _run(label, chosen, optimizers, plan, out, console, command)


def _run(label, chosen, optimizers, plan: Plan, out: Path, console: Console | None, command: str) -> dict[str, Any]:
    results = run_suite(chosen, optimizers, plan, _shown(console or Console(stderr=True)))
    if not results:
        raise ConfigError(f"nothing is finished yet of {label}: run it without --finished")
    lost = [r.workload.name for r in results if r.optimizer.name == REFERENCE and not np.isfinite(r.final).all()]
    results = [result for result in results if result.workload.name not in lost]
    why = "with every setting that it tried" if plan.ruleset == "tuned" else "try --ruleset tuned"
    without = f"{REFERENCE}, the reference, diverged on {', '.join(lost)}: {why}"
    if not results:
        raise ConfigError(without)
    missing = (len(chosen) - len(lost)) * len(optimizers) - len(results)
    left_out = [f"{missing} of {len(chosen) * len(optimizers)} rows are not run yet"] * bool(missing) + [
        without
    ] * bool(lost)
    about = {
        "suite": label,
        "ruleset": plan.ruleset,
        "seeds": plan.seeds,
        "trials": plan.trials if plan.ruleset == "tuned" else 0,
        "incomplete": "; ".join(left_out) or None,
        "frozen": manifest.frozen()["sha256"][:12] if label == manifest.SUITE else None,
        "machine": machine_of(),
        "versions": f"Python {platform.python_version()}, JAX {jax.__version__}, Optax {optax.__version__}",
        "command": command,
        "sources": {optimizer.name: optimizer.source for optimizer in optimizers},
    }
    document = report.write(out, results, about)
    if console is not None:
        shown = Console()
        shown.print(report.table(document))
        shown.print(report.sentence(document), highlight=False)
        shown.print(f"written:   {out}/report.html, results.csv, results.json, curves.png", soft_wrap=True)
    return {"out": str(out), **document}


def check_ruleset(name: str) -> str:
    """A ruleset's name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in RULESETS:
        raise ConfigError(f"unknown ruleset {name!r}; rulesets: {', '.join(RULESETS)}")
    return name


def _own(contender: Contender) -> Optimizer:
    """A user's optimizer, a decade about its default rate being its space."""

    def make(s: Settings, num_steps: int) -> optax.GradientTransformation:
        return contender.make(s.get("learning_rate", 1.0), num_steps)

    if not contender.grid:
        return Optimizer(contender.name, make, {}, {}, contender.about, "learned")
    usual = contender.default or contender.grid[len(contender.grid) // 2]
    space = {"learning_rate": Range(usual / 10, usual * 10)}
    return Optimizer(contender.name, make, {"learning_rate": usual}, space, contender.about, "learned")


def _shown(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, highlight=False, soft_wrap=True)
