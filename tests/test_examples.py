"""Every example runs and does what it says."""

import os
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
from support import ROOT

from learned_opt import self_tuning


def run(name, *arguments, folder=ROOT, scripts="examples"):
    environment = {**os.environ, "PYTHONPATH": str(folder), "MPLBACKEND": "Agg"}
    command = [sys.executable, str(ROOT / scripts / name), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize("name", ["haiku_loop.py", "flax_loop.py", "equinox_loop.py"])
def test_loops_learn(name):
    before, after = (float(number) for number in re.findall(r": ([\d.]+)", run(name)))
    assert after < 0.2 * before


def test_finetune():
    assert "saved and loaded again: mine" in run("finetune.py", "--meta-steps", "2")


def test_a_schedule_trains_without_the_package(tmp_path):
    """On what the JSON holds: learned-opt cannot even be imported."""
    specs = runpy.run_path(str(ROOT / "examples" / "my_network.py"))["SPECS"]
    mean, sigma = (np.asarray(x)[None].repeat(2, 0) for x in self_tuning.hyperparameters.start(specs))
    schedule = self_tuning.Schedule(specs, np.array([0, 150]), mean, sigma)
    (tmp_path / "schedule.json").write_text(self_tuning.schedule_to_json(schedule))
    (tmp_path / "learned_opt.py").write_text("raise ImportError")
    before, after = (
        float(number)
        for number in re.findall(r": ([\d.]+)", run("replay_schedule.py", "schedule.json", folder=tmp_path))
    )
    assert after < 0.15 < before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"), [("use_a_rule", ("--steps", "20")), ("meta_train_a_rule", ("--meta-steps", "3"))]
)
def test_tutorials_draw_their_pictures(name, arguments, tmp_path):
    run(f"{name}.py", *arguments, "--picture", str(tmp_path / "picture.png"), scripts="docs/tutorials")
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["local_sgd_fsdp.py", "local_sgd_maxtext.py"])
def test_local_sgd_learns(name):
    shown = run(name)
    before, after = (float(number) for number in re.findall(r"loss [^:]*: ([\d.]+)", shown))
    assert after < 0.2 * before
    if name == "local_sgd_fsdp.py":
        assert re.search(r"hidden: .*'workers', 'fsdp'.* its anchor: .*'fsdp'", shown)


def test_no_example_goes_untested():
    tested = {"haiku_loop.py", "flax_loop.py", "equinox_loop.py", "finetune.py", "replay_schedule.py"}
    tested |= {"local_sgd_fsdp.py", "local_sgd_maxtext.py"}
    # tests/learned_opt/local_sgd/test_multihost.py, tests/meta_train/bench/test_user_code.py, .../train/test_tune.py
    elsewhere = {"local_sgd_multihost.py", "my_task.py", "my_workload.py", "my_optimizer.py", "my_network.py"}
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == tested | elsewhere
