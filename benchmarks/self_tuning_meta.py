r"""Meta-training through the response: a rule fine-tuned by the validation loss of self-tuned networks, and unchanged.

`adafac-mlp` is fine-tuned on the two small networks of the suite `self_tuned`, a CNN on Fashion-MNIST and an LSTM on
State of the Union, as by this command (the script does it itself):

    learned-opt train --rule adafac_mlp --suite self_tuned --estimator nres --unroll 5 --particles 2 \
      --meta-steps 60 --set init=adafac-mlp --set learner=self_tuning --set min_length=20 --set max_length=100 \
      --set bench_suite= --workdir runs/self_tuned

Then both rules train NETWORKS, which it was not tuned on, while their hyperparameters are tuned (the tuner as in
fine-tuning). Their steps are multiplied by a factor: that of FACTORS with the least mean validation loss of CHOICE
seeds, from 100, for either rule; the five seeds that are reported are run with both rules at the factors of both, and
at 1, the rules as they are. Losses are of the weights at the end, on the whole validation and test sets.

    python benchmarks/self_tuning_meta.py      # writes reports/self_tuning/meta{.csv,.json,.png}, meta_training.csv

Twenty minutes of one core. Finished runs are kept and not repeated, and fine-tuning goes on where it was stopped;
delete meta.json, meta_choice.json and runs/self_tuned to start afresh.
"""

import argparse
import functools
import itertools
import json
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import tables
from self_tuning_runs import CYCLE, strips
from self_tuning_search import REPORT, Lab, Watch, interval, missing

from learned_opt import store
from meta_train.train import config, loop
from meta_train.train.problems import char_lstm, char_transformer, make_tuner

START, WORKDIR = "adafac-mlp", Path("runs/self_tuned")
FINE_TUNING = config.Config(
    rule="adafac_mlp", init=START, learner="self_tuning", suite="self_tuned", estimator="nres", meta_steps=60,
    particles=2, unroll=5, min_length=20, max_length=100, outer_learning_rate=1e-3, checkpoint_every=25, log_every=5,
    bench_suite="",
)  # fmt: skip
NETWORKS = {
    "LSTM, Moby Dick": lambda: char_lstm("moby_dick_small", width=48, embedding=16, length=24, batch_size=16),
    "transformer, King James Bible": lambda: char_transformer("kjv_small", width=32, batch_size=16),
}
FACTORS, CHOICE, LOOK = (0.25, 0.5, 1.0, 2.0, 4.0), 1, 50
RULES = ("unchanged", "fine-tuned")


class Network(Lab):
    """A Lab that a rule trains; theta and the factor are arguments of what is compiled."""

    def __init__(self, make, rule):
        made = make()
        whole = lambda rows: jax.tree.map(lambda x: x[: len(x) // 100 * 100], rows)  # noqa: E731
        super().__init__(made._replace(data={split: whole(rows) for split, rows in made.data.items()}), rows=None)
        self.rule = rule

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def part(self, theta, factor, cycles, state, key):
        return self.tuner(theta, factor, cycles).run(state, key, self.data, LOOK)[0]

    def tuner(self, theta, factor, cycles):
        weights = optax.chain(self.rule.build(theta, num_steps=CYCLE * cycles), optax.scale(factor))
        return make_tuner(self.problem, weights=weights, response=optax.adam(1e-3), guard=None, trust=None)

    def run(self, theta, factor, cycles, seed):
        k_init, k_run = jax.random.split(jax.random.key(seed))
        watch, state = Watch(self, np.inf), self.tuner(theta, factor, cycles).init(*self.start(k_init))
        for _ in range(0, cycles, LOOK):
            state = self.part(theta, factor, cycles, state, k_run)
            last = watch.look(state.params, state.hyper.mean, CYCLE * LOOK)
        return watch, last, float(self.judge(state.params, self.data["test"])["loss"])


def fine_tuned():
    """The fine-tuned rule's theta; the losses while it was tuned go to a table."""
    done = (WORKDIR / "rule").exists() and store.read_record(WORKDIR / "rule")["config"]["meta_steps"]
    if done != FINE_TUNING.meta_steps:
        loop.run(FINE_TUNING, WORKDIR, resume=WORKDIR.exists())
    metrics = [json.loads(line) for line in (WORKDIR / "metrics.jsonl").read_text().splitlines()]
    columns = [name for name in metrics[0] if name.startswith("loss/")]
    tables.write(REPORT / "meta_training.csv", tables.shortened(metrics, 5), without=columns)
    return store.read(WORKDIR / "rule").theta


def named(network, rule, factor):
    return f"{network}; {rule}; {factor}"


def study(networks, thetas, cycles, seeds):
    """All runs; return those that are reported, their factors by network, and the chosen ones by network and rule."""

    def do(method, seed, after=0):
        name, rule, factor = method.split("; ")
        network = networks[name]()
        watch, valid, test = network.run(thetas[rule], float(factor), cycles, after + seed)
        result = {"method": method, "seed": seed, "cycles": cycles, "valid": round(valid, 4), "test": round(test, 4)}
        return result, watch.curve

    every = [named(*x) for x in itertools.product(NETWORKS, RULES, FACTORS)]
    tried, _ = missing("meta_choice", functools.partial(do, after=100), CHOICE, every, cycles, unit="cycles")
    means = {m: np.mean([run["valid"] for run in tried if run["method"] == m]) for m in every}
    means = {m: loss if np.isfinite(loss) else np.inf for m, loss in means.items()}
    chosen = {
        (name, rule): min(FACTORS, key=lambda factor: means[named(name, rule, factor)])
        for name, rule in itertools.product(NETWORKS, RULES)
    }
    factors = {name: sorted({1.0, *(chosen[name, rule] for rule in RULES)}) for name in NETWORKS}
    reported = [named(name, rule, factor) for name in NETWORKS for factor in factors[name] for rule in RULES]
    runs, _ = missing("meta", do, seeds, reported, cycles, unit="cycles")
    return runs, factors, chosen


def losses(runs, name, rule, factor, split="test"):
    return np.asarray([run[split] for run in runs if run["method"] == named(name, rule, factor)])


def summary(runs, factors, chosen):
    print("| network | factor | unchanged: validation loss | test loss | fine-tuned: validation loss | test loss |"
          " fine-tuned less unchanged | chosen for |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    shown = lambda values, sign="": "{:{s}.4f} ± {:.4f}".format(*interval(values), s=sign)  # noqa: E731
    for name in NETWORKS:
        for factor in factors[name]:
            cells = [shown(losses(runs, name, rule, factor, split)) for rule in RULES for split in ("valid", "test")]
            before, after = (losses(runs, name, rule, factor) for rule in RULES)
            own = ", ".join(rule for rule in RULES if chosen[name, rule] == factor)
            print(f"| {name} | {factor} | " + " | ".join([*cells, shown(after - before, "+"), own]) + " |")


def plot(runs, factors):
    fig, axes = plt.subplots(1, len(NETWORKS), figsize=(12, 3), layout="constrained")
    for ax, name in zip(axes, NETWORKS, strict=True):
        rows = {
            f"{rule}, steps times {factor:g}": losses(runs, name, rule, factor)
            for factor in factors[name]
            for rule in RULES
        }
        strips(ax, rows, [plt.cm.tab10(i) for _ in factors[name] for i in range(len(RULES))], "test loss")
        ax.set_title(name, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(REPORT / "meta.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=100, help=f"of five training steps: a multiple of {LOOK}")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    REPORT.mkdir(parents=True, exist_ok=True)
    start = store.read(START)
    thetas = dict(zip(RULES, (start.theta, fine_tuned()), strict=True))
    networks = {name: functools.cache(functools.partial(Network, make, start.rule)) for name, make in NETWORKS.items()}
    runs, factors, chosen = study(networks, thetas, args.cycles, args.seeds)
    summary(runs, factors, chosen)
    plot(runs, factors)


if __name__ == "__main__":
    main()
