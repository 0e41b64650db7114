"""What bfloat16 parameters and states cost in final loss and in time, and what they save.

Two optimizers on four tasks, in float32 and with parameters, state or both in bfloat16, rounded to the nearest or at
random (`learned_opt.bfloat16_params`, `learned_opt.bfloat16_state`). Forward and backward pass stay float32. The step
size falls to zero by a cosine, from the best of six for Adam (chosen in float32), from its own for `flagship-1`. Writes
to reports/precision:

- precision.csv, precision.png: the training loss of the last tenth of the steps over that of float32, the geometric
  mean over seeds and its standard error;
- second_moment.csv: Adam's second moment of a gradient that falls to a tenth after 3,000 of 9,000 updates;
- cost.csv: one update of 4.2 million parameters with its state in bfloat16 next to float32.

    python benchmarks/precision.py [--steps 1000] [--seeds 8]
"""

import argparse
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tables

import learned_opt
from learned_opt import precision
from tasks.suites import suite

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TASKS = (  # whose loss at the end is not next to zero, where its logarithm would be noise
    "photos/mlp-192-64-64-10-gelu",
    "digits/autoencoder-64-32-8",
    "kjv_small/transformer-1x24",
    "moby_dick_small/lstm-24",
)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SIDE = 1024  # of the four matrices whose update is timed
SIZE = 4096  # numbers whose second moment is followed
VARIANTS = {
    "float32": (None, None),
    "params, nearest": (precision.nearest, None),
    "params, stochastic": (precision.stochastic, None),
    "state, nearest": (None, precision.nearest),
    "state, stochastic": (None, precision.stochastic),
    "both, stochastic": (precision.stochastic, precision.stochastic),
}


def final_losses(family, tx, in_bfloat16, steps, seeds):
    """The mean training loss of the last tenth of `steps` updates, one a seed."""

    def run(data, key):
        cfg_key, init_key, key = jax.random.split(key, 3)
        task = family.task(data, family.sample(cfg_key))
        params = task.init(init_key)
        if in_bfloat16:
            params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)

        def loss(params, key):
            batch_key, loss_key = jax.random.split(key)
            params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
            return task.loss(params, loss_key, task.batch(batch_key, "train"))[0]

        def step(carry, key):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, key)
            updates, state = tx.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), value

        _, losses = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))
        return jnp.mean(losses[-steps // 10 :])

    keys = jax.random.split(jax.random.key(0), seeds)
    return np.asarray(jax.jit(jax.vmap(run, (None, 0)))(family.data, keys), np.float64)


def second_moments():
    """The mean second moment halfway down and at the end, for each rounding."""
    roundings = {"float32": None, "nearest": precision.nearest, "stochastic": precision.stochastic}

    def run(tx):
        def step(state, t):
            gradient = jnp.where(t < 3000, 1.0, 0.1) * jax.random.normal(jax.random.key(t), (SIZE,))
            _, state = tx.update(gradient, state, gradient)
            return state, jnp.mean(optax.tree_utils.tree_get(state, "nu").astype(jnp.float32))

        return jax.lax.scan(step, tx.init(jnp.zeros(SIZE)), jnp.arange(9000))[1]

    rows = []
    for name, rounding in roundings.items():
        adam = optax.adam(1e-3)
        tx = adam if rounding is None else precision.bfloat16_state(adam, rounding=rounding)
        path = jax.jit(run, static_argnums=0)(tx)
        rows.append({"state": name} | {f"after {t}": float(path[t - 1]) for t in (1000, 3000, 4000, 6000, 9000)})
        print(*(f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in rows[-1].items()), sep=", ", flush=True)
    return rows


def costs(rounds=15):
    """Time and memory of an update with its state in bfloat16, the two taking turns."""
    params = {name: 0.03 * jax.random.normal(jax.random.key(0), (SIDE, SIDE)) for name in "abcd"}
    grads = jax.tree.map(jnp.sin, params)
    size = sum(p.size for p in params.values())
    rows = []
    for optimizer, tx in {"adam": optax.adam(1e-3), "flagship-1": learned_opt.load("flagship-1")}.items():
        runs, row = [], {"optimizer": optimizer, "load_before": round(os.getloadavg()[0], 1)}
        for name, made in (("float32", tx), ("bfloat16", precision.bfloat16_state(tx))):
            state = made.init(params)
            row[f"{name}_state_bytes_per_parameter"] = sum(x.nbytes for x in jax.tree.leaves(state)) / size
            runs.append([jax.jit(made.update, donate_argnums=1), state, []])
        for turn in range(rounds + 2):
            for run in runs:
                start = time.perf_counter()
                updates, run[1] = run[0](grads, run[1], params)
                jax.block_until_ready(updates)
                if turn >= 2:
                    run[2].append(time.perf_counter() - start)
        plain, wrapped = (np.array(run[2]) for run in runs)
        row |= {
            "float32_milliseconds": float(np.median(plain)) * 1e3,
            "times_float32": float(np.median(wrapped / plain)),
        }
        rows.append(row)
        print(*(f"{k} {v:.3g}" if isinstance(v, float) else v for k, v in row.items()), sep=", ", flush=True)
    return rows


def write(rows, path):
    tables.write(path, tables.shortened(rows, 5))


def variant(tx, name):
    params, state = VARIANTS[name]
    if state is not None:
        tx = precision.bfloat16_state(tx, rounding=state, min_size=1)
    if params is not None:
        tx = optax.chain(tx, precision.bfloat16_params(rounding=params))
    return optax.with_extra_args_support(tx)


def plot(rows, path):
    tasks, optimizers = (list(dict.fromkeys(row[k] for row in rows)) for k in ("task", "optimizer"))
    shape = {"figsize": (3 * len(tasks), 3.6), "sharex": True, "sharey": True, "squeeze": False}
    figure, (axes,) = plt.subplots(1, len(tasks), **shape, layout="constrained")
    names = [name for name in VARIANTS if name != "float32"]
    for ax, task in zip(axes, tasks, strict=True):
        for i, (optimizer, color) in enumerate(zip(optimizers, ("#555555", "#1b7fbd", "#d1711f"), strict=False)):
            found = {row["variant"]: row for row in rows if row["task"] == task and row["optimizer"] == optimizer}
            y = np.arange(len(names)) + 0.25 * (i - (len(optimizers) - 1) / 2)
            more = 100 * np.log([found[name]["ratio"] for name in names])
            error = 100 * np.array([found[name]["log_error"] for name in names])
            ax.errorbar(more, y, xerr=2 * error, fmt="o", ms=4, color=color, lw=1.2, label=optimizer)
        ax.axvline(0, color="#bbbbbb", lw=1, zorder=0)
        ax.set_title(task, fontsize=8)
        ax.set_yticks(range(len(names)), names)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[-1].legend(frameon=False, fontsize=8)
    figure.supxlabel("training loss at the end, % above that of float32 (bars: two standard errors)", fontsize=9)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--out", type=Path, default=Path("reports/precision"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write(second_moments(), arguments.out / "second_moment.csv")
    write(costs(), arguments.out / "cost.csv")
    entries = {entry.name: entry for name in ("held_out", "validation") for entry in suite(name, held_out=True)}
    rows = []
    for task in arguments.tasks:
        family = entries[task].make()
        runs = (arguments.steps, arguments.seeds)

        def adam(rate):
            return optax.adam(optax.cosine_decay_schedule(rate, arguments.steps))

        tuned = {rate: np.log(final_losses(family, adam(rate), False, *runs)).mean() for rate in RATES}
        best = min(tuned, key=tuned.get)
        own = learned_opt.store.read_record("flagship-1")["learning_rate"]
        flagship = learned_opt.load("flagship-1", learning_rate=optax.cosine_decay_schedule(own, arguments.steps))
        for optimizer, tx, rate in (("adam", adam(best), best), ("flagship-1", flagship, own)):
            logs = {
                name: np.log(final_losses(family, variant(tx, name), VARIANTS[name][0] is not None, *runs))
                for name in VARIANTS
            }
            for name, log in logs.items():
                gap = log - logs["float32"]
                row = {"task": task, "optimizer": optimizer, "learning_rate": rate, "variant": name}
                row["loss"] = float(np.exp(log.mean()))
                row["ratio"] = float(np.exp(gap.mean()))
                row["log_error"] = float(gap.std(ddof=1) / np.sqrt(len(gap)))
                rows.append(row)
                figures = f"{row['loss']:10.3g} x{row['ratio']:8.3f} (log +- {row['log_error']:.3f})"
                print(f"{task:34} {optimizer:9} {rate:<6g} {name:20}", figures, flush=True)
    write(rows, arguments.out / "precision.csv")
    plot(rows, arguments.out / "precision.png")


if __name__ == "__main__":
    main()
