"""Draws with fast keys: those of JAX's own generator, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meta_train.train.keys import fast

DRAWS = {
    "normal": lambda key: jax.random.normal(key, (7, 3)),
    "uniform": jax.random.uniform,
    "bits of 8": lambda key: jax.random.bits(key, (5,), jnp.uint8),
    "bits of 16": lambda key: jax.random.bits(key, (5,), jnp.uint16),
    "nothing": lambda key: jax.random.normal(key, (0,)),
    "integers": lambda key: jax.random.randint(key, (4,), 0, 1000),
    "permutation": lambda key: jax.random.permutation(key, 9),
    "split": lambda key: jax.random.key_data(jax.random.split(key, (3, 2))),
    "fold_in": lambda key: jax.random.key_data(jax.random.fold_in(key, 2**31 - 1)),
    "lanes": lambda key: jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 3), (2,)))(
        jax.random.split(key, 5)
    ),
}
COMPILED = {name: jax.jit(draw) for name, draw in DRAWS.items()}


@pytest.mark.parametrize("name", DRAWS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_draws_are_those_of_jax(name, seed):
    key = jax.random.key(seed)
    np.testing.assert_array_equal(COMPILED[name](fast(key)), COMPILED[name](key))
    np.testing.assert_array_equal(COMPILED[name](fast(jax.random.PRNGKey(seed))), COMPILED[name](key))


def test_draws_of_64_bits():
    with jax.enable_x64(True):
        key = jax.random.key(3)
        np.testing.assert_array_equal(jax.random.normal(fast(key), (5,)), jax.random.normal(key, (5,)))


def test_keys_of_other_generators_stay_what_they_are():
    key = jax.random.key(3, impl="rbg")
    assert fast(key) is key
