"""The estimators against the exact gradient of a linear unroll, whose loss is quadratic in theta.

x_{t+1} = rho x_t + theta, L_t = |x_{t+1} - target|^2 / 2, x_0 = 0: Gaussian smoothing leaves the gradient of a
quadratic alone, so the evolution strategies must match it in the mean, within their standard error.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_train.train import estimators
from meta_train.train.learners import Learner

RHO, DIM, UNROLL, WINDOWS, PARTICLES = 0.9, 3, 5, 8, 4096
TARGET = jnp.array([1.0, -2.0, 0.5])
THETA = {"a": jnp.array([0.3, 0.1]), "b": jnp.array([-0.2])}


def _flat(theta):
    return jnp.concatenate([theta["a"], theta["b"]])


LINEAR = Learner(
    init=lambda theta, key: jnp.zeros(DIM),
    step=lambda theta, x, key: (
        RHO * x + _flat(theta),
        0.5 * jnp.sum((RHO * x + _flat(theta) - TARGET) ** 2),
    ),
)


def exact_gradient(steps, window=None):
    """Of the mean loss; with ``window``, what an estimator sees that takes each window's start for given."""
    theta, total = np.asarray(_flat(THETA), np.float64), np.zeros(DIM)
    x = np.zeros(DIM)
    for t in range(steps):
        x = RHO * x + theta
        since = t if window is None else t % window
        total += (1 - RHO ** (since + 1)) / (1 - RHO) * (x - np.asarray(TARGET))
    return total / steps


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def episode(estimator, windows, particles, key):
    """Per particle and window of an episode, the gradient [particles, windows, dim] and the loss."""

    def particle(key):
        k_init, k_steps = jax.random.split(key)

        def window(state, k):
            grad, state, info = estimator.estimate(THETA, state, k)
            return state, (_flat(grad), info.loss)

        _, (grads, losses) = jax.lax.scan(window, estimator.init(THETA, k_init), jax.random.split(k_steps, windows))
        return grads, losses

    return jax.vmap(particle)(jax.random.split(key, particles))


def estimate(estimator, windows, seed=0):
    grads, _ = episode(estimator, windows, PARTICLES, jax.random.key(seed))
    grads = np.asarray(grads, np.float64).mean(axis=1)
    return grads.mean(axis=0), grads.std(axis=0, ddof=1) / np.sqrt(PARTICLES)


def test_es_matches_the_exact_gradient():
    mean, error = estimate(estimators.es(LINEAR, unroll=UNROLL, sigma=0.1), 1)
    truth = exact_gradient(UNROLL)
    assert np.all(np.abs(mean - truth) < 4 * error)
    assert np.all(error < 0.1 * np.linalg.norm(truth))  # the check could fail


@pytest.mark.parametrize("make", [estimators.pes, estimators.nres])
def test_unbiased_over_an_episode(make):
    mean, error = estimate(make(LINEAR, unroll=UNROLL, sigma=0.1), WINDOWS)
    truth = exact_gradient(UNROLL * WINDOWS)
    assert np.all(np.abs(mean - truth) < 4 * error)
    assert np.all(error < 0.1 * np.linalg.norm(truth))


def test_truncated_es_is_biased_as_predicted_where_pes_is_not():
    mean, error = estimate(estimators.truncated_es(LINEAR, unroll=UNROLL, sigma=0.1), WINDOWS)
    truth, truncated = exact_gradient(UNROLL * WINDOWS), exact_gradient(UNROLL * WINDOWS, window=UNROLL)
    assert np.all(np.abs(mean - truncated) < 4 * error)
    assert np.max(np.abs(mean - truth) / error) > 10


def test_nres_has_less_variance_than_pes_on_a_long_episode():
    # Of the estimate of one window at a random age, which is what a staggered particle gives a meta-step.
    variances = []
    for make in (estimators.nres, estimators.pes):
        grads, _ = episode(make(LINEAR, unroll=UNROLL, sigma=0.1), 40, 256, jax.random.key(0))
        variances.append(np.asarray(grads).reshape(-1, DIM).var(axis=0).sum())
    # 256 independent episodes: each variance's relative standard error is below sqrt(2 / 256) = 9%.
    assert variances[0] < 0.5 * variances[1]


def test_bptt_is_exact():
    grads, losses = episode(estimators.bptt(LINEAR, unroll=UNROLL), 1, 2, jax.random.key(0))
    np.testing.assert_allclose(grads[0, 0], exact_gradient(UNROLL), rtol=1e-5)
    assert losses.shape == (2, 1)


def test_truncated_bptt_stops_at_the_window():
    grads, _ = episode(estimators.truncated_bptt(LINEAR, unroll=UNROLL), WINDOWS, 1, jax.random.key(0))
    np.testing.assert_allclose(grads[0].mean(axis=0), exact_gradient(UNROLL * WINDOWS, window=UNROLL), rtol=1e-5)


# --- episodes

LENGTH = 20
COUNTING = Learner(  # the state is (steps taken, the episode's draw); the loss says how old the episode is
    init=lambda theta, key: (jnp.zeros((), jnp.int32), jax.random.uniform(key)),
    step=lambda theta, state, key: ((state[0] + 1, state[1]), state[0].astype(jnp.float32) + 0 * _flat(theta).sum()),
    remaining=lambda state: LENGTH - state[0],
)


@pytest.mark.parametrize("name", ["truncated_bptt", "truncated_es", "pes", "nres"])
def test_episodes_end_and_are_staggered(name):
    estimator = estimators.ESTIMATORS[name](COUNTING, unroll=UNROLL, sigma=0.1)
    particles, windows = 64, 12

    def particle(key):
        state = estimator.init(THETA, key)
        keys = jax.random.split(jax.random.fold_in(key, 1), windows)

        def window(state, k):
            _, state, info = estimator.estimate(THETA, state, k)
            return state, (info.restarts, info.loss)

        return jax.lax.scan(window, state, keys)[1]

    restarts, losses = jax.jit(jax.vmap(particle))(jax.random.split(jax.random.key(0), particles))
    restarts, ages = np.asarray(restarts), np.asarray(losses) - (UNROLL - 1) / 2
    assert np.all(restarts[:, 0] == 1)
    assert np.all(ages[restarts == 1] == 0)
    assert ages.max() == LENGTH - UNROLL  # never past the end
    # Every window count of the first episode occurs; afterwards every episode is whole.
    second = [1 + int(np.argmax(row[1:])) for row in restarts]
    assert set(second) == {1, 2, 3, 4}
    for row, start in zip(restarts, second, strict=True):
        assert np.all(np.flatnonzero(row[start:]) % (LENGTH // UNROLL) == 0)


def test_pes_forgets_the_noise_of_the_episode_before():
    estimator = estimators.pes(COUNTING, unroll=LENGTH, sigma=0.1)  # each window a whole episode
    start = estimator.init(THETA, jax.random.key(0))
    _, once, _ = estimator.estimate(THETA, start, jax.random.key(2))
    _, before, _ = estimator.estimate(THETA, start, jax.random.key(1))
    _, twice, _ = estimator.estimate(THETA, before, jax.random.key(2))
    np.testing.assert_array_equal(once.noise, twice.noise)


def test_the_halves_share_batches_and_start():
    noisy = Learner(
        init=lambda theta, key: jax.random.normal(key, (DIM,)),
        step=lambda theta, x, key: (x, jnp.sum(x) + jax.random.normal(key)),
    )
    for name in ("es", "pes", "nres", "truncated_es"):
        estimator = estimators.ESTIMATORS[name](noisy, unroll=UNROLL, sigma=0.1)
        grad, _, _ = estimator.estimate(THETA, estimator.init(THETA, jax.random.key(0)), jax.random.key(1))
        np.testing.assert_array_equal(_flat(grad), 0)  # the loss does not depend on theta: no difference at all
