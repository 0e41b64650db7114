"""The task learner, and backpropagation through it against finite differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import learned_opt
from meta_train.train import estimators
from meta_train.train.learners import MEASURES, SCHEDULES, task_learner
from tasks.base import Task, TaskFamily, only
from tasks.families.networks import log_uniform


def smooth_family(dim=3):
    """Log-cosh regression: no kink, non-trivial curvature."""

    def task(data, cfg):
        def loss(params, key, batch):
            return jnp.mean(jnp.log(jnp.cosh(batch @ params["w"] - cfg))) + 0.1, {}

        return Task(
            init=lambda key: {"w": jax.random.normal(key, (dim,))},
            batch=lambda key, split: jax.random.normal(key, (4, dim)),
            loss=loss,
        )

    return TaskFamily(data=(), sample=jax.random.normal, task=task)


@pytest.mark.parametrize(("estimator", "rule"), [("bptt", "adam"), ("bptt", "celo2"), ("truncated_bptt", "adam")])
def test_backpropagation_equals_finite_differences(estimator, rule):
    with jax.enable_x64(True):
        rule = learned_opt.RULES[rule]()
        # Off the fresh theta, where celo2 has units that stand exactly on the kink of their ReLU.
        rng = np.random.default_rng(0)
        theta = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape)), rule.init(jax.random.key(0)))
        learner = task_learner(rule, smooth_family(), lengths=(20, 20), multiple_of=20)
        made = estimators.ESTIMATORS[estimator](learner, unroll=20)
        state = made.init(theta, jax.random.key(1))
        estimate = jax.jit(lambda theta: made.estimate(theta, state, jax.random.key(2))[::2])
        grad, _ = estimate(theta)
        flat, unravel = jax.flatten_util.ravel_pytree(theta)
        flat_grad = jax.flatten_util.ravel_pytree(grad)[0]
        assert flat.dtype == jnp.float64
        for _ in range(4):
            direction = jnp.asarray(rng.normal(size=flat.shape))
            step = 1e-6
            ends = [estimate(unravel(flat + sign * step * direction))[1].loss for sign in (1, -1)]
            slope = float((ends[0] - ends[1]) / (2 * step))
            expected = float(flat_grad @ direction)
            assert abs(slope - expected) < 1e-5 * max(abs(expected), float(jnp.linalg.norm(flat_grad)))
        assert float(jnp.linalg.norm(flat_grad)) > 1e-6


def test_episodes_are_log_uniform_in_whole_windows():
    learner = task_learner(learned_opt.RULES["sgd"](), smooth_family(), lengths=(100, 1000), multiple_of=50)
    theta = learned_opt.RULES["sgd"]().init(jax.random.key(0))
    states = jax.vmap(learner.init, (None, 0))(theta, jax.random.split(jax.random.key(1), 2000))
    lengths = np.asarray(states.num_steps)
    assert set(lengths % 50) == {0}
    assert lengths.min() == 100
    assert lengths.max() == 1000
    # Half of a log-uniform draw lies below the geometric mean, 316: rounding to 50 keeps that. Standard error 1.1%.
    assert abs(np.mean(lengths <= 316) - 0.5) < 0.05
    assert set(np.asarray(learner.remaining(states)) - lengths) == {0}


def test_log_uniform_covers_its_range():
    draws = np.asarray(jax.vmap(lambda k: log_uniform(k, 1e-3, 1e1))(jax.random.split(jax.random.key(0), 4000)))
    assert 1e-3 <= draws.min() < 1.1e-3
    assert 9 < draws.max() <= 10.0001
    assert abs(np.mean(np.log10(draws)) - -1) < 4 * (4 / np.sqrt(12)) / np.sqrt(4000)


def test_a_loss_that_is_not_finite_counts_as_the_cap_and_does_not_move_the_parameters():
    def task(data, cfg):
        return Task(
            init=lambda key: jnp.ones(()),
            batch=lambda key, split: jnp.zeros(()),
            loss=lambda params, key, batch: (params * jnp.where(params < 1.5, 1.0, jnp.nan), {}),
        )

    family = TaskFamily(data=(), sample=lambda key: (), task=task)
    rule = learned_opt.RULES["sgd"]()
    learner = task_learner(rule, family, lengths=(10, 10), max_loss=7.0)
    theta = rule.init(jax.random.key(0))
    state = learner.init(theta, jax.random.key(1))._replace(params=jnp.asarray(2.0))
    state, loss = learner.step(theta, state, jax.random.key(2))
    assert loss == 7.0
    assert state.params == 2.0


def test_the_logarithm_of_the_loss_as_meta_loss():
    rule, family = learned_opt.RULES["sgd"](), smooth_family()
    theta = rule.init(jax.random.key(0))
    steps = {}
    for name, measure in MEASURES.items():
        learner = task_learner(rule, family, lengths=(10, 10), measure=measure)
        steps[name] = learner.step(theta, learner.init(theta, jax.random.key(1)), jax.random.key(2))[1]
    np.testing.assert_allclose(steps["log"], np.log(steps["relative"] + 0.01), rtol=1e-6)
    assert np.isfinite(MEASURES["log"](jnp.float32(-1.0)))  # a loss may be negative


def test_the_step_size_is_drawn_for_a_rule_that_has_a_free_one():
    rule = learned_opt.RULES["celo2"](hidden_size=2)
    learner = task_learner(rule, smooth_family(), learning_rates=(1e-4, 1e-2))
    theta = rule.init(jax.random.key(0))
    states = jax.vmap(learner.init, (None, 0))(theta, jax.random.split(jax.random.key(1), 50))
    rates = np.asarray(states.learning_rate)
    assert rates.min() < 3e-4
    assert rates.max() > 3e-3
    fixed = task_learner(rule, smooth_family()).init(theta, jax.random.key(1))
    np.testing.assert_allclose(fixed.learning_rate, rule.learning_rate, rtol=1e-6)


def test_the_step_size_follows_its_schedule_over_the_episode():
    rule = learned_opt.RULES["sgd"](learning_rate=1.0)
    line = Task(lambda key: jnp.ones(()), lambda key, split: (), lambda params, key, batch: (params, {}))
    family = only(line)
    learner = task_learner(rule, family, lengths=(4, 4), schedule=SCHEDULES["cosine"])
    theta = rule.init(jax.random.key(0))
    state, moved = learner.init(theta, jax.random.key(1)), []
    for _ in range(4):
        before, (state, _) = state.params, learner.step(theta, state, jax.random.key(2))
        moved.append(float(before - state.params))
    np.testing.assert_allclose(moved, [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2], rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_episodes_whose_length_is_told(share):
    """A rule whose update is the length that it is told."""

    def build(theta, num_steps=None):
        del theta
        fill = optax.stateless(lambda grads, params: jax.tree.map(lambda g: jnp.full_like(g, num_steps), grads))
        return optax.with_extra_args_support(fill)

    stub = learned_opt.LearnedOptimizer(lambda key: (), build)
    family = smooth_family()

    def task(data, cfg):  # all episodes begin with the same loss
        return family.task(data, cfg)._replace(loss=lambda params, key, batch: (1 + 0 * jnp.sum(params["w"]), {}))

    learner = task_learner(stub, family._replace(task=task), lengths=(10, 10), told_length=share)

    def told(key):
        start = learner.init((), key)
        once, _ = learner.step((), start, key)
        twice, _ = learner.step((), once, jax.random.fold_in(key, 1))
        return once.params["w"] - start.params["w"], twice.params["w"] - once.params["w"]

    first, second = jax.jit(jax.vmap(told))(jax.random.split(jax.random.key(0), 400))
    np.testing.assert_allclose(first, second, atol=1e-4)  # the same all through an episode
    np.testing.assert_allclose(np.mean(first) / 10, share, atol=4 * np.sqrt(share * (1 - share) / 400) + 1e-5)
    assert set(np.unique(np.round(first))) <= {0.0, 10.0}


def losses_of_an_episode(**settings):
    """The meta-losses of ten steps on a task whose loss is 2 on batches for training and 3 on others."""
    sgd = learned_opt.RULES["sgd"]()
    batch = {"train": 2.0, "valid": 3.0}
    task = Task(
        lambda key: jnp.ones(()), lambda key, split: batch[split], lambda params, key, batch: (batch + 0 * params, {})
    )
    learner, theta = task_learner(sgd, only(task), lengths=(10, 10), **settings), sgd.init(jax.random.key(0))

    def step(state, key):
        return learner.step(theta, state, key)

    return jax.lax.scan(step, learner.init(theta, jax.random.key(1)), jax.random.split(jax.random.key(2), 10))[1]


def test_the_split_that_a_rule_is_judged_on():
    np.testing.assert_allclose(losses_of_an_episode(), np.ones(10))
    np.testing.assert_allclose(losses_of_an_episode(judged_on="valid"), np.full(10, 1.5))


def test_what_is_judged_of_an_episode_weighs_as_much_as_the_whole():
    np.testing.assert_allclose(losses_of_an_episode(judged_from=0.6), [0.0] * 6 + [2.5] * 4, rtol=1e-6)
