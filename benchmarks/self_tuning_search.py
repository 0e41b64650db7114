"""Self-tuning against searches and implicit differentiation: a Fashion-MNIST CNN, ten hyperparameters, equal time.

    Delta-STN, STN    one run that tunes while it trains
    default           the start values, trained for all of the time
    random, TPE       trials at hyperparameters held constant; Optuna's sampler
    Hyperband         TPE with Optuna's Hyperband pruner, trials of up to twice as many steps
    implicit          Lorraine et al. 2020: the hypergradient -v (H^-1) d2L/dw dl, H^-1 by a Neumann series, every
                      EVERY steps of one run. Dropout's masks, whole pixels of translation and cutout have no derivative
                      in their hyperparameters: it holds those five at the start and tunes the other five

The first ROWS of the training images train, so that hyperparameters matter within the time. Every method has the same
processor time a run (compiling excluded, looking at the validation set included), starts from the same values (the
searches' first trial), trains by the same Adam, looks at the whole validation set every CHUNK steps, and keeps the
weights of the least validation loss. A search draws l uniformly within REACH of the start. No method's own settings
(SETTINGS) were tuned: they let one run cross REACH within the time, and a search make several trials.

    python benchmarks/self_tuning_search.py            # writes reports/self_tuning/search{.csv,.json,.png}

Finished runs are kept and not repeated; delete search.json to start afresh.
"""

import argparse
import collections
import csv
import functools
import itertools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
import tables

from learned_opt import self_tuning as st
from learned_opt.files import write_atomically
from meta_train.train.problems import fashion_cnn, make_tuner, standing

REPORT = Path(__file__).parents[1] / "reports" / "self_tuning"
ROWS, RATE, CHUNK, REACH = 1000, 3e-3, 100, 3.0
EVERY, TERMS = 20, 10  # of implicit differentiation: training steps a hypergradient, terms of the series
NO_DERIVATIVE = ("dropout_conv1", "dropout_conv2", "dropout_dense", "translation", "cutout_length")
SETTINGS = {
    "Delta-STN": {"hyper_rate": 0.03},
    "STN": {"hyper_rate": 0.03},
    "default": {},
    "random": {"trial": 400},
    "TPE": {"trial": 400},
    "Hyperband": {"trial": 800},
    "implicit": {"hyper_rate": 0.1, "alpha": 0.01},
}
METHODS = tuple(SETTINGS)


class Watch:
    """The processor time of a run, and the best weights by the whole validation set."""

    def __init__(self, lab, seconds):
        self.lab, self.seconds = lab, seconds
        self.best, self.params, self.last, self.level, self.steps, self.curve = np.inf, None, None, None, 0, []
        self.begin = time.process_time()

    def look(self, params, level, steps=CHUNK):
        """Count the steps taken, judge the weights and return their validation loss."""
        loss = float(self.lab.judge(params, self.lab.data["valid"])["loss"])
        self.steps += steps
        self.last = params
        if loss < self.best:
            self.best, self.params, self.level = loss, params, np.asarray(level)
        self.curve.append((round(time.process_time() - self.begin, 2), self.steps, self.best))
        return loss

    def left(self):
        return time.process_time() - self.begin < self.seconds


class Lab:
    """The problem, its compiled functions and the methods; hyperparameters are arguments of what is compiled."""

    def __init__(self, problem=None, rows=ROWS):
        self.problem = problem or fashion_cnn(width=4, batch_size=32)
        self.specs = self.problem.specs
        train = {name: x[:rows] for name, x in self.problem.data["train"].items()}
        self.data = jax.device_put(self.problem.data | {"train": train})
        self.level = st.start(self.specs)[0]
        self.adam = optax.adam(RATE)
        self.start = jax.jit(self.problem.init)
        for split in ("valid", "test"):  # compiled, outside of any run's time
            self.judge(self.start(jax.random.key(0))[0], self.data[split])
        self.free = jnp.asarray([name not in NO_DERIVATIVE for name in st.names(self.specs)])

    @functools.partial(jax.jit, static_argnums=0)
    def judge(self, params, rows):
        metrics = jax.lax.map(lambda row: self.problem.metrics(params, row), _in_batches(rows, 100))
        return jax.tree.map(jnp.mean, metrics)

    def loss(self, params, level, key):
        k_batch, k_loss = jax.random.split(key)
        batch = self.problem.batch(self.data["train"], k_batch)
        return jnp.mean(self.problem.train_loss(params, st.values(self.specs, level), k_loss, batch))

    def train(self, carry, level, key, steps):
        def step(carry, key):
            grads = jax.grad(self.loss)(carry[0], level, key)
            updates, state = self.adam.update(grads, carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, carry, jax.random.split(key, steps))[0]

    @functools.partial(jax.jit, static_argnums=0)
    def chunk(self, carry, level, key):
        return self.train(carry, level, key, CHUNK)

    @functools.partial(jax.jit, static_argnums=0)
    def implicit_chunk(self, carry, key, hyper_rate, alpha):
        """CHUNK training steps with a hypergradient after every EVERY; carry is (weights, l, Adam's state of l)."""
        tuning = optax.scale_by_adam()

        def outer(carry, key):
            weights, level, state = carry
            k_train, k_valid, k_loss = jax.random.split(key, 3)
            weights = self.train(weights, level, k_train, EVERY)
            batch = self.problem.batch(self.data["valid"], k_valid)
            slope = jax.grad(lambda p: jnp.mean(self.problem.valid_loss(p, batch)))(weights[0])
            # One batch and one set of draws for all terms: the series is of one Hessian.
            descent = jax.grad(lambda p, at: self.loss(p, at, k_loss))

            def term(both, _):
                v, total = both
                hv = jax.jvp(lambda p: descent(p, level), (weights[0],), (v,))[1]
                v = jax.tree.map(lambda a, b: a - alpha * b, v, hv)
                return (v, jax.tree.map(jnp.add, total, v)), None

            (_, total), _ = jax.lax.scan(term, (slope, slope), None, length=TERMS)
            grad = jax.grad(lambda at: -alpha * optax.tree.vdot(total, descent(weights[0], at)))(level) * self.free
            updates, state = tuning.update(grad, state)
            return (weights, level - hyper_rate * updates, state), None

        return jax.lax.scan(outer, carry, jax.random.split(key, CHUNK // EVERY))[0]

    @functools.cache  # noqa: B019
    def tuner(self, method, hyper_rate):
        return make_tuner(
            self.problem, weights=self.adam, hyper=optax.adam(hyper_rate), method=method, warmup=CHUNK // 5
        )

    def self_tuned(self, seed, seconds, method, hyper_rate):
        tuner = self.tuner(method, hyper_rate)
        k_init, k_run = jax.random.split(jax.random.key(seed))
        begin = jax.jit(lambda key: tuner.init(*self.problem.init(key)))(k_init)

        weights_of = jax.jit(functools.partial(standing, method))

        def one(state):
            state, info = tuner.run(state, k_run, self.data, CHUNK // 5)
            return state, weights_of(state), info.mean[-1]

        jax.block_until_ready(one(begin))  # compiled
        watch, state = Watch(self, seconds), begin
        while watch.left():
            state, params, level = one(state)
            watch.look(params, level)
        return watch, 1, state.hyper.mean

    def implicit(self, seed, seconds, hyper_rate, alpha):
        k_init, k_run = jax.random.split(jax.random.key(seed))
        params = self.start(k_init)[0]
        carry = ((params, self.adam.init(params)), self.level, optax.scale_by_adam().init(self.level))
        jax.block_until_ready(self.implicit_chunk(carry, k_run, hyper_rate, alpha))
        watch = Watch(self, seconds)
        for i in itertools.count():
            carry = self.implicit_chunk(carry, jax.random.fold_in(k_run, i), hyper_rate, alpha)
            watch.look(carry[0][0], carry[1])
            if not watch.left():
                return watch, 1, carry[1]

    def trial(self, watch, level, key, steps, report=lambda loss, chunk: False):
        """Train at a constant l until the steps, the time or ``report``'s patience is used up; return the best loss."""
        k_init, k_run = jax.random.split(key)
        params = self.start(k_init)[0]
        carry, best = (params, self.adam.init(params)), np.inf
        for i in range(steps // CHUNK):
            carry = self.chunk(carry, level, jax.random.fold_in(k_run, i))
            loss = watch.look(carry[0], level)
            best = min(best, loss)
            if not watch.left() or report(loss, i + 1):
                break
        return best

    def search(self, seed, seconds, trial, sampler=None, pruned=False):
        key, rng = jax.random.key(seed), np.random.default_rng(seed)
        self.trial(Watch(self, seconds), self.level, key, CHUNK)  # compiled
        names = st.names(self.specs)
        if sampler is not None:
            optuna = load_optuna()
            pruner = optuna.pruners.HyperbandPruner(2, trial // CHUNK, 3) if pruned else optuna.pruners.NopPruner()
            study = optuna.create_study(
                sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=4), pruner=pruner
            )
            study.enqueue_trial(dict.fromkeys(names, 0.0))
        watch = Watch(self, seconds)
        for i in itertools.count():
            if not watch.left():
                return watch, i, watch.level
            own = jax.random.fold_in(key, i)
            if sampler is None:
                offset = rng.uniform(-REACH, REACH, len(names)) if i else np.zeros(len(names))
                self.trial(watch, self.level + jnp.asarray(offset, jnp.float32), own, trial)
                continue
            asked = study.ask()
            offset = [asked.suggest_float(name, -REACH, REACH) for name in names]

            def report(loss, chunk, asked=asked):
                asked.report(loss, chunk)
                return pruned and asked.should_prune()

            best = self.trial(watch, self.level + jnp.asarray(offset, jnp.float32), own, trial, report)
            study.tell(asked, best)

    def run(self, method, seed, seconds, **options):
        if method in ("Delta-STN", "STN"):
            return self.self_tuned(seed, seconds, {"Delta-STN": "delta_stn", "STN": "stn"}[method], **options)
        if method == "implicit":
            return self.implicit(seed, seconds, **options)
        if method == "default":
            return self.search(seed, seconds, trial=10**9)
        sampler = None if method == "random" else "tpe"
        return self.search(seed, seconds, sampler=sampler, pruned=method == "Hyperband", **options)


def _in_batches(rows, size):
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), rows)


def load_optuna():
    try:
        import optuna
    except ImportError:
        raise SystemExit("the searches need Optuna: pip install optuna, or choose other --methods") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def record(lab, method, seed, seconds, options):
    """Return a run's results and its curve."""
    watch, trials, last = lab.run(method, seed, seconds, **options)
    test = jax.device_get(lab.judge(watch.params, lab.data["test"]))
    named = lambda level: {k: float(f"{float(v):.3g}") for k, v in st.values(lab.specs, jnp.asarray(level)).items()}  # noqa: E731
    result = {
        "method": method, "seed": seed, "seconds": seconds, **options, "trials": trials, "steps": watch.steps,
        "valid": round(watch.best, 4), "test": round(float(test["loss"]), 4),
        "accuracy": round(1 - float(test["error"]), 4), "chosen": named(watch.level), "last": named(last),
    }  # fmt: skip
    return result, watch.curve


def interval(values):
    """Return the mean and the half width of its 95 % interval by Student's t."""
    from scipy.stats import t

    values = np.asarray(values, float)
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(half)


def summary(runs):
    print("| method | seeds | trials | steps | validation loss | test loss | test accuracy, % |")
    print("|---|---|---|---|---|---|---|")
    for method in METHODS:
        own = [run for run in runs if run["method"] == method]
        if not own:
            continue
        cells = [interval([run[name] for run in own]) for name in ("valid", "test")]
        cells.append(tuple(100 * x for x in interval([run["accuracy"] for run in own])))
        text = [f"{mean:.3f} ± {half:.3f}" for mean, half in cells[:2]] + [f"{cells[2][0]:.1f} ± {cells[2][1]:.1f}"]
        trials, steps = (np.mean([run[name] for run in own]) for name in ("trials", "steps"))
        print(f"| {method} | {len(own)} | {trials:.1f} | {steps:.0f} | " + " | ".join(text) + " |")


def plot(runs, curves):
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(3, 2), layout="constrained")
    colours = dict(zip(METHODS, plt.cm.tab10.colors, strict=False))
    seconds = max(run["seconds"] for run in runs)
    grid = np.linspace(1, seconds, 200)
    for place, method in enumerate(METHODS):
        own = [run for run in runs if run["method"] == method]
        if not own:
            continue
        paths = []
        for run in own:
            times, _, best = np.asarray(curves[method, run["seed"]]).T
            at = np.searchsorted(times, grid, side="right") - 1
            paths.append(np.where(at >= 0, best[at], np.nan))
        paths = np.asarray(paths)
        seen = np.isfinite(paths).all(0)
        mean, half = np.asarray([interval(column) for column in paths[:, seen].T]).reshape(-1, 2).T
        left.plot(grid[seen], mean, color=colours[method], label=method)
        left.fill_between(grid[seen], mean - half, mean + half, color=colours[method], alpha=0.08, lw=0)
        tests = [run["test"] for run in own]
        mean, half = interval(tests)
        right.errorbar(mean, -place, xerr=half, fmt="o", color=colours[method], capsize=3)
        right.plot(tests, np.full(len(own), -place - 0.25), "|", color=colours[method])
    left.set(xlabel="processor time, s", ylabel="best validation loss so far", yscale="log")
    left.set_ylim(None, 0.9)
    left.yaxis.set_major_formatter("{x:.2g}")
    left.yaxis.set_minor_formatter("{x:.2g}")
    left.legend(frameon=False, fontsize=8)
    right.set_yticks(-np.arange(len(METHODS)), METHODS)
    right.set_xlabel("test loss; mean, 95 % interval, runs")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(REPORT / "search.png", dpi=110)


def load_results(name):
    """The runs and curves that an earlier call left of a study."""
    if not (REPORT / f"{name}.json").exists():
        return [], {}
    curves = collections.defaultdict(list)
    with open(REPORT / f"{name}.csv", newline="") as file:
        for row in csv.DictReader(file):
            point = float(row["processor_s"]), int(row["steps"]), float(row["best_valid"])
            curves[row["method"], int(row["seed"])].append(point)
    return json.loads((REPORT / f"{name}.json").read_text()), dict(curves)


def save(name, runs, curves):
    rows = [
        {"method": method, "seed": seed, "processor_s": f"{s:.2f}", "steps": steps, "best_valid": f"{best:.4f}"}
        for (method, seed), curve in curves.items()
        for s, steps, best in curve
    ]
    tables.write(REPORT / f"{name}.csv", rows)
    write_atomically(REPORT / f"{name}.json", ("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n").encode())


def missing(name, do, seeds, methods, budget, hidden=("chosen",), unit="seconds"):
    """Does the runs of a study that are not kept yet, each written when it is done.

    Args:
        name: of the study's files.
        do: ``(method, seed) -> result, curve``.
        seeds: how many.
        methods: their names.
        budget: a run's processor time, or its steps; runs kept of another are dropped.
        hidden: what of a result is not printed.
        unit: the entry of a result that is its budget.

    Returns:
        All runs and curves.
    """
    REPORT.mkdir(parents=True, exist_ok=True)
    runs, curves = load_results(name)
    done = {(run["method"], run["seed"]) for run in runs if run[unit] == budget}
    runs = [run for run in runs if (run["method"], run["seed"]) in done]
    curves = {key: curve for key, curve in curves.items() if key in done}
    for seed, method in itertools.product(range(seeds), methods):
        if (method, seed) in done:
            continue
        result, curves[method, seed] = do(method, seed)
        runs.append(result)
        save(name, runs, curves)
        print({k: v for k, v in result.items() if k not in hidden}, flush=True)
    return runs, curves


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="processor time a run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    args = parser.parse_args()
    if {"TPE", "Hyperband"} & set(args.methods):
        load_optuna()
    lab = Lab()

    def do(method, seed):
        return record(lab, method, seed, args.seconds, SETTINGS[method])

    runs, curves = missing("search", do, args.seeds, args.methods, args.seconds, ("chosen", "last"))
    summary(runs)
    plot(runs, curves)


if __name__ == "__main__":
    main()
