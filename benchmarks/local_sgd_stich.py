"""Stich's experiment: steps and rounds to a set accuracy, over workers, delays and batch sizes.

L2-regularised logistic regression, lambda = 1/n, on breast cancer (569 rows) and on two whole Fashion-MNIST classes
(shirts against T-shirts, 14,000 images, training and test part together):

    f(w) = 1/n sum_i log(1 + exp(-y_i x_i w)) + |w|^2 / (2n),    reached when f(mean of the workers) - f* <= eps

Every (workers, delay, batch) has its learning rate tuned on one grid: eta_t = eta_0 a / (a + t), as Stich's.

    python benchmarks/local_sgd_stich.py          # writes reports/local_sgd/stich.csv and stich_*.png
"""

import argparse
import csv
import functools
import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import tables

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.optimize

from learned_opt.local_sgd import local_sgd, map_workers, spread_workers, worker_axes
from tasks import data

REPORT = Path(__file__).parents[1] / "reports" / "local_sgd"
WORKERS = (1, 2, 4, 8, 16, 32)
DELAYS = (1, 2, 4, 8, 16, 32, 64, 128)
BATCHES = (4, 16)
RATES = tuple(itertools.product((0.25, 1.0, 4.0), (30.0, 300.0, 3000.0)))  # eta_0 L, a
EPS = {"breast_cancer": 0.0002, "fashion_mnist_shirts": 0.005}  # 0.005 takes but five steps on the former


def load(name):
    """Return features [n, d + 1] (the last is 1), mean square norm 1 a row, and labels ±1."""
    sets = data.load("breast_cancer" if name == "breast_cancer" else "fashion_mnist")
    if name == "breast_cancer":
        x = np.concatenate([part["features"] for part in sets.values()])
        y = np.concatenate([part["label"] for part in sets.values()])
    else:
        x = np.concatenate([part["image"] for part in sets.values()]).reshape(-1, 28 * 28).astype(np.float64)
        y = np.concatenate([part["label"] for part in sets.values()])
        chosen = (y == 0) | (y == 6)
        x, y = x[chosen] - x[chosen].mean(axis=0), y[chosen] == 6
    x = np.concatenate([x, np.ones((len(x), 1)) * np.sqrt(np.mean(x**2))], axis=1)
    x = x / np.sqrt(np.mean(np.sum(x**2, axis=1)))
    return x.astype(np.float32), np.where(y > 0, 1, -1).astype(np.float32)


def objective(w, x, y):
    return jnp.mean(jax.nn.softplus(-y * (x @ w))) + 0.5 / len(y) * jnp.sum(w**2)


def optimum(x, y):
    """Return f* in float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)

    def value_and_grad(w):
        margin = y * (x @ w)
        grad = -(x.T @ (y / (1 + np.exp(margin)))) / len(y) + w / len(y)
        return np.mean(np.logaddexp(0, -margin)) + 0.5 / len(y) * w @ w, grad

    options = {"maxiter": 20000, "maxfun": 40000, "ftol": 1e-14, "gtol": 1e-9}
    found = scipy.optimize.minimize(value_and_grad, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options=options)
    return float(found.fun)


@functools.partial(jax.jit, static_argnames=("workers", "batch"))
def curves(x, y, smoothness, points, key, *, workers, batch):
    """Return f at the mean of the workers, [points, delays, rates]; lanes share the samples drawn."""

    def gradient(w, rows):
        xb, yb = x[rows], y[rows]
        return -(xb.T @ (yb * jax.nn.sigmoid(-yb * (xb @ w)))) / batch + w / len(y)

    def transform(delay, rate):
        schedule = lambda t: rate[0] / smoothness * rate[1] / (rate[1] + t)  # noqa: E731
        return local_sgd(optax.sgd(schedule), sync_every=delay)

    state = transform(jnp.int32(1), jnp.ones(2)).init(jnp.zeros(x.shape[1]))
    axes = worker_axes(state)
    delays, rates = jnp.asarray(DELAYS), jnp.asarray(RATES)

    def start(delay, rate):
        w = jnp.zeros(x.shape[1])
        return spread_workers(w, workers), spread_workers(transform(delay, rate).init(w), workers, axes)

    def step(delay, rate, carry, rows):
        def one(w, state, rows):
            updates, state = transform(delay, rate).update(gradient(w, rows), state, w)
            return optax.apply_updates(w, updates), state

        return map_workers(one, in_axes=(0, axes, 0), out_axes=(0, axes))(*carry, rows)

    def over(fn, *extra):
        """Map over delays, then rates; extra arguments along too (0) or shared (None)."""
        return jax.vmap(jax.vmap(fn, in_axes=(None, 0, *extra)), in_axes=(0, None, *extra))

    carry = over(start)(delays, rates)

    def stretch(carry, ends):
        def body(t, carry):
            rows = jax.random.randint(jax.random.fold_in(key, t), (workers, batch), 0, len(y))
            return over(step, 0, None)(delays, rates, carry, rows)

        carry = jax.lax.fori_loop(ends[0], ends[1], body, carry)
        means = jnp.mean(carry[0], axis=2).reshape(-1, x.shape[1])
        margins = y[None] * (means @ x.T)
        values = jnp.mean(jax.nn.softplus(-margins), axis=1) + 0.5 / len(y) * jnp.sum(means**2, axis=1)
        return carry, values.reshape(len(DELAYS), len(RATES))

    ends = jnp.stack([jnp.concatenate([jnp.zeros(1, jnp.int32), points[:-1]]), points], axis=1)
    return jax.lax.scan(stretch, carry, ends)[1]


def first_reach(points, gaps, eps):
    """Return the step at which each curve [points, ...] first is below eps, interpolated in log-log; inf if never."""
    below = gaps <= eps
    at = np.argmax(below, axis=0)
    steps = np.full(at.shape, np.inf)
    for index in np.ndindex(at.shape):
        i = at[index]
        if not below[(i, *index)]:
            continue
        if i == 0:
            steps[index] = points[0]
            continue
        high, low = gaps[(i - 1, *index)], max(gaps[(i, *index)], 1e-9)
        share = np.clip(np.log(high / eps) / np.log(high / low), 0, 1)
        steps[index] = np.exp((1 - share) * np.log(points[i - 1]) + share * np.log(points[i]))
    return steps


def run(name, seeds):
    x, y = load(name)
    best = optimum(x, y)
    smoothness = 0.25 * float(np.linalg.eigvalsh(x.T.astype(np.float64) @ x / len(y))[-1]) + 1 / len(y)
    print(f"{name}: n={len(y)} d={x.shape[1]} L={smoothness:.4f} f*={best:.6f} f(0)={np.log(2):.4f}", flush=True)
    rows = []
    for batch, workers in itertools.product(BATCHES, WORKERS):
        began = time.time()
        last = int(np.clip(2**17 / (workers * batch), 2**11, 2**14))
        points = np.unique(np.round(2 ** np.arange(2, np.log2(last) + 0.01, 1 / 3)).astype(np.int32))
        steps = []
        for seed in range(seeds):
            values = curves(x, y, smoothness, points, jax.random.key(seed), workers=workers, batch=batch)
            steps.append(first_reach(points, np.asarray(values) - best, EPS[name]))
        mean = np.mean(steps, axis=0)  # over seeds, [delays, rates]; inf if a seed never got there
        for i, delay in enumerate(DELAYS):
            j = int(np.argmin(mean[i]))
            reached = float(mean[i, j])
            rows.append(
                {
                    "data": name, "batch": batch, "workers": workers, "delay": delay, "steps": round(reached, 1),
                    "rounds": round(reached / delay, 1), "eta0_times_L": RATES[j][0], "a": RATES[j][1],
                    "seed_deviation": round(float(np.std([s[i, j] for s in steps])), 1) if np.isfinite(reached) else "",
                }
            )  # fmt: skip
        print(
            f"  b={batch} P={workers}: steps {[r['steps'] for r in rows[-len(DELAYS) :]]} {time.time() - began:.0f} s",
            flush=True,
        )
    return rows


def plot(name, rows):
    fig, grid = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    table = {(r["batch"], r["workers"], r["delay"]): r["steps"] for r in rows if r["data"] == name}
    for line, batch in zip(grid, BATCHES, strict=True):
        base = table[batch, 1, 1]
        speed = np.array([[base / table[batch, k, h] for h in DELAYS] for k in WORKERS])
        shown = line[0].imshow(
            np.log2(np.maximum(speed, 2**-6)), origin="lower", cmap="viridis", aspect="auto", vmin=-1, vmax=5
        )
        for i, j in np.ndindex(speed.shape):
            line[0].text(j, i, f"{speed[i, j]:.1f}" if speed[i, j] > 0 else "–", ha="center", va="center", fontsize=8,
                         color="black" if speed[i, j] > 6 else "white")  # fmt: skip
        line[0].set_xticks(range(len(DELAYS)), DELAYS)
        line[0].set_yticks(range(len(WORKERS)), WORKERS)
        line[0].set(xlabel="delay H", ylabel="workers P", title=f"batch {batch}: speed-up in steps over P=1, H=1")
        fig.colorbar(shown, ax=line[0], label="log2 speed-up")
        for j, h in enumerate(DELAYS):
            line[1].plot(WORKERS, speed[:, j], "o-", ms=3, lw=1.2, color=plt.cm.plasma(j / len(DELAYS)), label=f"H={h}")
        line[1].plot(WORKERS, WORKERS, "k--", lw=1, label="linear")
        line[1].set(xscale="log", yscale="log", xlabel="workers P", ylabel="speed-up", title=f"batch {batch}")
        line[1].set_xticks(WORKERS, WORKERS)
        line[1].minorticks_off()
        line[1].legend(fontsize=7, ncols=2)
        knees, bounds = [], []
        for k in WORKERS:
            good = [h for h in DELAYS if table[batch, k, h] <= 1.25 * table[batch, k, 1]]
            knees.append(max(good))
            bounds.append(np.sqrt(table[batch, k, 1] / (k * batch)))
        line[2].plot(WORKERS, knees, "o-", label="measured: largest H within 1.25 × the steps of H=1")
        line[2].plot(WORKERS, bounds, "s--", label="sqrt(T / (P b)), T the steps of H=1")
        line[2].set(xscale="log", yscale="log", xlabel="workers P", ylabel="delay H", title=f"batch {batch}: the knee")
        line[2].set_xticks(WORKERS, WORKERS)
        line[2].minorticks_off()
        line[2].set_ylim(0.2, 300)
        line[2].legend(fontsize=7, loc="lower left", framealpha=0.6)
    fig.suptitle(f"{name}: steps to f - f* = {EPS[name]}, learning rate tuned for every cell")
    fig.savefig(REPORT / f"stich_{name}.png", dpi=110)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--data", nargs="+", default=["breast_cancer", "fashion_mnist_shirts"])
    parser.add_argument("--plot-only", action="store_true", help="draw again from stich.csv")
    args = parser.parse_args()
    REPORT.mkdir(parents=True, exist_ok=True)
    if args.plot_only:
        with open(REPORT / "stich.csv") as file:
            number = lambda v: v if v in args.data or v == "" else float(v)  # noqa: E731
            rows = [{k: number(v) for k, v in row.items()} for row in csv.DictReader(file)]
    else:
        rows = [row for name in args.data for row in run(name, args.seeds)]
        tables.write(REPORT / "stich.csv", rows)
    for name in args.data:
        plot(name, rows)


if __name__ == "__main__":
    main()
