"""Celo2 in SOAP's basis: plain Celo2 where nothing is rotated; units, the first update, what it takes to compile."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt.rules.celo2 import celo2
from learned_opt.rules.celo2_soap import celo2_soap

SHAPES = {"w": (5, 3), "b": (4,), "s": (), "kernel": (2, 2, 3, 4)}


def draw(key, shapes):
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def run(tx, gradients, params):
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: 0.1 * u, updates))
    return updates, state


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_unrotated_it_is_celo2_on_matrices_of_the_last_axis(orthogonalize):
    plain, rotated = celo2(orthogonalize=orthogonalize), celo2_soap(orthogonalize=orthogonalize, max_dim=0)
    theta = plain.init(jax.random.key(0))
    gradients, params = [draw(jax.random.key(k), SHAPES) for k in range(3)], draw(jax.random.key(9), SHAPES)
    ours, state = run(rotated.build(theta), gradients, params)
    flat = [jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x, g) for g in (*gradients, params)]
    theirs, _ = run(plain.build(theta), flat[:-1], flat[-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b.reshape(a.shape), rtol=2e-4, atol=2e-5), ours, theirs)
    assert state.step == 3


def test_rotating_changes_matrices_alone():
    rule, unrotated = celo2_soap(), celo2_soap(max_dim=0)
    theta = rule.init(jax.random.key(0))
    gradients, params = [draw(jax.random.key(k), SHAPES) for k in range(3)], draw(jax.random.key(9), SHAPES)
    (ours, _), (theirs, _) = (run(r.build(theta), gradients, params) for r in (rule, unrotated))
    for name in SHAPES:
        same = np.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
        assert same == (len(SHAPES[name]) < 2), name


@pytest.mark.parametrize("rule", [celo2(), celo2(orthogonalize=True), celo2_soap()], ids=["celo2", "ortho", "soap"])
@pytest.mark.parametrize("unit", [2.0**-27, 2.0**20])  # powers of two round nothing
def test_the_unit_of_the_loss_does_not_matter(rule, unit):
    """Gradients of full rank: what lies in no gradient's direction is rounding noise in any unit."""
    tx = rule.build(rule.init(jax.random.key(0)))
    shapes = {"w": (4, 4), "b": (4,), "s": ()}
    gradients, params = [draw(jax.random.key(k), shapes) for k in range(4)], draw(jax.random.key(9), shapes)
    ours, _ = run(tx, gradients, params)
    scaled, _ = run(tx, jax.tree.map(lambda g: unit * g, gradients), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), ours, scaled)


def test_the_first_update_follows_the_gradient_and_no_noise():
    """In its own eigenbasis all but a diagonal of a gradient is rounding noise, which the rule would make full size."""
    rule = celo2_soap(orthogonalize=False)
    tx = rule.build(rule.init(jax.random.key(0)))
    g, p = (jax.random.normal(jax.random.key(k), (24, 16)) for k in range(2))
    u, _ = tx.update(g, tx.init(p), p)
    nearby, _ = tx.update(g * (1 + 1e-6), tx.init(p), p)
    assert float(jnp.sum(u * g) / jnp.linalg.norm(u) / jnp.linalg.norm(g)) < -0.6
    np.testing.assert_allclose(u, nearby, atol=1e-4)


def test_compiled_code_grows_with_shapes_and_not_with_tensors():
    """Lines of HLO; the few that a tensor more takes are its slices of the stacks."""
    rule = celo2_soap()
    tx = rule.build(rule.init(jax.random.key(0)))

    def lines(params):
        state = jax.eval_shape(tx.init, params)
        return len(jax.jit(tx.update).lower(params, state, params).as_text().splitlines())

    matrix, other, vector = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 12), (12, 8), (12,)))
    few, many = lines([matrix, vector] * 2), lines([matrix, vector] * 12)
    assert many - few < 20 * 60
    assert lines([matrix, vector, other] * 2) - few > 400  # which another shape takes: the test can tell


def test_a_bad_interval_is_refused():
    with pytest.raises(ValueError, match="every >= 1"):
        celo2_soap(every=0)
