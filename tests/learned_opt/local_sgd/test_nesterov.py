"""Nesterov's outer step with another added: the sum of the two, its cut, and both inside local SGD."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import learned_opt
from learned_opt.local_sgd import add_nesterov, lookahead

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.ones(3)}


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("rate", [0.01, 100.0])
def test_it_is_the_sum_of_nesterov_s_step_and_a_share_of_the_other_cut_to_its_length(share, rate):
    outer = optax.adam(rate)
    tx, plain = add_nesterov(outer, share=share), optax.sgd(0.7, momentum=0.6, nesterov=True)
    states = tx.init(PARAMS), plain.init(PARAMS), outer.init(PARAMS)
    for seed in range(3):
        delta = jax.tree.map(lambda p, seed=seed: jax.random.normal(jax.random.key(seed), p.shape), PARAMS)
        found, mine = tx.update(delta, states[0], PARAMS)
        (x, first), (y, second) = plain.update(delta, states[1], PARAMS), outer.update(delta, states[2], PARAMS)
        states = mine, first, second
        for name, cut in ((name, min(1, np.linalg.norm(x[name]) / np.linalg.norm(y[name]))) for name in PARAMS):
            assert (cut < 1) == (rate > 1)
            np.testing.assert_allclose(found[name], x[name] + share * cut * y[name], rtol=1e-5, atol=1e-6)


def test_a_delta_of_zero_has_a_derivative():
    tx = add_nesterov(optax.sgd(1.0))
    zero = jnp.zeros(3)
    slope = jax.grad(lambda d: jnp.sum(tx.update(d, tx.init(zero))[0]))(zero)
    assert np.all(np.isfinite(slope))


def test_the_loss_reaches_the_other_step():
    class SeenError(Exception): ...

    def update(updates, state, params=None, *, value, **extra):
        raise SeenError(value)

    tx = add_nesterov(optax.GradientTransformationExtraArgs(lambda params: (), update))
    with pytest.raises(SeenError, match="3"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=3)


def test_with_the_learned_step_inside_local_sgd():
    tx = lookahead(optax.sgd(0.1), add_nesterov(learned_opt.load("outer", num_steps=2)), every=2)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(4):
        updates, state = tx.update(params, state, params, value=0.0)
        params = optax.apply_updates(params, updates)
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(params))
    assert int(state.round) == 2
    assert optax.tree.norm(params) < optax.tree.norm(PARAMS)


@pytest.mark.parametrize("size", [0.0, 1e-4])
def test_small_deltas_in_half_precision_are_steps(size):
    tx, params = add_nesterov(optax.sgd(1.0)), jnp.ones(3, jnp.float16)
    updates, _ = tx.update(jnp.full(3, size, jnp.float16), tx.init(params), params)
    assert updates.dtype == jnp.float16
    assert np.all(np.isfinite(updates))
