"""Local SGD with AdamW, Muon and `flagship` inside: published methods, each tuned, and learned outer steps.

Eight workers meet every 16, 64 or 128 steps, 32, 10 or 6 times, on networks and data of no training suite: a character
transformer on Moby Dick, an LSTM on the King James Bible, a convolutional net on CIFAR-10. The workers' rate falls by a
half cosine over the run. Every hand-made method has up to sixteen trials of its workers' rate, outer rate and momentum,
on a seed of its own: the usual ones, then what lies beside the best so far, until that has worse neighbours. The
learned steps have none: the workers' rate is the one that averaging chose, and `flagship`, which has nothing to set, is
left as it is. All are reported on five other seeds by the loss at the end on the same validation batches, and compared
with the best peer seed by seed. Post-local SGD spends a quarter of the rounds on single steps; Streaming DiLoCo deals
the parameters into four fragments, which meet in turn and are used a step late. All but SparseLoCo send the bytes that
averaging sends. The numbers of `flagship` were chosen on larger networks on these three data sets, so a few methods run
on SQLite's source too, of which no learned rule has seen anything, and on two larger networks, with fewer rounds and up
to twelve trials: a ResNet of 0.3 million parameters on CIFAR-10 and a transformer of a million on SQLite's source.
Finished runs are kept: the same command goes on. Writes peers.json, peers.csv and peers.png under reports/local_sgd.

    for name in moby_dick kjv cifar10 sqlite; do learned-opt data fetch $name; done
    python benchmarks/local_sgd_peers.py [--learned outer ...] [--only TASK ...]
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tables
from matplotlib.figure import Figure
from scipy import stats

import learned_opt
from learned_opt import communication
from learned_opt.files import write_atomically
from learned_opt.local_sgd import add_nesterov, local_sgd, map_workers, spread_workers, worker_axes
from meta_train.train.learners.local_sgd import LOCAL_OPTIMIZERS
from tasks.base import TaskFamily, num_params
from tasks.families.sequence import char_rnn, char_transformer
from tasks.families.vision import image_conv, image_resnet
from tasks.workloads.language import gpt

REPORT = Path(__file__).parents[1] / "reports" / "local_sgd"
WORKERS = 8
TUNING_SEED, SEEDS, VALIDATION = 100, range(200, 205), 64


class Network(NamedTuple):
    """What the workers train.

    Attributes:
        family: makes the task family.
        methods: names of those that run on it; None: all.
        rounds: by the steps of a round.
        trials: at most so many for each tuned method.
        start: of a method's trials, in place of what is usual: rate, outer rate, momentum.
    """

    family: Callable[[], TaskFamily]
    methods: tuple[str, ...] | None = None
    rounds: Mapping[int, int] = {16: 32, 64: 10, 128: 6}
    trials: int = 16
    start: Mapping[str, tuple[float, float, float]] = {}


_FOUR = ("DiLoCo (AdamW)", "MuLoCo (Muon)", "DiLoCo's step, flagship", "Nesterov + outer, flagship")
TASKS = {
    "transformer": Network(lambda: char_transformer("moby_dick", layers=1, width=32, length=16, batch_size=8)),
    "LSTM": Network(lambda: char_rnn("kjv", core="lstm", width=64, embedding=16, length=16, batch_size=8)),
    "conv": Network(lambda: image_conv("cifar10", side=16, channels=(32, 64), batch_size=8)),
    "transformer, C source": Network(
        lambda: gpt("sqlite", layers=1, heads=2, width=32, length=16, batch_size=8),
        (
            *("averaging, AdamW", "DiLoCo (AdamW)", "averaging, Muon", "MuLoCo (Muon)"),
            *("Nesterov + outer, Muon", "DiLoCo's step, flagship", "Nesterov + outer, flagship"),
        ),
    ),
    "ResNet": Network(
        lambda: image_resnet("cifar10", side=None, channels=(32, 64, 128), batch_size=8),
        _FOUR,
        {16: 16, 64: 6, 128: 4},
        12,
        {"DiLoCo (AdamW)": (0.004, 1.05, 0.6), "MuLoCo (Muon)": (0.008, 1.05, 0.6)},
    ),
    "transformer of 1M": Network(
        lambda: gpt("sqlite", layers=5, width=128, length=32, batch_size=8),
        _FOUR,
        {16: 16, 64: 4, 128: 2},
        12,
        {"DiLoCo (AdamW)": (0.008, 0.7, 0.6), "MuLoCo (Muon)": (0.016, 1.05, 0.6)},
    ),
}
SHOWN = (  # in the plot
    *("DiLoCo (AdamW)", "Streaming DiLoCo (AdamW)", "MuLoCo (Muon)"),
    *("Nesterov + outer, AdamW", "Nesterov + outer, Muon", "Nesterov + outer, flagship"),
)


def half_cosine(share):
    return 0.5 * (1 + jnp.cos(jnp.pi * share))


def falling(optimizer):
    """At a rate that falls by a half cosine over the run."""
    return lambda rate, total: optax.chain(optimizer, optax.scale_by_schedule(lambda n: rate * half_cosine(n / total)))


def flagship(rate, total):
    return learned_opt.load("flagship", num_steps=total, learning_rate=rate)


INNER = {  # and usual rates
    "AdamW": (falling(LOCAL_OPTIMIZERS["adamw"](None)), 0.008),
    "Muon": (falling(LOCAL_OPTIMIZERS["muon"](None)), 0.016),
    "flagship": (flagship, 1.0),
}


def nesterov(rate, momentum, rounds):
    """Averaging where the momentum is 0 and the rate 1."""
    return optax.sgd(rate, momentum=momentum, nesterov=True)


def slowmo(rate, momentum, rounds):
    """Momentum of the mean deltas, each in units of the workers' rate, which falls."""
    return optax.chain(
        optax.scale_by_schedule(lambda r: 1 / half_cosine(r / rounds)),
        optax.trace(momentum),
        optax.scale_by_schedule(lambda r: -rate * half_cosine(r / rounds)),
    )


def steady(delay, rounds):
    return lambda *_: delay


def quarters(delay, rounds):
    """A fragment of four at a time, so that each meets every ``delay`` steps."""
    return lambda *_: delay // 4


def late(delay, rounds):
    """Single steps for a quarter of the rounds; the others share the remaining steps."""
    single = jnp.maximum(rounds // 4, 1)
    return lambda round_, step, _: jnp.where(
        round_ < single, 1, (delay * rounds - step) // jnp.maximum(rounds - round_, 1)
    )


class Method(NamedTuple):
    """A way to meet.

    Attributes:
        inner: of INNER.
        outer: ``(outer rate, momentum, rounds) -> Optax transform``.
        usual: its outer rate and momentum; a momentum of 0 is not tuned.
        options: of ``local_sgd``.
        delay: ``(steps of a round, rounds) -> sync_every``.
        tuned: whether it has trials.
    """

    inner: str
    outer: Callable = nesterov
    usual: tuple[float, float] = (1.0, 0.0)
    options: Mapping = {}
    delay: Callable = steady
    tuned: bool = True


def learned(name):
    return lambda rate, momentum, rounds: learned_opt.load(name, num_steps=rounds)


def added(name):
    return lambda rate, momentum, rounds: add_nesterov(learned_opt.load(name, num_steps=rounds))


def methods(names):
    """Averaging first: it chooses the workers' rate of the learned steps."""
    sparse = {"compression": communication.chunked_top_k(16, 1024, bits=2), "error_feedback": 0.95}
    streaming = {"fragments": 4, "overlap": 1, "mixing": 0.5}
    return {
        "averaging, AdamW": Method("AdamW"),
        "DiLoCo (AdamW)": Method("AdamW", usual=(0.7, 0.9)),
        "SparseLoCo (AdamW)": Method("AdamW", options=sparse),
        "Streaming DiLoCo (AdamW)": Method("AdamW", usual=(0.7, 0.9), options=streaming, delay=quarters),
        "SlowMo (AdamW)": Method("AdamW", slowmo, (1.0, 0.6)),
        "post-local (AdamW)": Method("AdamW", delay=late),
        "averaging, Muon": Method("Muon"),
        "MuLoCo (Muon)": Method("Muon", usual=(0.7, 0.6)),
        "averaging, flagship": Method("flagship", tuned=False),
        "DiLoCo's step, flagship": Method("flagship", usual=(0.7, 0.6), tuned=False),
        **{
            f"{label}{name}, {inner}": Method(inner, make(name), tuned=False)
            for name in names
            for label, make, inners in (("", learned, ("AdamW", "Muon")), ("Nesterov + ", added, INNER))
            for inner in inners
        },
    }


def runner(family, method):
    """``(data, (rate, outer rate, momentum), H, rounds, seed) -> validation loss``, one program for all H."""
    inner = INNER[method.inner][0]

    def run(data, setting, delay, rounds, seed):
        rate, outer_rate, momentum = setting
        k_cfg, k_init, k_run, k_valid = jax.random.split(jax.random.PRNGKey(seed), 4)
        task = family.task(data, family.sample(k_cfg))
        params = task.init(k_init)
        total = delay * rounds
        transform = local_sgd(
            inner(rate, total),
            method.outer(outer_rate, momentum, rounds),
            sync_every=method.delay(delay, rounds),
            **method.options,
        )
        state = transform.init(params)
        axes = worker_axes(state)

        def step(params, state, key):
            k_batch, k_loss = jax.random.split(key)
            batch = task.batch(k_batch, "train")
            loss, grads = jax.value_and_grad(lambda p: task.loss(p, k_loss, batch)[0])(params)
            updates, state = transform.update(grads, state, params, value=loss)
            return optax.apply_updates(params, updates), state

        steps = map_workers(step, in_axes=(0, axes, 0), out_axes=(0, axes))

        def one(i, carry):
            return steps(*carry, jax.random.split(jax.random.fold_in(k_run, i), WORKERS))

        start = spread_workers(params, WORKERS), spread_workers(state, WORKERS, axes)
        _, state = jax.lax.fori_loop(0, total, one, start)
        anchor = state.anchor  # where all met last; in fragments the workers still differ
        keys = jax.random.split(k_valid, VALIDATION)
        return jnp.mean(jax.lax.map(lambda k: task.loss(anchor, k, task.batch(k, "valid"))[0], keys))

    return jax.jit(run)


def tune(score, usual, trials):
    """So many settings (rate, outer rate, momentum): the usual, then neighbours of the best so far, its rates first.

    Rates go by factors of two, outer rates by 1.5, a momentum by 0.3.

    Returns:
        Their losses, and whether the best lies inside what was tried: the rate and the outer rate have both neighbours.
    """
    rate, outer, momentum = usual

    def setting(place):
        return rate * 2.0 ** place[0], outer * 1.5 ** place[1], momentum + 0.3 * place[2]

    def neighbours():
        i, j, k = min(found, key=found.get)
        places = [(i + 1, j, k), (i - 1, j, k), (i, j + 1, k), (i, j - 1, k), (i, j, k - 1), (i, j, k + 1)]
        return [place for place in places if place[2] == k or (momentum and 0.01 < setting(place)[2] < 1)]

    found = {(0, 0, 0): score(usual)}
    while len(found) < trials and (untried := [place for place in neighbours() if place not in found]):
        found[untried[0]] = score(setting(untried[0]))
    inside = all(place in found for place in neighbours()[:4])
    return {setting(place): loss for place, loss in found.items()}, inside


def compare(network, data, delay, method, run, start):
    """One method at one delay: its trials, and its losses on the reported seeds."""
    rounds, trials, inside = network.rounds[delay], {}, None

    def score(setting, seed=TUNING_SEED):
        loss = float(run(data, setting, delay, rounds, seed))
        return loss if np.isfinite(loss) else np.inf

    best = start
    if method.tuned:
        trials, inside = tune(score, start, network.trials)
        best = min(trials, key=trials.get)
    return {
        "rate": best[0],
        "outer_rate": round(best[1], 4),
        "momentum": round(best[2], 2),
        "interior": inside,
        "trials": [[*(round(x, 5) for x in setting), round(loss, 5)] for setting, loss in trials.items()],
        "losses": [round(score(best, seed), 5) for seed in SEEDS],
    }


def table(found):
    """One row for each task, delay and method, beside the best peer's mean."""
    rows = []
    for task, delays in found.items():
        for delay, results in delays["delays"].items():
            means = {name: float(np.mean(r["losses"])) for name, r in results.items()}
            peer = min((name for name, r in results.items() if r["trials"]), key=means.__getitem__)
            for name, r in results.items():
                less = np.subtract(r["losses"], results[peer]["losses"])
                error = float(less.std(ddof=1) / len(less) ** 0.5)
                row = {
                    "task": task,
                    "H": delay,
                    "rounds": TASKS[task].rounds[int(delay)],
                    "method": name,
                    "rate": r["rate"],
                }
                row |= {
                    "outer_rate": r["outer_rate"],
                    "momentum": r["momentum"],
                    "interior": r["interior"],
                    "trials": len(r["trials"]),
                }
                row |= {"valid_loss": round(means[name], 5), "best_peer": peer, "less_best_peer": round(less.mean(), 5)}
                p = float("nan") if name == peer else float(stats.ttest_1samp(less, 0).pvalue)
                rows.append(row | {"standard_error": round(error, 5), "p": round(p, 4)})
    return rows


def plot(rows, path):
    """Validation loss over the best peer's, a panel a task, a group a delay."""
    names = [name for name in SHOWN if any(row["method"] == name for row in rows)]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    across = min(len(tasks), 3)
    down = -(-len(tasks) // across)
    figure = Figure(figsize=(3.1 * across + 1, 2.7 * down + 0.8), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for ax in panels[len(tasks) :]:
        ax.remove()
    for ax, task in zip(panels, tasks, strict=False):
        mine = [row for row in rows if row["task"] == task]
        delays = list(dict.fromkeys(row["H"] for row in mine))
        for number, name in enumerate(names):
            points = [row for row in mine if row["method"] == name]
            at = [delays.index(row["H"]) + 0.11 * (number - (len(names) - 1) / 2) for row in points]
            ratios = [row["valid_loss"] / (row["valid_loss"] - row["less_best_peer"]) for row in points]
            errors = [2 * row["standard_error"] / (row["valid_loss"] - row["less_best_peer"]) for row in points]
            learned = "outer" in name or "flagship" in name
            kind = {"color": "black", "marker": "x+*"[number % 3]} if learned else {"marker": "o"}
            ax.errorbar(at, ratios, errors, fmt="none", ecolor="lightgrey", zorder=0)
            ax.scatter(at, ratios, s=26, label=name, **kind)
        ax.axhline(1, color="grey", lw=0.6)
        ax.set_xticks(range(len(delays)), [f"H = {delay}" for delay in delays])
        ax.set_title(task, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supylabel("validation loss over the best peer's", fontsize=8)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learned", nargs="*", default=["outer"], help="learned outer steps: names or folders")
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--out", type=Path, default=REPORT)
    arguments = parser.parse_args()
    path = arguments.out / "peers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    for task in arguments.only:
        network = TASKS[task]
        family = network.family()
        kept = found.setdefault(task, {"parameters": num_params(family), "delays": {}})["delays"]
        for name, method in methods(arguments.learned).items():
            if network.methods and name not in network.methods:
                continue
            run = runner(family, method)
            for delay in network.rounds:
                results = kept.setdefault(str(delay), {})
                if name in results:
                    continue
                averaged = results.get(f"averaging, {method.inner}")
                rate = averaged["rate"] if averaged and not method.tuned else INNER[method.inner][1]
                start = network.start.get(name, (rate, *method.usual))
                results[name] = compare(network, family.data, delay, method, run, start)
                write_atomically(path, json.dumps(found, indent=1) + "\n")
                print(task, delay, name, results[name], flush=True)
    rows = table(found)
    tables.write(arguments.out / "peers.csv", rows)
    plot(rows, arguments.out / "peers.png")


if __name__ == "__main__":
    main()
