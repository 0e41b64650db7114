"""The multi-process example with real processes: a killed coordinator, a stopped peer, and the undisturbed result."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from support import ROOT

from learned_opt.local_sgd import (
    load_anchor,
    load_tree,
    local_sgd,
    map_workers,
    save_anchor,
    spread_workers,
    worker_axes,
)

EXAMPLE = ROOT / "examples" / "local_sgd_multihost.py"
ROUNDS, SEED, SYNC_EVERY, BATCH, WORKERS = 9, 3, 4, 16, 2


def simulation():
    """The same training on one device, by vmap: ``(fresh state, run to the last round, loss)``."""
    spec = importlib.util.spec_from_file_location("local_sgd_multihost", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    params, data, loss_fn = example.digits(SEED)
    opt = example.make_optimizer(SYNC_EVERY)
    fresh = jax.jit(opt.init)(params)
    axes = worker_axes(fresh)
    one_round = example.make_round(opt, loss_fn, BATCH, SEED)
    step = jax.jit(map_workers(one_round, in_axes=(0, axes, None, None), out_axes=(0, axes)))

    def finish(state):
        params, state = spread_workers(state.anchor, WORKERS), spread_workers(state, WORKERS, axes)
        while int(state.round) < ROUNDS:
            params, state = step(params, state, *data)
        return float(loss_fn(state.anchor, *data))

    return fresh, finish


def test_faults_lose_at_most_a_round(tmp_path):
    """A peer is stopped: the watchdog ends the run, it restarts. The coordinator is killed: its anchor is left."""
    command = [sys.executable, str(EXAMPLE), "--processes", str(WORKERS), "--workdir", str(tmp_path), "--pause", "0.2"]
    command += ["--rounds", str(ROUNDS), "--seed", str(SEED), "--sync-every", str(SYNC_EVERY)]
    command += ["--batch-size", str(BATCH), "--timeout", "4", "--startup-timeout", "120", "--restarts", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "XLA_FLAGS": ""}
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    faults = [(2, 1, signal.SIGSTOP), (5, 0, signal.SIGKILL)]  # after this round, to this process
    seen, pids = [], []
    try:
        for line in launcher.stdout:
            if not line.startswith("{"):
                continue  # gloo talks too
            seen.append(json.loads(line))
            if seen[-1]["event"] == "started":
                pids = seen[-1]["pids"]
            elif seen[-1]["event"] == "round" and faults and seen[-1]["round"] >= faults[0][0]:
                _, process, sent = faults.pop(0)
                os.kill(pids[process], sent)
        errors = launcher.stderr.read()
        assert launcher.wait(timeout=60) == 1
    finally:
        launcher.kill()
        if launcher.wait() < 0:  # its children would outlive it
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        launcher.stdout.close()
        launcher.stderr.close()
    names = [event["event"] for event in seen]
    stopped, killed = (event for event in seen if event["event"] == "failed")
    assert (stopped["process"], stopped["code"]) == (0, 75), stopped  # the other one, by its watchdog
    assert "no round finished within 4 s" in stopped["why"]
    assert killed["code"] in (-signal.SIGKILL, 1, -signal.SIGABRT), killed  # whichever of the two is seen first
    assert "gave up after 1 restarts" in errors
    before = max(event["round"] for event in seen[: names.index("failed")] if event["event"] == "round")
    restored = next(event["round"] for event in seen if event["event"] == "restored")
    assert before - restored <= 1

    fresh, finish = simulation()
    state, _ = load_anchor(tmp_path / "anchor.safetensors", fresh)
    last = max(event["round"] for event in seen if event["event"] == "round")
    assert last - int(state.round) <= 1
    assert int(state.round) < ROUNDS
    np.testing.assert_allclose(finish(state), finish(fresh), rtol=1e-5)


RETURNING = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
from learned_opt.local_sgd import check_anchor, load_anchor, local_sgd, newest_anchor, save_tree

address, index, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.distributed.initialize(address, 2, index)
opt = local_sgd(optax.adam(0.1), optax.sgd(0.7, momentum=0.9), sync_every=2)
params = {"w": jnp.zeros(3), "half": jnp.zeros(2, jnp.bfloat16), "count": jnp.int32(0)}
state, _ = load_anchor(folder / f"anchor_{index}.safetensors", opt.init(params))
try:
    check_anchor(state)
except ValueError as error:
    (folder / f"refused_{index}").write_text(str(error))
state = newest_anchor(state)
check_anchor(state)
assert newest_anchor(state) is state
save_tree(folder / f"after_{index}.safetensors", (state.anchor, state.outer, state.round, state.bytes))
"""


def test_a_process_that_comes_back_with_an_old_anchor_is_refused_and_brought_up_to_date(tmp_path):
    opt = local_sgd(optax.adam(0.1), optax.sgd(0.7, momentum=0.9), sync_every=2)
    params = {"w": jnp.zeros(3), "half": jnp.zeros(2, jnp.bfloat16), "count": jnp.int32(0)}
    fresh = opt.init(params)
    axes = worker_axes(fresh)
    step = jax.jit(map_workers(lambda p, s: _step(opt, p, s), in_axes=(0, axes), out_axes=(0, axes)))
    p, state = spread_workers(params, 2), spread_workers(fresh, 2, axes)
    for index in (1, 0):  # process 1 has the anchor of round 1, process 0 that of round 2
        for _ in range(2):
            p, state = step(p, state)
        save_anchor(tmp_path / f"anchor_{index}.safetensors", state)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    commands = [[sys.executable, "-c", RETURNING, address, str(index), str(tmp_path)] for index in (0, 1)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    running = [subprocess.Popen(command, **pipes) for command in commands]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
    for index, own in ((0, 2), (1, 1)):
        told = (tmp_path / f"refused_{index}").read_text()
        assert f"the anchor of process {index} is of round {own}, the newest of round 2 (process 0)" in told
        wanted = (state.anchor, state.outer, state.round, state.bytes)
        found, _ = load_tree(tmp_path / f"after_{index}.safetensors", wanted)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert int(state.round) == 2


def _step(opt, params, state):
    grads = jax.tree.map(lambda x: (x - 1).astype(x.dtype), params)
    updates, state = opt.update(grads, state, params)
    return optax.apply_updates(params, updates), state
