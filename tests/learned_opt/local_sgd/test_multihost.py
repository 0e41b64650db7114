"""Real processes: a killed coordinator, a stopped peer, an old anchor, a network that is away for a while."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading

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
from learned_opt.local_sgd.transform import REPLICATED

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

    other = subprocess.run(
        [*command, "--seed", str(SEED + 1)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert other.returncode == 2  # it would go on from the anchor of another run, and once, without a restart
    assert f"{tmp_path} holds a run with" in other.stderr


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


# ---- a network that is away for a while ----

AWAY = """
import sys, time
from pathlib import Path
import jax, jax.numpy as jnp, optax
from jax.sharding import AxisType
from learned_opt.local_sgd import (
    Watchdog, check_anchor, load_anchor, local_sgd, map_workers, newest_anchor, save_anchor, spread_workers, worker_axes
)

def worker(opt):
    def one_round(params, state):
        def step(_, carry):
            params, state = carry
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), state.step), jax.lax.axis_index("workers"))
            target = jax.random.normal(key, (3,))
            updates, state = opt.update(params - target, state, params)
            return optax.apply_updates(params, updates), state
        return jax.lax.fori_loop(0, state.period, step, (params, state))
    return one_round

def make():
    return local_sgd(optax.sgd(0.1), optax.sgd(0.7, momentum=0.9, nesterov=True), sync_every=2)

def main(address, processes, index, folder, rounds):
    path, opt = Path(folder) / f"anchor_{index}.safetensors", make()
    with Watchdog(20, first=120) as watchdog:
        if processes > 1:
            jax.distributed.initialize(
                address, processes, index, initialization_timeout=4 if rounds == 0 else 60, heartbeat_timeout_seconds=6
            )
        state = opt.init(jnp.zeros(3))
        if path.exists():
            state, _ = load_anchor(path, state)
        if processes > 1:
            try:
                check_anchor(state)
            except ValueError as error:
                (Path(folder) / f"refused_{index}").write_text(str(error))
            state = newest_anchor(state)
            check_anchor(state)
        mesh = jax.make_mesh((processes,), ("workers",), axis_types=(AxisType.Auto,))
        axes = worker_axes(state)
        step = jax.jit(map_workers(worker(opt), in_axes=(0, axes), out_axes=(0, axes), mesh=mesh))
        params = spread_workers(state.anchor, processes, mesh=mesh)
        state = spread_workers(state, processes, axes, mesh=mesh)
        print("round", int(state.round), flush=True)
        while int(state.round) < rounds:
            params, state = jax.block_until_ready(step(params, state))
            watchdog.beat()
            save_anchor(path, state)
            print("round", int(state.round), flush=True)
            time.sleep(0.1)

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
"""


class Cable:
    """Forwards the connections to a port; pulled out, it holds back what is sent, and new connections too."""

    def __init__(self, port):
        self.port, self.plugged, self._sockets = port, threading.Event(), []
        self.plugged.set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._run(self._accept)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.plugged.set()
        for end in (self._server, *self._sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes its thread
            end.close()

    def _run(self, target, *ends):
        threading.Thread(target=target, args=ends, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._server.accept()
                self._sockets.append(near)
                self.plugged.wait()
                try:
                    far = socket.create_connection(("127.0.0.1", self.port))
                except OSError:  # nobody there
                    near.close()
                    continue
                self._sockets.append(far)
                self._run(self._pump, near, far)
                self._run(self._pump, far, near)

    def _pump(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.plugged.wait()
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_network_that_is_away_for_some_rounds(tmp_path):
    """Both sides notice and end; one goes on alone; the other cannot join, then does, from the newest anchor."""
    (tmp_path / "away.py").write_text(AWAY)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    started = []

    def start(address, processes, index, rounds):
        command = [sys.executable, tmp_path / "away.py", address, processes, index, tmp_path, rounds]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
        started.append(subprocess.Popen([str(word) for word in command], **pipes))
        return started[-1]

    def anchor(index):
        return load_anchor(tmp_path / f"anchor_{index}.safetensors", away.make().init(jnp.zeros(3)))[0]

    spec = importlib.util.spec_from_file_location("away", tmp_path / "away.py")
    away = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(away)

    def end():
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()

    def outputs(*processes):
        return [process.communicate(timeout=120)[0] for process in processes]

    with contextlib.ExitStack() as stack:
        stack.callback(end)
        port = free_port()
        cable = stack.enter_context(Cable(port))
        both = start(f"127.0.0.1:{port}", 2, 0, 10**6), start(cable.address, 2, 1, 10**6)
        for line in both[0].stdout:
            if line.startswith("round 3"):
                break
        cable.plugged.clear()
        said = outputs(*both)
        assert all(process.returncode not in (0, None) for process in both), said  # neither goes on as if nothing were
        cut = [int(anchor(index).round) for index in (0, 1)]
        assert abs(cut[0] - cut[1]) <= 1
        assert min(cut) >= 3

        alone = start("", 1, 0, cut[0] + 4)
        outside = start(stack.enter_context(Cable(port)).address, 2, 1, 0)  # its coordinator is not there
        said = outputs(alone, outside)
        assert alone.returncode == 0, said[0]
        assert outside.returncode not in (0, None), said[1]
        assert int(anchor(1).round) == cut[1]

        port = free_port()
        cable, last = stack.enter_context(Cable(port)), cut[0] + 7
        both = start(f"127.0.0.1:{port}", 2, 0, last), start(cable.address, 2, 1, last)
        said = outputs(*both)
        assert [process.returncode for process in both] == [0, 0], said
    told = (tmp_path / "refused_1").read_text()
    assert f"process 1 is of round {cut[1]}, the newest of round {cut[0] + 4} (process 0)" in told

    opt = away.make()
    state = opt.init(jnp.zeros(3))
    axes = worker_axes(state)
    step = jax.jit(map_workers(away.worker(opt), in_axes=(0, axes), out_axes=(0, axes)))
    for workers, rounds in ((2, cut[0]), (1, cut[0] + 4), (2, cut[0] + 7)):
        params, state = spread_workers(state.anchor, workers), spread_workers(opt.init(jnp.zeros(3))._replace(
            **{name: getattr(state, name) for name in REPLICATED}), workers, axes)  # fmt: skip
        while int(state.round) < rounds:
            params, state = step(params, state)
    for index in (0, 1):
        found = anchor(index)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found.anchor, state.anchor)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found.outer, state.outer)
        assert [int(found.round), int(found.step)] == [cut[0] + 7, 2 * (cut[0] + 7)]
