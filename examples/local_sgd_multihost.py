"""Local SGD in several processes, with a watchdog and restarts: on one machine, or on a pod.

One machine, two or four processes over gloo:

    python examples/local_sgd_multihost.py --processes 2 --rounds 20 --workdir runs/local_sgd

Kill (or stop) any of the processes while it runs: the rest notice, the launcher starts them again from the last
synchronised anchor, and at most one round is lost. With ``--shrink`` it goes on with one process fewer instead
(experimental: other workers then see other data). Each line printed is a JSON event.

On a pod, start one process a host (TPU) or a GPU yourself, with no launcher; the environment tells JAX the rest:

    srun python examples/local_sgd_multihost.py --worker --workdir /shared/run     # Slurm; TPU pods likewise
    python examples/local_sgd_multihost.py --worker --coordinator HOST:PORT --processes N --process-id I ...
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from sklearn.datasets import load_digits

from learned_opt.local_sgd import (
    Watchdog,
    load_anchor,
    local_sgd,
    map_workers,
    newest_anchor,
    save_anchor,
    spread_workers,
    worker_axes,
)

ANCHOR = "anchor.safetensors"
SETTINGS = ("sync_every", "batch_size", "seed")  # of a run: one with others is another run
USAGE = 2  # exit code of a user's mistake


def event(name, **fields):
    print(json.dumps({"event": name, **fields}), flush=True)


# ---- a worker ----


def digits(seed):
    """Return the 8x8 digits, and a small network's parameters and loss."""
    x, y = load_digits(return_X_y=True)
    x, y = np.float32(x / 16), np.int32(y)
    rng = np.random.default_rng(seed)
    params = [
        {"w": np.float32(rng.normal(size=size) / np.sqrt(size[0])), "b": np.zeros(size[1], np.float32)}
        for size in ((64, 32), (32, 10))
    ]

    def loss_fn(params, x, y):
        hidden = jnp.tanh(x @ params[0]["w"] + params[0]["b"][None])
        logits = hidden @ params[1]["w"] + params[1]["b"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return params, (x, y), loss_fn


def make_round(opt, loss_fn, batch_size, seed):
    """Return a worker's whole round in one call: the delay may change from round to round, the program does not.

    Worker i's batch at step t depends on (seed, t, i) alone: a restart sees what an undisturbed run would have seen.
    """

    def one_round(params, state, x, y):
        own = jax.random.fold_in(jax.random.key(seed + 1), jax.lax.axis_index("workers"))

        def step(_, carry):
            params, state = carry
            rows = jax.random.randint(jax.random.fold_in(own, state.step), (batch_size,), 0, len(x))
            value, grads = jax.value_and_grad(loss_fn)(params, x[rows], y[rows])
            updates, state = opt.update(grads, state, params, value=value)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, state.period, step, (params, state))

    return one_round


def make_optimizer(sync_every):
    return local_sgd(optax.sgd(0.1), optax.sgd(0.7, momentum=0.9, nesterov=True), sync_every=sync_every)


def train(args):
    with Watchdog(args.timeout, first=args.startup_timeout) as watchdog:
        if args.coordinator:
            jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
        else:
            jax.distributed.initialize()  # Slurm, TPU pods: found in the environment
        first = jax.process_index() == 0
        workers = jax.device_count()  # one worker a device
        mesh = jax.make_mesh((workers,), ("workers",), axis_types=(AxisType.Auto,))

        params, data, loss_fn = digits(args.seed)
        opt = make_optimizer(args.sync_every)
        state = jax.jit(opt.init)(params)
        path, settings = Path(args.workdir) / ANCHOR, {name: getattr(args, name) for name in SETTINGS}
        if path.exists():
            state, saved = load_anchor(path, state)
            if saved != settings:
                print(f"{args.workdir} holds a run with {saved}: name another --workdir", file=sys.stderr)
                sys.exit(USAGE)
        state = newest_anchor(state)  # a host may have found no file, or an older one
        params = state.anchor
        if first and int(state.round):
            event("restored", round=int(state.round), workers=workers)

        axes = worker_axes(state)
        one_round = make_round(opt, loss_fn, args.batch_size, args.seed)
        run = jax.jit(map_workers(one_round, in_axes=(0, axes, None, None), out_axes=(0, axes), mesh=mesh))
        data = spread_workers(data, workers, None, mesh=mesh)  # None: every worker has it all
        params = spread_workers(params, workers, mesh=mesh)
        state = spread_workers(state, workers, axes, mesh=mesh)

        while int(state.round) < args.rounds:
            params, state = jax.block_until_ready(run(params, state, *data))
            watchdog.beat()
            if first:
                save_anchor(path, state, settings)
                event("round", round=int(state.round), value=float(state.statistics.value))
            time.sleep(args.pause)
        if first:
            anchor, data = jax.tree.map(np.asarray, (state.anchor, data))
            event("done", round=int(state.round), workers=workers, loss=float(jax.jit(loss_fn)(anchor, *data)))


# ---- the launcher: one machine ----


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(args, processes):
    port = free_port()
    command = [
        sys.executable,
        __file__,
        "--worker",
        "--coordinator",
        f"localhost:{port}",
        "--processes",
        str(processes),
    ]
    for name in ("rounds", "sync_every", "batch_size", "seed", "workdir", "timeout", "startup_timeout", "pause"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **cpu_environment()}
    peers = [
        subprocess.Popen([*command, "--process-id", str(i)], env=environment, stderr=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    for peer in peers:  # the last words of a process tell why it ended
        peer.tail = []
        threading.Thread(target=lambda peer=peer: peer.tail.extend(peer.stderr), daemon=True).start()
    event("started", pids=[peer.pid for peer in peers])
    return peers


def cpu_environment():
    """One device and few threads a process: there are several on this machine."""
    return {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "JAX_NUM_CPU_DEVICES": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    }


def wait(peers):
    """Return None when all have finished, else the first to fail and its exit code; the rest are ended."""
    try:
        while True:
            codes = [peer.poll() for peer in peers]
            failed = next(((i, code) for i, code in enumerate(codes) if code), None)
            if failed or all(code == 0 for code in codes):
                return failed
            time.sleep(0.05)
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()


def launch(args):
    processes = args.processes
    for attempt in range(args.restarts + 1):
        peers = start(args, processes)
        failed = wait(peers)
        if failed is None:
            return 0
        index, code = failed
        if code == USAGE:
            print("".join(peers[index].tail[-1:]).strip(), file=sys.stderr)
            return USAGE
        said = [line for line in peers[index].tail if "watchdog" in line or "Error" in line]
        event("failed", process=index, code=code, attempt=attempt, why="".join(said[-1:]).strip()[:300])
        if args.shrink and processes > 1:
            processes -= 1
    print(f"gave up after {args.restarts} restarts; the last anchor is in {args.workdir}", file=sys.stderr)
    return 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sync-every", type=int, default=8, help="steps a round")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", default="runs/local_sgd", help="of the anchor; a shared folder on several hosts")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds a round may take before a peer is stuck")
    parser.add_argument("--startup-timeout", type=float, default=600.0, help="the same until the first round is done")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--shrink", action="store_true", help="restart with one process fewer (experimental)")
    parser.add_argument(
        "--pause", type=float, default=0.0, help="seconds after each round, to have time to break things"
    )
    parser.add_argument("--worker", action="store_true", help="be one worker, do not launch any")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0; on Slurm and TPU pods it is found")
    parser.add_argument("--process-id", type=int)
    args = parser.parse_args()
    return train(args) if args.worker else launch(args)


if __name__ == "__main__":
    sys.exit(main())
