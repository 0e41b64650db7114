"""Self-tuning of a residual network on whole Fashion-MNIST, against population-based training and searches.

The network of `learned-opt tune fashion-resnet`, of 78,000 parameters, with its ten hyperparameters: 48,000 images
train, 12,000 validate, 10,000 test. Batches of 64; Adam, whose rate rises to 0.003 over 200 steps and falls to 0 by a
cosine over a run; the weights with the least validation loss of all looks are tested. Every method has about the
processor time of Delta-STN, which is that of one plain run of twice its steps.

    untuned defaults, twice as long   the values that the preset starts at, held constant: an expert's guess
    Delta-STN                         one run from a draw of the seed's own
    Delta-STN, from the defaults      one run from what the others are not told
    PBT                               four members from draws, of half the steps each
    ASHA                              draws, successive halving, trials of up to half the steps
    search                            TPE, four draws first, trials of a quarter of the steps
    search's best, trained anew       a whole run at the values that the search found, on top of its time

    learned-opt data fetch fashion_mnist
    python benchmarks/self_tuning_resnet.py    # writes reports/self_tuning/resnet{.csv,.json,.png}; needs Optuna
    python benchmarks/self_tuning_resnet.py --budget 4    # runs of four times the steps: resnet_4x.*

Half an hour of one core a seed, and at four times the steps two hours. Finished runs are kept and not repeated; delete
the .json to start afresh.
"""

import argparse

import matplotlib.pyplot as plt
from self_tuning_runs import HYPER_RATES, METHODS, Comparison, Runs, plot, summary, within
from self_tuning_search import REPORT

from meta_train.train.problems import fashion_resnet

COMPARED = (
    "untuned defaults, twice as long",
    "Delta-STN",
    "Delta-STN, from the defaults",
    "PBT",
    "ASHA",
    "search",
    "search's best, trained anew",
)
STEPS, RATE, LOOK = 4000, 3e-3, 500


def problem():
    made = fashion_resnet()
    return made._replace(specs=within(made.specs))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=1, help=f"times {STEPS} steps a run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=COMPARED, choices=METHODS)
    args = parser.parse_args()
    lab = Runs(problem(), None, RATE, LOOK)
    lab.compile()
    name = "resnet" if args.budget == 1 else f"resnet_{args.budget}x"
    study = Comparison(name, lab, args.budget * STEPS, HYPER_RATES, drawn=True)
    runs, curves = study.missing(args.seeds, args.methods)
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(3, 2), layout="constrained")
    for column, title, unit, digits in (
        ("test_error", "test error, %", 0.01, 2),
        ("end_error", "test error at the end, %", 0.01, 2),
        ("test_loss", "test loss", 1, 3),
    ):
        summary(runs, curves, column, title, unit, digits)
    plot(axes, runs, curves, "test_loss", "test loss", 1)
    axes[0].legend(frameon=False, fontsize=8)
    fig.savefig(REPORT / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
