"""The learned Nesterov step of local SGD: fresh it is Nesterov's, it has no unit, and its numbers are bounded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import learned_opt

RULE = learned_opt.RULES["outer_nesterov"]()
THETA = RULE.init(jax.random.key(0))
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.ones(3)}


def deltas(seed):
    keys = jax.random.split(jax.random.key(seed), len(PARAMS))
    return {name: jax.random.normal(key, PARAMS[name].shape) for name, key in zip(PARAMS, keys, strict=True)}


def run(transform, scale=1.0, rounds=4):
    """The updates of some rounds; deltas and parameters in other units."""
    params = jax.tree.map(lambda p: scale * p, PARAMS)
    state, found = transform.init(params), []
    for seed in range(rounds):
        updates, state = transform.update(jax.tree.map(lambda d: scale * d, deltas(seed)), state, params)
        found.append(updates)
    return found


def trained():
    """A network that says something."""
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), THETA)


def test_fresh_it_is_nesterov():
    found = run(RULE.build(THETA, num_steps=4))
    wanted = run(optax.sgd(0.7, momentum=0.6, nesterov=True))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, wanted)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_it_is_in_the_unit_of_the_deltas(scale):
    found, wanted = (run(RULE.build(trained(), num_steps=4), s) for s in (scale, 1.0))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, scale * y, rtol=1e-4, atol=1e-6 * scale), found, wanted)
    plain = run(optax.sgd(0.7, momentum=0.6, nesterov=True))
    assert not np.allclose(wanted[-1]["w"], plain[-1]["w"], rtol=0.05)


def test_no_network_takes_it_further_than_its_bounds():
    wild = jax.tree.map(lambda x: 1e3 * x, trained())
    first = run(RULE.build(wild), rounds=1)[0]
    for name, delta in deltas(0).items():
        factors = -first[name] / delta  # rate (1 + momentum)
        assert np.ptp(factors) < 1e-4
        assert 0.7 / 4 < factors.mean() < 0.7 * 4 * 1.92


@pytest.mark.parametrize("mistake", [{"learning_rate": 0.0}, {"momentum": 1.0}, {"hidden_size": 0}])
def test_mistakes(mistake):
    with pytest.raises(ValueError, match="outer_nesterov needs"):
        learned_opt.RULES["outer_nesterov"](**mistake)
