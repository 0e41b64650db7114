"""What meta-training is worth, checkpoint by checkpoint: validation losses over those of the fresh rule.

Runs every checkpoint of finished runs of one rule, and what they started from, on the suite `validation`, 500 steps and
three seeds; the ratio is a geometric mean over the tasks with data. A line through the ratio's logarithm against that
of the meta-steps says what more of them would buy. Writes checkpoints.csv and .png to a report, for `flagship-light`:

    for seed in 0 1 2; do python scripts/pretrain.py flagship-light --seed $seed; done
    python scripts/checkpoints.py reports/light runs/pretrain/flagship-light-0 runs/pretrain/seed-[12]/flagship-light-0
"""

import argparse
import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import orbax.checkpoint as ocp

import learned_opt
from learned_opt import store
from learned_opt.base import LearnedOptimizer, Theta
from meta_train.bench.contenders import Contender
from meta_train.bench.execution import compile_run
from meta_train.train import checkpoint
from meta_train.train import config as configs
from tasks import suites

STEPS, SEEDS = 500, range(2_000_000, 2_000_003)
_ALL = "geometric mean"


def thetas(run: Path) -> dict[int, Theta]:
    """The trained meta-parameters of every checkpoint of a run."""
    manager = checkpoint.manager(run, keep=1000)
    return {
        step: manager.restore(step, args=ocp.args.StandardRestore())["state"]["theta"]
        for step in sorted(manager.all_steps())
    }


def losses(entry: suites.Entry, rule: LearnedOptimizer, tried: list[Theta]) -> np.ndarray:
    """Each theta's validation loss on a task, a mean over seeds; compiled once for all."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tried)

    def make(number, num_steps):
        return rule.build(jax.tree.map(lambda x: x[number.astype(int)], stacked), num_steps=num_steps)

    run = compile_run(entry, Contender("numbered", make, ()), STEPS, jax.devices()[0], 1)
    pairs = [(number, seed) for number in range(len(tried)) for seed in SEEDS]
    return run.losses(*zip(*pairs, strict=True))[1].reshape(len(tried), -1).mean(1)


def line(meta_steps: np.ndarray, ratios: np.ndarray) -> tuple[float, float, float]:
    """Least squares of ``log ratio`` on ``log10 meta_steps``: offset, slope, and the slope's standard error."""
    (slope, offset), covariance = np.polyfit(np.log10(meta_steps), np.log(ratios), 1, cov=True)
    return offset, slope, covariance[0, 0] ** 0.5


def draw(rows: list[dict], fit: tuple[float, float, float], path: Path) -> None:
    """A curve a run, and the line."""
    figure, axes = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    for run in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == run]
        axes.plot([row["meta_steps"] for row in mine], [float(row["ratio"]) for row in mine], "o-", label=f"run {run}")
    ends = np.array([min(row["meta_steps"] for row in rows), 10 * max(row["meta_steps"] for row in rows)])
    axes.plot(ends, np.exp(fit[0] + fit[1] * np.log10(ends)), "k--", lw=1, label="line, to ten times the meta-steps")
    axes.axhline(1, color="grey", lw=0.8)
    axes.set(xscale="log", xlabel="meta-steps", ylabel="validation loss over the fresh rule's")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs them all, and writes the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="folder to write to")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of `learned-opt train`")
    arguments = parser.parse_args()
    report, runs = arguments.report, arguments.runs
    config, *others = [configs.read(run / "config.json") for run in runs]
    if any((other.rule, other.rule_kwargs) != (config.rule, config.rule_kwargs) for other in others):
        parser.error("the runs are of different rules")
    rule = learned_opt.RULES[config.rule](**config.rule_kwargs)
    fresh = store.read(config.init).theta if config.init else rule.init(jax.random.key(0))
    tried = {("fresh", 0): fresh}
    for number, run in enumerate(runs):
        tried |= {(str(number), step): fresh | theta for step, theta in thetas(run).items()}
    entries = [entry for entry in suites.suite("validation", held_out=True) if entry.family != "quadratic"]
    found = {entry.name: losses(entry, rule, list(tried.values())) for entry in entries}
    rows = []
    for number, (run, step) in enumerate(list(tried)[1:], 1):
        ratios = {task: valid[number] / valid[0] for task, valid in found.items()}
        ratios[_ALL] = float(np.exp(np.mean(np.log(list(ratios.values())))))
        rows += [{"run": run, "meta_steps": step, "task": task, "ratio": f"{x:.4f}"} for task, x in ratios.items()]
    report.mkdir(parents=True, exist_ok=True)
    with (report / "checkpoints.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    means = [row for row in rows if row["task"] == _ALL]
    fit = line(np.array([row["meta_steps"] for row in means]), np.array([float(row["ratio"]) for row in means]))
    draw(means, fit, report / "checkpoints.png")
    print(f"ten times the meta-steps: the ratio times {np.exp(fit[1]):.3f} (slope {fit[1]:.4f} +- {fit[2]:.4f})")


if __name__ == "__main__":
    main()
