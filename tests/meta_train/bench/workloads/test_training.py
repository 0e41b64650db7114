"""One run on a workload: deterministic, kept, killed at any time and gone on with to the same end."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest
from support import ROOT

from meta_train.bench.workloads import baselines, training
from tasks import Workload
from tasks.families.synthetic import quadratic

NADAMW = baselines.baselines()[0]
WORKLOAD = Workload(lambda: quadratic(dim=8, condition=(2.0, 4.0)), steps=30, every=7, name="quadratic")


def finished(folder):
    made = training.program(WORKLOAD, NADAMW)
    return training.run(made, WORKLOAD, NADAMW.setting, 3, folder)


def test_a_run_is_the_plain_loop(tmp_path):
    curves = finished(tmp_path)
    family = WORKLOAD.make()
    task, key = family.task(family.data, family.sample(jax.random.key(0))), jax.random.key(3)
    params = task.init(jax.random.fold_in(key, 0))
    transform = NADAMW.make({k: np.float32(v) for k, v in NADAMW.setting.items()}, 30)
    state, losses = transform.init(params), []
    for number in range(30):
        k_batch, k_loss = jax.random.split(jax.random.fold_in(key, number + 1))
        batch = task.batch(k_batch, "train")
        loss, grads = jax.value_and_grad(lambda p: task.loss(p, k_loss, batch)[0])(params)  # noqa: B023
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    np.testing.assert_allclose(curves.train, losses, rtol=1e-4)
    assert curves.steps.tolist() == [7, 14, 21, 28, 30]
    assert np.isfinite(curves.valid).all()
    assert not curves.diverged


def test_a_kept_run_is_read_and_not_run(tmp_path, monkeypatch):
    first = finished(tmp_path)
    made = training.program(WORKLOAD, NADAMW)._replace(step=None, init=None)
    again = training.run(made, WORKLOAD, NADAMW.setting, 3, tmp_path)
    np.testing.assert_array_equal(first.train, again.train)
    np.testing.assert_array_equal(first.valid, again.valid)


def test_only_finished_runs_nothing(tmp_path):
    made = training.program(WORKLOAD, NADAMW)
    with pytest.raises(training.NotFinishedError, match="quadratic"):
        training.run(made, WORKLOAD, NADAMW.setting, 3, tmp_path, only_finished=True)
    assert not list(tmp_path.iterdir())


def test_other_settings_seeds_and_programs_are_other_runs(tmp_path):
    finished(tmp_path)
    made = training.program(WORKLOAD, NADAMW)
    training.run(made, WORKLOAD, NADAMW.setting, 4, tmp_path)
    training.run(made, WORKLOAD, {**NADAMW.setting, "weight_decay": 0.1}, 3, tmp_path)
    longer = WORKLOAD._replace(steps=31)
    training.run(training.program(longer, NADAMW), longer, NADAMW.setting, 3, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_other_starts_and_other_looks_are_other_runs(tmp_path):
    """Neither is a part of the training step."""
    family = quadratic(dim=8, noise=0.1)

    def changed(**other):
        def task(data, cfg):
            made = family.task(data, cfg)
            return made._replace(**{name: change(getattr(made, name)) for name, change in other.items()})

        return training.program(WORKLOAD._replace(make=lambda: family._replace(task=task)), NADAMW).key

    def farther(init):
        return lambda key: jax.tree.map(lambda p: 5 * p, init(key))

    def worse(loss):
        return lambda params, key, batch: jax.tree.map(lambda x: 10 * x, loss(params, key, batch))

    def doubled(batch):
        def drawn(key, split):
            return jax.tree.map(lambda x: x * (2 if split == "valid" else 1), batch(key, split))

        return drawn

    keys = {changed(), changed(init=farther), changed(loss=worse), changed(batch=doubled)}
    assert changed() in keys
    assert len(keys) == 4


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    made = training.program(WORKLOAD, NADAMW)
    curves = training.run(made, WORKLOAD, {**NADAMW.setting, "learning_rate": 1e30}, 0, tmp_path)
    assert curves.diverged
    assert curves.final == np.inf


@pytest.mark.parametrize("damage", ["truncate", "other"])
def test_a_damaged_checkpoint_is_not_believed(tmp_path, damage):
    whole = finished(tmp_path / "whole")
    (name,) = [path.name for path in (tmp_path / "whole").iterdir()]
    part = tmp_path / "part" / name.replace(".npz", ".part.npz")
    part.parent.mkdir()
    if damage == "truncate":
        part.write_bytes(b"PK\x03\x04 no archive")
    else:
        np.savez(part, begin=7, seconds=1.0, looks=1, train=np.zeros(7), valid=np.zeros(1), leaf_0=np.zeros(3))
    np.testing.assert_array_equal(finished(part.parent).train, whole.train)


KILLED = """
import sys, time
from pathlib import Path
from meta_train.bench.workloads import training
sys.path.insert(0, {tests!r})
from test_training import NADAMW, WORKLOAD
training._SAVED_EVERY = 0.0
made = training.program(WORKLOAD, NADAMW)

def show(done, loss):
    print(done, flush=True)
    time.sleep(0.5)

training.run(made, WORKLOAD, NADAMW.setting, 3, Path({folder!r}), show)
"""


def test_a_killed_run_goes_on_to_the_same_end(tmp_path):
    folder = tmp_path / "killed"
    code = KILLED.format(tests=str(ROOT / "tests/meta_train/bench/workloads"), folder=str(folder))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    seen = [process.stdout.readline().strip() for _ in range(2)]
    assert seen == ["7", "14"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    time.sleep(0.1)
    assert [path.name for path in folder.glob("*.part.npz")]
    done = []
    made = training.program(WORKLOAD, NADAMW)
    resumed = training.run(made, WORKLOAD, NADAMW.setting, 3, folder, lambda step, loss: done.append(step))
    assert done[0] in (14, 21)  # it was killed before or after it saved what it had told
    assert not list(folder.glob("*.part.npz"))
    whole = finished(tmp_path / "whole")
    np.testing.assert_array_equal(resumed.train, whole.train)
    np.testing.assert_array_equal(resumed.valid, whole.valid)
