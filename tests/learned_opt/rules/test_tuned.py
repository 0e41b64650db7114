"""Learned hyperparameters: the updates are Optax's at the same values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt.rules import RULES
from learned_opt.rules.tuned import hyperparameters

OPTAX = {"sgd": optax.sgd, "sgdm": optax.sgd, "adam": optax.adam, "nadamw": optax.nadamw}


@pytest.mark.parametrize("name", OPTAX)
def test_updates_are_optax_s_at_equal_values(name):
    rule = RULES[name]()
    theta = jax.tree.map(lambda x: x + 0.3, rule.init(jax.random.key(0)))
    values = {k: float(v) for k, v in hyperparameters(theta).items()}
    ours, theirs = rule.build(theta), OPTAX[name](**values)
    params = {"w": jnp.linspace(-1, 1, 12).reshape(3, 4), "b": jnp.ones(4)}
    state, other = ours.init(params), theirs.init(params)
    for i in range(5):
        g = jax.tree.map(lambda x, i=i: jnp.sin(3 * x + i), params)
        u, state = jax.jit(ours.update)(g, state, params)
        v, other = jax.jit(theirs.update)(g, other, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-9), u, v)
        params = optax.apply_updates(params, u)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("sgd", {"learning_rate": 0.3}),
        ("sgdm", {"learning_rate": 0.2, "momentum": 0.8}),
        ("adam", {"learning_rate": 0.02, "b1": 0.8, "b2": 0.95, "eps": 1e-6}),
        ("nadamw", {"learning_rate": 0.02, "b1": 0.8, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.1}),
    ],
)
def test_meta_training_starts_from_the_given_values(name, start):
    values = hyperparameters(RULES[name](**start).init(jax.random.key(0)))
    assert values.keys() == start.keys()
    np.testing.assert_allclose([values[k] for k in start], list(start.values()), rtol=1e-5)
