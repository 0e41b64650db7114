"""Outer steps of local SGD compared: averaging, post-local, SlowMo, DiLoCo, and a learned outer step left untuned.

K = 8 workers of 16 examples each step by plain SGD, H = 4, 16, 64 times a round, equal rounds, on convolutional nets
(Fashion-MNIST and digits) and a character transformer (Moby Dick). The learned step was trained on other families, no
convolutions or transformers, and never on 64 steps a round; but on perceptrons on Fashion-MNIST. Every hand-made method
is tuned on nine settings by two seeds; all are reported on five others: the loss at the anchor over rounds, mean over
seeds. The learned step has one local rate on all tasks, the best of three on three validation tasks (--validate shows
it), whose data sets are none of these. With every method a round costs a worker the same bytes, 4 a parameter, which
the upper axis counts. Results are kept method by method: a run that was cut off goes on. Writes
reports/local_sgd/outer.json, outer.csv, outer.png:

    python benchmarks/local_sgd_outer.py [--learned NAME_OR_FOLDER] [--rounds 40] [--only TASK ...] [--validate]
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tables
from matplotlib.figure import Figure

import learned_opt
from learned_opt.files import write_atomically
from tasks.base import num_params
from tasks.families.sequence import char_transformer
from tasks.families.vision import image_conv, image_mlp

WORKERS, DELAYS = 8, (4, 16, 64)
LOCAL = (0.1, 0.3, 1.0)
NINE = tuple(float(x) for x in np.geomspace(0.03, 3.0, 9))
OURS = "learned, untuned"
UNTUNED = 0.1  # the learned step's local rate: the best of LOCAL on the validation tasks
LOOKS = {OURS: {"color": "black", "lw": 1.8}, "learned, local rate tuned": {"color": "black", "lw": 1.2, "ls": "--"}}
REPORT = Path(__file__).parents[1] / "reports" / "local_sgd"

TASKS = {
    "fashion conv": lambda: image_conv("fashion_mnist_small", side=8, channels=(8, 16), batch_size=16),
    "digits conv": lambda: image_conv("digits", side=8, channels=(8, 16), batch_size=16),
    "moby dick transformer": lambda: char_transformer("moby_dick_small", layers=1, width=16, length=8, batch_size=16),
}
VALIDATION = {
    "photos conv": lambda: image_conv("photos", side=8, channels=(8, 16), batch_size=16),
    "photos mlp": lambda: image_mlp("photos", side=8, width=64, depth=2, activation="gelu", batch_size=16),
    "King James transformer": lambda: char_transformer("kjv_small", layers=1, width=16, length=8, batch_size=16),
}
# name -> (outer transform of its setting b, settings (local rate, b), whether the first third of the rounds has H = 1)
METHODS = {
    "averaging": (lambda b: optax.sgd(b), [(a, 1.0) for a in NINE], False),
    "post-local": (lambda b: optax.sgd(b), [(a, 1.0) for a in NINE], True),
    "SlowMo": (lambda b: optax.sgd(1.0, momentum=b), [(a, b) for a in LOCAL for b in (0.3, 0.6, 0.9)], False),
    "DiLoCo": (
        lambda b: optax.sgd(b, momentum=0.9, nesterov=True),
        [(a, b) for a in LOCAL for b in (0.3, 0.7, 1.0)],
        False,
    ),
}


def runner(family, outer, rounds, post_local):
    """``(data, local rate, setting, H, seed) -> loss at the anchor by round``, compiled once for all delays."""

    def run(data, rate, setting, delay, seed):
        k_cfg, k_init, k_run = jax.random.split(jax.random.PRNGKey(seed), 3)
        task, transform = family.task(data, family.sample(k_cfg)), optax.with_extra_args_support(outer(setting))
        anchor = task.init(k_init)

        def one_round(carry, inputs):
            anchor, state = carry
            index, key = inputs
            steps = jnp.where(post_local & (index < rounds // 3), 1, delay)

            def worker(key):
                def local(i, carry):
                    params, first = carry
                    batch = task.batch(jax.random.fold_in(key, i), "train")
                    loss, grads = jax.value_and_grad(lambda p: task.loss(p, key, batch)[0])(params)
                    return jax.tree.map(lambda p, g: p - rate * g, params, grads), jnp.where(i == 0, loss, first)

                return jax.lax.fori_loop(0, steps, local, (anchor, jnp.zeros(())))

            ends, losses = jax.vmap(worker)(jax.random.split(key, WORKERS))
            delta = jax.tree.map(lambda x, e: x - e.mean(0), anchor, ends)
            updates, state = transform.update(delta, state, anchor, value=losses.mean())
            return (optax.apply_updates(anchor, updates), state), losses.mean()

        keys = jax.random.split(k_run, rounds)
        return jax.lax.scan(one_round, (anchor, transform.init(anchor)), (jnp.arange(rounds), keys))[1]

    # one H a call: lanes of different H would all wait for the longest
    return jax.jit(jax.vmap(run, (None, 0, 0, None, 0)))


def curves(run, data, settings, delay, seeds):
    """``[settings, seeds, rounds]``; a loss that is not finite counts as infinite."""
    lanes = [(a, b, s) for a, b in settings for s in seeds]
    rates, values, keys = (jnp.asarray(x) for x in zip(*lanes, strict=True))
    found = np.asarray(run(data, rates, values, jnp.asarray(delay), keys.astype(jnp.uint32)))
    return np.nan_to_num(found, nan=np.inf).reshape(len(settings), len(seeds), -1)


def compare(family, method, rounds):
    """The results of a method on a task: one row a delay."""
    outer, settings, post_local = method
    run, rows = runner(family, outer, rounds, post_local), []
    for delay in DELAYS:
        best = 0
        if len(settings) > 1:
            tuned = curves(run, family.data, settings, delay, range(100, 102))
            best = int(np.argmin(tuned[:, :, -5:].mean((1, 2))))
        losses = curves(run, family.data, [settings[best]], delay, range(200, 205))[0]
        final = losses[:, -5:].mean(1)
        rows.append(
            {
                "H": delay,
                "local_rate": round(settings[best][0], 4),
                "setting": settings[best][1],
                "final_loss": round(float(final.mean()), 5),
                "stderr": round(float(final.std(ddof=1) / len(final) ** 0.5), 5),
                "curve": [float(f"{x:.4g}") for x in losses.mean(0)],
            }
        )
    return rows


def validate(learned, rounds):
    """Prints the learned step's losses on the validation tasks at each of LOCAL, and their mean logarithm."""
    print("local rate", *LOCAL)
    logs = []
    for name, make in VALIDATION.items():
        family = make()
        run = runner(family, learned, rounds, False)
        for delay in DELAYS:
            losses = curves(run, family.data, [(rate, 1.0) for rate in LOCAL], delay, range(300, 303))
            final = losses[:, :, -5:].mean((1, 2))
            logs.append(np.log(np.minimum(final, 10)))
            print(f"{name}, H = {delay}", *(f"{x:.4g}" for x in final), flush=True)
    print("mean log loss", *(f"{x:.4f}" for x in np.mean(logs, 0)))


def plot(found, path):
    figure = Figure(figsize=(10.5, 2.9 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), len(DELAYS), sharex=True, squeeze=False)
    for axes, (task, results) in zip(grid, found.items(), strict=True):
        for column, (ax, delay) in enumerate(zip(axes, DELAYS, strict=True)):
            for i, (method, rows) in enumerate(results["methods"].items()):
                look = LOOKS.get(method, {"color": f"C{i}", "lw": 1.1})
                ax.plot(rows[column]["curve"], label=method, **look)
            ax.set_title(f"{task}, H = {delay}", fontsize=9)
            ax.set_yscale("log")
            shown = [rows[column]["curve"] for rows in results["methods"].values()]
            start, least = max(curve[0] for curve in shown), min(min(curve) for curve in shown)
            ax.set_ylim(0.9 * least, min(ax.get_ylim()[1], 2 * start))  # what diverges leaves the picture
            ax.tick_params(labelsize=7, which="both")
            ax.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("training loss at the anchor", fontsize=8)
        bytes_of = 4e-6 * results["parameters"]
        upper = axes[-1].secondary_xaxis("top", functions=(lambda r, b=bytes_of: r * b, lambda m, b=bytes_of: m / b))
        upper.tick_params(labelsize=6)
        upper.set_xlabel("MB sent by a worker", fontsize=6)
    for ax in grid[-1]:
        ax.set_xlabel("rounds", fontsize=8)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learned", default="outer", help="a learned outer step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--validate", action="store_true", help="show the local rates on the validation tasks, no more")
    parser.add_argument("--out", type=Path, default=REPORT)
    arguments = parser.parse_args()
    rule, theta, *_, rate = learned_opt.load_rule(arguments.learned)
    rate = rate or 1.0

    def learned(setting):
        del setting
        return optax.chain(rule.build(theta, num_steps=arguments.rounds), optax.scale(rate))

    if arguments.validate:
        return validate(learned, arguments.rounds)
    methods = METHODS | {
        OURS: (learned, [(UNTUNED, 1.0)], False),
        "learned, local rate tuned": (learned, [(a, 1.0) for a in LOCAL], False),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "outer.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for task in arguments.only:
        family = TASKS[task]()
        results = found.setdefault(task, {"parameters": num_params(family), "methods": {}})["methods"]
        for name, method in methods.items():
            if name in results and not name.startswith("learned"):  # weights change, the others do not
                continue
            begun, results[name] = time.time(), compare(family, method, arguments.rounds)
            losses = [row["final_loss"] for row in results[name]]
            print(f"{task}: {name} {losses}, {time.time() - begun:.0f} s", flush=True)
            write_atomically(path, json.dumps(found) + "\n")
    rows = [
        {"task": task, "method": method} | row
        for task, results in found.items()
        for method, of_method in results["methods"].items()
        for row in of_method
    ]
    tables.write(arguments.out / "outer.csv", rows, without={"curve"})
    plot(found, arguments.out / "outer.png")


if __name__ == "__main__":
    main()
