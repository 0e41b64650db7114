"""What nn_adam's reference trajectory does not reach: the clipping, the bounds, tensors at rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learned_opt.rules import nn_adam

RULE = nn_adam.nn_adam(lstm_size=5)


def noisy(theta, size=0.3):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + size * rng.normal(size=x.shape).astype(np.float32), theta)


def test_fresh_rule_is_adam_of_the_clipped_gradient_without_bias_correction():
    rng = np.random.default_rng(0)
    tx = RULE.build(RULE.init(jax.random.key(0)))
    params = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    state, update = tx.init(params), jax.jit(tx.update)
    m = r = np.zeros((3, 4))
    for size in (1.0, 1e5, 0.0, 1e-6):
        g = (size * rng.normal(size=(3, 4))).astype(np.float32)
        clipped = np.clip(g.astype(np.float64), -1000, 1000)
        m, r = 0.9 * m + 0.1 * clipped, 0.999 * r + 0.001 * clipped**2
        updates, state = update(jnp.asarray(g), state, params)
        # 1 - .999 has a relative rounding error of 6e-5 in float32
        np.testing.assert_allclose(updates, -1e-3 * m / (1e-8 + np.sqrt(r + 1e-10)), rtol=2e-4)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4))
def test_projection_keeps_the_hyperparameters_within_their_bounds_and_changes_none_within(controls):
    controls = jnp.asarray(controls, jnp.float32)
    before = np.array([float(x) for x in nn_adam.hyperparameters(controls)])
    projected = nn_adam.project(controls)
    after = np.array([float(x) for x in nn_adam.hyperparameters(projected)])
    lr, b1, b2, eps = after
    assert 0.99e-8 <= lr <= 1.01e3
    assert 0.99e-11 <= eps <= 1.01e4
    assert 0 <= min(b1, b2) <= max(b1, b2) <= 1 - 4.5e-5
    np.testing.assert_allclose(after[[0, 3]], before[[0, 3]], rtol=1e-4)
    np.testing.assert_allclose(after[1:3], before[1:3], atol=1e-6)
    assert np.all(np.isfinite(projected))


@pytest.mark.parametrize("sign", [-1, 1])
def test_controls_move_by_a_hundredth_of_the_output_and_stop_at_the_bounds(sign):
    theta = RULE.init(jax.random.key(0))
    theta["to_controls"]["b"] = sign * jnp.array([1.0, 2.0, 3.0, 4.0])
    tx = RULE.build(theta)
    p = jnp.ones(3)
    update = jax.jit(lambda state: tx.update(jnp.sin(p), state, p)[1])
    state = update(tx.init(p))
    # 1 - b2 = .001 has a relative rounding error of 6e-5, hence its tenth of the logarithm one of 6e-6
    moved = np.asarray(theta["controls"]) + 0.01 * sign * np.array([1, 2, 3, 4])
    np.testing.assert_allclose(state.tensors.controls, moved, atol=1e-5)
    for _ in range(100):  # far enough for all but the step size
        state = update(state)
    bounds = {-1: [-10 / 10, -10 / 10, np.log(1e-11) / 10], 1: [0, 0, np.log(1e4) / 10]}[sign]
    np.testing.assert_allclose(state.tensors.controls[1:], bounds, atol=1e-3)


def test_a_tensor_knows_nothing_of_the_others_and_rests_without_a_gradient():
    theta = noisy(RULE.init(jax.random.key(0)))
    tx = RULE.build(theta)
    params = {"a": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.ones(4)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    alone = tx.init({"a": params["a"]})
    for t in range(3):
        g = jnp.cos(params["a"] + t)
        u, alone = update({"a": g}, alone, {"a": params["a"]})
        updates, new = update({"a": g, "b": None}, state, params)
        np.testing.assert_allclose(updates["a"], u["a"], rtol=1e-6)
        assert updates["b"] is None
        for old, kept in zip(
            (*state.tensors[:3], *state.tensors.memory), (*new.tensors[:3], *new.tensors.memory), strict=True
        ):
            np.testing.assert_array_equal(old["b"], kept["b"])
        state = new
    assert float(jnp.max(jnp.abs(state.tensors.controls["a"] - theta["controls"]))) > 1e-3


def test_size_and_its_check():
    theta = jax.eval_shape(nn_adam.nn_adam().init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(theta)) == 6856
    with pytest.raises(ValueError, match="lstm_size"):
        nn_adam.nn_adam(lstm_size=0)
