"""Runs that are stopped, killed and damaged, and go on as if nothing had happened."""

import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from support import ROOT
from support.problems import ridge

import learned_opt
from meta_train import claim
from meta_train.train import checkpoint, config, loop, problems
from meta_train.train.config import ConfigError
from meta_train.train.learners import MEASURES, SCHEDULES
from meta_train.train.learners.local_sgd import LOCAL_OPTIMIZERS
from tasks import suites
from tasks.families.synthetic import quadratic

SETTINGS = config.Config(
    rule="adam",
    suite="small",
    meta_steps=12,
    particles=8,
    unroll=5,
    min_length=10,
    max_length=20,
    checkpoint_every=2,
    keep_checkpoints=3,
    log_every=3,
)


@pytest.fixture(autouse=True)
def small_suite(monkeypatch):
    entry = suites.Entry("quadratic", "quadratic", "quadratic 1-10", lambda: quadratic(dim=3, condition=(1.0, 10.0)))
    monkeypatch.setitem(suites.TRAIN, "small", (entry,))


def flat(theta):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(theta)])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        entry = suites.Entry("quadratic", "quadratic", "", lambda: quadratic(dim=3, condition=(1.0, 10.0)))
        patch.setitem(suites.TRAIN, "small", (entry,))
        folder = tmp_path_factory.mktemp("run") / "a"
        return folder, loop.run(SETTINGS, folder)


def interrupted(folder: Path, steps: int, *, resume: bool = False) -> None:
    """A run of ``SETTINGS`` cut off after ``steps`` meta-steps by SIGTERM, sent to ourselves from the log."""
    write = loop.progress.Metrics.write

    def write_and_stop(self, step, values):
        write(self, step, values)
        if step >= steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.progress.Metrics, "write", write_and_stop)
        outcome = loop.run(SETTINGS, folder, resume=resume)
    assert not outcome.finished
    assert outcome.stopped_by == signal.SIGTERM
    assert outcome.step < SETTINGS.meta_steps


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(undisturbed):
    folder, outcome = undisturbed
    assert outcome.finished
    assert outcome.step == 12
    assert steps_of(folder) == [3, 6, 9, 12]
    assert list((folder / "tensorboard").glob("events*"))
    kept = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert kept == [8, 10, 12]
    assert config.read(folder / "config.json") == SETTINGS
    theta = learned_opt.load_rule(folder / "rule").theta
    np.testing.assert_array_equal(flat(theta), flat(outcome.theta))


def test_a_rule_that_sets_its_own_step_size_is_given_none(tmp_path):
    plain = dataclasses.replace(SETTINGS, meta_steps=2)
    rates = {"min_learning_rate": 1e-3, "max_learning_rate": 1e-2, "inner_schedule": "cosine"}
    outcomes = [
        loop.run(settings, tmp_path / name)
        for name, settings in (("plain", plain), ("rates", dataclasses.replace(plain, **rates)))
    ]
    jax.tree.map(np.testing.assert_array_equal, outcomes[0].theta, outcomes[1].theta)
    assert learned_opt.store.read_record(tmp_path / "rates" / "rule")["learning_rate"] is None


def test_the_names_that_a_config_knows_are_those_there_are():
    assert set(config._MEASURES) == set(MEASURES)
    assert set(config._SCHEDULES) == set(SCHEDULES)
    assert set(config._LOCAL_OPTIMIZERS) == set(LOCAL_OPTIMIZERS)


def test_a_rule_is_meta_trained_through_a_self_tuned_network(tmp_path, monkeypatch):
    monkeypatch.setitem(problems.SUITES, "ridge", (problems.ProblemEntry("ridge", ridge),))
    settings = {"rule": "sgd", "learner": "self_tuning", "suite": "ridge", "estimator": "nres", "bench_suite": ""}
    outcome = loop.run(dataclasses.replace(SETTINGS, **settings), tmp_path / "a")
    assert outcome.finished
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["loss/ridge"] < 4 for line in lines)
    start = learned_opt.RULES["sgd"]().init(jax.random.key(0))
    assert not np.array_equal(flat(learned_opt.load_rule(str(tmp_path / "a" / "rule")).theta), flat(start))


def test_where_a_run_started_is_recorded_by_name(tmp_path):
    start = learned_opt.save(tmp_path / "start", "adam", learned_opt.RULES["adam"]().init(jax.random.key(0)))
    loop.run(dataclasses.replace(SETTINGS, meta_steps=1, init=str(start)), tmp_path / "run")
    assert learned_opt.store.read_record(tmp_path / "run" / "rule")["config"]["init"] == "start"


def test_a_run_keeps_what_it_started_from(tmp_path):
    """Resumed after that rule has been saved again, and after it has been removed: nothing of it changes."""
    theta = learned_opt.RULES["adam"]().init(jax.random.key(0))
    start = learned_opt.save(tmp_path / "start", "adam", jax.tree.map(lambda x: x + 0.5, theta))
    settings = dataclasses.replace(SETTINGS, init=str(start), trainable=["log_learning_rate"], meta_steps=4)
    whole = loop.run(settings, tmp_path / "run").theta
    learned_opt.save(start, "adam", theta)
    for _ in range(2):
        resumed = loop.run(settings, tmp_path / "run", resume=True)
        jax.tree.map(np.testing.assert_array_equal, resumed.theta, whole)
        shutil.rmtree(start, ignore_errors=True)


def test_a_rule_in_half_precision_is_trained_in_single(tmp_path):
    theta = learned_opt.RULES["adam"]().init(jax.random.key(0))
    start = learned_opt.save(tmp_path / "start", "adam", jax.tree.map(lambda x: np.asarray(x, np.float16), theta))
    outcome = loop.run(dataclasses.replace(SETTINGS, meta_steps=3, init=str(start)), tmp_path / "run")
    assert {leaf.dtype for leaf in jax.tree.leaves(outcome.theta)} == {np.dtype(np.float32)}
    assert np.isfinite(flat(outcome.theta)).all()


def test_what_is_not_trainable_stays(tmp_path):
    settings = dataclasses.replace(SETTINGS, trainable=["log_learning_rate"], meta_steps=3)
    outcome = loop.run(settings, tmp_path / "a")
    start = learned_opt.RULES["adam"]().init(jax.random.key(0))
    assert {name for name in start if outcome.theta[name] != start[name]} == {"log_learning_rate"}
    saved = learned_opt.load_rule(tmp_path / "a" / "rule").theta
    jax.tree.map(np.testing.assert_array_equal, saved, outcome.theta)
    resumed = loop.run(settings, tmp_path / "a", resume=True)
    jax.tree.map(np.testing.assert_array_equal, resumed.theta, outcome.theta)
    with pytest.raises(ConfigError, match=r"trainable: .*log_one_minus_b1.*, not momentum"):
        loop.run(dataclasses.replace(settings, trainable=["momentum"]), tmp_path / "b")


def test_sigterm_saves_and_resuming_ends_bit_identical(undisturbed, tmp_path):
    interrupted(tmp_path / "b", 5)
    outcome = loop.run(SETTINGS, tmp_path / "b", resume=True)
    assert outcome.finished
    np.testing.assert_array_equal(flat(outcome.theta), flat(undisturbed[1].theta))
    assert steps_of(tmp_path / "b") == steps_of(undisturbed[0])


def test_resuming_a_finished_run_changes_nothing(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed[0], tmp_path / "copy")
    outcome = loop.run(SETTINGS, folder, resume=True)
    np.testing.assert_array_equal(flat(outcome.theta), flat(undisturbed[1].theta))


# Orbax's storage layer leaves callbacks on its closed event loop when a file is damaged: noise, from its threads.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["flip", "truncate", "missing"])
def test_a_damaged_checkpoint_is_passed_over(undisturbed, tmp_path, damage):
    folder = shutil.copytree(undisturbed[0], tmp_path / "copy")
    files = [path for path in (folder / "checkpoints" / "12").rglob("*") if path.is_file() and path.parent.name == "d"]
    assert files
    for path in files:
        if damage == "missing":
            path.unlink()
        elif damage == "truncate":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            contents = bytearray(path.read_bytes())
            contents[len(contents) // 2] ^= 4
            path.write_bytes(contents)
    with pytest.warns(UserWarning, match="checkpoint 12 is damaged"):
        outcome = loop.run(SETTINGS, folder, resume=True)
    gc.collect()
    np.testing.assert_array_equal(flat(outcome.theta), flat(undisturbed[1].theta))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was saved anew
        loop.run(SETTINGS, folder, resume=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_without_a_sound_checkpoint_is_left_as_it_is(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed[0], tmp_path / "copy")
    for path in (folder / "checkpoints").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.unlink()
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(checkpoint.CheckpointError, match="begin again in another folder"),
    ):
        loop.run(SETTINGS, folder, resume=True)
    gc.collect()
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == before


def test_a_half_written_checkpoint_is_passed_over(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed[0], tmp_path / "copy")
    whole = folder / "checkpoints" / "12"
    whole.rename(folder / "checkpoints" / "12.orbax-checkpoint-tmp")
    outcome = loop.run(SETTINGS, folder, resume=True)
    np.testing.assert_array_equal(flat(outcome.theta), flat(undisturbed[1].theta))


def test_the_checksum_sees_every_bit():
    state = {"a": np.linspace(0, 1, 7, dtype=np.float32), "b": np.arange(3, dtype=np.int32), "c": np.array(True)}
    before = int(checkpoint.checksum(state))
    for name, leaf in state.items():
        for place in range(leaf.size):
            changed = {key: value.copy() for key, value in state.items()}
            if leaf.dtype == bool:
                changed[name] = ~leaf
            else:
                changed[name].view(np.uint32)[place] ^= np.uint32(1 << (5 * place % 32))
            assert int(checkpoint.checksum(changed)) != before


def test_another_runs_folder_is_refused(undisturbed, tmp_path):
    folder = undisturbed[0]
    with pytest.raises(ConfigError, match="holds a run already"):
        loop.run(SETTINGS, folder)
    with pytest.raises(ConfigError, match="holds a run with seed 0, not 1"):
        loop.run(config.replace(SETTINGS, seed=1), folder, resume=True)
    with pytest.raises(ConfigError, match="no run to resume"):
        loop.run(SETTINGS, tmp_path / "nothing", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="something that is no run"):
        loop.run(SETTINGS, tmp_path / "other")
    assert (tmp_path / "other" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "nonesuch"}, "unknown rule"),
        ({"suite": "nonesuch"}, "unknown training suite"),
        ({"estimator": "nonesuch"}, "unknown estimator"),
        ({"outer_optimizer": "nonesuch"}, "outer_optimizer"),
        ({"outer_optimizer": "lbfgs"}, "outer_optimizer 'lbfgs' cannot be made with optax"),
        ({"outer_kwargs": {"b1": "x"}}, "outer_optimizer"),
        ({"rule": "celo2", "rule_kwargs": {"hidden": 3}}, "cannot be made"),
        ({"rule": "sgd", "rule_kwargs": {"learning_rate": -1}}, "cannot be made"),
        ({"trainable": [1]}, "trainable"),
        ({"min_learning_rate": 1.0, "max_learning_rate": np.inf}, "finite"),
        ({"particles": 7}, "multiple of the number of devices"),
        ({"judged_on": "test"}, "judged_on must be one of train, valid"),
        ({"judged_from": 1.0}, "judged_from must be at least 0 and below 1"),
        ({"init": "nonesuch"}, "nonesuch"),
    ],
)
def test_bad_settings_are_one_clear_line(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as raised:
        loop.run(config.replace(SETTINGS, **change), tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())  # the corrected settings find no run there


def test_nothing_is_written_before_the_first_meta_step_is_compiled(tmp_path, monkeypatch):
    def fail(*_):
        raise ConfigError("found while compiling")

    monkeypatch.setattr(loop, "begin", fail)
    with pytest.raises(ConfigError, match="while compiling"):
        loop.run(SETTINGS, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_seeds_are_not_shortened(seed):
    with pytest.raises(ConfigError, match=f"seed must be within 0 to 4294967295, not {seed}"):
        config.replace(SETTINGS, seed=seed)
    assert config.replace(SETTINGS, seed=2**32 - 1).seed == 2**32 - 1


def test_a_full_disk_is_one_clear_line_and_keeps_the_run(undisturbed, tmp_path, monkeypatch):
    folder = shutil.copytree(undisturbed[0], tmp_path / "copy")
    shutil.rmtree(folder / "checkpoints" / "12")
    before = (folder / "rule" / "rule.json").read_bytes()

    def full(path, contents):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("learned_opt.files._write_synced", full)
    with pytest.raises(ValueError, match="No space left on device"):
        loop.run(SETTINGS, folder, resume=True)
    assert (folder / "rule" / "rule.json").read_bytes() == before


def test_resume_on_another_number_of_devices(tmp_path, undisturbed, monkeypatch):
    make_mesh, devices = loop.make_mesh, jax.devices()
    for number, until in ((4, 3), (2, 6), (8, 12)):
        monkeypatch.setattr(loop, "make_mesh", lambda number=number: make_mesh(devices[:number]))
        if until < 12:
            interrupted(tmp_path / "run", until, resume=until > 3)
    outcome = loop.run(SETTINGS, tmp_path / "run", resume=True)
    start = flat(learned_opt.RULES["adam"]().init(jax.random.key(0)))
    travelled = np.linalg.norm(flat(undisturbed[1].theta) - start)
    assert np.linalg.norm(flat(outcome.theta) - flat(undisturbed[1].theta)) < 0.01 * travelled


def test_sigkill_at_an_arbitrary_moment(tmp_path):
    """Real processes: one undisturbed, one killed and resumed."""
    command = [sys.executable, "-m", "meta_train.cli", "train", "--devices", "2", "--json"]
    settings = ["--rule", "adam", "--suite", "small", "--particles", "2", "--unroll", "5", "--meta-steps", "40"]
    for setting in ("checkpoint_every=3", "bench_suite=", "min_length=10", "log_every=5"):
        settings += ["--set", setting]
    run = lambda *more, **options: subprocess.Popen([*command, *more], cwd=ROOT, **options)  # noqa: E731
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    whole = run(*settings, "--workdir", str(tmp_path / "whole"), **silent)
    killed = run(*settings, "--workdir", str(tmp_path / "killed"), **silent)
    assert whole.wait(timeout=300) == 0
    rng = np.random.default_rng(int(time.time()))  # an arbitrary moment, on purpose
    _wait_for(tmp_path / "killed" / "checkpoints" / "3", killed)
    time.sleep(rng.uniform(0, 0.3))
    killed.kill()
    killed.wait()
    resumed = run("--resume", "--workdir", str(tmp_path / "killed"), **silent)
    assert resumed.wait(timeout=300) == 0
    thetas = [flat(learned_opt.load_rule(tmp_path / name / "rule")[1]) for name in ("whole", "killed")]
    np.testing.assert_array_equal(*thetas)


def test_one_run_a_folder_and_what_sigterm_and_sigkill_leave_of_it(tmp_path):
    """Real processes: the second is refused, SIGTERM ends with its own code, SIGKILL leaves no claim that stands."""
    workdir = tmp_path / "a run"
    command = [sys.executable, "-m", "meta_train.cli", "train", "--devices", "2", "--workdir", str(workdir)]
    settings = ["--rule", "adam", "--suite", "small", "--particles", "2", "--unroll", "5", "--meta-steps", "1000000"]
    for setting in ("checkpoint_every=3", "bench_suite=", "min_length=10", "log_every=5"):
        settings += ["--set", setting]
    options = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *settings], **options) as first:
        _wait_for(workdir / "checkpoints" / "3", first)
        kept = (workdir / "config.json").read_bytes()
        for more in (settings, ["--resume"], [*settings, "--seed", "1"]):
            second = subprocess.run([*command, *more], **options, timeout=120, check=False)
            assert second.returncode == 2
            last = second.stderr.splitlines()[-1]
            assert last.startswith(f"learned-opt: {workdir} is in use by process {first.pid} on ")
        assert (workdir / "config.json").read_bytes() == kept
        first.terminate()
        told = first.communicate(timeout=120)[1]
        assert first.returncode == 128 + signal.SIGTERM
        assert f"saved; go on with: learned-opt train --resume --workdir '{workdir}'" in told
    assert not (workdir / ".running").exists()

    saved = {path.name for path in (workdir / "checkpoints").iterdir()}
    with subprocess.Popen([*command, "--resume"], **options) as again:
        for _ in range(3000):
            if not {path.name for path in (workdir / "checkpoints").iterdir()} <= saved:
                break
            assert again.poll() is None
            time.sleep(0.05)
        again.kill()
    assert (workdir / ".running").exists()
    with claim.claim(workdir):
        pass


def _wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(3000):
        if path.exists() or process.poll() is not None:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def test_warnings_are_not_needed_for_a_sound_run(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loop.run(config.replace(SETTINGS, meta_steps=1), tmp_path / "run").finished
