"""The alpha-beta model against the clock: real processes over gloo on one machine.

What a synchronisation costs is the time of steps that meet every time less that of steps that never do, for messages
of 10^3 to 10^7 floats; medians over repeats that take turns. Latency and bandwidth are fitted by least squares on the
relative errors:

- on every second size, to predict the sizes between them;
- on all sizes with two processes, to predict four;
- and with both, the wall-clock of a short training run at H = 1, 4, 16 (a perceptron of 233,740 parameters in four
  tensors), from the counters in its state and the measured time of a step alone.

gloo sends the tensors one by one: a round makes one all-reduce a tensor and one for its statistics; with int8 two
all-gathers a tensor (codes, scale) and that all-reduce, which costs the latency of two all-gathers. The run is also
predicted with one collective a round, to show what leaving that out would cost.

    python benchmarks/local_sgd_communication.py    # a few minutes; writes reports/local_sgd/communication.*
"""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
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
from jax.sharding import AxisType

from learned_opt import communication
from learned_opt.local_sgd import local_sgd, map_workers, spread_workers, worker_axes

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "reports" / "local_sgd"
PROCESSES = (2, 4)
SIZES = tuple(round(10 ** (k / 2)) for k in range(6, 15))  # floats
CODES = ("none", "int8")
COLLECTIVE = {"none": "all-reduce", "int8": "all-gather"}
COLLECTIVES = {"none": lambda tensors: tensors + 1, "int8": lambda tensors: 2 * tensors + 2}  # of a round
DELAYS = (1, 4, 16)
RUN_STEPS = 64
PARAMETERS = 784 * 294 + 294 + 294 * 10 + 10
NEVER = 10**6


def example():
    """Return the multi-process example as a module: how it starts processes is used here too."""
    spec = importlib.util.spec_from_file_location("multihost", ROOT / "examples" / "local_sgd_multihost.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- a process ----


def stepper(gradient, params, mesh, code="none"):
    """Return ``run(delay, steps)``: seconds of so many steps in one call, and the state after them."""
    workers = mesh.size
    transform = lambda delay: local_sgd(optax.sgd(1e-3), sync_every=delay, compression=None if code == "none" else code)  # noqa: E731
    fresh = transform(jnp.int32(1)).init(params)
    axes = worker_axes(fresh)

    def one(params, state, delay, steps):
        state = state._replace(period=delay)

        def body(t, carry):
            params, state = carry
            updates, state = transform(delay).update(gradient(params, t), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, body, (params, state))

    call = jax.jit(map_workers(one, in_axes=(0, axes, None, None), out_axes=(0, axes), mesh=mesh))
    params = spread_workers(params, workers, mesh=mesh)
    state = spread_workers(fresh, workers, axes, mesh=mesh)

    def run(delay, steps):
        began = time.perf_counter()
        _, after = jax.block_until_ready(call(params, state, jnp.int32(delay), jnp.int32(steps)))
        return time.perf_counter() - began, after

    return run


def perceptron():
    """Return a training task: its parameters, and the gradient of one worker at step t."""
    rng = np.random.default_rng(0)
    sizes = ((784, 294), (294, 10))
    params = [(np.float32(rng.normal(size=s) / np.sqrt(s[0])), np.zeros(s[1], np.float32)) for s in sizes]
    x = jnp.asarray(rng.normal(size=(1024, 784)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, size=1024))

    def loss(params, rows):
        (w1, b1), (w2, b2) = params
        logits = jax.nn.relu(x[rows] @ w1 + b1[None]) @ w2 + b2[None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def gradient(params, t):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), t), jax.lax.axis_index("workers"))
        return jax.grad(loss)(params, jax.random.randint(key, (32,), 0, len(x)))

    return params, gradient


def worker(args):
    jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    mesh = jax.make_mesh((args.processes,), ("workers",), axis_types=(AxisType.Auto,))
    messages = {
        (code, size): stepper(lambda p, t: p, np.ones(size, np.float32), mesh, code) for code in CODES for size in SIZES
    }
    counts = {size: int(np.clip(3e6 / size, 2, 30)) for size in SIZES}
    seconds = {key: [] for key in messages}
    sent = {}
    for repeat in range(args.repeats + 1):
        for (code, size), run in messages.items():
            apart, _ = run(NEVER, counts[size])
            together, state = run(1, counts[size])
            sent[code, size] = communication.total_bytes(state.bytes) / counts[size]
            if repeat:  # the first compiles
                seconds[code, size].append((together - apart) / counts[size])
    params, gradient = perceptron()
    run = stepper(gradient, params, mesh)
    runs, states = {delay: [] for delay in (*DELAYS, NEVER)}, {}
    for repeat in range(args.repeats + 1):
        for delay in runs:
            took, states[delay] = run(delay, RUN_STEPS)
            if repeat:
                runs[delay].append(took)
    found = {
        "messages": [[*key, sent[key], *middle(seconds[key])] for key in messages],
        "step": middle(runs[NEVER])[0] / RUN_STEPS,
        "runs": [
            [delay, int(states[delay].round), communication.total_bytes(states[delay].bytes), *middle(runs[delay])]
            for delay in DELAYS
        ],
    }
    if jax.process_index() == 0:
        print(json.dumps(found), flush=True)


def middle(values):
    """Return the median and half the interquartile range."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(median), float(high - low) / 2


# ---- the launcher ----


def for_launch(parser):
    """The arguments that :func:`launch` gives a script."""
    parser.add_argument("--worker", action="store_true", help="be one process, do not launch any")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process-id", type=int)


def launch(script, processes, repeats, *more):
    """What the first of several processes of a script says in one line of JSON."""
    module = example()
    command = [sys.executable, script, "--worker", "--coordinator", f"localhost:{module.free_port()}"]
    command += ["--processes", str(processes), "--repeats", str(repeats), *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **module.cpu_environment()}
    peers = [
        subprocess.Popen([*command, "--process-id", str(i)], env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    try:
        said = peers[0].communicate()[0]
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()
            peer.stdout.close()
    return next(json.loads(line) for line in said.splitlines() if line.startswith("{"))


def fit(points, workers):
    """Fit latency and bandwidth to (bytes, seconds) of rounds of one plain tensor: least squares of model / t - 1."""
    sent, seconds = np.asarray(points).T
    per_latency = predict("none", 1, 0.0, workers, {"latency": 1.0, "bandwidth": 1.0})
    per_byte = predict("none", 1, 1.0, workers, {"latency": 0.0, "bandwidth": 1.0})
    design = np.stack([np.full(len(sent), per_latency), per_byte * sent], axis=1) / seconds[:, None]
    latency, slowness = scipy.optimize.nnls(design, np.ones(len(sent)))[0]
    return {"latency": float(latency), "bandwidth": 1 / float(slowness) if slowness else math.inf}


def predict(code, tensors, sent, workers, network, *, rounds=1, steps=0, step=0.0, packed=False):
    return communication.wall_clock(
        steps=steps,
        rounds=rounds,
        sent_bytes=sent,
        workers=workers,
        seconds_per_step=step,
        collective=COLLECTIVE[code],
        collectives=1 if packed else COLLECTIVES[code](tensors),
        **network,
    ).total


def compare(found):
    """Return rows of measured and predicted seconds, and the fitted networks."""
    plain = {p: [(m[2], m[3]) for m in f["messages"] if m[0] == "none"] for p, f in found.items()}
    half = {p: fit(points[::2], p) for p, points in plain.items()}
    whole = {p: fit(points, p) for p, points in plain.items()}
    two = min(found)
    rows = []
    for processes, f in found.items():
        other = {} if processes == two else {"2 processes": whole[two]}
        for code, size, sent, *measured in f["messages"]:
            for source, network in {"half the sizes": half[processes], **other}.items():
                seen = code == "none" and source == "half the sizes" and SIZES.index(size) % 2 == 0
                predicted = predict(code, 1, sent, processes, network)
                rows.append(row("message", processes, code, size, 1, sent, *measured, predicted, source, seen))
        for delay, rounds, sent, *measured in f["runs"]:
            run = {"rounds": rounds, "steps": RUN_STEPS, "step": f["step"]}
            networks = {"all sizes": whole[processes], **other, "all sizes, one collective a round": whole[processes]}
            for source, network in networks.items():
                predicted = predict("none", 4, sent, processes, network, **run, packed="one" in source)
                rows.append(row("run", processes, "none", PARAMETERS, delay, sent, *measured, predicted, source, False))
    return rows, whole


def row(kind, processes, code, size, delay, sent, seconds, deviation, predicted, source, seen):
    return {
        "kind": kind, "processes": processes, "compression": code, "floats": size, "delay": delay, "bytes": round(sent),
        "seconds": float(f"{seconds:.4g}"), "half_interquartile": float(f"{deviation:.2g}"),
        "predicted": float(f"{predicted:.4g}"), "relative_error": round(predicted / seconds - 1, 3),
        "fitted_on": source, "part_of_the_fit": seen,
    }  # fmt: skip


def plot(rows, networks):
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    colours = dict(zip(sorted(networks), ("tab:blue", "tab:orange"), strict=True))
    for processes, network in networks.items():
        for code, marker in (("none", "o"), ("int8", "^")):
            mine = [
                r for r in rows
                if r["kind"] == "message" and (r["processes"], r["compression"]) == (processes, code)
                and r["fitted_on"] == "half the sizes"
            ]  # fmt: skip
            x, y, e = ([r[name] for r in mine] for name in ("floats", "seconds", "half_interquartile"))
            left.errorbar(x, y, e, fmt=marker, color=colours[processes], mfc="none" if code == "int8" else None, ms=5,
                          capsize=2, label=f"{processes} processes, {code.replace('none', 'float32')}")  # fmt: skip
        n = np.geomspace(SIZES[0], SIZES[-1], 100)
        model = [predict("none", 1, 4 * k, processes, network) for k in n]
        label = f"fit to float32: {1e3 * network['latency']:.1f} ms, {network['bandwidth'] / 1e6:.0f} MB/s"
        left.plot(n, model, color=colours[processes], lw=1, label=label)
    left.set(xscale="log", yscale="log", xlabel="floats", ylabel="seconds", title="One synchronisation")
    left.legend(fontsize=8)
    for processes in networks:
        mine = [r for r in rows if r["kind"] == "run" and r["processes"] == processes and r["fitted_on"] == "all sizes"]
        x, y, e = ([r[name] for r in mine] for name in ("delay", "seconds", "half_interquartile"))
        right.errorbar(x, y, e, fmt="o-", color=colours[processes], capsize=3, label=f"{processes} processes, measured")
        predicted = [r["predicted"] for r in mine]
        right.plot(x, predicted, "x--", color=colours[processes], label=f"{processes} processes, predicted")
    right.set(
        xscale="log",
        xlabel="delay H",
        ylabel="seconds",
        title=f"A run of {RUN_STEPS} steps, {PARAMETERS:,} parameters in four tensors",
    )
    right.set_xticks(DELAYS, DELAYS)
    right.minorticks_off()
    right.set_ylim(0)
    right.legend(fontsize=8)
    fig.savefig(REPORT / "communication.png", dpi=110)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--predict-only", action="store_true", help="fit and draw again from communication.json")
    for_launch(parser)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    REPORT.mkdir(parents=True, exist_ok=True)
    path = REPORT / "communication.json"
    if not args.predict_only:
        measured = {processes: launch(__file__, processes, args.repeats) for processes in PROCESSES}
        path.write_text(json.dumps(measured) + "\n")
    found = {int(processes): f for processes, f in json.loads(path.read_text()).items()}
    rows, networks = compare(found)
    tables.write(REPORT / "communication.csv", rows)
    plot(rows, networks)
    for processes, network in networks.items():
        print(processes, "processes:", network, "a step alone", found[processes]["step"])
    for r in rows:
        print(*r.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
