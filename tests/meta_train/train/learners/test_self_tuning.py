"""A learned rule inside a self-tuning network: the meta-gradient through the hyperparameters' response."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.problems import ridge

import learned_opt
from meta_train.train import estimators
from meta_train.train.learners.self_tuning import self_tuning_learner
from meta_train.train.trainer import make_mesh, make_trainer

OPTIONS = {"hyper": optax.adam(0.1), "response": optax.sgd(0.2), "train_steps": 3}


def test_the_meta_gradient_equals_finite_differences_and_needs_the_response():
    with jax.enable_x64(True):
        problem, rule = ridge(), learned_opt.RULES["adam"](learning_rate=0.05)
        theta = jax.tree.map(lambda x: x.astype(jnp.float64), rule.init(jax.random.key(0)))

        def meta_loss(theta, **options):
            learner = self_tuning_learner(rule, problem, problem.data, cycles=(8, 8), **(OPTIONS | options))
            state = learner.init(theta, jax.random.key(1))
            keys = jax.random.split(jax.random.key(2), 8)
            return jnp.mean(jax.lax.scan(lambda s, k: learner.step(theta, s, k), state, keys)[1])

        gradient = jax.jit(jax.grad(meta_loss))(theta)
        value = jax.jit(meta_loss)
        for name in theta:
            for size in (1e-5, 3e-6):
                up, down = (value(theta | {name: theta[name] + sign * size}) for sign in (1, -1))
                np.testing.assert_allclose(gradient[name], (up - down) / (2 * size), rtol=2e-4, atol=1e-9)
        # held hyperparameters give another gradient: this one does run through them
        held = jax.jit(jax.grad(lambda theta: meta_loss(theta, hyper=optax.sgd(0.0))))(theta)
        assert abs(held["log_learning_rate"] / gradient["log_learning_rate"] - 1) > 1e-3


@pytest.mark.parametrize("estimator", ["bptt", "pes"])
def test_a_short_meta_training_improves_on_its_start(estimator):
    problem, rule = ridge(), learned_opt.RULES["sgd"](learning_rate=0.01)
    unroll = 10 if estimator == "bptt" else 5

    def build(data):
        learner = self_tuning_learner(rule, problem, data, cycles=(10, 10), **OPTIONS)
        return [estimators.ESTIMATORS[estimator](learner, unroll=unroll, sigma=0.1)]

    trainer = make_trainer(rule.init, build, optax.adam(0.1), particles=8, mesh=make_mesh(jax.devices()[:1]))
    state = trainer.init(jax.random.key(0), problem.data)
    learner = self_tuning_learner(rule, problem, problem.data, cycles=(10, 10), **OPTIONS)

    @jax.jit
    def judged(theta):
        """Mean final validation loss over 16 starts."""

        def run(key):
            k_init, k_run = jax.random.split(key)
            steps = jax.random.split(k_run, 10)
            return jax.lax.scan(lambda s, k: learner.step(theta, s, k), learner.init(theta, k_init), steps)[1][-1]

        return jnp.mean(jax.vmap(run)(jax.random.split(jax.random.key(9), 16)))

    before = judged(state.theta)
    for _ in range(25):
        state, _ = trainer.meta_step(state, problem.data)
    assert judged(state.theta) < 0.7 * before


def test_rates_and_lengths_in_whole_windows_are_drawn():
    problem, rule = ridge(), learned_opt.RULES["sgd"](learning_rate=0.01)
    drawn = {"cycles": (5, 40), "multiple_of": 5, "learning_rates": (0.1, 1.0)}
    learner = self_tuning_learner(rule, problem, problem.data, **drawn, **OPTIONS)
    keys = jax.random.split(jax.random.key(0), 100)
    states = jax.vmap(learner.init, (None, 0))(rule.init(keys[0]), keys)
    assert set(np.asarray(states.cycles)) == {5, 10, 15, 20, 25, 30, 35, 40}
    np.testing.assert_array_equal(jax.vmap(learner.remaining)(states), states.cycles)
    assert 0.1 <= states.learning_rate.min() < 0.15
    assert 0.7 < states.learning_rate.max() <= 1.0
