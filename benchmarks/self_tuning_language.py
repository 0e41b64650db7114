"""Self-tuning of character models on State of the Union, an LSTM and a small transformer, by equal compute.

TRAIN windows of 32 characters train, the last ones before the tenth of the training split that validates: a small part
of the text. 1,000 windows validate and 2,000 test, evenly spaced over their splits (the test split is the last tenth of
the text). Adam, whose rate rises to 0.003 over 200 steps and falls to 0 by a cosine over a run; batches of 32; the
weights with the least validation loss of all looks are tested, in bits a character.

    untuned defaults             the values that the presets start at, held constant
    untuned draw                 a draw from the space SPACES, held constant
    Delta-STN                    one run from that draw
    search                       Optuna's TPE, from that draw and three others, in Delta-STN's processor time
    search's best, trained anew  a whole run at the values that the search found, on top of its time
    replay                       the schedule of the seed's Delta-STN, in a run of other initial weights and batches

    learned-opt data fetch sotu
    python benchmarks/self_tuning_language.py  # reports/self_tuning/language{.png}, _lstm and _transformer{.csv,.json}

Needs Optuna. Finished runs are kept and not repeated; delete the .json to start afresh.
"""

import argparse

import matplotlib.pyplot as plt
import numpy as np
from self_tuning_runs import HYPER_RATES, METHODS, Comparison, Runs, plot, summary
from self_tuning_search import REPORT

from learned_opt import self_tuning as st
from meta_train.train.problems import char_lstm, char_transformer

COMPARED = ("untuned defaults", "untuned draw", "Delta-STN", "search", "search's best, trained anew", "replay")
TRAIN, VALID, TEST = 1000, 1000, 2000  # windows
RATE, LOOK = 3e-3, 100
COMMON = {
    "dropout_input": st.interval(0.05, 0.0, 0.8),
    "dropout_output": st.interval(0.05, 0.0, 0.8),
    "dropout_characters": st.interval(0.02, 0.0, 0.5),
    "weight_decay": st.log(1e-6, 1e-9, 1e-2),
}
SPACES = {
    "lstm": COMMON | {
        "weight_drop": st.interval(0.05, 0.0, 0.8, per_example=False),
        "activation": st.log(1e-3, 1e-6, 1.0),
        "temporal": st.log(1e-3, 1e-6, 1.0),
    },
    "transformer": COMMON | {
        "dropout_attention": st.interval(0.05, 0.0, 0.8),
        "dropout_dense": st.interval(0.05, 0.0, 0.8),
    },
}  # fmt: skip
MODELS = {
    "lstm": lambda: char_lstm("sotu", width=64, embedding=24),
    "transformer": lambda: char_transformer("sotu", width=48),
}


def problem_of(model):
    made = MODELS[model]()
    text = {split: rows["text"] for split, rows in made.data.items()}
    kept = {"train": text["train"][-TRAIN:]}
    for split, count in (("valid", VALID), ("test", TEST)):
        kept[split] = text[split][np.linspace(0, len(text[split]) - 1, count).astype(int)]
    return made._replace(specs=SPACES[model], data={split: {"text": rows} for split, rows in kept.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help=f"of a run: a multiple of {4 * LOOK}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=COMPARED, choices=METHODS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args()
    size, shape = (11, 4.2 * len(args.models)), (len(args.models), 2)
    fig, axes = plt.subplots(*shape, figsize=size, width_ratios=(3, 2), layout="constrained", squeeze=False)
    for model, own in zip(args.models, axes, strict=True):
        lab = Runs(problem_of(model), None, RATE, LOOK)
        lab.compile()
        study = Comparison(f"language_{model}", lab, args.steps, HYPER_RATES, drawn=True)
        runs, curves = study.missing(args.seeds, args.methods)
        print(model)
        summary(runs, curves, "test_loss", "test bits a character", np.log(2), 3)
        plot(own, runs, curves, "test_loss", "test bits a character", np.log(2))
        own[0].set_title(model)
    axes[0, 0].legend(frameon=False, fontsize=8)
    fig.savefig(REPORT / "language.png", dpi=110)


if __name__ == "__main__":
    main()
