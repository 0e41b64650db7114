"""The trainer on one to eight devices: the same trajectory, one all-reduce, honest guards."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import learned_opt
from meta_train.train import estimators
from meta_train.train.learners import Learner, task_learner
from meta_train.train.trainer import make_mesh, make_trainer, place
from tasks.families.synthetic import quadratic
from tasks.families.vision import image_mlp

PARTICLES = 8
CELO2, ADAM = learned_opt.RULES["celo2"](hidden_size=2), learned_opt.RULES["adam"]()
QUADRATIC, IMAGES = quadratic(dim=4), image_mlp("fashion_mnist_small", width=4, batch_size=8)


def build(devices, rule=ADAM, families=(QUADRATIC, IMAGES), particles=PARTICLES):
    mesh = make_mesh(jax.devices()[:devices])

    def estimators_of(data):
        for family, held in zip(families, data, strict=True):
            learner = task_learner(rule, family._replace(data=held), lengths=(100, 400), multiple_of=50)
            yield estimators.pes(learner, unroll=50)  # as `learned-opt train`

    trainer = make_trainer(
        rule.init, lambda data: list(estimators_of(data)), optax.adam(1e-3), particles=particles, mesh=mesh
    )
    return trainer, place(tuple(family.data for family in families), mesh)


@functools.cache
def trainer_of_celo2(devices):
    return build(devices, CELO2, (QUADRATIC,))


@functools.cache
def first_gradient(devices, seed):
    trainer, data = trainer_of_celo2(devices)
    state, _ = trainer.meta_step(trainer.init(jax.random.PRNGKey(seed), data), data)
    return _flat(state.outer_state[0].mu) / 0.1  # Adam's first momentum is a tenth of the gradient


@functools.cache
def trajectory(devices, steps=20):
    trainer, data = trainer_of_celo2(devices)
    state = trainer.init(jax.random.PRNGKey(0), data)
    start, norms = _flat(state.theta), []
    for _ in range(steps):
        state, info = trainer.meta_step(state, data)
        norms.append(float(info.gradient_norm))
    return start, _flat(state.theta), norms, state


def _flat(theta):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(theta)])


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_any_number_of_devices_computes_the_same_trajectory(devices):
    start, last, _, _ = trajectory(1)
    start_n, last_n, _, _ = trajectory(devices)
    np.testing.assert_array_equal(start, start_n)
    assert np.linalg.norm(last - last_n) < 0.01 * np.linalg.norm(last - start)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_any_number_of_devices_computes_the_same_first_gradient(devices):
    for seed in range(8):
        first, first_n = first_gradient(1, seed), first_gradient(devices, seed)
        assert np.linalg.norm(first - first_n) < 1e-4 * np.linalg.norm(first), seed


def test_theta_moves_and_particles_differ():
    start, last, norms, state = trajectory(1)
    assert np.linalg.norm(last - start) > 1e-3
    assert min(norms) > 0
    assert len(set(norms)) == len(norms)
    lengths = np.asarray(state.particles[0].learner.num_steps)[:, 0]
    assert len(set(lengths.tolist())) > 1
    np.testing.assert_array_equal(lengths % 50, 0)


def test_the_compiled_step_holds_one_all_reduce_of_the_size_of_theta():
    trainer, data = build(4)
    state = trainer.init(jax.random.PRNGKey(0), data)
    hlo = trainer.meta_step.lower(state, data).compile().as_text()
    collectives = re.findall(
        r"= (\S+) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", hlo
    )
    size = _flat(state.theta).size
    told = 2 * 3  # what the log wants of either family
    assert [kind for _, kind in collectives] == ["all-reduce"], collectives
    assert collectives[0][0].startswith(f"f32[{size + told}]"), collectives


def test_data_sets_are_arguments_not_constants():
    trainer, data = build(1)
    state = jax.eval_shape(trainer.init, jax.random.PRNGKey(0), data)
    jaxpr = jax.make_jaxpr(trainer.meta_step)(state, data)

    def constants(jaxpr):
        found = [np.size(c) for c in getattr(jaxpr, "consts", [])]
        for equation in jaxpr.eqns:
            for value in equation.params.values():
                if hasattr(value, "eqns"):
                    found += constants(value)
                elif hasattr(value, "jaxpr"):
                    found += [np.size(c) for c in value.consts] + constants(value.jaxpr)
        return found

    assert max(constants(jaxpr), default=0) < 2000


def test_devices_must_divide_the_particles():
    with pytest.raises(ValueError, match="multiple of the number of devices"):
        build(4, particles=6)


def one_meta_step(learner, theta, particles):
    """By plain descent at rate 1, on a scalar."""
    trainer = make_trainer(
        lambda key: jnp.asarray(theta),
        lambda data: [estimators.bptt(learner, unroll=1)],
        optax.sgd(1.0),
        particles=particles,
        mesh=make_mesh(jax.devices()[:2]),
    )
    return trainer.meta_step(trainer.init(jax.random.PRNGKey(1), ()), ())


def test_a_particle_whose_gradient_is_not_finite_counts_as_zero():
    # The odd draws give a NaN loss, the others the slope 1.
    learner = Learner(
        init=lambda theta, key: jax.random.bernoulli(key),
        step=lambda theta, bad, key: (bad, theta * jnp.where(bad, jnp.nan, 1.0)),
    )
    state, info = one_meta_step(learner, 0.0, particles=64)
    assert 0.2 < info.dropped < 0.8
    np.testing.assert_allclose(state.theta, -(1 - info.dropped), rtol=1e-6)


def test_a_step_that_loses_every_particle_has_no_loss():
    learner = Learner(init=lambda theta, key: (), step=lambda theta, state, key: (state, theta * jnp.nan))
    state, info = one_meta_step(learner, 1.0, particles=2)
    assert np.isnan(info.loss)
    assert float(info.dropped) == 1
    assert float(state.theta) == 1


def test_meta_training_improves_a_learning_rate():
    # SGD on quadratics of condition 1..2, from a rate 30 times too small.
    rule = learned_opt.RULES["sgd"]()
    theta = jax.tree.map(lambda x: jnp.full_like(x, jnp.log(0.01)), rule.init(jax.random.key(0)))
    family = quadratic(dim=4, condition=(1.0, 2.0))

    def estimators_of(data):
        return [estimators.pes(task_learner(rule, family, lengths=(10, 10), multiple_of=5), unroll=5, sigma=0.1)]

    trainer = make_trainer(
        lambda key: theta, estimators_of, optax.adam(0.1), particles=16, mesh=make_mesh(jax.devices()[:1])
    )
    state = trainer.init(jax.random.PRNGKey(0), ())
    losses = []
    for _ in range(60):
        state, info = trainer.meta_step(state, ())
        losses.append(float(info.loss))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
