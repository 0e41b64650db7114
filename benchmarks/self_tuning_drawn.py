"""Where self-tuning ends from twenty starts that are drawn from the search space.

The small CNN and the ten hyperparameters of self_tuning_peers.py, on whole Fashion-MNIST's validation and test images
(12,000 and 10,000) and its first ROWS training images, batches of 32. Every run begins at the same weights, and takes
the same number of steps, over which Adam's rates of the weights and of l fall to 0 by a cosine (that of the weights
rises over the first 200); looked at every LOOK steps, the weights of the least validation loss are tested.

    Delta-STN              from STARTS drawn points, at those of RATES whose mean validation loss is least from CHOICE
                           others
    held                   the values that the best of these runs (by its validation loss) found, held constant in
                           OTHERS runs that differ in their batches only: what of the spread is not the starts'

    learned-opt data fetch fashion_mnist
    python benchmarks/self_tuning_drawn.py     # writes reports/self_tuning/drawn{.csv,.json,.png}, drawn_choice.{...}

Twenty minutes of one core. Finished runs are kept and not repeated; delete drawn.json and drawn_choice.json to start
afresh.
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
RATES = {"0.1, sigma's too": (0.1, 0.1), "0.1": (0.1, 0.0)}  # Adam's for l and for sigma
STARTS, CHOICE, OTHERS, AFTER = 20, 2, 5, 102  # runs; the seeds of the choice follow AFTER
NEAR, NOTHING = 1.02, 0.85  # of the best test loss; the error of a network that has learned nothing


def run(lab, method, seed, steps, rate=None, level=None, after=0):
    """One run: self-tuned at a setting of RATES, or at constant values."""
    start = draw(lab, after + seed) if level is None else level
    keys = jax.random.key(0), jax.random.key(after + seed)
    columns = {"method": method, "seed": seed, "steps": steps}
    if rate is None:
        watch = Watch(lab, np.inf)
        lab.plain(watch, start, *keys, steps)
    else:
        watch, _, guarded = lab.tuned(start, *keys, steps, *RATES[rate])
        columns |= {"rates": rate, **guarded}
    return lab.result(watch, **columns, start=lab.named(start)), watch.curve


def mean_by(runs, name):
    methods = dict.fromkeys(run["method"] for run in runs)
    return {m: float(np.mean([run[name] for run in runs if run["method"] == m])) for m in methods}


def summary(runs):
    own = [run for run in runs if run["method"] == "Delta-STN"]
    best = min(run["test_loss"] for run in own)
    print("| method | runs | validation loss | test loss | test error, % | worst test loss | within 2 % of the best |"
          " learned nothing |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for method in ("Delta-STN", "held"):
        runs_of = [run for run in runs if run["method"] == method]
        losses = [run["test_loss"] for run in runs_of]
        cells = ["{:.4f} ± {:.4f}".format(*interval([run[name] for run in runs_of])) for name in ("valid", "test_loss")]
        cells.append("{:.2f} ± {:.2f}".format(*interval([100 * run["test_error"] for run in runs_of])))
        near, lost = sum(x <= NEAR * best for x in losses), sum(run["test_error"] > NOTHING for run in runs_of)
        print(f"| {method} | {len(losses)} | " + " | ".join(cells) + f" | {max(losses):.4f} | {near} | {lost} |")
    losses = np.sort([run["test_loss"] for run in own]) / best
    print(f"Delta-STN, test losses over the best: {np.round(losses, 3).tolist()}")
    print("not finite, rolled back:", *(sum(run[name] for run in own) for name in ("skipped", "rolled_back")))


def share(name, value):
    """Where a value lies between its bounds, in 0 to 1; by its logarithm where that is its scale."""
    spec = SPACE[name]
    scale = np.log if spec.kind == "log_interval" else np.asarray
    return (scale(value) - scale(spec.low)) / (scale(spec.high) - scale(spec.low))


def plot(runs, curves):
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    colours = dict(zip(("Delta-STN", "held"), plt.cm.tab10.colors, strict=False))
    for (method, seed), curve in curves.items():
        _, steps, best = np.asarray(curve).T
        left.plot(steps, best, color=colours[method], lw=0.9, label=method if seed == 0 else None)
    left.set(xlabel="training step", ylabel="best validation loss so far", yscale="log")
    left.yaxis.set_major_formatter("{x:.2g}")
    left.yaxis.set_minor_formatter("{x:.2g}")
    left.legend(frameon=False, fontsize=8)
    for place, method in enumerate(colours):
        losses = [run["test_loss"] for run in runs if run["method"] == method]
        middle.plot(losses, np.full(len(losses), -place), "|", ms=14, color=colours[method])
    best = min(run["test_loss"] for run in runs if run["method"] == "Delta-STN")
    middle.axvspan(best, NEAR * best, color="0.9", lw=0)
    middle.set_yticks(-np.arange(len(colours)), colours)
    middle.set(xlabel="test loss; grey: within 2 % of the best", xscale="log", ylim=(-1.5, 0.5))
    middle.xaxis.set_major_formatter("{x:.2g}")
    middle.xaxis.set_minor_formatter("{x:.2g}")
    for place, name in enumerate(SPACE):
        for shift, colour, which in ((0.15, "0.6", "start"), (-0.15, colours["Delta-STN"], "chosen")):
            points = [share(name, run[which][name]) for run in runs if run["method"] == "Delta-STN"]
            label = {"start": "start", "chosen": "where it is tested"}[which] if place == 0 else None
            right.plot(points, np.full(len(points), shift - place), ".", ms=4, color=colour, label=label)
    right.set_yticks(-np.arange(len(SPACE)), SPACE)
    right.set_xlabel("share of the range")
    right.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(REPORT / "drawn.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help=f"a multiple of {LOOK}")
    args = parser.parse_args()
    lab = Runs(fashion_cnn(dataset="fashion_mnist", width=4, batch_size=32)._replace(specs=SPACE), ROWS, RATE, LOOK)
    lab.compile()

    def part(name, seeds, methods, do):
        return missing(name, do, seeds, methods, args.steps, ("start", "chosen"), "steps")

    tried, _ = part("drawn_choice", CHOICE, RATES, lambda m, seed: run(lab, m, seed, args.steps, rate=m, after=AFTER))
    means = mean_by(tried, "valid")
    rate = min(means, key=means.get)
    print(f"validation loss by the setting, on other starts: {means}", flush=True)
    runs, _ = part("drawn", STARTS, ["Delta-STN"], lambda m, seed: run(lab, m, seed, args.steps, rate))
    best = min((run for run in runs if run["method"] == "Delta-STN"), key=lambda run: run["valid"])
    found = lab.level_of(best["chosen"])
    runs, curves = part("drawn", OTHERS, ["held"], lambda m, seed: run(lab, m, seed, args.steps, level=found))
    summary(runs)
    plot(runs, curves)


if __name__ == "__main__":
    main()
