"""Where self-tuning ends from twenty starts that are drawn from the search space.

The small CNN and the ten hyperparameters of self_tuning_peers.py, on whole Fashion-MNIST's validation and test images
(12,000 and 10,000) and its first ROWS training images, batches of 32. Every run begins at the same weights, and takes
the same number of steps, over which Adam's rates of the weights and of l fall to 0 by a cosine (that of the weights
rises over the first 200); looked at every LOOK steps, the weights of the least validation loss are tested.

    Delta-STN              from STARTS drawn points, at that of its SETTINGS whose mean validation loss is least from
                           CHOICE others
    Delta-STN, mild first  the same, but all regularisation is off (MILD) in the first 200 steps
    held                   the values that the best of these runs (by its validation loss) found, held constant in
                           OTHERS runs that differ in their batches only: what of the spread is not the starts'

    learned-opt data fetch fashion_mnist
    python benchmarks/self_tuning_drawn.py     # writes reports/self_tuning/drawn{.csv,.json,.png}, drawn_choice.{...}
    python benchmarks/self_tuning_drawn.py --name drawn_8000 --steps 8000     # the same under another name

Forty minutes of one core, and four times as long for 8,000 steps. Finished runs are kept and not repeated; delete
drawn.json and drawn_choice.json to start afresh.
"""

import argparse

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from self_tuning_peers import SPACE, draw
from self_tuning_runs import Runs
from self_tuning_search import REPORT, Watch, interval, missing

from meta_train.train.problems import fashion_cnn

ROWS, RATE, LOOK = 4800, 3e-3, 250
MILD = {name: spec.low for name, spec in SPACE.items()}
SETTINGS = {  # Adam's rates for l and for sigma, and whether regularisation is off at first
    "Delta-STN": {"0.1, sigma's too": (0.1, 0.1, False), "0.1": (0.1, 0.0, False)},
    "Delta-STN, mild first": {"mild, 0.1": (0.1, 0.0, True), "mild, 0.3": (0.3, 0.0, True)},
}
ALL = {name: setting for settings in SETTINGS.values() for name, setting in settings.items()}
STARTS, CHOICE, OTHERS, AFTER = 20, 2, 5, 102  # runs; the seeds of the choice follow AFTER
NEAR, NOTHING = 1.02, 0.85  # of the best test loss; the error of a network that has learned nothing


def run(lab, method, seed, steps, setting=None, level=None, after=0):
    """One run: self-tuned at one of SETTINGS, or at constant values."""
    start = draw(lab, after + seed) if level is None else level
    keys = jax.random.key(0), jax.random.key(after + seed)
    columns = {"method": method, "seed": seed, "steps": steps}
    if setting is None:
        watch = Watch(lab, np.inf)
        lab.plain(watch, start, *keys, steps)
    else:
        watch, _, guarded = lab.tuned(start, *keys, steps, *ALL[setting])
        columns |= {"rates": setting, **guarded}
    return lab.result(watch, **columns, start=lab.named(start)), watch.curve


def mean_by(runs, name):
    methods = dict.fromkeys(run["method"] for run in runs)
    return {m: float(np.mean([run[name] for run in runs if run["method"] == m])) for m in methods}


def by_method(runs):
    """Lists of runs, the tuned ones first."""
    return {method: found for method in (*SETTINGS, "held") if (found := [r for r in runs if r["method"] == method])}


def summary(runs):
    best = min(run["test_loss"] for run in runs if run["method"] != "held")
    print("| method | runs | validation loss | test loss | test error, % | worst test loss | within 2 % of the best |"
          " learned nothing |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for method, runs_of in by_method(runs).items():
        losses = [run["test_loss"] for run in runs_of]
        cells = ["{:.4f} ± {:.4f}".format(*interval([run[name] for run in runs_of])) for name in ("valid", "test_loss")]
        cells.append("{:.2f} ± {:.2f}".format(*interval([100 * run["test_error"] for run in runs_of])))
        near, lost = sum(x <= NEAR * best for x in losses), sum(run["test_error"] > NOTHING for run in runs_of)
        print(f"| {method} | {len(losses)} | " + " | ".join(cells) + f" | {max(losses):.4f} | {near} | {lost} |")
        print(f"  test losses over the best: {np.round(np.sort(losses) / best, 3).tolist()}")
    print("not finite, rolled back:", *(sum(run.get(name, 0) for run in runs) for name in ("skipped", "rolled_back")))


def share(name, value):
    """Where a value lies between its bounds, in 0 to 1; by its logarithm where that is its scale."""
    spec = SPACE[name]
    scale = np.log if spec.kind == "log_interval" else np.asarray
    return (scale(value) - scale(spec.low)) / (scale(spec.high) - scale(spec.low))


def plot(name, runs, curves):
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    methods = by_method(runs)
    colours = dict(zip((*SETTINGS, "held"), plt.cm.tab10.colors, strict=False))
    for (method, seed), curve in curves.items():
        _, steps, best = np.asarray(curve).T
        left.plot(steps, best, color=colours[method], lw=0.9, label=method if seed == 0 else None)
    left.set(xlabel="training step", ylabel="best validation loss so far", yscale="log")
    left.yaxis.set_major_formatter("{x:.2g}")
    left.yaxis.set_minor_formatter("{x:.2g}")
    left.legend(frameon=False, fontsize=8)
    for place, (method, found) in enumerate(methods.items()):
        losses = [run["test_loss"] for run in found]
        middle.plot(losses, np.full(len(losses), -place), "|", ms=14, color=colours[method])
    best = min(run["test_loss"] for run in runs if run["method"] != "held")
    middle.axvspan(best, NEAR * best, color="0.9", lw=0)
    middle.set_yticks(-np.arange(len(methods)), methods)
    middle.set(xlabel="test loss; grey: within 2 % of the best", xscale="log", ylim=(0.5 - len(methods), 0.5))
    middle.xaxis.set_major_formatter("{x:.2g}")
    middle.xaxis.set_minor_formatter("{x:.2g}")
    shown = [method for method in methods if method != "held"]
    rows = [("start", shown[0], "start", "0.6")] + [(f"{m}, tested", m, "chosen", colours[m]) for m in shown]
    for place, hyperparameter in enumerate(SPACE):
        for number, (label, method, which, colour) in enumerate(rows):
            points = [share(hyperparameter, run[which][hyperparameter]) for run in methods[method]]
            height = np.full(len(points), 0.25 - 0.5 * number / (len(rows) - 1) - place)
            right.plot(points, height, ".", ms=4, color=colour, label=label if place == 0 else None)
    right.set_yticks(-np.arange(len(SPACE)), SPACE)
    right.set_xlabel("share of the range")
    right.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(rows))
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(REPORT / f"{name}.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help=f"a multiple of {LOOK}")
    parser.add_argument("--name", default="drawn", help="of the files")
    parser.add_argument("--methods", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()
    problem = fashion_cnn(dataset="fashion_mnist", width=4, batch_size=32)._replace(specs=SPACE)
    lab = Runs(problem, ROWS, RATE, LOOK, mild=MILD)
    lab.compile()

    def part(name, seeds, methods, do):
        return missing(name, do, seeds, methods, args.steps, ("start", "chosen"), "steps")

    def tried(setting, seed):
        return run(lab, setting, seed, args.steps, setting, after=AFTER)

    for method in args.methods:
        means = mean_by(part(f"{args.name}_choice", CHOICE, SETTINGS[method], tried)[0], "valid")
        setting = min(SETTINGS[method], key=means.get)
        print(f"{method}: {setting}; validation losses on other starts: {means}", flush=True)
        runs, _ = part(args.name, STARTS, [method], lambda m, seed, s=setting: run(lab, m, seed, args.steps, s))
    first = min((run for run in runs if run["method"] == args.methods[0]), key=lambda run: run["valid"])
    found = lab.level_of(first["chosen"])
    runs, curves = part(args.name, OTHERS, ["held"], lambda m, seed: run(lab, m, seed, args.steps, level=found))
    summary(runs)
    plot(args.name, runs, curves)


if __name__ == "__main__":
    main()
