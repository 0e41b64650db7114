"""Growing batches against constant ones at equal samples: sequential steps to a set loss, and the loss at the end.

A perceptron (14x14 pixels, 32 hidden units) on Fashion-MNIST; four workers that meet after every step, so that
steps are rounds. Every plan takes the same samples. A batch is that of all workers together.

- constant: eight sizes
- geometric: doubled after equal numbers of steps;  stepwise: doubled after equal numbers of samples
- noise: follows the measured gradient-noise scale

The growing ones start at one of two sizes, with one of three rules for the learning rate (kept, linear in the batch,
by noise scale): six variants each, fewer than there are constant sizes. Every variant is tuned on one grid (initial
learning rates times constant or cosine over the samples), on seeds of its own; then every family's best variant and
all constant batches are run on the reporting seeds.

    learned-opt data fetch fashion_mnist
    python benchmarks/local_sgd_batches.py         # writes reports/local_sgd/batches.csv and batches.png
"""

import argparse
import csv
import itertools
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import tables

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax

from learned_opt import schedules
from learned_opt.local_sgd import local_sgd, map_workers, spread_workers, worker_axes
from tasks import data
from tasks.families import vision

REPORT = Path(__file__).parents[1] / "reports" / "local_sgd"
WORKERS = 4
SAMPLES = 120_000 // WORKERS  # of one worker
STRETCH = 1000  # samples of one worker between evaluations, and between readings of the noise scale
BUCKETS = tuple(2**i for i in range(3, 9))  # padded sizes of one worker's batch: one compilation each
MEMORY = 8192  # samples over which the noise estimates are averaged
SIZES = (32, 48, 64, 96, 128, 256, 512, 1024)
STARTS = (32, 128)
RULES = ("kept", "linear", "noise")
RATES = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
GRID = tuple(itertools.product(RATES, ("constant", "cosine")))
SLACKS = (1.05, 1.1, 1.2)  # a set loss is so many times the best constant batch's last loss on the tuning seeds
TUNING, REPORTING = (100, 101), (10, 11, 12, 13, 14)


class Variant(NamedTuple):
    family: str
    start: int
    rule: str


def variants():
    constant = [Variant("constant", size, "kept") for size in SIZES]
    return constant + [Variant(*v) for v in itertools.product(("geometric", "stepwise", "noise"), STARTS, RULES)]


def batch_schedule(variant):
    """Return the batch schedule of one worker."""
    first, last = variant.start // WORKERS, SIZES[-1] // WORKERS
    sizes = [first * 2**i for i in range(int(math.log2(last // first)) + 1)]
    if variant.family == "constant":
        return schedules.constant_batch(first)
    if variant.family == "geometric":
        return schedules.geometric_batch(first, factor=2.0, every=SAMPLES // sum(sizes), maximum=last)
    if variant.family == "stepwise":
        steps = [SAMPLES // len(sizes) // size for size in sizes]
        return schedules.stepwise_batch(sizes, np.cumsum(steps[:-1]).tolist())
    return schedules.noise_scale_batch(first, last, scale=1 / WORKERS)


def load():
    """Return standardised images [n, 196] and labels."""
    train = data.load("fashion_mnist")["train"]
    x = vision.shrink(train["image"], 14).reshape(len(train["image"]), -1).astype(np.float32)
    return jnp.asarray((x - x.mean()) / x.std()), jnp.asarray(train["label"].astype(np.int32))


def start_params(seed):
    rng = np.random.default_rng(seed)
    sizes = ((196, 32), (32, 10))
    return [(np.float32(rng.normal(size=s) / np.sqrt(s[0])), np.zeros(s[1], np.float32)) for s in sizes]


def losses(params, x, y):
    (w1, b1), (w2, b2) = params
    logits = jax.nn.relu(x @ w1 + b1) @ w2 + b2
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


@jax.jit
def evaluate(params, x, y):
    return jnp.mean(losses(params, x, y))


class Noise(NamedTuple):
    """Running sums of the estimates of |G|^2 and tr Sigma; only their ratio is used."""

    signal: jax.Array
    noise: jax.Array

    def scale(self):
        """Return B_noise: NaN before the first step, infinite where the gradient is lost in the noise."""
        ratio = self.noise / jnp.where(self.signal > 0, self.signal, 1)
        return jnp.where(self.signal > 0, ratio, jnp.where(self.noise > 0, jnp.inf, jnp.nan))


@jax.jit
def stretch(carry, x, y, steps, base, first, rule):
    """Take the steps (indices, masks, sizes, factors of the rate); sizes are one worker's, nothing is done at 0."""
    axes = worker_axes(carry[1])

    def step(carry, xs):
        params, state, noise = carry
        rows, mask, size, factor = xs
        known = jnp.nan_to_num(noise.scale(), nan=0.0, posinf=1e9) / WORKERS  # unknown: the rate stays
        rules = [
            base,
            schedules.learning_rate_for_batch(base, first, size, rule="linear"),
            schedules.learning_rate_for_batch(base, first, size, rule="noise", noise_scale=known),
        ]
        rate = factor * jnp.stack(rules)[rule]

        def one(params, state, rows, mask):
            loss = lambda p: schedules.masked_mean(losses(p, x[rows], y[rows]), mask)  # noqa: E731
            updates, state = local_sgd(optax.sgd(rate), sync_every=1).update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        params, state = map_workers(one, in_axes=(0, axes, 0, 0), out_axes=(0, axes))(params, state, rows, mask)
        of_workers, of_mean = state.statistics.worker_sq / rate**2, state.statistics.delta_sq / rate**2
        found = schedules.gradient_noise(of_workers, of_mean, size, WORKERS * size)
        left = jnp.exp(-size * WORKERS / MEMORY)
        noise = Noise(left * noise.signal + size * found.signal, left * noise.noise + size * found.noise)
        return params, state, noise

    def unless_padding(carry, xs):
        return jax.lax.cond(xs[2] > 0, lambda: step(carry, xs), lambda: carry), None

    return jax.lax.scan(unless_padding, carry, steps)[0]


def pieces(sizes):
    """Cut one worker's batch sizes into runs of one bucket, each at most STRETCH samples long if padded."""
    begin = 0
    while begin < len(sizes):
        padded = schedules.bucket(sizes[begin], BUCKETS)
        end = begin
        while end < min(begin + STRETCH // padded, len(sizes)) and schedules.bucket(sizes[end], BUCKETS) == padded:
            end += 1
        yield sizes[begin:end]
        begin = end


def adaptive_pieces(schedule, scale):
    """The same for a schedule that reads the noise scale (given by ``scale()``) before every piece."""
    left = SAMPLES
    while left > 0:
        size = int(schedule(0, schedules.Statistics(custom=scale())))
        steps = min(STRETCH // schedules.bucket(size, BUCKETS), math.ceil(left / size))
        sizes = [size] * steps
        sizes[-1] = min(size, left - size * (steps - 1))
        left -= sum(sizes)
        yield sizes


def run(variant, base, decay, seed, x, y):
    """Return the curve: lists of steps, samples of all workers, batch of all workers, loss."""
    params, state = start_params(seed), local_sgd(optax.sgd(0.0), sync_every=1).init(start_params(seed))
    none = Noise(jnp.zeros(()), jnp.zeros(()))
    carry = [spread_workers(params, WORKERS), spread_workers(state, WORKERS, worker_axes(state)), none]
    schedule = batch_schedule(variant)
    if variant.family == "noise":
        parts = adaptive_pieces(schedule, lambda: carry[2].scale())
    else:
        parts = pieces(schedules.make_plan(SAMPLES, 1, schedule).batches.tolist())
    curve, steps, taken = [], 0, 0
    for sizes in parts:
        padded, count = schedules.bucket(max(sizes), BUCKETS), len(sizes)
        indices = np.zeros((STRETCH // padded, WORKERS, padded), np.int32)
        masks = np.zeros(indices.shape, bool)
        # what was taken before counts as one batch, dropped: the draw goes on where it was, and sizes may be new
        past = [taken] if taken else []
        plan = schedules.Plan(np.ones(count + len(past), int), np.asarray(past + sizes))
        drawn = schedules.plan_batches(plan, len(y), WORKERS, seed=seed, buckets=[padded, *past])
        for i, batch in enumerate(itertools.islice(drawn, len(past), None)):
            indices[i], masks[i] = batch
        factors = np.ones(len(indices), np.float32)
        if decay == "cosine":
            done = taken + np.cumsum(sizes) - np.asarray(sizes)
            factors[:count] = 0.5 * (1 + np.cos(np.pi * done / SAMPLES))
        padding = np.zeros(len(indices) - count, np.float32)
        xs = (indices, masks, np.concatenate([np.float32(sizes), padding]), factors)
        carry[:] = stretch(tuple(carry), x, y, xs, base, variant.start / WORKERS, RULES.index(variant.rule))
        steps, taken = steps + count, taken + sum(sizes)
        loss = float(evaluate(carry[1].anchor, x[:5000], y[:5000]))
        curve.append((steps, taken * WORKERS, sizes[0] * WORKERS, loss))
        if not loss < 10:
            curve.append((steps, SAMPLES * WORKERS, sizes[0] * WORKERS, np.inf))
            break
    return curve


def reach(curve, target):
    """Return the steps to the set loss, interpolated; infinite if it is never reached."""
    before, above = 0, np.log(10)
    for steps, _, _, loss in curve:
        if loss <= target:
            share = np.log(above / target) / max(np.log(above / loss), 1e-9)
            return before + np.clip(share, 0, 1) * (steps - before)
        before, above = steps, loss
    return np.inf


def summary(variant, point, curves, target, seeds, chosen=""):
    """Return a row: means and standard errors over the seeds; ``chosen``: best of its family on the tuning seeds."""
    got = np.asarray([reach(curve, target) if target else np.nan for curve in curves])
    numbers = {"steps_to_target": got, "last_loss": np.asarray([curve[-1][3] for curve in curves])}
    numbers |= {"steps": np.asarray([curve[-1][0] for curve in curves])}
    row = variant._asdict() | {"rate": point[0], "decay": point[1], "seeds": seeds, "chosen": chosen}
    row |= {"target": round(target, 4) if target else "last loss", "of": len(curves)}
    row |= {"reached": int(np.isfinite(got).sum()) if target else ""}
    for name, values in numbers.items():
        fine = bool(np.all(np.isfinite(values)))
        row[name] = float(f"{values.mean():.6g}") if fine else ""
        row[f"{name}_se"] = float(f"{values.std(ddof=1) / len(values) ** 0.5:.3g}") if fine else ""
    return row


def study(x, y):
    """Return the rows of the table, and one reporting curve of each family's quickest variant."""
    runs = {}

    def on_seeds(variant, point, seeds):
        for seed in seeds:
            if (variant, point, seed) not in runs:
                runs[variant, point, seed] = run(variant, *point, seed, x, y)
        return [runs[variant, point, seed] for seed in seeds]

    tuning = {}
    for variant in variants():
        began = time.time()
        tuning |= {(variant, point): on_seeds(variant, point, TUNING) for point in GRID}
        best = min(GRID, key=lambda point: np.mean([curve[-1][3] for curve in tuning[variant, point]]))
        loss, steps = np.mean([c[-1][3] for c in tuning[variant, best]]), tuning[variant, best][0][-1][0]
        print(f"{variant}: {best}, loss {loss:.4f}, {steps} steps, took {time.time() - began:.0f} s", flush=True)
    last = {key: float(np.mean([curve[-1][3] for curve in curves])) for key, curves in tuning.items()}
    lowest = min(value for (variant, _), value in last.items() if variant.family == "constant")

    rows, shown = [], {}
    for slack in (None, *SLACKS):  # None: tuned for the loss at the end
        target = None if slack is None else slack * lowest
        goal = dict(last)
        if target:
            goal = {k: (float(np.mean([reach(c, target) for c in cs])), last[k]) for k, cs in tuning.items()}
        best = {v: min(GRID, key=lambda point, v=v, g=goal: g[v, point]) for v in variants()}
        rows += [summary(v, point, tuning[v, point], target, "tuning") for v, point in best.items()]
        families = ("constant", "geometric", "stepwise", "noise")
        first = {f: min((v for v in best if v.family == f), key=lambda v, b=best, g=goal: g[v, b[v]]) for f in families}
        for v in (v for v in best if v.family == "constant" or v == first[v.family]):
            curves = on_seeds(v, best[v], REPORTING)
            rows.append(summary(v, best[v], curves, target, "reporting", chosen=v == first[v.family]))
            print(rows[-1], flush=True)
            if slack == SLACKS[0]:
                shown[v] = curves[0]
    return rows, shown


COLOURS = {"constant": "0.45", "geometric": "tab:orange", "stepwise": "tab:green", "noise": "tab:blue"}
LABELS = {
    "geometric": "geometric (doubled after equal steps)",
    "stepwise": "stepwise (doubled after equal samples)",
    "noise": "by the noise scale",
}


def plot(rows, curves):
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    report = [r for r in rows if r["seeds"] == "reporting"]
    ends = [r for r in report if r["target"] == "last loss"]
    constant = [r for r in ends if r["family"] == "constant"]
    values = [[r[name] for r in constant] for name in ("steps", "last_loss", "last_loss_se")]
    left.errorbar(*values, fmt="o-", color=COLOURS["constant"], capsize=3, ms=4, label="constant batch (its size)")
    for r in constant:
        left.annotate(r["start"], (r["steps"], r["last_loss"]), xytext=(4, 5), textcoords="offset points", fontsize=8)
    for r in (r for r in ends if r["family"] != "constant"):
        error = {"xerr": r["steps_se"], "yerr": r["last_loss_se"]}
        label = f"{LABELS[r['family']]}, rate {r['rule']}"
        left.errorbar(r["steps"], r["last_loss"], **error, fmt="s", ms=5, color=COLOURS[r["family"]], label=label)
    left.set(xlabel="sequential steps", ylabel="training loss", title="After equal samples", xscale="log")
    left.set_xticks([100, 200, 500, 1000, 2000, 4000], [100, 200, 500, 1000, 2000, 4000])
    left.minorticks_off()
    left.legend(fontsize=8)

    aims = [r for r in report if r["target"] != "last loss" and r["steps_to_target"] != ""]
    targets = sorted({r["target"] for r in aims})
    for i, target in enumerate(targets):
        mine = [r for r in aims if r["target"] == target]
        for r in mine:
            place = (i, r["steps_to_target"])
            if r["family"] == "constant":
                best = r["chosen"] is True
                middle.errorbar(
                    *place, r["steps_to_target_se"], fmt="o", color="black" if best else "0.6", ms=5, capsize=3
                )
                middle.annotate(r["start"], place, xytext=(-8, 0), textcoords="offset points", fontsize=8, ha="right",
                                va="center", color="black" if best else "0.5")  # fmt: skip
            else:
                middle.errorbar(i + 0.12, place[1], r["steps_to_target_se"], fmt="s", ms=5, color=COLOURS[r["family"]])
    middle.set_xticks(range(len(targets)), [f"{t:.3f}" for t in targets])
    middle.set(
        xlabel="set training loss", ylabel="sequential steps", title="Steps to a set loss, where all seeds reach it"
    )
    middle.plot([], [], "o", color="black", label="constant batch, best on the tuning seeds")
    middle.plot([], [], "o", color="0.6", label="constant batch, other sizes")
    middle.legend(fontsize=8)
    middle.set_xlim(-0.5, len(targets) - 0.5)
    middle.set_yscale("log")
    middle.set_ylim(250, 4000)
    middle.set_yticks([300, 500, 1000, 2000], [300, 500, 1000, 2000])
    middle.minorticks_off()

    for variant, curve in curves.items():
        if variant.family != "constant":
            samples, batch = ([p[i] for p in curve[:-1]] for i in (1, 2))  # the last takes what is left
            right.plot(samples, batch, color=COLOURS[variant.family], label=LABELS[variant.family])
    right.set(
        xlabel="samples taken", ylabel="batch", title="The growing batches (lowest set loss, one seed)", yscale="log"
    )
    right.set_yticks([32, 64, 128, 256, 512, 1024], [32, 64, 128, 256, 512, 1024])
    right.minorticks_off()
    right.legend(fontsize=8)
    fig.savefig(REPORT / "batches.png", dpi=110)
    plt.close(fig)


def write(name, rows):
    tables.write(REPORT / name, rows)


def read(name):
    """Return a file's rows with what is a number as one."""
    with open(REPORT / name) as file:
        return [{k: number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def number(text):
    try:
        return {"True": True, "False": False}[text] if text in ("True", "False") else json.loads(text)
    except ValueError:
        return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot-only", action="store_true", help="draw again from the files")
    args = parser.parse_args()
    REPORT.mkdir(parents=True, exist_ok=True)
    if not args.plot_only:
        rows, shown = study(*load())
        write("batches.csv", rows)
        names = ("steps", "samples", "batch", "loss")
        points = [v._asdict() | dict(zip(names, p, strict=True)) for v, curve in shown.items() for p in curve]
        write("batches_curves.csv", points)
    rows, curves = read("batches.csv"), {}
    for point in read("batches_curves.csv"):
        variant = Variant(*(point[name] for name in Variant._fields))
        curves.setdefault(variant, []).append([point[name] for name in ("steps", "samples", "batch", "loss")])
    plot(rows, curves)


if __name__ == "__main__":
    main()
