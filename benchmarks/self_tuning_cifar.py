"""Self-tuning on few images of CIFAR-10, shrunk to 16 x 16: against the values it starts at, and a search.

The network of `learned-opt tune cifar-cnn` with its fifteen hyperparameters, the first TRAIN training images, 2,000
that validate and all 10,000 test images. Adam, whose rate rises to 0.003 over 200 steps and falls to 0 by a cosine over
a run; batches of 32; the weights with the least validation loss of all looks are tested, and those at the end.

    untuned defaults             the preset's starting values as they are, held constant
    ..., twice as long           in about the time of Delta-STN, whose steps are dearer
    Delta-STN                    one run from the defaults
    search                       Optuna's TPE, from the defaults and three draws, in Delta-STN's processor time
    ..., trained anew            a whole run at the values that the search found best; its time comes on top

    learned-opt data fetch cifar10
    python benchmarks/self_tuning_cifar.py     # writes reports/self_tuning/cifar{.csv,.json,.png}; needs Optuna
    python benchmarks/self_tuning_cifar.py --name cifar_2400 --steps 2400

Finished runs are kept and not repeated; delete the .json to start afresh.
"""

import argparse

import matplotlib.pyplot as plt
from self_tuning_runs import HYPER_RATES, METHODS, Comparison, Runs, less, plot, summary, within
from self_tuning_search import REPORT, interval

from meta_train.train.problems import cifar_cnn

TRAIN, VALID = 1000, 2000
COMPARED = ("untuned defaults", "untuned defaults, twice as long", "Delta-STN", "search", "search's best, trained anew")
RATE, LOOK, WIDTH = 3e-3, 75, 16
BOUNDS = {"translation": (0.0, 3.0), "cutout_length": (0.0, 8.0)}  # half of the preset's: so are the images


def problem():
    made = cifar_cnn(width=WIDTH, batch_size=32, shrink=2)
    valid = {name: rows[:VALID] for name, rows in made.data["valid"].items()}
    return made._replace(specs=within(made.specs, BOUNDS), data=made.data | {"valid": valid})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help=f"of a run: a multiple of {4 * LOOK}")
    parser.add_argument("--name", default="cifar", help="of the files")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=COMPARED, choices=METHODS)
    args = parser.parse_args()
    lab = Runs(problem(), TRAIN, RATE, LOOK)
    lab.compile()
    runs, curves = Comparison(args.name, lab, args.steps, HYPER_RATES, drawn=False).missing(args.seeds, args.methods)
    for name, title in (("test_error", "test error, %"), ("end_error", "test error at the end, %")):
        summary(runs, curves, name, title, 0.01, 2)
    for method in {"untuned defaults", "untuned defaults, twice as long"} & {run["method"] for run in runs}:
        for name in ("test_error", "end_error"):
            own = {run["seed"]: run[name] for run in runs if run["method"] == method}
            ratios = [1 + x / error for x, error in zip(less(runs, method, name), own.values(), strict=True)]
            print(f"{name} over that of {method}: " + "{:.3f} ± {:.3f}".format(*interval(ratios)))
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(3, 2), layout="constrained")
    plot(axes, runs, curves, "test_error", "test error, %", 0.01)
    axes[0].legend(frameon=False, fontsize=8)
    fig.savefig(REPORT / f"{args.name}.png", dpi=110)


if __name__ == "__main__":
    main()
