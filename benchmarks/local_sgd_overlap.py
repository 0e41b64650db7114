"""What overlap hides: two real processes with a slow link between them, beside the alpha-beta model.

A link of `--delays` seconds is a sleep before each all-reduce, in the thread that carries it (`Link.carry`); the
all-reduce itself goes over gloo. A step is that of a perceptron of 233,740 parameters and a sleep of 20 ms, which
leaves the core to others as a step on an accelerator does: both processes share one. For each overlap tau a run
of 96 steps, 16 a round, with tau = 0 for waiting at once; medians over repeats that take turns. The model,
`communication.wall_clock(overlap=tau)`, is given the time of a step and of a message, both measured apart.

The second half of the table is the model alone: a network of 10^8 parameters in float32 on 8 workers, half a second a
step, 100 steps between two messages of a parameter, on three links; whole, or in four fragments.

What the delay costs: DiLoCo as tuned in local_sgd_outer.py (transformer on Moby Dick, 8 workers of 16 examples, 16
steps a round, 40 rounds), nothing tuned again: the last five rounds' loss of three seeds, less that without overlap.

    python benchmarks/local_sgd_overlap.py    # some eight minutes; writes reports/local_sgd/overlap*.csv and .png
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tables
from jax.sharding import AxisType
from local_sgd_communication import for_launch, launch, middle, perceptron
from matplotlib.figure import Figure

from learned_opt import communication
from learned_opt.local_sgd import Link, diloco, local_sgd, map_workers, spread_workers, worker_axes
from tasks.families.sequence import char_transformer

REPORT = Path(__file__).parents[1] / "reports" / "local_sgd"
STEPS, EVERY = 96, 16
WORKERS, ROUNDS, RATE = 8, 40, 1.0  # of what the delay costs
PAUSE = 0.02  # seconds
OVERLAPS = (0, 1, 2, 4, 8, 15)
NETWORKS = {  # seconds, bytes a second
    "10 Gbit/s, 1 ms": {"latency": 1e-3, "bandwidth": 1.25e9},
    "1 Gbit/s, 30 ms": {"latency": 0.03, "bandwidth": 1.25e8},
    "100 Mbit/s, 100 ms": {"latency": 0.1, "bandwidth": 1.25e7},
}
MODEL = {"workers": 8, "seconds_per_step": 0.5}
MODEL_STEPS, MODEL_EVERY, MODEL_BYTES, FRAGMENTS = 1000, 100, 4e8, 4


# ---- a process ----


def worker(args):
    jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    mesh = jax.make_mesh((args.processes,), ("workers",), axis_types=(AxisType.Auto,))
    start, gradient = perceptron()

    def run(overlap, delay, every=EVERY, steps=STEPS):
        opt = local_sgd(optax.sgd(1e-3), sync_every=every, overlap=max(overlap, 1), mixing=0.5, linked=True)
        state = opt.init(start)
        axes = worker_axes(state)

        def one(params, state):
            updates, state = opt.update(gradient(params, state.step), state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(map_workers(one, in_axes=(0, axes), out_axes=(0, axes), mesh=mesh))
        params = spread_workers(start, args.processes, mesh=mesh)
        state = spread_workers(state, args.processes, axes, mesh=mesh)
        messages, link = [], Link(opt, state, mesh=mesh)
        carry = link.carry

        def slow(program, message):
            began = time.perf_counter()
            time.sleep(delay)
            result = carry(program, message)
            messages.append(time.perf_counter() - began)
            return result

        link.carry = slow

        def measure():
            p, s = params, state
            messages.clear()
            link._round, link._since, link._flight = 0, 0, None  # the same programs for a run from the start
            jax.block_until_ready(meet(jnp.zeros((args.processes,))))  # both begin together
            began = time.perf_counter()
            for _ in range(steps):
                p, s = jax.block_until_ready(step(p, s))
                time.sleep(PAUSE)
                p, s = link(p, s)
                if not overlap:
                    link.wait()
            jax.block_until_ready(p)
            took = time.perf_counter() - began
            link.wait()
            return took, float(np.mean(messages or [0.0]))

        measure()
        return measure

    meet = jax.jit(map_workers(lambda x: jax.lax.psum(x, "workers"), in_axes=(0,), out_axes=None, mesh=mesh))
    runs = {(0, 0.0): run(1, 0.0, every=10**6)}  # steps alone
    runs |= {(overlap, delay): run(overlap, delay) for delay in args.delays for overlap in OVERLAPS}
    seconds = {key: [] for key in runs}
    for _ in range(args.repeats):
        for key, measure in runs.items():
            seconds[key].append(measure())
    if jax.process_index() == 0:
        found = [[*key, *middle([s for s, _ in took]), float(np.median([m for _, m in took]))]
                 for key, took in seconds.items()]  # fmt: skip
        print(json.dumps({"runs": found}), flush=True)


# ---- what the delay costs ----


def delayed(family, overlap, mixing, seeds):
    """The mean loss of the last five rounds, ``[seeds]``."""
    opt = diloco(optax.sgd(1.0), sync_every=EVERY, learning_rate=0.7, overlap=overlap, mixing=mixing)

    def run(data, seed):
        k_cfg, k_init, k_run = jax.random.split(jax.random.PRNGKey(seed), 3)
        task = family.task(data, family.sample(k_cfg))
        params = task.init(k_init)
        state = opt.init(params)
        axes = worker_axes(state)

        def one(params, state, key):
            key = jax.random.fold_in(key, jax.lax.axis_index("workers"))
            loss, grads = jax.value_and_grad(lambda p: task.loss(p, key, task.batch(key, "train"))[0])(params)
            updates, state = opt.update(jax.tree.map(lambda g: RATE * g, grads), state, params)
            return optax.apply_updates(params, updates), state, loss

        step = map_workers(one, in_axes=(0, axes, None), out_axes=(0, axes, 0))

        def body(carry, key):
            *carry, loss = step(*carry, key)
            return tuple(carry), loss.mean()

        start = spread_workers(params, WORKERS), spread_workers(state, WORKERS, axes)
        losses = jax.lax.scan(body, start, jax.random.split(k_run, ROUNDS * EVERY))[1]
        return losses[-5 * EVERY :].mean()

    run = jax.jit(run)
    return np.array([float(run(family.data, jnp.uint32(seed))) for seed in seeds])


def costs():
    family = char_transformer("moby_dick_small", layers=1, width=16, length=8, batch_size=16)
    rows, seeds, prompt = [], (200, 201, 202), None
    for mixing in (0.0, 0.5):
        for overlap in OVERLAPS if mixing else (0, *OVERLAPS[2:]):
            if mixing and not overlap:
                continue
            found = delayed(family, overlap, mixing, seeds)
            prompt = found if prompt is None else prompt
            difference = found - prompt
            error = difference.std(ddof=1) / len(seeds) ** 0.5
            rows.append({"overlap": overlap, "mixing": mixing, "loss": round(float(found.mean()), 4),
                         "paired_difference": round(float(difference.mean()), 4),
                         "standard_error": round(float(error), 4)})  # fmt: skip
            print(*rows[-1].values(), flush=True)
    return rows


# ---- the launcher ----


def compare(found):
    """Rows of measured and predicted seconds of a run."""
    alone = found[0][2] / STEPS
    rows = []
    for overlap, delay, seconds, deviation, _ in found[1:]:
        rounds = STEPS // EVERY
        message = next(row[4] for row in found[1:] if row[0] == 0 and row[1] == delay)
        bare = {"latency": message / 2, "bandwidth": 1.0}  # two workers: T = 2 latencies
        # of the last round, sent at the last step, nothing is waited for but at once
        waited = rounds - (overlap > 0)
        predicted = communication.wall_clock(
            steps=STEPS, rounds=waited, sent_bytes=0, workers=2, seconds_per_step=alone, overlap=overlap, **bare
        ).total
        rows.append(row("measured", f"{delay:g} s a message", overlap, seconds, predicted, alone * STEPS, deviation))
    return rows


def model():
    """Rows of the model alone."""
    rows = []
    for name, network in NETWORKS.items():
        for parts in (1, FRAGMENTS):
            every = MODEL_EVERY // parts
            for overlap in (0, 1, 5, 10, every - 1):
                rounds, sent = MODEL_STEPS // every, MODEL_BYTES / parts * (MODEL_STEPS // every)
                run = {"steps": MODEL_STEPS, "rounds": rounds, "sent_bytes": sent, **MODEL, **network}
                found = communication.wall_clock(overlap=overlap, **run)
                label = f"{name}, {'whole' if parts == 1 else f'{parts} fragments'}"
                rows.append(row("model", label, overlap, None, found.total, found.compute, None))
    return rows


def row(kind, link, overlap, seconds, predicted, steps_alone, deviation):
    short = lambda x: "" if x is None else float(f"{x:.4g}")  # noqa: E731
    return {
        "kind": kind, "link": link, "overlap": overlap, "seconds": short(seconds), "half_interquartile":
        short(deviation), "predicted": short(predicted), "steps_alone": short(steps_alone),
    }  # fmt: skip


def plot(rows):
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    measured = [r for r in rows if r["kind"] == "measured"]
    for i, link in enumerate(dict.fromkeys(r["link"] for r in measured)):
        mine = [r for r in measured if r["link"] == link]
        x, y, e, p = ([r[key] for r in mine] for key in ("overlap", "seconds", "half_interquartile", "predicted"))
        left.errorbar(x, y, e, fmt="o", color=f"C{i}", capsize=2, label=f"{link}, measured")
        left.plot(x, p, "--", color=f"C{i}", label="model")
    left.axhline(measured[0]["steps_alone"], color="0.5", lw=1, label="steps alone")
    left.set(xlabel="overlap, steps", ylabel="seconds", ylim=(0, None), title=f"{STEPS} steps, {EVERY} a round")
    modelled = [r for r in rows if r["kind"] == "model"]
    for i, link in enumerate(dict.fromkeys(r["link"] for r in modelled)):
        mine = [r for r in modelled if r["link"] == link]
        x, y = [r["overlap"] for r in mine], [100 * (1 - r["steps_alone"] / r["predicted"]) for r in mine]
        right.plot(x, y, "o-" if "whole" in link else "s--", color=f"C{i // 2}", ms=3, label=link)
    right.set(xscale="symlog", xlim=(0, None), ylim=(0, 100), xlabel="overlap, steps", ylabel="% of the time waited")
    right.set_title("Model: 100 million parameters, 8 workers")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(REPORT / "overlap.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--delays", type=float, nargs="+", default=[0.05, 0.2], help="seconds added to a message")
    parser.add_argument("--only", choices=["loss"], help="what the delay costs, no more")
    for_launch(parser)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    tables.write(REPORT / "overlap_loss.csv", costs())
    if args.only == "loss":
        return 0
    said = launch(__file__, 2, args.repeats, "--delays", *map(str, args.delays))
    rows = compare(said["runs"]) + model()
    tables.write(REPORT / "overlap.csv", rows)
    plot(rows)
    for r in rows:
        print(*r.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
