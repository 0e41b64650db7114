"""What features from a learned unsupervised rule are worth with ten labels a class, beside honest baselines.

Four studies: ``table`` (every method on every data set), ``step`` (the step activation, where backpropagation has no
gradient), ``transfer`` (deeper, wider, permuted pixels) and ``meta-seeds`` (rules that other meta-seeds gave, as
``python scripts/pretrain.py letters --seed S --stages 2`` makes them, in one folder). Every method's settings and its
ridge penalty are chosen on tuning seeds; the reporting seeds draw other weights and other labels. Figures are kept as
they come: a run that was stopped goes on where it was.

    python benchmarks/unsupervised_features.py --rule letters --out reports/unsupervised
"""

import argparse
import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import scipy.stats
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA

from learned_opt import unsupervised
from learned_opt.files import write_atomically
from learned_opt.store import read_record
from learned_opt.unsupervised import network
from tasks.families.representation import labelled_images

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS = "learned rule"
STUDIES = ("table", "step", "transfer", "meta-seeds")
SHOTS = 10
PENALTIES = (1e-2, 1e-1, 1e0, 1e1, 1e2, 1e3, 1e4)
TUNING_SEEDS = (1000, 1001, 1002)
POOL = 10_000  # unlabelled rows at most
TESTED = 5_000  # test rows at most
BATCH = 64

# data set -> (name in tasks.data, side, units of the network)
DATASETS = {
    "digits 8x8": ("digits", 8, (32, 32)),
    "MNIST 14x14": ("mnist", 14, (64, 32)),
    "MNIST 28x28": ("mnist", 28, (64, 32)),
    "Fashion-MNIST 28x28": ("fashion_mnist", 28, (64, 32)),
    "CIFAR-10 grey 16x16": ("cifar10", 16, (64, 32)),
}


class Problem(NamedTuple):
    """Unlabelled rows to learn from, labelled ones, and those to be judged on, by one input scale."""

    pool: np.ndarray
    support: np.ndarray
    support_y: np.ndarray
    test: np.ndarray
    test_y: np.ndarray


def problem(dataset: str, seed: int, permute: bool = False) -> Problem:
    """Draws the labels, and the pixels' order if asked to."""
    name, side, _ = DATASETS[dataset]
    rng = np.random.default_rng(seed)
    splits = labelled_images(name, side)
    train_x, train_y = splits["train"]
    test_x, test_y = splits["valid"]
    if name == "digits":  # few rows: all that is not labelled is judged
        train_x, train_y = np.concatenate([train_x, test_x]), np.concatenate([train_y, test_y])
    labelled = np.concatenate([rng.choice(np.flatnonzero(train_y == c), SHOTS, replace=False) for c in range(10)])
    if name == "digits":
        others = np.setdiff1d(np.arange(len(train_y)), labelled)
        test_x, test_y = train_x[others], train_y[others]
    pool = rng.permutation(len(train_x))[:POOL]
    tested = rng.permutation(len(test_x))[:TESTED]
    shift, scale = train_x.mean(), train_x.std()
    order = rng.permutation(train_x.shape[1]) if permute else np.arange(train_x.shape[1])

    def scaled(x):
        return ((x[:, order] - shift) / scale).astype(np.float32)

    return Problem(
        scaled(train_x[pool]), scaled(train_x[labelled]), train_y[labelled], scaled(test_x[tested]), test_y[tested]
    )


# --- methods: (problem, sizes, activation, seed, **settings) -> features of (pool, support, test), or test predictions


def _embed(phi, p: Problem):
    moments = _statistics(phi, p.pool)
    return tuple(np.asarray(_apply(phi, moments, x)) for x in (p.pool, p.support, p.test))


_statistics = jax.jit(network.statistics)
_apply = jax.jit(lambda phi, moments, x: network.features(phi, x, moments))


@partial(jax.jit, static_argnums=(0, 5))
def _learn(update, theta, phi, pool, key, steps):
    def step(phi, k):
        rows = jax.random.randint(k, (BATCH,), 0, pool.shape[0])
        return update(theta, phi, pool[rows]), None

    return jax.lax.scan(step, phi, jax.random.split(key, steps))[0]


_HAND_SET = unsupervised.hand_set()


def by_rule(rule, theta, p, sizes, activation, seed, *, steps):
    k_init, k_steps = jax.random.split(jax.random.key(seed))
    phi = network.init(k_init, sizes, activation)
    done = 0
    while done < steps:  # in hundreds: one compilation for any number
        phi = _learn(rule.update, theta, phi, p.pool, jax.random.fold_in(k_steps, done), 100)
        done += 100
    return _embed(phi, p)


def by_hand(p, sizes, activation, seed, *, steps, rate, decorrelation):
    theta = _HAND_SET.init_theta(jax.random.key(0))
    place = unsupervised.TERMS.index("decorrelation")
    theta = {"merge": theta["merge"].at[place].set(decorrelation), "log_rate": jnp.log(rate)}
    return by_rule(_HAND_SET, theta, p, sizes, activation, seed, steps=steps)


def random_network(p, sizes, activation, seed):
    return _embed(network.init(jax.random.split(jax.random.key(seed))[0], sizes, activation), p)


def raw(p, sizes, activation, seed):
    return p.pool, p.support, p.test


def pca(p, sizes, activation, seed, *, whiten):
    model = PCA(min(sizes[-1], p.pool.shape[1]), whiten=whiten, random_state=seed).fit(p.pool)
    return tuple(model.transform(x) for x in (p.pool, p.support, p.test))


def k_means(p, sizes, activation, seed, *, soft, clusters=None):
    model = MiniBatchKMeans(clusters or sizes[-1], random_state=seed, n_init=3, batch_size=1024).fit(p.pool)

    def encode(x):
        distance = model.transform(x)
        return np.maximum(distance.mean(1, keepdims=True) - distance, 0) if soft else distance

    return tuple(encode(x) for x in (p.pool, p.support, p.test))


def wide_random(p, sizes, activation, seed, *, width):
    w = np.random.default_rng(seed).normal(size=(p.pool.shape[1], width)).astype(np.float32)
    return tuple(np.maximum(x @ w, 0) for x in (p.pool, p.support, p.test))


@jax.custom_jvp
def _straight_through(z):
    return (z > 0).astype(z.dtype)


@_straight_through.defjvp
def _(primals, tangents):
    (z,), (t,) = primals, tangents
    return _straight_through(z), jnp.where(jnp.abs(z) < 1, t, 0)


def _encode(params, activation, x, straight_through, moments=None):
    if not straight_through:
        return network.features(network.Network(params, activation), x, moments)
    for layer in params:
        y = x @ layer.w
        z = (y - y.mean(0)[None]) * jax.lax.rsqrt(y.var(0) + 1e-5)[None] + layer.b[None]
        x = _straight_through(z)
    return x


def _dense(key, inputs, outputs):
    return {"w": jax.random.normal(key, (inputs, outputs)) * np.sqrt(2 / inputs), "b": jnp.zeros(outputs)}


def _decode(decoder, x):
    for i, layer in enumerate(decoder):
        x = (jax.nn.relu(x) if i else x) @ layer["w"] + layer["b"][None]
    return x


def _reconstruction(params, activation, x, key, straight_through, beta):
    """Autoencoder, or VAE where the parameters have heads for a mean and a log variance."""
    code, penalty = _encode(params["encoder"], activation, x, straight_through), 0.0
    if "mean" in params:
        mean, log_variance = (_decode([params[k]], code) for k in ("mean", "log_variance"))
        code = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        penalty = 0.5 * jnp.mean(jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance, axis=1))
    return jnp.mean(jnp.sum((_decode(params["decoder"], code) - x) ** 2, axis=1)) + beta * penalty


@partial(jax.jit, static_argnums=(3, 4, 7, 8))
def _descend(params, activation, x, loss, straight_through, beta, key, steps, batch, rate, y=None):
    optimizer = optax.adam(rate)

    def step(carry, k):
        params, state = carry
        k_rows, k_noise = jax.random.split(k)
        rows = jax.random.randint(k_rows, (batch,), 0, x.shape[0])
        target = k_noise if y is None else y[rows]
        grads = jax.grad(loss)(params, activation, x[rows], target, straight_through, beta)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0][0]


def autoencoder(p, sizes, activation, seed, *, rate, steps, beta=None, straight_through=False):
    """An autoencoder of the same encoder and a mirrored decoder; with ``beta`` a VAE."""
    keys = jax.random.split(jax.random.key(seed), 2 + len(sizes))
    phi = network.init(jax.random.split(jax.random.key(seed))[0], sizes, activation)
    back = sizes[::-1]
    params = {
        "encoder": phi.layers,
        "decoder": [_dense(k, i, o) for k, i, o in zip(keys, back[:-1], back[1:], strict=False)],
    }
    if beta is not None:
        params |= {
            "mean": _dense(keys[-2], sizes[-1], sizes[-1]),
            "log_variance": _dense(keys[-3], sizes[-1], sizes[-1]),
        }
    beta = 0.0 if beta is None else beta
    params = _descend(
        params, phi.activation, p.pool, _reconstruction, straight_through, beta, keys[-1], steps, BATCH, rate
    )
    return _embed(network.Network(params["encoder"], phi.activation), p)


def _classification(params, activation, x, y, straight_through, beta):
    logits = _decode([params["head"]], _encode(params["encoder"], activation, x, straight_through))
    decay = sum(jnp.sum(layer.w**2) for layer in params["encoder"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean() + beta * decay


def supervised(p, sizes, activation, seed, *, rate, steps, decay=0.0, straight_through=False):
    """The same network and a linear head, by Adam on the same few labels alone; features of its top layer."""
    k_init, k_head, k_steps = jax.random.split(jax.random.key(seed), 3)
    phi = network.init(k_init, sizes, activation)
    params = {"encoder": phi.layers, "head": _dense(k_head, sizes[-1], 10)}
    y = jnp.asarray(p.support_y, jnp.int32)
    params = _descend(
        params, phi.activation, p.support, _classification, straight_through, decay, k_steps, steps, BATCH, rate, y
    )
    return _embed(network.Network(params["encoder"], phi.activation), p)


def grid(**choices):
    """All combinations."""
    settings = [{}]
    for name, values in choices.items():
        settings = [s | {name: value} for s in settings for value in values]
    return settings


_GRADIENT = grid(rate=(1e-3, 5e-3), steps=(500, 2000))
_NO_RULE: dict[str, tuple[Callable, list[dict]]] = {
    "hand-set rule": (by_hand, grid(steps=(100, 300), rate=(3e-4, 1e-3), decorrelation=(0.1, 0.2))),
    "random init": (random_network, [{}]),
    "PCA": (pca, grid(whiten=(True, False))),
    "k-means": (k_means, grid(soft=(True, False))),
    "k-means, 256": (k_means, grid(soft=(True,), clusters=(256,))),
    "random ReLU, 512": (wide_random, grid(width=(512,))),
    "autoencoder": (autoencoder, _GRADIENT),
    "VAE": (autoencoder, grid(rate=(1e-3, 5e-3), steps=(500, 2000), beta=(0.1, 1.0))),
    "supervised": (supervised, grid(rate=(1e-3, 1e-2), steps=(100, 400))),
    "raw pixels": (raw, [{}]),
}


def read_out(features, p: Problem) -> dict[float, float]:
    """Accuracy of ridge regression on standardised features, by penalty."""
    pool, support, test = features
    mean, std = pool.mean(0), pool.std(0)
    std = np.where(std > 1e-6, std, 1.0)
    f, q = (support - mean) / std, (test - mean) / std
    middle = f.mean(0)
    f, q = f - middle, q - middle
    y = np.eye(10)[p.support_y] - 0.1
    gram, values = f @ f.T, {}
    for penalty in PENALTIES:
        dual = np.linalg.solve(gram + penalty * np.eye(len(f)), y)
        values[penalty] = float(np.mean(np.argmax((q @ f.T) @ dual, 1) == p.test_y))
    return values


def learned(name: str | Path) -> tuple[Callable, list[dict]]:
    """A learned rule as a method, and its settings."""
    return partial(by_rule, *unsupervised.load(name)[:2]), grid(steps=(100, 300))


# --- studies


class Cell(NamedTuple):
    """One method on one data set with one network."""

    study: str
    dataset: str
    setting: str  # of the network or the data
    method: str


def cells(methods, datasets):
    """What is to be measured: ``(cell, units, activation, permuted)``."""
    for dataset in datasets:
        units = DATASETS[dataset][2]
        for study in ("table", "meta-seeds"):
            for method in methods[study]:
                yield Cell(study, dataset, "relu", method), units, "relu", False
    for dataset in [d for d in datasets if d in ("digits 8x8", "MNIST 14x14")]:
        units = DATASETS[dataset][2]
        for method in methods["step"]:
            yield Cell("step", dataset, "step", method), units, "step", False
        settings = (
            ("as trained", units, False),
            ("permuted pixels", units, True),
            ("twice the depth", tuple(u for u in units for _ in range(2)), False),
            ("eight times the width", tuple(8 * u for u in units), False),
        )
        for setting, wanted, permute in settings:
            for method in methods["transfer"]:
                yield Cell("transfer", dataset, setting, method), wanted, "relu", permute


def measure(cell, units, activation, permute, methods, seeds):
    """Tunes on the tuning seeds, then reports: ``(accuracies, chosen settings)``."""
    function, settings = methods[cell.study][cell.method]

    def scores(seed, chosen):
        p = problem(cell.dataset, seed, permute)
        return read_out(function(p, (p.pool.shape[1], *units), activation, seed, **chosen), p)

    tuned = []
    for chosen in settings:
        by_penalty = [scores(seed, chosen) for seed in TUNING_SEEDS]
        penalty = max(PENALTIES, key=lambda penalty: np.mean([s[penalty] for s in by_penalty]))
        tuned.append((np.mean([s[penalty] for s in by_penalty]), chosen, penalty))
    _, chosen, penalty = max(tuned, key=lambda row: row[0])
    return [scores(seed, chosen)[penalty] for seed in seeds], chosen | {"penalty": penalty}


def interval(values) -> float:
    """Half of Student's 95% interval of the mean."""
    if len(values) < 2:
        return float("nan")
    return float(scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))


# --- the report


def markdown(rows, study) -> list[str]:
    """One table a study, data sets and settings down, methods across; ours first."""
    rows = [row for row in rows if row["study"] == study]
    if not rows:
        return []
    methods = list(dict.fromkeys(row["method"] for row in rows))
    places = list(dict.fromkeys((row["dataset"], row["setting"]) for row in rows))

    def value(place, method):
        found = [r for r in rows if (r["dataset"], r["setting"]) == place and r["method"] == method]
        return found[0] if found else None

    def lead(place):
        others = [r["mean"] for m in methods if m != OURS and (r := value(place, m))]
        ours = [r["mean"] for m in methods if m == OURS and (r := value(place, m))]
        return (max(ours) if ours else 0) - (max(others) if others else 0)

    lines = ["| | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    for place in sorted(places, key=lead) if study == "table" else places:  # losing cases first
        cells = []
        best = max(r["mean"] for m in methods if (r := value(place, m)))
        for method in methods:
            r = value(place, method)
            text = "–" if r is None else f"{r['mean']:.3f} ± {r['interval']:.3f}"
            cells.append(f"**{text}**" if r and r["mean"] == best else text)
        label = place[0] if study != "transfer" else ", ".join(place)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def plot(rows, path: Path) -> None:
    """Accuracy of every method, a panel a data set."""
    rows = [row for row in rows if row["study"] == "table"]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(1, len(datasets), figsize=(2.9 * len(datasets) + 1.3, 4.2), sharey=True, squeeze=False)
    for axis, dataset in zip(axes[0], datasets, strict=True):
        for i, method in enumerate(methods):
            for row in rows:
                if (row["dataset"], row["method"]) == (dataset, method):
                    ours = method == OURS
                    axis.errorbar(
                        row["mean"], i, xerr=row["interval"], fmt="o", color="C3" if ours else "C0", capsize=2
                    )
        axis.set_title(dataset, fontsize=10)
        axis.set_xlabel("accuracy")
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(range(len(methods)), methods)
    axes[0, 0].invert_yaxis()
    figure.suptitle("Ten labels a class: mean and 95% interval over seeds", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rule", default="letters", help="a pretrained unsupervised rule, or a saved one's folder")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=list(DATASETS))
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("reports/unsupervised"))
    parser.add_argument("--meta-seeds", type=Path, default=Path("runs/meta_seeds"), help="a saved rule in each folder")
    arguments = parser.parse_args()
    weights = read_record(arguments.rule)["sha256"]
    ours = {OURS: learned(arguments.rule)}
    others = {f"meta-seed {folder.name}": learned(folder) for folder in sorted(arguments.meta_seeds.glob("*"))}
    by_backprop = grid(rate=(1e-3, 5e-3), steps=(500,))
    by_labels = grid(rate=(1e-3, 1e-2), steps=(100, 400))
    step = {
        "autoencoder, backprop": (autoencoder, by_backprop),
        "autoencoder, straight-through": (partial(autoencoder, straight_through=True), by_backprop),
        "supervised, backprop": (supervised, by_labels),
        "supervised, straight-through": (partial(supervised, straight_through=True), by_labels),
    }
    plain = {name: _NO_RULE[name] for name in ("hand-set rule", "random init")}
    by_hand_few = {"hand-set rule": (by_hand, grid(steps=(300,), rate=(3e-4, 1e-3), decorrelation=(0.1,)))}
    methods = {"table": ours | _NO_RULE, "step": ours | plain | step, "transfer": ours | plain | by_hand_few}
    methods["meta-seeds"] = ours | others

    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.json"
    about = {"seeds": arguments.seeds, "shots": SHOTS, "tuning_seeds": list(TUNING_SEEDS)}
    rows = []
    if path.exists():
        old = json.loads(path.read_text())
        if {k: old["about"][k] for k in about} == about:  # the baselines stay, of another rule nothing
            rows = [r for r in old["rows"] if r["method"] != OURS or old["about"]["weights"] == weights]
    about["weights"] = weights
    wanted = [c for c in cells(methods, arguments.datasets) if c[0].study in arguments.studies]
    for i, (cell, units, activation, permute) in enumerate(wanted):
        if any(tuple(row[k] for k in Cell._fields) == cell for row in rows):
            continue
        values, chosen = measure(cell, units, activation, permute, methods, range(arguments.seeds))
        row = cell._asdict() | {"units": list(units), "mean": float(np.mean(values)), "interval": interval(values)}
        rows.append(row | {"values": values, "chosen": chosen})
        print(
            f"{i + 1}/{len(wanted)} {', '.join(cell)}: {row['mean']:.3f} ± {row['interval']:.3f} {chosen}", flush=True
        )
        write_atomically(path, (json.dumps({"about": about, "rows": rows}, indent=1) + "\n").encode())
    place = {c[0]: i for i, c in enumerate(wanted)}
    rows.sort(key=lambda row: place.get(Cell(*(row[k] for k in Cell._fields)), len(place)))
    with (arguments.out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Cell._fields, "mean", "interval", "seeds", "chosen"])
        for row in rows:
            kept = [row[k] for k in Cell._fields]
            writer.writerow([*kept, f"{row['mean']:.4f}", f"{row['interval']:.4f}", len(row["values"]), row["chosen"]])
    tables = [line for study in STUDIES for line in [f"## {study}", "", *markdown(rows, study), ""]]
    (arguments.out / "tables.md").write_text("\n".join(tables))
    plot(rows, arguments.out / "table.png")


if __name__ == "__main__":
    main()
