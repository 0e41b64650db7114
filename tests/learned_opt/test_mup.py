"""Width multipliers: closed forms, under every rule, and the coordinate check of Yang et al. 2022."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.rules import SHORT_BY_DEFAULT, small

from learned_opt import mup
from learned_opt.layouts import outputs_first
from learned_opt.rules import RULES


def shapes(width):
    return {
        "embedding": (100, width),
        "conv": {"w": (3, 3, width, 2 * width), "b": (2 * width,)},
        "hidden": (width, 4 * width),
        "gain": (width,),
        "temperature": (),
        "out": (4 * width, 10),
    }


def arrays(width):
    return jax.tree.map(jnp.ones, shapes(width), is_leaf=lambda x: isinstance(x, tuple))


def test_multipliers_are_those_of_the_table():
    expected = {
        "embedding": 1,
        "conv": {"w": 1 / 8, "b": 1},
        "hidden": 1 / 8,
        "gain": 1,
        "temperature": 1,
        "out": 1 / 8,
    }
    assert mup.width_multipliers(arrays(32), jax.eval_shape(lambda: arrays(4))) == expected
    assert jax.tree.leaves(mup.width_multipliers(arrays(4), arrays(4))) == [1.0] * 7


def test_the_fan_in_is_the_layout_s():
    attention = {"query": {"kernel": jnp.zeros((64, 8, 8))}, "out": {"kernel": jnp.zeros((8, 8, 64))}}
    base = {"query": {"kernel": jnp.zeros((16, 2, 8))}, "out": {"kernel": jnp.zeros((2, 8, 16))}}
    assert jax.tree.leaves(mup.width_multipliers(attention, base)) == [0.25, 0.25]
    wide, narrow = {"weight": jnp.zeros((10, 64))}, {"weight": jnp.zeros((10, 16))}
    assert mup.width_multipliers(wide, narrow, layout=outputs_first) == {"weight": 0.25}
    assert mup.width_multipliers(wide, narrow) == {"weight": 1.0}


@pytest.mark.parametrize("name", SHORT_BY_DEFAULT)
def test_every_rule_s_updates_are_multiplied(name):
    rule = small(RULES[name])
    params = {"w": jnp.linspace(-1, 1, 24).reshape(6, 4), "b": jnp.ones(4), "none": None}
    base = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3), "none": None, "unused": jnp.zeros(2)}
    grads = jax.tree.map(jnp.cos, params)

    @jax.jit
    def two_updates(theta):
        """Plain and multiplied, of one rule's run: as in ``optax.chain``, of which the last test has a whole run."""
        tx, scale = rule.build(theta, num_steps=10), mup.scale_by_width(base)

        def step(state, _):
            state, scale_state = state
            updates, state = tx.update(grads, state, params, value=jnp.float32(1.0))
            scaled, scale_state = scale.update(updates, scale_state, params)
            return (state, scale_state), (updates, scaled)

        return jax.lax.scan(step, (tx.init(params), scale.init(params)), None, length=2)[1]

    plain, scaled = two_updates(rule.init(jax.random.key(0)))
    np.testing.assert_allclose(scaled["w"], plain["w"] / 3, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scaled["b"], plain["b"])
    assert float(jnp.max(jnp.abs(plain["w"]))) > 0


def test_dtypes_stay_and_masks_pass():
    params = {"w": jnp.ones((4, 2), jnp.bfloat16), "frozen": jnp.ones((4, 4))}
    tx = optax.masked(mup.scale_by_width({"w": jnp.ones((2, 2))}), {"w": True, "frozen": False})
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates["w"].astype(jnp.float32), 0.5)
    np.testing.assert_array_equal(updates["frozen"], 1)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"a": {"w": (2, 3)}}, "no tensor 'a/b'; it has a/w"),
        ({}, "it has none"),
        ({"a": {"w": (2, 3), "b": (3, 1)}}, r"'a/b' has shape \(6,\), but \(3, 1\)"),
        ({"a": {"w": (0, 3), "b": (3,)}}, "'a/w' has a fan-in of 4, and of 0"),
    ],
)
def test_trees_that_do_not_fit_are_told(base, message):
    base = jax.tree.map(jnp.zeros, base, is_leaf=lambda x: isinstance(x, tuple))
    params = {"a": {"w": jnp.zeros((4, 6)), "b": jnp.zeros(6)}}
    with pytest.raises(ValueError, match=message):
        mup.scale_by_width(base).init(params)


# --- the coordinate check

NARROW, WIDE, SEEDS = 32, 192, 8


def mlp(key, width):
    sizes = [(8, width), (width, width), (width, 1)]
    keys = jax.random.split(key, len(sizes))
    params = {
        f"w{i}": jax.random.normal(k, s) / np.sqrt(s[0]) for i, (k, s) in enumerate(zip(keys, sizes, strict=True))
    }
    params["w2"] *= np.sqrt(NARROW / width)  # the model's part of the parametrisation
    return params | {f"b{i}": jnp.zeros(width) for i in range(2)}


def activations(params, x):
    zs = []
    for i in range(2):
        zs.append(x @ params[f"w{i}"] + params[f"b{i}"][None])
        x = jnp.tanh(zs[-1])
    return [*zs, x @ params["w2"]]


def log_change(key, width, tx):
    """``[3]`` logarithms of how much the activations of each layer change over four updates."""
    x = jax.random.normal(jax.random.key(7), (16, 8))
    y = jnp.sin(3 * x[:, :1])
    start = mlp(key, width)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: jnp.mean((activations(p, x)[-1] - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), None, length=4)
    pairs = zip(activations(params, x), activations(start, x), strict=True)
    return jnp.log(jnp.stack([jnp.sqrt(jnp.mean((new - old) ** 2)) for new, old in pairs]))


RATES = {"adam": (RULES["adam"](learning_rate=0.003), 1.0), "celo2": (RULES["celo2"](hidden_size=2), 0.003)}


@pytest.mark.parametrize("name", RATES)
def test_activations_change_as_much_at_every_width(name):
    rule, rate = RATES[name]
    tx = rule.build(rule.init(jax.random.key(0)))
    tx = optax.chain(tx, optax.scale(rate))
    base = jax.eval_shape(lambda: mlp(jax.random.key(0), NARROW))
    keys = jax.random.split(jax.random.key(1), SEEDS)

    def run(width, tx):
        return jax.jit(jax.vmap(lambda key: log_change(key, width, tx)))(keys)

    narrow = run(NARROW, tx)
    growth = np.log(WIDE / NARROW)
    with_multipliers = (run(WIDE, optax.chain(tx, mup.scale_by_width(base))) - narrow) / growth
    without = (run(WIDE, tx) - narrow) / growth
    # exponents of the width, one a layer; seeds give their mean a standard error of at most 0.05
    assert np.max(np.std(with_multipliers, 0, ddof=1)) / np.sqrt(SEEDS) < 0.05
    np.testing.assert_allclose(np.mean(with_multipliers, 0), 0, atol=0.15)
    assert np.mean(without, 0)[1] > 0.4  # the hidden layer
