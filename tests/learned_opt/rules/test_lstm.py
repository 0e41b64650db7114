"""The coordinate-wise LSTM against a plain NumPy version, one parameter at a time in its arithmetic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learned_opt.rules.lstm import log_and_sign, lstm


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(theta, gradients, scale):
    """The update after the last gradient, in float64; Andrychowicz et al. 2016, section 3 and appendix A."""
    theta = jax.tree.map(lambda x: np.asarray(x, np.float64), theta)
    n = gradients[0].size
    memory = [[np.tile(theta[f"lstm{i}"][k], (n, 1)) for k in ("hidden", "cell")] for i in range(2)]
    for gradient in gradients:
        g = np.asarray(gradient, np.float64).reshape(-1)
        x = np.empty((n, 2))
        for j, value in enumerate(g):
            if abs(value) >= math.exp(-10):
                x[j] = math.log(abs(value)) / 10, np.sign(value)
            else:
                x[j] = -1, math.exp(10) * value
        for i in range(2):
            layer = theta[f"lstm{i}"]
            h, c = memory[i]
            z = np.concatenate([x, h], 1) @ layer["w"] + layer["b"]
            size = h.shape[1]
            write, new, forget, read = (z[:, k * size : (k + 1) * size] for k in range(4))
            c = sigmoid(forget + 1) * c + sigmoid(write) * np.tanh(new)
            h = sigmoid(read) * np.tanh(c)
            memory[i] = [h, c]
            x = h
    return -scale * (x @ theta["out"]["w"] + theta["out"]["b"]).reshape(gradients[0].shape)


@pytest.mark.parametrize("shapes", [[(), (5,), (2, 3), (2, 1, 2, 3)], [(100, 91)]], ids=["small", "blocks"])
def test_update_is_the_numpy_version_s(shapes):
    rng = np.random.default_rng(0)
    rule = lstm(lstm_size=4, output_scale=0.1)
    theta = rule.init(jax.random.key(0))
    theta = jax.tree.map(lambda x: x + 0.5 * rng.normal(size=x.shape).astype(np.float32), theta)
    gradients = [
        [(rng.normal(size=s) * 10.0 ** rng.uniform(-8, 4, size=s)).astype(np.float32) for s in shapes] for _ in range(3)
    ]
    tx = rule.build(theta)
    state, update = tx.init([jnp.zeros(s) for s in shapes]), jax.jit(tx.update)
    for g in gradients:
        updates, state = update([jnp.asarray(x) for x in g], state)
    for i in range(len(shapes)):
        np.testing.assert_allclose(updates[i], reference(theta, [g[i] for g in gradients], 0.1), rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=100)
@given(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False))
def test_preprocessing_is_its_closed_form_and_can_be_undone(g):
    log, sign = (float(x) for x in log_and_sign(jnp.float32(g)))
    assert -1 <= log <= 7
    assert abs(sign) <= 1 + 1e-5
    back = sign * math.exp(-10) if log == -1 else sign * math.exp(10 * log)
    assert back == pytest.approx(g, rel=1e-4, abs=1e-12)


def test_preprocessing_has_no_jump_and_finite_derivatives():
    edge = math.exp(-10)
    below, above = (np.asarray(log_and_sign(jnp.float32(edge * (1 + e)))) for e in (-1e-5, 1e-5))
    np.testing.assert_allclose(below, above, atol=2e-5)
    for g in (0.0, 1e-30, 1.0, 1e30):
        assert np.all(np.isfinite(jax.jacobian(log_and_sign)(jnp.float32(g))))


def test_fresh_rule_follows_the_sign_of_the_gradient():
    g = jax.random.normal(jax.random.key(1), (20, 10))
    rule = lstm()

    @jax.jit
    def moved(key):
        tx = rule.build(rule.init(key))
        return jax.lax.scan(lambda state, _: tx.update(g, state)[::-1], tx.init(g), None, length=20)[1]

    for seed in range(3):
        u = moved(jax.random.key(seed))[-1]
        assert float(jnp.sum(u * g) / jnp.linalg.norm(u) / jnp.linalg.norm(g)) < -0.6
        assert 3e-4 < float(jnp.sqrt(jnp.mean(u * u))) < 3e-3


def test_temporaries_of_a_large_tensor_are_those_of_its_new_state():
    rule = lstm()
    theta = rule.init(jax.random.key(0))
    g = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    tx = rule.build(theta)
    state = jax.eval_shape(tx.init, g)
    compiled = jax.jit(tx.update, donate_argnums=1).lower(g, state).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * 320 * 512**2


def test_size_and_its_check():
    theta = jax.eval_shape(lstm().init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(theta)) == 5221
    with pytest.raises(ValueError, match="lstm_size"):
        lstm(lstm_size=0)
