"""Self-tuning against population-based training and searches that start where it does: drawn from the search space.

Fashion-MNIST as it comes with the package (4,800 images train, 1,200 validate, 1,000 test), the small CNN of
`learned-opt tune fashion-cnn` with 4 and 8 channels, batches of 32, Adam at 0.003, the ten hyperparameters of SPACE.

    untuned defaults       the values that the specs start at, held constant: an expert's guess, which no search gets
    untuned draw           one draw from the space, held constant: what Delta-STN below starts from, seed by seed
    Delta-STN              starts at that draw and tunes while it trains
    Delta-STN, defaults    starts at the defaults, which the others are not told
    PBT, 4 or 8            population-based training with so many members, self_tuning.population, from draws
    random, 4 or 16        so many trials at draws
    TPE, 8                 Optuna's TPE, the first four trials drawn
    ASHA                   draws, Optuna's successive halving, trials of up to a quarter of the time
    Hyperband, TPE         TPE with Optuna's Hyperband pruner, as BOHB pairs them; trials of up to a quarter of the time

Every method has the same processor time a run (compiling excluded, looking at the validation set included). The best
weights by the whole validation set, looked at every CHUNK steps (PBT: after a round of CHUNK steps of each member), are
tested. Numbers of trials and members come from the time: one run at constant values takes about STEPS steps in it.
Delta-STN's settings are those of self_tuning_search.py, set there on other seeds and fewer images; nothing was tuned
here.

    python benchmarks/self_tuning_peers.py       # writes reports/self_tuning/peers{.csv,.json,.png}; needs Optuna
    python benchmarks/self_tuning_peers.py --budget 4    # four times the time, trials four times as long: peers_4x.*

Finished runs are kept and not repeated; delete peers.json to start afresh.
"""

import argparse
import functools
import itertools

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from self_tuning_search import CHUNK, REPORT, Lab, Watch, interval, load_optuna, missing

from learned_opt import self_tuning as st
from meta_train.train.problems import GREY, fashion_cnn, make_tuner

SECONDS = 20.0  # processor time a run
STEPS = 4000  # that a plain run takes in it, about: what the lengths of trials are parts of
SPACE = {
    "dropout_conv1": st.interval(0.05, 0.0, 0.8),
    "dropout_conv2": st.interval(0.05, 0.0, 0.8),
    "dropout_dense": st.interval(0.1, 0.0, 0.8),
    **GREY,
}
METHODS = {
    "untuned defaults": {"kind": "constant", "drawn": False},
    "untuned draw": {"kind": "constant", "drawn": True},
    "Delta-STN": {"kind": "delta_stn", "drawn": True},
    "Delta-STN, defaults": {"kind": "delta_stn", "drawn": False},
    "PBT, 4": {"kind": "pbt", "members": 4},
    "PBT, 8": {"kind": "pbt", "members": 8},
    "random, 4": {"kind": "search", "trial": STEPS // 4},
    "random, 16": {"kind": "search", "trial": STEPS // 16},
    "TPE, 8": {"kind": "search", "trial": STEPS // 8, "sampler": "tpe"},
    "ASHA": {"kind": "search", "trial": STEPS // 4, "pruner": "asha"},
    "Hyperband, TPE": {"kind": "search", "trial": STEPS // 4, "sampler": "tpe", "pruner": "hyperband"},
}
OWN = "Delta-STN"


def draw(lab, seed, trial=0):
    """The point of the space that a seed's trial starts at; trial 0 is Delta-STN's start too."""
    return st.draw(lab.specs, jax.random.fold_in(jax.random.key(1000 + seed), trial))


def constant(lab, seed, seconds, drawn):
    level = draw(lab, seed) if drawn else lab.level
    lab.trial(Watch(lab, seconds), level, jax.random.key(seed), CHUNK)  # compiled
    watch = Watch(lab, seconds)
    lab.trial(watch, level, jax.random.key(seed), 10**9)
    return watch, 1


@functools.cache
def self_tuner(lab, hyper_rate):
    tuner = make_tuner(lab.problem, weights=lab.adam, hyper=optax.adam(hyper_rate), warmup=CHUNK // 5)
    return jax.jit(lambda key: tuner.init(*lab.problem.init(key))), tuner.run


def delta_stn(lab, seed, seconds, drawn, hyper_rate=0.03):
    init, run = self_tuner(lab, hyper_rate)
    k_init, k_run = jax.random.split(jax.random.key(seed))
    begin = init(k_init)
    if drawn:
        hyper = begin.hyper._replace(mean=draw(lab, seed))
        begin = begin._replace(hyper=hyper, best=begin.best._replace(hyper=hyper))
    jax.block_until_ready(run(begin, k_run, lab.data, CHUNK // 5))  # compiled
    watch, state = Watch(lab, seconds), begin
    while watch.left():
        state, info = run(state, k_run, lab.data, CHUNK // 5)
        watch.look(state.params, info.mean[-1])
    return watch, 1


@functools.cache
def a_population(lab, members):
    return st.population(
        lab.specs, lab.problem.train_loss, lab.problem.valid_loss,
        lambda data, key: lab.problem.batch(data["train"], key), lambda data, key: data["valid"],
        weights=lab.adam, members=members, train_steps=CHUNK,
    )  # fmt: skip


def pbt(lab, seed, seconds, members):
    made = a_population(lab, members)
    k_init, k_run = jax.random.split(jax.random.key(seed))
    begin = made.init(k_init, lambda key: lab.problem.init(key)[0])
    jax.block_until_ready(made.run(begin, k_run, lab.data, 1))  # compiled
    watch, state = Watch(lab, seconds), begin
    while watch.left():
        state, _ = made.run(state, k_run, lab.data, 1)
        watch.look(*made.best(state), steps=members * CHUNK)
    return watch, members


def search(lab, seed, seconds, trial, sampler="random", pruner=None):
    optuna = load_optuna()
    names, key = st.names(lab.specs), jax.random.key(seed)
    lab.trial(Watch(lab, seconds), lab.level, key, CHUNK)  # compiled
    pruners = {
        None: optuna.pruners.NopPruner,
        "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=3),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(2, trial // CHUNK, 3),
    }
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
        if sampler == "tpe"
        else optuna.samplers.RandomSampler(seed=seed),
        pruner=pruners[pruner](),
    )
    first = jax.nn.sigmoid(draw(lab, seed))
    study.enqueue_trial({name: float(x) for name, x in zip(names, first, strict=True)})
    watch = Watch(lab, seconds)
    for i in itertools.count():
        if not watch.left():
            return watch, i
        asked = study.ask()
        # uniform between the bounds, or their logarithms: what self_tuning.draw draws
        share = jnp.asarray([asked.suggest_float(name, 0.0067, 0.9933) for name in names], jnp.float32)

        def report(loss, chunk, asked=asked):
            asked.report(loss, chunk)
            return pruner is not None and asked.should_prune()

        level = jnp.log(share) - jnp.log1p(-share)
        study.tell(asked, lab.trial(watch, level, jax.random.fold_in(key, i), trial, report))


KINDS = {"constant": constant, "delta_stn": delta_stn, "pbt": pbt, "search": search}


def record(lab, method, seed, budget):
    options, seconds = dict(METHODS[method]), budget * SECONDS
    if "trial" in options:
        options["trial"] *= budget
    watch, trials = KINDS[options.pop("kind")](lab, seed, seconds, **options)
    test = jax.device_get(lab.judge(watch.params, lab.data["test"]))
    chosen = {k: float(f"{float(v):.3g}") for k, v in st.values(lab.specs, jnp.asarray(watch.level)).items()}
    result = {
        "method": method, "seed": seed, "seconds": seconds, "trials": trials, "steps": watch.steps,
        "valid": round(watch.best, 4), "test": round(float(test["loss"]), 4),
        "accuracy": round(1 - float(test["error"]), 4), "chosen": chosen,
    }  # fmt: skip
    return result, watch.curve


def paired(runs, method, name):
    """The differences, seed by seed: Delta-STN's less another method's."""
    own, other = ({run["seed"]: run[name] for run in runs if run["method"] == m} for m in (OWN, method))
    return [own[seed] - other[seed] for seed in own.keys() & other.keys()]


def at_steps(curve, steps):
    """The best validation loss after so many training steps; NaN before the first look."""
    return min((best for _, taken, best in curve if taken <= steps), default=np.nan)


def summary(runs, curves):
    """Print the table, the method that is furthest ahead of Delta-STN first."""
    fewest = min(run["steps"] for run in runs)
    print(f"| method | seeds | trials | steps | validation loss | after {fewest} steps | test loss | test accuracy, % |"
          f" {OWN}'s test loss less its |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    order = sorted(
        {run["method"] for run in runs}, key=lambda m: np.mean([run["test"] for run in runs if run["method"] == m])
    )
    for method in order:
        own = [run for run in runs if run["method"] == method]
        cells = [
            interval([run["valid"] for run in own]),
            interval([at_steps(curves[method, run["seed"]], fewest) for run in own]),
            interval([run["test"] for run in own]),
        ]
        text = [f"{mean:.3f} ± {half:.3f}" for mean, half in cells]
        mean, half = interval([100 * run["accuracy"] for run in own])
        text.append(f"{mean:.1f} ± {half:.1f}")
        text.append("" if method == OWN else "{:+.3f} ± {:.3f}".format(*interval(paired(runs, method, "test"))))
        trials, steps = (np.mean([run[name] for run in own]) for name in ("trials", "steps"))
        print(f"| {method} | {len(own)} | {trials:.1f} | {steps:.0f} | " + " | ".join(text) + " |")


def plot(name, runs, curves):
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), width_ratios=(3, 2), layout="constrained")
    found = [method for method in METHODS if any(run["method"] == method for run in runs)]
    colours = dict(zip(found, plt.cm.tab20(np.arange(0, 20) % 20), strict=False))
    grid = np.linspace(1, max(run["seconds"] for run in runs), 200)
    for place, method in enumerate(found):
        own = [run for run in runs if run["method"] == method]
        paths = []
        for run in own:
            times, _, best = np.asarray(curves[method, run["seed"]]).T
            at = np.searchsorted(times, grid, side="right") - 1
            paths.append(np.where(at >= 0, best[at], np.nan))
        style = {"lw": 2.4} if "STN" in method else {"lw": 1.2, "ls": "--" if "untuned" in method else "-"}
        left.plot(grid, np.mean(paths, 0), color=colours[method], label=method, **style)
        tests = [run["test"] for run in own]
        mean, half = interval(tests)
        right.errorbar(mean, -place, xerr=half, fmt="o", color=colours[method], capsize=3)
        right.plot(tests, np.full(len(own), -place - 0.3), "|", color=colours[method])
    left.set(
        xlabel="processor time, s", ylabel="best validation loss so far, mean (colours as on the right)", yscale="log"
    )
    left.set_ylim(None, 2.2)
    left.yaxis.set_major_formatter("{x:.2g}")
    left.yaxis.set_minor_formatter("{x:.2g}")
    right.set_yticks(-np.arange(len(found)), found)
    right.set_xlabel("test loss; mean, 95 % interval, runs")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(REPORT / f"{name}.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=1, help=f"times {SECONDS:g} s of processor time a run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    lab = Lab(fashion_cnn(width=4, batch_size=32)._replace(specs=SPACE), rows=None)
    name = "peers" if args.budget == 1 else f"peers_{args.budget}x"

    def do(method, seed):
        return record(lab, method, seed, args.budget)

    runs, curves = missing(name, do, args.seeds, args.methods, args.budget * SECONDS)
    summary(runs, curves)
    plot(name, runs, curves)


if __name__ == "__main__":
    main()
