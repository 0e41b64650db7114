"""The multi-process example with real processes: a killed coordinator, a stopped peer, and the undisturbed result."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
from support import ROOT

from learned_opt.local_sgd import load_anchor, map_workers, spread_workers, worker_axes

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
