"""Two processes of two devices each compute what one process of four does."""

import json
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from support import ROOT
from support.claims import held

import learned_opt

RUN = [sys.executable, "-m", "meta_train.cli", "train", "--rule", "adam", "--suite", "small", "--particles", "4"]
RUN += ["--unroll", "5", "--meta-steps", "20"]
for setting in ("bench_suite=", "min_length=10", "max_length=20", "log_every=1", "checkpoint_every=10"):
    RUN += ["--set", setting]


def flat(folder):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(learned_opt.load_rule(folder / "rule")[1])])


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(*commands):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    return [subprocess.Popen(command, **pipes) for command in commands]


def test_two_processes_agree_with_one(tmp_path):
    two = [*RUN, "--workdir", str(tmp_path / "two"), "--devices", "2", "--distributed", "--coordinator", free_address()]
    for setting in ("bench_suite=quick", "bench_steps=2", "bench_seeds=1"):  # one process does it, when all have left
        two += ["--set", setting]
    commands = [[*two, "--num-processes", "2", "--process-id", str(i)] for i in range(2)]
    commands.append([*RUN, "--workdir", str(tmp_path / "one"), "--devices", "4"])
    running = start(*commands)
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], "\n".join(outputs)
    assert (tmp_path / "two" / "bench" / "results.json").exists()
    fresh = learned_opt.RULES["adam"]().init(jax.random.key(0))
    fresh = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(fresh)])
    one, both = flat(tmp_path / "one"), flat(tmp_path / "two")
    assert np.linalg.norm(one - fresh) > 1e-3
    assert np.linalg.norm(one - both) < 0.01 * np.linalg.norm(one - fresh)
    first = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("one", "two")]
    assert abs(first[0]["gradient_norm"] / first[1]["gradient_norm"] - 1) < 1e-4


def test_all_processes_end_where_the_folder_is_held(tmp_path):
    with held(tmp_path / "run") as holder:
        command = [*RUN, "--workdir", str(tmp_path / "run"), "--devices", "2", "--coordinator", free_address()]
        running = start(*([*command, "--num-processes", "2", "--process-id", str(i)] for i in range(2)))
        outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [2, 2], "\n".join(outputs)
    assert f"in use by process {holder.pid} on " in outputs[0]
    assert "learned-opt: process 0 of this run has found a mistake" in outputs[1]


def test_processes_with_other_settings_are_told(tmp_path):
    command = [*RUN, "--workdir", str(tmp_path / "run"), "--devices", "1", "--coordinator", free_address()]
    command += ["--num-processes", "2"]
    running = start(*([*command, "--process-id", str(i), "--seed", str(i)] for i in range(2)))
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [2, 2], "\n".join(outputs)
    for output in outputs:
        assert "processes 0 and 1 of this run have other settings: give all the same" in output
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_saves_and_ends_all(tmp_path, sent):
    folder = tmp_path / "run"
    command = [*RUN, "--meta-steps", "100000", "--workdir", str(folder), "--devices", "1"]
    command += ["--set", "checkpoint_every=100000", "--coordinator", free_address(), "--num-processes", "2"]
    running = start(*([*command, "--process-id", str(i)] for i in range(2)))
    deadline = time.monotonic() + 200
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in running), [process.communicate()[0] for process in running]
        time.sleep(0.1)
    running[1].send_signal(sent)
    outputs = [process.communicate(timeout=100)[0] for process in running]
    assert [process.returncode for process in running] == [128 + signal.SIGTERM] * 2, "\n".join(outputs)
    assert "saved; go on with" in outputs[0]
    (kept,) = (int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    assert 0 < kept < 100000
