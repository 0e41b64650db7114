"""Two processes of two devices each compute what one process of four does."""

import json
import socket
import subprocess
import sys

import jax
import numpy as np
from support import ROOT
from support.claims import held

import learned_opt

RUN = [sys.executable, "-m", "meta_train.cli", "train", "--rule", "adam", "--suite", "small", "--particles", "4"]
RUN += ["--unroll", "5", "--meta-steps", "20"]
for setting in ("bench_suite=", "min_length=10", "max_length=20", "log_every=1", "checkpoint_every=10"):
    RUN += ["--set", setting]


def flat(folder):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(learned_opt.load_rule(folder / "rule")[1])])


def test_two_processes_agree_with_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    two = [*RUN, "--workdir", str(tmp_path / "two"), "--devices", "2", "--distributed", "--coordinator", address]
    commands = [[*two, "--num-processes", "2", "--process-id", str(i)] for i in range(2)]
    commands.append([*RUN, "--workdir", str(tmp_path / "one"), "--devices", "4"])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    running = [subprocess.Popen(command, **pipes) for command in commands]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], "\n".join(outputs)
    start = learned_opt.RULES["adam"]().init(jax.random.key(0))
    start = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(start)])
    one, both = flat(tmp_path / "one"), flat(tmp_path / "two")
    assert np.linalg.norm(one - start) > 1e-3
    assert np.linalg.norm(one - both) < 0.01 * np.linalg.norm(one - start)
    first = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("one", "two")]
    assert abs(first[0]["gradient_norm"] / first[1]["gradient_norm"] - 1) < 1e-4


def test_all_processes_end_where_the_folder_is_held(tmp_path):
    with held(tmp_path / "run") as holder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        command = [*RUN, "--workdir", str(tmp_path / "run"), "--devices", "2", "--coordinator", address]
        commands = [[*command, "--num-processes", "2", "--process-id", str(i)] for i in range(2)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        running = [subprocess.Popen(command, **pipes) for command in commands]
        outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [2, 2], "\n".join(outputs)
    assert f"in use by process {holder.pid} on " in outputs[0]
    assert "learned-opt: process 0 of this run has found a mistake" in outputs[1]
