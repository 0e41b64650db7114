"""``learned-opt tune``: a self-tuning run, its table, curves and schedule."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import learned_opt
from learned_opt import self_tuning as st
from learned_opt.files import write_atomically
from learned_opt.loaded import check_rate

from .. import claim
from . import tune_page
from .config import check_seed
from .problems import PROBLEMS, Problem, evaluate, make_tuner, standing
from .progress import progress

_TRAIN_STEPS = 5  # of a cycle, as Delta-STN's authors found to work
_ADAM_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """Everything that determines a tuning run.

    Attributes:
        problem: a name in :data:`meta_train.train.problems.PROBLEMS`.
        dataset: a data set instead of the problem's own.
        optimizer: a pretrained rule's name or folder that trains the weights; by default Adam.
        learning_rate: of the weights; for a rule that sets its own steps, a factor on them. By default the rule's
            own, and Adam's is 1e-3.
        hyper_learning_rate: of the hyperparameters (Adam).
        method: ``"delta_stn"`` or ``"stn"``.
        cycles: cycles of five training steps and a validation step.
        warmup: cycles before the first validation step, at most a quarter of all.
        seed: of everything random, 0 to 2^32 - 1.
        report_every: cycles between two lines of progress.
        constants: whether to train twice more, at the first and at the last values held constant.
    """

    problem: str
    dataset: str | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    hyper_learning_rate: float = 1e-2
    method: str = "delta_stn"
    cycles: int = 600
    warmup: int = 40
    seed: int = 0
    report_every: int = 20
    constants: bool = False


def run(config: TuneConfig, out: Path, console: Console, problem: Problem | None = None) -> dict[str, Any]:
    """Tune a problem and write ``result.json``, ``schedule.json``, ``curves.png`` and ``report.html``.

    Args:
        config: the run.
        out: folder of the results, made if missing, and claimed while the run lives.
        console: where progress is shown. Ctrl-C there ends the run early, with the results so far and no constants.
        problem: one that is not among the presets.

    Returns:
        What ``result.json`` holds: the config, the metrics of the best and the last weights on the validation and test
        sets, and the hyperparameters at the best and at the end.

    Raises:
        ValueError: an unknown problem, a setting out of range, or every training step was skipped.
        ClaimError: another process holds ``out``.
        DataError: the data set is missing.
    """
    check_seed(config.seed)
    if problem is None and config.problem not in PROBLEMS:
        raise ValueError(f"unknown problem {config.problem!r}; known: {', '.join(sorted(PROBLEMS))}")
    for name in ("cycles", "report_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.learning_rate is not None:
        check_rate("learning_rate", config.learning_rate)
    with claim.claim(out):
        if problem is None:
            problem = PROBLEMS[config.problem](**({"dataset": config.dataset} if config.dataset else {}))
        return _run(config, problem, out, console)


def _run(config: TuneConfig, problem: Problem, out: Path, console: Console) -> dict[str, Any]:
    weights = _weights(config, problem)
    tuner = make_tuner(
        problem,
        weights=weights,
        response=_adam(config),
        hyper=optax.adam(config.hyper_learning_rate),
        method=config.method,
        train_steps=_TRAIN_STEPS,
        warmup=min(config.warmup, config.cycles // 4),
    )
    k_init, k_run = jax.random.split(jax.random.key(config.seed))
    state, parts, interrupted = jax.jit(lambda key: tuner.init(*problem.init(key)))(k_init), [], False
    data = jax.device_put({split: problem.data[split] for split in ("train", "valid")})
    with progress(console, f"tune {config.problem}", config.cycles) as show:
        try:
            while (done := int(state.cycle)) < config.cycles:
                state, info = tuner.run(state, k_run, data, min(config.report_every, config.cycles - done))
                parts.append(jax.device_get(info))
                loss = np.mean(info.valid_loss)
                show(int(state.cycle), f"validation loss {loss:.4f}  {_values(problem, state.hyper)}")
        except KeyboardInterrupt:  # what was found so far is worth keeping
            if not parts:
                raise
            interrupted = True
    schedule = st.from_run(problem.specs, parts, train_steps=_TRAIN_STEPS)
    skipped = int(sum(part.skipped.sum() for part in parts))
    if skipped >= len(schedule.steps) * _TRAIN_STEPS:
        raise ValueError(f"{config.problem}: in every training step the loss or a gradient was not finite")
    result = {
        "config": dataclasses.asdict(config),
        "cycles_done": len(schedule.steps),
        "best": _judged(problem, standing(config.method, state.best), state.best.hyper),
        "last": _judged(problem, standing(config.method, state), state.hyper),
        "constants": {},
        "skipped_updates": skipped,
        "rolled_back": int(sum(part.rolled_back.sum() for part in parts)),
        "jax": jax.__version__,
    }
    losses = {
        label: _smoothed(np.concatenate([getattr(part, field) for part in parts]))
        for label, field in (("training", "train_loss"), ("validation", "valid_loss"))
    }
    matplotlib.use("Agg")

    def write() -> None:
        write_atomically(out / "result.json", json.dumps(result, indent=1) + "\n")
        write_atomically(out / "report.html", tune_page.render(result, _drawn(losses, schedule, "svg").decode()))

    write_atomically(out / "schedule.json", st.schedule_to_json(schedule))
    write_atomically(out / "curves.png", _drawn(losses, schedule, "png"))
    write()
    if config.constants and not interrupted:
        with contextlib.suppress(KeyboardInterrupt):  # the run itself is written
            result["constants"] = _constants(config, problem, weights, schedule, data)
            write()
    return result


def _constants(
    config: TuneConfig, problem: Problem, weights: Any, schedule: st.Schedule, data: Any
) -> dict[str, dict[str, Any]]:
    """What the network comes to at the run's first and last hyperparameters, held constant for as many steps."""
    found = {}
    k_init, k_run = jax.random.split(jax.random.key(config.seed))
    for name, mean in (("first", schedule.mean[0]), ("last", schedule.mean[-1])):
        replay = st.replay(
            st.constant(problem.specs, mean),
            problem.train_loss,
            lambda data, key: problem.batch(data["train"], key),
            weights,
        )
        num_steps = len(schedule.steps) * _TRAIN_STEPS
        state, _ = replay.run(replay.init(problem.init(k_init)[0]), k_run, data, num_steps=num_steps)
        found[name] = {split: evaluate(problem, state.params, problem.data[split]) for split in ("valid", "test")}
    return found


def table(result: dict[str, Any]) -> Table:
    """What a run found, for the terminal."""
    title = f"{result['config']['problem']}: best weights by validation loss, and the last"
    shown = Table(title=title, caption=tune_page.remarks(result) or None)
    for column in ("", "best", "last", *(f"{name} values, constant" for name in result["constants"])):
        shown.add_column(column, justify="right" if column else "left")
    for split in ("valid", "test"):
        for metric in result["best"][split]:
            row = [f"{result[which][split][metric]:.4f}" for which in ("best", "last")]
            row += [f"{constant[split][metric]:.4f}" for constant in result["constants"].values()]
            shown.add_row(f"{split} {metric}", *row)
    shown.add_section()
    for name in result["best"]["hyperparameters"]:
        shown.add_row(name, *(f"{result[which]['hyperparameters'][name]:.4g}" for which in ("best", "last")))
    return shown


def _weights(config: TuneConfig, problem: Problem) -> Any:
    if problem.weights is not None:
        if (config.optimizer, config.learning_rate) != (None, None):
            raise ValueError(
                f"{config.problem} brings its own optimizer for the weights: leave --optimizer and --learning-rate out"
            )
        return problem.weights
    if config.optimizer is None:
        return _adam(config)
    return learned_opt.load(
        config.optimizer, learning_rate=config.learning_rate, num_steps=config.cycles * _TRAIN_STEPS
    )


def _adam(config: TuneConfig) -> optax.GradientTransformation:
    """For the response, and for the weights that no rule trains; a rule's rate is not Adam's."""
    given = config.learning_rate if config.optimizer is None else None
    return optax.adam(_ADAM_RATE if given is None else given)


def _by_name(problem: Problem, hyper: st.Hyper) -> dict[str, float]:
    found = st.hyperparameters.by_name(st.values(problem.specs, hyper.mean))
    return {name: float(value) for name, value in found.items()}


def _values(problem: Problem, hyper: st.Hyper) -> str:
    return " ".join(f"{name} {value:.2g}" for name, value in _by_name(problem, hyper).items())


def _judged(problem: Problem, params: Any, hyper: st.Hyper) -> dict[str, dict[str, float]]:
    judged = {split: evaluate(problem, params, problem.data[split]) for split in ("valid", "test")}
    return judged | {"hyperparameters": _by_name(problem, hyper)}


def _drawn(losses: dict[str, np.ndarray], schedule: st.Schedule, kind: str) -> bytes:
    """Curves of the losses and of each hyperparameter, with a band of one sigma of its perturbations."""
    found = schedule.values()
    low, high = (schedule._replace(mean=schedule.mean + sign * schedule.sigma).values() for sign in (-1, 1))
    perturbed = {
        name: spec.by == "response" for name, spec in zip(found, st.hyperparameters.tuned(schedule.specs), strict=True)
    }
    columns = 4
    rows = -(-(len(found) + 1) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    first = next(axes)
    for label, values in losses.items():
        first.plot(schedule.steps, values, label=label)
    first.set_title("loss", fontsize=9)
    first.legend(fontsize=7, frameon=False)
    for (name, values), ax in zip(found.items(), axes, strict=False):
        if perturbed[name]:
            ax.fill_between(schedule.steps, low[name], high[name], color="#cccccc", linewidth=0)
        ax.plot(schedule.steps, values, color="#444444")
        ax.set_title(name.replace("_", " "), fontsize=9)
    for ax in figure.axes:
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
        if not ax.lines:
            ax.set_axis_off()
    for ax in figure.axes[-columns:]:
        ax.set_xlabel("training step", fontsize=8)
    contents = io.BytesIO()
    figure.savefig(contents, dpi=120, format=kind)
    return contents.getvalue()


def _smoothed(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """A running mean over a fiftieth of the run, shorter at the ends."""
    width = max(int(share * len(values)), 1)
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
