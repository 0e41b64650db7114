"""The command `tune`, on a problem that compiles in a moment, and the problems themselves."""

import json
import signal
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from support import ROOT
from support.problems import ridge

from learned_opt import self_tuning as st
from meta_train import cli
from meta_train.bench import user_code
from meta_train.train import problems, tune


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(problems.PROBLEMS, "ridge", lambda: ridge())


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


def test_tune_judges_the_weights_that_respond_in_the_original_form(small, tmp_path):
    assert cli.main(["tune", "ridge", "--method", "stn", "--cycles", "30", "--out", str(tmp_path), "--json"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())["best"]["valid"]["loss"]
    problem = ridge()
    tuner = problems.make_tuner(
        problem, weights=optax.adam(1e-3), hyper=optax.adam(1e-2), method="stn", train_steps=5, warmup=7
    )
    k_init, k_run = jax.random.split(jax.random.key(0))
    _, info = tuner.run(tuner.init(*problem.init(k_init)), k_run, problem.data, 30)
    # every validation batch is the whole set
    assert result == pytest.approx(float(info.valid_loss.min()), rel=1e-5)


def test_tune_needs_no_home_folder(small, tmp_path, capsys, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    for name in ("LEARNED_OPT_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    cache = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert cli.main(["tune", "ridge", "--cycles", "3", "--out", str(tmp_path), "--json"]) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    assert "what is compiled is not kept: there is no home folder: set LEARNED_OPT_DATA" in capsys.readouterr().err


def test_tune_trains_the_weights_with_a_learned_rule(small, tmp_path):
    adam, rule = tmp_path / "adam", tmp_path / "rule"
    for out, more in ((adam, []), (rule, ["--optimizer", "flagship"])):
        assert cli.main(["tune", "ridge", "--cycles", "3", "--out", str(out), "--json", *more]) == 0
    losses = [json.loads((out / "result.json").read_text())["last"]["valid"]["loss"] for out in (adam, rule)]
    assert np.all(np.isfinite(losses))
    assert losses[1] < losses[0], losses


def own(folder, text):
    path = folder / "mine.py"
    path.write_text(text)
    return f"{path}:make"


def test_tune_takes_a_network_from_a_file_and_compares_it_with_constants(tmp_path, capsys):
    spec = own(tmp_path, "from support.problems import ridge as make")
    out = tmp_path / "out"
    assert cli.main(["tune", "--network", spec, "--cycles", "45", "--constants", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["config"]["problem"] == spec
    assert set(result["constants"]) == {"first", "last"}
    page = (out / "report.html").read_text()
    assert f"learned-opt tune --network {spec} --method delta_stn --cycles 45 --seed 0 --constants" in page
    for text in ("<svg", "first values, constant", "l2", f"{result['constants']['last']['test']['loss']:.4f}", "45"):
        assert text in page
    assert "<script" not in page
    # the first values' column is a plain run of as many steps
    problem = ridge()
    k_init, k_run = jax.random.split(jax.random.key(0))
    w, _ = problem.init(k_init)
    replay = st.replay(
        st.constant(problem.specs, st.hyperparameters.start(problem.specs)[0]),
        problem.train_loss,
        lambda data, key: data["train"],
        optax.adam(1e-3),
    )
    state, _ = replay.run(replay.init(w), k_run, problem.data, 225)
    expected = problems.evaluate(problem, state.params, problem.data["valid"])["loss"]
    assert result["constants"]["first"]["valid"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_example_of_an_own_network_is_one():
    name, problem = user_code.network(str(ROOT / "examples" / "my_network.py") + ":make")
    assert name == "my_network"
    assert "learning_rate" in st.names(problem.specs)


MISTAKES = {
    "make = 3": "has no function make",
    "def make(): return 3": "returned int, not a meta_train.train.problems.Problem",
    "def make(): raise KeyError('no')": "line 1: KeyError",
    "from support.problems import ridge\ndef make(): return ridge()._replace(data={'train': 0})": "have no 'valid'",
    "from support.problems import ridge\ndef make(): return ridge()._replace(valid_loss=lambda w, b: 1 // w)": "line 2",
    "from support.problems import ridge\n"
    "def make(): return ridge()._replace(metrics=lambda w, b: {'loss': b['t'].mean()})": "one number a row",
}


def test_a_loss_that_is_never_finite_is_a_mistake_and_a_stopped_run_keeps_what_it_found(small, tmp_path, monkeypatch):
    console, out, problem = Console(quiet=True), tmp_path / "out", ridge()
    nowhere = problem._replace(train_loss=lambda *arguments: jnp.nan * problem.train_loss(*arguments))
    config = tune.TuneConfig("ridge", cycles=4, report_every=1)
    with pytest.raises(ValueError, match="in every training step the loss or a gradient was not finite"):
        tune.run(config, out, console, nowhere)
    assert not out.exists()

    def stopped(problem, hyper):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "_values", stopped)
    result = tune.run(config, out, console)
    assert (result["cycles_done"], len(st.schedule_from_json((out / "schedule.json").read_text()).steps)) == (1, 1)


def test_constants_that_are_interrupted_leave_the_run(small, tmp_path, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "_constants", stopped)
    assert cli.main(["tune", "ridge", "--cycles", "2", "--constants", "--out", str(tmp_path)]) == 130
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["cycles_done"], result["constants"]) == (2, {})


def test_a_metric_that_is_a_mean_is_refused():
    problem = ridge()
    mean = problem._replace(metrics=lambda w, batch: {"loss": jnp.mean(problem.valid_loss(w, batch))})
    with pytest.raises(ValueError, match="'loss' has shape"):
        problems.evaluate(mean, jnp.zeros(4), problem.data["valid"])


def test_sigterm_stops_a_command_as_ctrl_c_does(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    text = "import os, signal, time\ndef make():\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(9)"
    assert cli.main(["tune", "--network", own(tmp_path, text), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_in_a_file_are_one_line(text, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["tune", "--network", own(tmp_path, text), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert MISTAKES[text] in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tune", "nonsense"], "unknown problem 'nonsense'; known: char-lstm, cifar-cnn, fashion-cnn, fashion-resnet"),
        (["tune"], "name a preset, or one of your own"),
        (["tune", "char-lstm", "--network", "a.py:make"], "name a preset, or one of your own"),
        (["tune", "--network", "a.py:make", "--dataset", "b"], "brings its data"),
        (["tune", "--network", "a.py:make"], "there is no file a.py"),
        (["tune", "cifar-cnn"], "learned-opt data fetch cifar10"),
        (["tune", "char-lstm", "--cycles", "0"], "cycles must be at least 1"),
        (["tune", "char-lstm", "--optimizer", "nonsense"], "nonsense"),
        (["tune", "char-lstm", "--learning-rate", "-1"], "learning_rate must be finite and at least 0, not -1"),
        (["tune", "char-lstm", "--dataset", "digits"], "the network reads text; 'digits' has none"),
        (["tune", "fashion-cnn", "--dataset", "wine"], "wants grey images of sides a multiple of 4; 'wine' has none"),
        (["tune", "cifar-cnn", "--dataset", "fashion_mnist_small"], "wants colour images of sides a multiple of 8"),
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
    problem = problems.PROBLEMS[name]()
    assert len(st.names(problem.specs)) == count
    params, response = jax.eval_shape(problem.init, jax.random.key(0))
    assert jax.tree.structure(response, is_leaf=lambda x: isinstance(x, st.Gated)).num_leaves > 4
    del params
    parts = [next(iter(problem.data[split].values())) for split in ("train", "valid", "test")]
    rows = [{row.tobytes() for row in part} for part in parts]
    overlap = len(rows[0] & rows[1]) + len(rows[0] & rows[2]) + len(rows[1] & rows[2])
    assert overlap <= 2  # a picture or a line may occur twice in the set


def test_the_lstm_can_be_deeper_and_tune_some_of_its_hyperparameters():
    problem = problems.char_lstm(width=8, layers=2, length=8, tuned=("dropout_output",))
    assert st.names(problem.specs) == ("dropout_output",)
    tuner = problems.make_tuner(problem, weights=optax.adam(1e-3))

    def begin(key):
        return tuner.cycle(tuner.init(*problem.init(key)), key, jax.device_put(problem.data))

    state, info = jax.eval_shape(begin, jax.random.key(0))
    assert {"lstm/linear", "lstm_1/linear"} <= set(state.params)
    assert info.mean.shape == (1,)


def test_every_stage_of_the_residual_network_has_dropout_of_its_own():
    problem = problems.fashion_resnet("fashion_mnist_small", channels=(2, 3, 4), batch_size=4)
    names = st.names(problem.specs)
    assert len(names) == 10
    params, _ = jax.jit(problem.init)(jax.random.key(0))
    batch = problem.batch(jax.device_put(problem.data["train"]), jax.random.key(1))
    start = st.values(problem.specs, st.start(problem.specs)[0])
    loss = jax.jit(lambda hparams: problem.train_loss(params, hparams, jax.random.key(2), batch))
    dropout = [name for name in names if name.startswith("dropout")]
    losses = [loss(start), *(loss(start | {name: jnp.float32(0.9)}) for name in dropout)]
    assert len({f"{x.sum():.4f}" for x in losses}) == 1 + 3  # none acts for another


def test_all_of_the_transformer_responds():
    problem = problems.char_transformer(width=8, layers=1, heads=2, length=6)
    params, response = problem.init(jax.random.key(0))
    gated = jax.tree.structure(response, is_leaf=lambda x: isinstance(x, st.Gated))
    assert gated.num_leaves == len(jax.tree.leaves(params))
    tuner = problems.make_tuner(problem, weights=optax.adam(1e-3))
    _, info = jax.eval_shape(
        lambda key: tuner.cycle(tuner.init(params, response), key, jax.device_put(problem.data)), jax.random.key(1)
    )
    assert info.mean.shape == (6,)


def test_images_shrink_to_the_means_of_their_squares(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    rows = {"image": images, "label": np.arange(20) % 10}
    monkeypatch.setattr(problems, "load", lambda name: {"train": rows, "valid": rows})
    whole, half = (problems.cifar_cnn(width=1, shrink=shrink) for shrink in (1, 2))
    x = whole.data["train"]["x"].astype(float)
    means = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    assert np.abs(half.data["train"]["x"] - means).max() <= 0.5
    assert jax.eval_shape(half.init, jax.random.key(0))[0]["dense1"]["w"].shape == (16, 4)


def test_convolution_and_pooling_are_those_of_haiku():
    x = jax.random.normal(jax.random.key(0), (2, 8, 6, 2))

    def reference(x):
        x = jax.nn.relu(hk.Conv2D(3, 3, name="conv")(x))
        return hk.max_pool(x, (2, 2, 1), (2, 2, 1), "SAME")

    own, other = (hk.without_apply_rng(hk.transform(f)) for f in (lambda x: problems._pooled(x, 3, "conv"), reference))
    theirs = other.init(jax.random.key(1), x)
    ours = {"conv": {"w": theirs["conv"]["w"].reshape(18, 3), "b": theirs["conv"]["b"] + 0.1}}
    theirs["conv"]["b"] = ours["conv"]["b"]
    assert jax.tree.map(np.shape, own.init(jax.random.key(1), x)) == jax.tree.map(np.shape, ours)
    np.testing.assert_allclose(own.apply(ours, x), other.apply(theirs, x), rtol=1e-5, atol=1e-6)
