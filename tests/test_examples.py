"""Every example runs and does what it says."""

import os
import re
import subprocess
import sys

import pytest
from support import ROOT


def run(name, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize("name", ["haiku_loop.py", "flax_loop.py", "equinox_loop.py"])
def test_loops_learn(name):
    before, after = (float(number) for number in re.findall(r": ([\d.]+)", run(name)))
    assert after < 0.2 * before


def test_finetune():
    assert "saved and loaded again: mine" in run("finetune.py", "--meta-steps", "2")


def test_no_example_goes_untested():
    tested = {"haiku_loop.py", "flax_loop.py", "equinox_loop.py", "finetune.py"}
    # tests/learned_opt/local_sgd/test_multihost.py, tests/meta_train/bench/test_user_code.py
    elsewhere = {"local_sgd_multihost.py", "my_task.py", "my_workload.py", "my_optimizer.py"}
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == tested | elsewhere
