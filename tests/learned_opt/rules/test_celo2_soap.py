"""Celo2 in SOAP's basis: against plain Celo2 where nothing is rotated, and the basis against what it should be."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt.rules.celo2 import celo2
from learned_opt.rules.celo2_soap import celo2_soap
from learned_opt.rules.eigenbasis import follow, rotate, rotate_back, start

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


@pytest.mark.parametrize("every", [1, 7])
def test_the_basis_diagonalises_its_statistic_and_keeps_its_signs(every):
    with jax.enable_x64(True):
        sides, bases = start(jnp.zeros((4, 3)), 4, jnp.float64), []
        scales = jnp.diag(jnp.array([1.0, 4.0, 2.0, 8.0]))
        step = jax.jit(lambda sides, g, t: follow(sides, g, t, decay=0.99, every=every)[0])
        for t in range(1, 120):
            sides = step(sides, scales @ jax.random.normal(jax.random.key(t), (4, 3)), jnp.asarray(t))
            bases.append(sides[0].basis)
        left = sides[0]
        np.testing.assert_allclose(left.basis.T @ left.basis, np.eye(4), atol=1e-12)
        inside = left.basis.T @ left.statistic @ left.basis
        assert np.abs(inside - np.diag(np.diag(inside))).max() < 0.1 * np.diag(inside).max()
        assert np.all(np.diff(np.diag(inside)) < 0)  # by falling eigenvalue
        if every > 1:
            np.testing.assert_array_equal(bases[1], bases[6])
        assert min(jnp.min(jnp.diag(a.T @ b)) for a, b in itertools.pairwise(bases[60:])) > 0.5
        x = jax.random.normal(jax.random.key(0), (4, 3))
        np.testing.assert_allclose(rotate_back(rotate(x, sides), sides), x, atol=1e-12)


def test_a_side_that_is_too_long_is_not_rotated():
    x, sides = jnp.ones((4, 3)), start(jnp.zeros((4, 3)), 3, jnp.float32)
    sides, *_ = follow(sides, x, jnp.asarray(1), decay=0.9, every=3)
    assert [side.basis.shape for side in sides] == [(), (3, 3)]
    np.testing.assert_allclose(rotate(x, sides), x @ sides[1].basis, rtol=1e-6)


def test_what_is_accumulated_moves_with_its_direction():
    """The second direction's gradients grow past the first's: the two change places."""
    sides, held = start(jnp.zeros((2, 2)), 2, jnp.float32), jnp.array([[1.0], [2.0]])
    for t, sizes in enumerate(([2.0, 1.0], [1.0, 50.0]), start=1):
        sides, moved, _ = follow(sides, jnp.diag(jnp.array(sizes)), jnp.asarray(t), decay=0.5, every=1)
        held = moved(held)
    np.testing.assert_array_equal(held[:, 0], [2.0, 1.0])
    np.testing.assert_allclose(jnp.abs(sides[0].basis), [[0, 1], [1, 0]], atol=1e-6)


@pytest.mark.parametrize("max_dim", [3, 4])
def test_what_is_kept_in_the_basis_turns_with_it(max_dim):
    """A mean of rotated gradients is the mean of the gradients, rotated."""
    with jax.enable_x64(True):
        sides = start(jnp.zeros((4, 3)), max_dim, jnp.float64)
        inside, outside = jnp.zeros((2, 4, 3)), jnp.zeros((2, 4, 3))
        for t in range(1, 9):
            g = jax.random.normal(jax.random.key(t), (4, 3))
            sides, _, turned = follow(sides, g, jnp.asarray(t), decay=0.9, every=3)
            outside = 0.5 * outside + jnp.stack([g, 2 * g])
            inside = 0.5 * turned(inside) + jnp.stack([rotate(g, sides), 2 * rotate(g, sides)])
            np.testing.assert_allclose(inside, rotate(outside, sides), atol=1e-12)


def test_lanes_of_other_ages_get_what_each_gets_alone_and_share_the_conditional():
    """Under vmap a plain `cond` would decompose at every step."""

    def walk(key, step):
        def one(carry, key):
            sides, step, held = carry
            sides, moved, _ = follow(sides, jax.random.normal(key, (5, 7)), step, decay=0.9, every=3)
            return (sides, step + 1, moved(held)), None

        carry = (start(jnp.zeros((5, 7)), 5, jnp.float32), step, jnp.arange(5.0)[:, None])
        return jax.lax.scan(one, carry, jax.random.split(key, 12))[0]

    keys, steps = jax.random.split(jax.random.key(0), 6).reshape(2, 3), jnp.array([[1, 1, 2], [3, 5, 1]])
    together = jax.jit(jax.vmap(jax.vmap(walk)))
    found = together(keys, steps)
    for i, j in np.ndindex(2, 3):
        alone = jax.jit(walk)(keys[i, j], steps[i, j])
        jax.tree.map(lambda a, b, i=i, j=j: np.testing.assert_allclose(a[i, j], b, rtol=1e-4, atol=1e-4), found, alone)
    text = together.lower(keys, steps).as_text()
    assert text.count("stablehlo.case") == 3  # one, and in it that of the first step and that of the others
    outside = text.split("stablehlo.case")[0]
    assert "geqrf" not in outside
    assert "syevd" not in outside


def test_a_bad_interval_is_refused():
    with pytest.raises(ValueError, match="every >= 1"):
        celo2_soap(every=0)
