"""Meta-training of unsupervised rules: meta-objectives, tasks, the learner, and runs that resume exactly."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import learned_opt
from learned_opt import unsupervised
from meta_train.cli import main
from meta_train.train import config, loop
from meta_train.train.config import Config, ConfigError
from meta_train.train.estimators import ESTIMATORS
from meta_train.train.learners import unsupervised as training
from tasks.data.glyphs import LETTERS, glyphs
from tasks.families import representation
from tasks.families.representation import FeatureEntry, FeatureFamily, FewShot


def gaussians(inputs=5, classes=3):
    """Clusters about random centres: a family that needs no data."""

    def rows(cfg, key, labels):
        noise = jax.random.normal(key, (labels.shape[0], inputs))
        return cfg["centres"][labels] + noise

    def batch(data, cfg, key, size):
        k_label, k_rows = jax.random.split(key)
        return rows(cfg, k_rows, jax.random.randint(k_label, (size,), 0, classes))

    def few_shot(data, cfg, key, shots):
        labels = jnp.repeat(jnp.arange(classes), shots)
        x = rows(cfg, key, jnp.concatenate([labels, labels]))
        return FewShot(x[: labels.size], x[labels.size :], labels)

    def sample(key):
        return {"centres": 2 * jax.random.normal(key, (classes, inputs))}

    return FeatureFamily((), inputs, classes, sample, batch, few_shot)


def small_learner(objective=None, activations=("tanh",), lengths=(100, 100), **options):
    rule = unsupervised.unsupervised(hidden_size=4, signal_size=2, channels=1)
    entry = FeatureEntry("gaussians", gaussians, (4, 3), activations, batch_size=8)
    learner = training.feature_learner(
        rule, gaussians(), entry, objective=objective, shots=4, lengths=lengths, **options
    )
    return rule, learner


# --- meta-objectives


def labelled(rng, classes=4, shots=5, units=6):
    labels = np.repeat(np.arange(classes), shots)
    centres = rng.normal(size=(classes, units))
    return [centres[labels] + rng.normal(size=(len(labels), units)) for _ in range(2)] + [labels]


@pytest.mark.parametrize("units", [6, 30])  # fewer and more than the 20 rows: the two ways to solve
def test_ridge_is_the_regression_with_a_free_bias(units):
    with jax.enable_x64(True):
        support, query, labels = labelled(np.random.default_rng(0), units=units)
        y = np.eye(4)[labels]
        y = y - y.mean()
        y = y / np.sqrt((y**2).sum(1).mean())
        a = np.hstack([support, np.ones((20, 1))])
        w = np.linalg.inv(a.T @ a + 0.1 * np.diag([1.0] * units + [0.0])) @ a.T @ y
        predicted = np.hstack([query, np.ones((20, 1))]) @ w
        predicted = predicted / np.linalg.norm(predicted, axis=1, keepdims=True)
        expected = ((predicted - y) ** 2).sum(1).mean()
        found = training.ridge(jnp.asarray(support), jnp.asarray(query), jnp.asarray(labels), 4)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_linear_probe_is_gradient_descent():
    with jax.enable_x64(True):
        support, query, labels = labelled(np.random.default_rng(1))
        mean, std = support.mean(0), np.sqrt(support.var(0) + 1e-6)
        f, q = (support - mean) / std, (query - mean) / std
        w, b = np.zeros((6, 4)), np.zeros(4)
        for _ in range(30):
            p = np.exp(f @ w + b)
            p = p / p.sum(1, keepdims=True) - np.eye(4)[labels]
            w, b = w - 0.5 * f.T @ p / 20, b - 0.5 * p.mean(0)
        logits = q @ w + b
        expected = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(20), labels])
        found = training.linear_probe(jnp.asarray(support), jnp.asarray(query), jnp.asarray(labels), 4)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_nearest_centroid_is_a_softmax_of_distances():
    with jax.enable_x64(True):
        support, query, labels = labelled(np.random.default_rng(2))
        mean, std = support.mean(0), np.sqrt(support.var(0) + 1e-6)
        f, q = (support - mean) / std, (query - mean) / std
        centroids = np.stack([f[labels == c].mean(0) for c in range(4)])
        logits = -np.array([[((row - c) ** 2).mean() for c in centroids] for row in q])
        expected = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(20), labels])
        found = training.nearest_centroid(jnp.asarray(support), jnp.asarray(query), jnp.asarray(labels), 4)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("name", training.OBJECTIVES)
def test_objectives_prefer_features_that_tell_the_classes_apart(name):
    rng = np.random.default_rng(3)
    labels = jnp.repeat(jnp.arange(5), 10)
    noise = [jnp.asarray(rng.normal(size=(50, 8)), jnp.float32) for _ in range(2)]
    centres = 3 * jax.nn.one_hot(labels, 8)
    objective = training.OBJECTIVES[name]
    useless, useful = objective(*noise, labels, 5), objective(*(n + centres for n in noise), labels, 5)
    assert useful < 0.6 * useless
    if name == "ridge":
        assert 1.5 < useless < 2.5
        assert objective(centres, centres, labels, 5) < 0.01


# --- the learner


@pytest.mark.parametrize(
    ("objective", "estimator"),
    [
        (training.ridge, "bptt"),
        pytest.param(training.nearest_centroid, "truncated_bptt", marks=pytest.mark.slow),
    ],
)
def test_the_meta_gradient_equals_finite_differences(objective, estimator):
    with jax.enable_x64(True):
        rule, learner = small_learner(objective)
        rng = np.random.default_rng(0)
        theta = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x, np.float64) + 0.1 * rng.normal(size=x.shape)),
            rule.init_theta(jax.random.key(0)),
        )
        made = ESTIMATORS[estimator](learner, unroll=6)
        state = made.init(theta, jax.random.key(1))
        estimate = jax.jit(lambda theta: made.estimate(theta, state, jax.random.key(2))[::2])
        grad = jax.flatten_util.ravel_pytree(estimate(theta)[0])[0]
        flat, unravel = jax.flatten_util.ravel_pytree(theta)
        assert grad.dtype == jnp.float64
        for _ in range(4):
            direction = rng.normal(size=flat.shape)
            ends = [estimate(unravel(flat + sign * 1e-7 * direction))[1].loss for sign in (1, -1)]
            expected = float(grad @ direction)
            assert abs(float(ends[0] - ends[1]) / 2e-7 - expected) < 1e-4 * max(abs(expected), jnp.linalg.norm(grad))
        assert jnp.linalg.norm(grad) > 1e-6


@pytest.mark.parametrize("estimator", ["pes", "nres"])
def test_evolution_strategies_run_it_unchanged(estimator):
    rule, learner = small_learner(lengths=(4, 8), multiple_of=4)
    theta = rule.init_theta(jax.random.key(0))
    made = ESTIMATORS[estimator](learner, unroll=4, sigma=0.01)
    estimate = jax.jit(made.estimate)
    state = made.init(theta, jax.random.key(1))
    restarts = 0.0
    for i in range(4):
        grad, state, info = estimate(theta, state, jax.random.key(2 + i))
        restarts += float(info.restarts)
        assert jnp.isfinite(info.loss)
    assert 1 <= restarts <= 4
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grad))


@pytest.mark.slow
def test_memory_grows_by_one_network_a_step():
    rule, learner = small_learner()
    theta = rule.init_theta(jax.random.key(0))

    def bytes_of(unroll):
        made = ESTIMATORS["bptt"](learner, unroll=unroll)
        compiled = jax.jit(made.estimate).lower(theta, (), jax.random.key(1)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, most = bytes_of(20), bytes_of(120)
    state = learner.init(theta, jax.random.key(1))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.phi))
    # a network, the few-shot problem's and the batch's keys, the loss: not the activations of a step
    assert held <= (most - few) / 100 < 2 * held + 200


def test_an_episode_draws_its_length_and_activation():
    _, learner = small_learner(activations=("relu", "step"), lengths=(10, 1000), multiple_of=10)
    states = jax.vmap(learner.init, (None, 0))((), jax.random.split(jax.random.key(0), 400))
    lengths = np.asarray(states.num_steps)
    assert set(lengths % 10) == {0}
    assert (lengths.min(), lengths.max()) == (10, 1000) or (lengths.min() < 20 and lengths.max() > 900)
    # log-uniform: half lie below 100; the standard error is 2.5%
    assert abs(np.mean(lengths < 100) - 0.5) < 0.1
    drawn = [unsupervised.ACTIVATIONS[i] for i in np.unique(states.phi.activation)]
    assert sorted(drawn) == ["relu", "step"]
    np.testing.assert_array_equal(learner.remaining(states), lengths)


# --- tasks


def test_letters_hold_no_digit_and_every_one_has_ink():
    images = glyphs(8, per_class=6)
    assert images.shape == (len(LETTERS), 6, 8, 8)
    assert not set(LETTERS) & set("0123456789OIlo")
    assert len(set(LETTERS)) == len(LETTERS)
    assert images.reshape(len(LETTERS), 6, -1).max(axis=-1).min() > 80
    # different letters differ more than the same letter drawn twice
    mean = images.astype(float).mean(axis=1).reshape(len(LETTERS), -1)
    spread = images.reshape(len(LETTERS), 6, -1).std(axis=1).mean()
    assert np.std(mean, axis=0).mean() > 0.5 * spread
    np.testing.assert_array_equal(images, glyphs.__wrapped__(8, per_class=6))


def test_a_task_keeps_its_classes_and_pixel_order():
    family = representation.images("fashion_mnist_small", noise=0.0)
    rows = np.asarray(family.data["rows"])
    key = jax.random.key(0)
    cfg = family.sample(key)
    problem = family.few_shot(family.data, cfg, jax.random.key(1), 3)
    assert problem.support.shape == problem.query.shape == (30, 64)
    np.testing.assert_array_equal(problem.labels, np.repeat(np.arange(10), 3))
    values = problem.query * cfg["sign"] * family.data["std"] + family.data["mean"]
    back = np.round(np.asarray(values)[:, np.argsort(cfg["order"])]).astype(np.uint8)
    for row, label in zip(back, np.asarray(problem.labels), strict=True):
        assert (rows[0, cfg["classes"][label]] == row).all(1).any()
    batch = family.batch(family.data, cfg, jax.random.key(2), 500)
    assert abs(float(batch.mean())) < 0.2
    assert abs(float(batch.std()) - 1) < 0.1


def test_tables_and_suites():
    family = representation.table("wine")
    assert (family.inputs, family.classes) == (13, 3)
    problem = family.few_shot(family.data, family.sample(jax.random.key(0)), jax.random.key(1), 2)
    assert problem.support.shape == (6, 13)
    quiet = representation.table("breast_cancer", noise=0.0)
    problem = quiet.few_shot(quiet.data, quiet.sample(jax.random.key(0)), jax.random.key(1), 200)
    known = {row.tobytes() for row in np.asarray(problem.support)}
    assert len(known) > 100
    assert not known & {row.tobytes() for row in np.asarray(problem.query)}  # judged on rows of their own
    with pytest.raises(representation.DataError, match="no table"):
        representation.table("diabetes")
    with pytest.raises(ValueError, match="unknown suite 'x'"):
        representation.suite("x")
    with pytest.raises(ValueError, match="classes 99"):
        representation.letters(classes=99, per_class=2)


def test_no_suite_holds_the_data_that_the_report_judges_on():
    import inspect

    source = inspect.getsource(representation).partition("_SMALL =")[2]
    for held_out in ("digits", "mnist", "cifar10"):
        assert f'"{held_out}"' not in source


# --- runs


@pytest.fixture
def tiny(monkeypatch):
    entry = FeatureEntry("gaussians", gaussians, (4, 3), ("relu", "tanh"), batch_size=8)
    monkeypatch.setitem(representation.SUITES, "tiny", (entry,))
    return Config(
        rule="unsupervised",
        rule_kwargs={"hidden_size": 4, "signal_size": 2, "channels": 1},
        suite="tiny",
        estimator="pes",  # backpropagation, which the test above has, takes four times as long to compile
        particles=8,
        unroll=2,
        min_length=4,
        max_length=8,
        meta_steps=4,
        checkpoint_every=2,
        log_every=1,
        bench_suite="",
        outer_schedule="constant",
    )


def test_a_run_resumes_exactly_and_its_rule_loads(tiny, tmp_path, monkeypatch):
    quiet = Console(quiet=True)
    whole = loop.run(tiny, tmp_path / "whole", console=quiet)
    steps = loop._steps

    def stopped(state, setup, config, workdir, checkpoints, metrics, stop, console):
        return steps(state, setup, config, workdir, checkpoints, metrics, lambda: True, console)

    monkeypatch.setattr(loop, "_steps", stopped)
    part = loop.run(tiny, tmp_path / "part", console=quiet)
    assert (part.step, part.finished) == (1, False)
    monkeypatch.setattr(loop, "_steps", steps)
    resumed = loop.run(tiny, tmp_path / "part", resume=True, console=quiet)
    assert resumed.finished
    for a, b in zip(jax.tree.leaves(whole.theta), jax.tree.leaves(resumed.theta), strict=True):
        np.testing.assert_array_equal(a, b)
    _, theta, *_ = unsupervised.load(tmp_path / "part" / "rule")
    for a, b in zip(jax.tree.leaves(theta), jax.tree.leaves(whole.theta), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = [json.loads(line) for line in (tmp_path / "part" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all("loss/gaussians" in line for line in lines)


def test_its_suites_are_its_own(tiny):
    with pytest.raises(ConfigError, match="unknown suite 'quick' of feature tasks"):
        loop.set_up(config.replace(tiny, suite="quick"), loop.make_mesh())


def test_on_the_command_line(tmp_path, capsys):
    rule = unsupervised.unsupervised()
    folder = learned_opt.save(tmp_path / "mine", "unsupervised", rule.init_theta(jax.random.key(0)))
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rule"] == "unsupervised"
    assert facts["meta_parameters"] == sum(x.size for x in jax.tree.leaves(rule.init_theta(jax.random.key(0))))
    assert main(["list", "unsupervised", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unsupervised"]["rules"] == ["unsupervised"]
    assert main(["train", "--rule", "unsupervised", "--workdir", str(tmp_path / "run")]) == 2
    assert "is no optimizer" in capsys.readouterr().err
