"""Outer steps of local SGD compared: averaging, post-local, SlowMo, DiLoCo, and a learned outer step left untuned.

K = 8 workers of 16 examples each, H = 4, 16, 64 local steps a round, equal rounds, on a convolutional net (digits) and
a character transformer (Moby Dick), none of which the learned step was trained on. Every hand-made method is tuned on
nine settings by two seeds; all are reported on five others: the loss at the anchor over rounds, mean over seeds. With
every method a round costs a worker the same bytes, so the curves against rounds are those against bytes. Writes
reports/local_sgd/outer.csv, outer.png:

    python benchmarks/local_sgd_outer.py [--learned NAME_OR_FOLDER] [--rounds 60]
"""

import argparse
import csv
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import learned_opt
from tasks.sequence import char_transformer
from tasks.vision import image_conv

WORKERS, DELAYS = 8, (4, 16, 64)
LOCAL = (0.03, 0.1, 0.3)
NINE = tuple(float(x) for x in np.geomspace(0.01, 1.0, 9))
UNTUNED = 0.1  # the learned step's local rate: the middle of the range that it was trained on
REPORT = Path(__file__).parents[1] / "reports" / "local_sgd"

TASKS = {
    "digits conv": lambda: image_conv("digits", side=8, channels=(8, 16), batch_size=16),
    "moby dick transformer": lambda: char_transformer("moby_dick_small", layers=1, width=16, length=8, batch_size=16),
}
# name -> (outer transform of its setting b, settings (local rate, b), whether the first third of the rounds has H = 1)
METHODS = {
    "averaging": (lambda b: optax.sgd(b), [(a, 1.0) for a in NINE], False),
    "post-local": (lambda b: optax.sgd(b), [(a, 1.0) for a in NINE], True),
    "SlowMo": (lambda b: optax.sgd(1.0, momentum=b), [(a, b) for a in LOCAL for b in (0.3, 0.6, 0.9)], False),
    "DiLoCo": (
        lambda b: optax.sgd(b, momentum=0.9, nesterov=True),
        [(a, b) for a in LOCAL for b in (0.1, 0.4, 0.7)],
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learned", default="outer", help="a learned outer step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=REPORT)
    arguments = parser.parse_args()
    rule, theta = learned_opt.load_rule(arguments.learned)
    rate = learned_opt.store.read_record(arguments.learned).get("learning_rate") or 1.0

    def learned(setting):
        del setting
        return optax.chain(rule.build(theta, num_steps=arguments.rounds), optax.scale(rate))

    methods = METHODS | {"learned, untuned": (learned, [(UNTUNED, 1.0)], False)}
    rows, shown = [], {}
    for task_name, make in TASKS.items():
        family = make()
        for method, (outer, settings, post_local) in methods.items():
            run, begun = runner(family, outer, arguments.rounds, post_local), time.time()
            for delay in DELAYS:
                best = 0
                if len(settings) > 1:
                    tuned = curves(run, family.data, settings, delay, range(100, 102))
                    best = int(np.argmin(tuned[:, :, -5:].mean((1, 2))))
                losses = curves(run, family.data, [settings[best]], delay, range(200, 205))[0]
                final = losses[:, -5:].mean(1)
                shown[task_name, delay, method] = losses.mean(0)
                rows.append(
                    {
                        "task": task_name,
                        "H": delay,
                        "method": method,
                        "local_rate": round(settings[best][0], 4),
                        "setting": settings[best][1],
                        "final_loss": round(float(final.mean()), 5),
                        "stderr": round(float(final.std(ddof=1) / len(final) ** 0.5), 5),
                    }
                )
            print(
                f"{task_name}: {method} {[r['final_loss'] for r in rows[-3:]]} {time.time() - begun:.0f} s", flush=True
            )
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "outer.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    for axes, task_name in zip(figure.subplots(len(TASKS), len(DELAYS), sharex=True), TASKS, strict=True):
        for ax, delay in zip(axes, DELAYS, strict=True):
            for i, method in enumerate(methods):
                ours = method.startswith("learned")
                look = {"color": "black", "lw": 1.8} if ours else {"color": f"C{i}", "lw": 1.1}
                ax.plot(shown[task_name, delay, method], label=method, **look)
            ax.set_title(f"{task_name}, H = {delay}", fontsize=9)
            ax.set_yscale("log")
            ax.tick_params(labelsize=7, which="both")
            ax.spines[["top", "right"]].set_visible(False)
    for ax in axes:
        ax.set_xlabel("rounds", fontsize=8)
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(arguments.out / "outer.png", dpi=120)


if __name__ == "__main__":
    main()
