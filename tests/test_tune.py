"""The command `tune`, on a problem that compiles in a moment, and the problems themselves."""

import json

import jax
import numpy as np
import pytest
from test_self_tuning_learner import ridge

from learned_opt import self_tuning as st
from meta_train import cli, self_tuned


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(self_tuned.PROBLEMS, "ridge", lambda: ridge())


def test_tune_writes_what_it_prints_and_the_schedule_can_be_replayed(small, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["tune", "ridge", "--cycles", "45", "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "result.json").read_text())
    assert printed["config"]["cycles"] == 45
    schedule = st.schedule_from_json((out / "schedule.json").read_text())
    assert schedule.steps[-1] == 44 * 5
    assert len(schedule.values()["l2"]) == 45
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.tmp"))
    # the best weights are the best: by the validation loss of the whole set, which here is every batch
    assert printed["best"]["valid"]["loss"] <= printed["last"]["valid"]["loss"] + 1e-6


def test_tune_trains_the_weights_with_a_learned_rule(small, tmp_path):
    adam, rule = tmp_path / "adam", tmp_path / "rule"
    for out, more in ((adam, []), (rule, ["--optimizer", "flagship"])):
        assert cli.main(["tune", "ridge", "--cycles", "3", "--out", str(out), "--json", *more]) == 0
    losses = [json.loads((out / "result.json").read_text())["last"]["valid"]["loss"] for out in (adam, rule)]
    assert np.all(np.isfinite(losses))
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tune", "nonsense"], "unknown problem 'nonsense'; known: char-lstm, cifar-cnn, fashion-cnn"),
        (["tune", "cifar-cnn"], "learned-opt data fetch cifar10"),
        (["tune", "char-lstm", "--cycles", "0"], "cycles must be at least 1"),
        (["tune", "char-lstm", "--optimizer", "nonsense"], "nonsense"),
    ],
)
def test_mistakes_are_one_line(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LEARNED_OPT_DATA", str(tmp_path))
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "count"), [("fashion-cnn", 10), ("char-lstm", 7)])
def test_the_problems_have_the_stated_hyperparameters_and_disjoint_splits(name, count):
    problem = self_tuned.PROBLEMS[name]()
    assert len(st.names(problem.specs)) == count
    params, response = jax.eval_shape(problem.init, jax.random.key(0))
    assert jax.tree.structure(response, is_leaf=lambda x: isinstance(x, st.Gated)).num_leaves > 4
    del params
    parts = [next(iter(problem.data[split].values())) for split in ("train", "valid", "test")]
    rows = [{row.tobytes() for row in part} for part in parts]
    overlap = len(rows[0] & rows[1]) + len(rows[0] & rows[2]) + len(rows[1] & rows[2])
    assert overlap <= 2  # a picture or a line may occur twice in the set
