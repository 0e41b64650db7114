"""The multi-process example with real processes: a killed coordinator, a stopped peer, and the undisturbed result."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from learned_opt.local_sgd import map_workers, spread_workers, worker_axes

EXAMPLE = Path(__file__).parents[1] / "examples" / "local_sgd_multihost.py"
ROUNDS, SEED, SYNC_EVERY, BATCH = 10, 3, 4, 16


def simulated_loss(workers):
    """The same run on one device, by vmap."""
    spec = importlib.util.spec_from_file_location("local_sgd_multihost", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    params, data, loss_fn = example.digits(SEED)
    opt = example.make_optimizer(SYNC_EVERY)
    state = jax.jit(opt.init)(params)
    axes = worker_axes(state)
    one_round = example.make_round(opt, loss_fn, BATCH, SEED)
    run = jax.jit(map_workers(one_round, in_axes=(0, axes, None, None), out_axes=(0, axes)))
    params, state = spread_workers(params, workers), spread_workers(state, workers, axes)
    for _ in range(ROUNDS):
        params, state = run(params, state, *data)
    return float(loss_fn(state.anchor, *data))


def test_faults_lose_at_most_a_round(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--processes", "2", "--workdir", str(tmp_path), "--rounds", str(ROUNDS)]
    command += ["--seed", str(SEED), "--sync-every", str(SYNC_EVERY), "--batch-size", str(BATCH)]
    command += ["--timeout", "4", "--startup-timeout", "120", "--pause", "0.2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "XLA_FLAGS": ""}
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    faults = [
        (2, 0, signal.SIGKILL),
        (5, 1, signal.SIGSTOP),
    ]  # after round r, process i: the coordinator, then its peer
    seen, lost, pids = [], [], []
    try:
        for line in launcher.stdout:
            if not line.startswith("{"):
                continue  # gloo talks too
            event = json.loads(line)
            seen.append(event)
            if event["event"] == "started":
                pids = event["pids"]
            elif event["event"] == "restored":
                lost.append(max(e["round"] for e in seen if e["event"] == "round") - event["round"])
            elif event["event"] == "round" and faults and event["round"] >= faults[0][0]:
                _, process, sent = faults.pop(0)
                os.kill(pids[process], sent)
        errors = launcher.stderr.read()
        assert launcher.wait(timeout=60) == 0, errors
    finally:
        launcher.kill()
        if launcher.wait() != 0:  # its children would outlive it
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        launcher.stdout.close()
        launcher.stderr.close()
    failed = [e for e in seen if e["event"] == "failed"]
    assert len(failed) == 2
    assert failed[1]["code"] == 75, failed  # the stopped process blocked the other, whose watchdog ended it
    assert "no round finished within 4 s" in failed[1]["why"]
    assert len(lost) == 2
    assert all(rounds <= 1 for rounds in lost)
    assert seen[-1]["event"] == "done"
    np.testing.assert_allclose(seen[-1]["loss"], simulated_loss(2), rtol=1e-5)
    assert not [e for e in seen if e["event"] == "round" and e["round"] > ROUNDS]
