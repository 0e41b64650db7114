"""NAdam in relative units under a learned schedule: against Optax, against NumPy, its units and its bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt.rules.light import light
from learned_opt.rules.relative import schedule

PARAMS = {"w": jnp.linspace(-1.0, 2.0, 12).reshape(4, 3), "b": jnp.array([0.5, -2.0, 0.0])}
SIZES = {"w": float(jnp.sqrt(jnp.mean(PARAMS["w"] ** 2))), "b": 0.05}
RULE = light()
THETA = RULE.init(jax.random.key(0))
DRAWN = {"control": jax.tree.map(lambda x: jax.random.normal(jax.random.key(2), x.shape), THETA["control"])}


def gradients_at(t):
    return jax.tree.map(lambda p: jnp.cos(3 * p + t), PARAMS)


def updates_of(rule, theta, params=PARAMS, steps=5, num_steps=20, scale=1.0):
    tx = rule.build(theta, num_steps=num_steps)
    state, found = tx.init(params), []
    for t in range(steps):
        updates, state = tx.update(jax.tree.map(lambda g: scale * g, gradients_at(t)), state, params)
        params = optax.apply_updates(params, updates)
        found.append(updates)
    return found


def test_a_fresh_one_without_decay_is_optax_s_nadam_at_relative_rates():
    tx = optax.scale_by_adam(b1=0.9, b2=0.99, nesterov=True)
    state = tx.init(PARAMS)
    for t, found in enumerate(updates_of(light(decay=0.0), THETA)):
        expected, state = tx.update(gradients_at(t), state)
        rate = 0.08 * schedule(jnp.int32(t), jnp.int32(20), 0.05, jnp.float32)
        for name in PARAMS:
            np.testing.assert_allclose(found[name], -rate * SIZES[name] * expected[name], rtol=2e-5, atol=1e-7)


def test_with_a_drawn_network_it_is_the_formula_s():
    """In NumPy and float64, tensor by tensor: memories that change from step to step, decay, and what zeros weigh."""
    layers = jax.tree.map(lambda x: np.asarray(x, np.float64), DRAWN["control"])
    params = {name: np.asarray(p, np.float64) for name, p in PARAMS.items()}
    state = {name: (np.zeros_like(p), np.zeros_like(p), 1.0, 1.0) for name, p in params.items()}
    for t, found in enumerate(updates_of(RULE, DRAWN)):
        done, time = t / 20, np.log1p(t)
        run = [np.tanh(time / 4), np.tanh(time / 10), 1, done, np.sqrt(done)]
        for name, inputs, outputs, matrix in (("w", 4, 3, 1), ("b", 1, 3, 0)):
            read = np.array([np.log10(inputs) / 4, np.log10(outputs) / 4, np.log10(15) / 4, matrix, *run])
            hidden = np.tanh(read @ layers["hidden"]["w"] + layers["hidden"]["b"])
            k = 4 ** np.tanh(hidden @ layers["last"]["w"] + layers["last"]["b"])
            a1, a2 = k[2] * 0.1, k[3] * 0.01
            m, v, missing1, missing2 = state[name]
            g, x = np.asarray(gradients_at(t)[name], np.float64), params[name]
            m, v = m + a1 * (g - m), v + a2 * (g**2 - v)
            missing1, missing2 = missing1 * (1 - a1), missing2 * (1 - a2)
            ahead = (1 - a1) * m / (1 - missing1 * (1 - a1)) + a1 * g / (1 - missing1)
            u = -ahead / (np.sqrt(v / (1 - missing2)) + 1e-8)
            rate = 0.08 * float(schedule(jnp.int32(t), jnp.int32(20), 0.05, jnp.float32))
            update = k[0] * rate * u * (SIZES[name] + matrix * k[1] * 0.2 * (u * x < 0) * np.abs(x))
            np.testing.assert_allclose(found[name], update, rtol=2e-4, atol=1e-6)
            state[name], params[name] = (m, v, missing1, missing2), x + update


def test_meta_gradients_of_entries_at_rest_are_finite():
    """The root of a second moment of exactly 0 has no derivative."""

    def after(theta):
        tx, p = RULE.build(theta), jnp.zeros((2, 1))
        state = tx.init(p)
        for _ in range(2):
            slope = jax.grad(lambda p: (jnp.array([1.0, 0.0]) @ p[:, 0] - 1) ** 2)(p)
            updates, state = tx.update(slope, state, p)
            p = p + updates
        return jnp.sum(p**2)

    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(jax.grad(after)(THETA)))


def test_the_unit_of_the_loss_does_not_matter():
    ones, many = updates_of(RULE, DRAWN), updates_of(RULE, DRAWN, scale=1024.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8), ones, many)


def test_the_unit_of_the_weights_does_not_matter_above_the_floor():
    ones, eights = updates_of(RULE, DRAWN), updates_of(RULE, DRAWN, PARAMS | {"w": 8 * PARAMS["w"]})
    for a, b in zip(ones, eights, strict=True):
        np.testing.assert_allclose(8 * a["w"], b["w"], rtol=1e-5)


def test_weights_that_start_at_zero_move_by_the_floor():
    (updates,) = updates_of(RULE, THETA, jax.tree.map(jnp.zeros_like, PARAMS), steps=1)
    np.testing.assert_allclose(np.abs(updates["w"]), 0.08 * 0.5 * (1 + 0.9 / 1.9), rtol=1e-5)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_no_network_goes_beyond_four_times(sign):
    last = THETA["control"]["last"]
    bound = {"control": THETA["control"] | {"last": last | {"b": last["b"].at[0].set(sign * 1e6)}}}
    fresh, found = (updates_of(light(decay=0.0), theta, steps=3) for theta in (THETA, bound))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(4.0**sign * a, b, rtol=1e-5), fresh, found)


def test_a_mean_takes_in_no_more_than_all_of_a_gradient():
    """Four times .5 would be twice: its square's mean would fall below 0."""
    last = THETA["control"]["last"]
    bound = {"control": THETA["control"] | {"last": last | {"b": jnp.full_like(last["b"], 1e6)}}}
    for updates in updates_of(light(b1=0.5, b2=0.5), bound):
        assert all(bool(jnp.all(jnp.isfinite(u)) & jnp.all(jnp.abs(u) < 5)) for u in updates.values())


def test_steps_of_growing_weights_stay_as_they_were():
    """They are relative to the weights at the start: a gradient that always points inward makes none grow by shares."""
    tx, params = RULE.build(THETA), {"w": jnp.ones((4, 3))}
    state, sizes = tx.init(params), []
    for _ in range(60):
        updates, state = tx.update(jax.tree.map(jnp.negative, params), state, params)
        params = optax.apply_updates(params, updates)
        sizes.append(float(jnp.max(jnp.abs(updates["w"]))))
    assert jnp.max(params["w"]) > 4
    assert max(sizes) < 1.5 * 0.08


@pytest.mark.parametrize(
    "bad", [{"ratio": 0.0}, {"decay": -1.0}, {"warmup": 1.0}, {"b1": 1.0}, {"b2": 0.0}, {"hidden_size": 0}]
)
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="light needs"):
        light(**bad)
