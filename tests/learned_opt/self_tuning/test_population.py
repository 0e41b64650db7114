"""Population-based training: draws, exploitation, exploration, and a run that finds the optimum of ridge regression."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt import self_tuning as st

N, D, KEY = 12, 4, jax.random.key(0)
RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(2, N, D)), RNG.normal(size=D)
T = X @ W + 0.8 * RNG.normal(size=(2, N))
DATA = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ((X[0], T[0]), (X[1], T[1])))
SPECS = {"l2": st.log(0.5, 1e-4, 1e2)}


def valid_loss(w, batch):
    return jnp.mean(0.5 * (batch[0] @ w - batch[1]) ** 2)


def train_loss(w, hparams, key, batch):
    return valid_loss(w, batch) + 0.5 * jnp.mean(hparams["l2"]) * st.squared_norm(w)


def made(specs=SPECS, **options):
    options = {"weights": optax.adam(0.05), "members": 8, "train_steps": 40} | options
    return st.population(specs, train_loss, valid_loss, lambda d, k: d[0], lambda d, k: d[1], **options)


def test_draws_are_uniform_on_the_scale_of_the_hyperparameter():
    specs = {"a": st.log(1.0, 1e-2, 1e2), "b": st.interval(1.0, 0.0, 4.0), "c": st.logit(0.5, tuned=False)}
    points = jax.vmap(lambda key: st.draw(specs, key))(jax.random.split(KEY, 4000))
    found = jax.vmap(lambda point: st.values(specs, point))(points)
    for share, edge in ((0.25, 1e-1), (0.5, 1.0), (0.75, 10.0)):
        assert abs(float(jnp.mean(found["a"] < edge)) - share) < 4 * np.sqrt(share * (1 - share) / 4000) + 0.01
        assert abs(float(jnp.mean(found["b"] < 4 * share)) - share) < 4 * np.sqrt(share * (1 - share) / 4000) + 0.01
    assert np.all(np.abs(points) <= 5)
    with pytest.raises(ValueError, match="l2 has no bounds"):
        st.draw({"l2": st.log(1.0)}, KEY)


def test_the_worst_take_over_from_the_best_and_the_rest_go_on():
    population = made(explore=0.1, resample=0.0)
    state = population.init(KEY, lambda key: jnp.zeros(D))
    after, info = population.run(state, KEY, DATA, 1)
    order = np.argsort(info.valid_loss[0])
    parent = np.asarray(info.parent[0])
    assert set(parent[order[-2:]]) <= set(order[:2])
    np.testing.assert_array_equal(parent[order[:-2]], order[:-2])
    np.testing.assert_array_equal(after.params[order[-1]], after.params[parent[order[-1]]])
    np.testing.assert_array_equal(after.mean[order[:-2]], state.mean[order[:-2]])
    step = np.abs(after.mean[order[-2:]] - state.mean[parent[order[-2:]]])
    assert np.all((step > 0) & (step < 0.6))
    assert np.all(np.isinf(after.valid_loss[order[-2:]]))  # of weights that other hyperparameters trained
    params, mean = population.best(after)
    np.testing.assert_array_equal(params, after.params[order[0]])
    np.testing.assert_array_equal(mean, after.mean[order[0]])


def test_a_member_at_rest_trains_as_a_replay_at_its_hyperparameters():
    population = made(members=2, train_steps=20)
    state = population.init(KEY, lambda key: jax.random.normal(key, (D,)))
    _, info = population.run(state, KEY, DATA, 1)
    for member in range(2):
        schedule = st.constant(SPECS, state.mean[member])
        replay = st.replay(schedule, train_loss, lambda d, k: d[0], optax.adam(0.05))
        _, losses = replay.run(replay.init(state.params[member]), KEY, DATA, 20)
        np.testing.assert_allclose(losses.mean(), info.train_loss[0, member], rtol=1e-5)


def test_it_finds_the_optimum_of_ridge_and_resumes():
    grid = np.linspace(-9, 4, 2000)
    A, b = X[0].T @ X[0] / N, X[0].T @ T[0] / N
    losses = [np.mean((X[1] @ np.linalg.solve(A + np.exp(level) * np.eye(D), b) - T[1]) ** 2) / 2 for level in grid]
    population = made()
    state = population.init(KEY, lambda key: jnp.zeros(D))
    whole, info = population.run(state, KEY, DATA, 20)
    half, _ = population.run(state, KEY, DATA, 10)
    again, _ = population.run(half, KEY, DATA, 10)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert float(whole.valid_loss.min()) < 1.02 * min(losses)
    assert np.median(info.valid_loss[-1]) < np.median(info.valid_loss[0])


def test_diverged_members_are_replaced():
    specs = {"l2": st.log(0.01, 1e-4, 1e-1), "rate": st.log(0.1, 1e-4, 1e4, by="hypergradient")}
    population = made(specs, weights=lambda h: optax.sgd(h["rate"]), members=8, resample=0.0, explore=0.0, replaced=0.5)
    state = population.init(KEY, lambda key: jnp.zeros(D))
    after, info = population.run(state, KEY, DATA, 4)
    assert not np.all(np.isfinite(info.valid_loss[0]))
    assert np.all(np.isfinite(population.best(after)[0]))
    assert np.sum(np.isfinite(info.valid_loss[-1])) > np.sum(np.isfinite(info.valid_loss[0]))


def test_mistakes_are_named():
    for options, told in (
        ({"members": 1}, "members"),
        ({"train_steps": 0}, "train_steps"),
        ({"replaced": 0.7}, "replaced"),
        ({"resample": 2.0}, "resample"),
    ):
        with pytest.raises(ValueError, match=told):
            made(**options)


def test_no_member_of_the_best_share_is_replaced():
    population = made(members=3, replaced=0.5)
    _, info = population.run(population.init(KEY, lambda key: jnp.zeros(D)), KEY, DATA, 5)
    assert np.all(np.sum(np.asarray(info.parent) != np.arange(3), axis=1) <= 1)
