"""Celo2's arithmetic, in all its layouts, against a plain NumPy version of the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learned_opt import features as ft
from learned_opt.newton_schulz import newton_schulz
from learned_opt.rules.celo2 import celo2


def reference(theta, params, gradients):
    """The direction after the last gradient, in float64."""
    theta = {k: np.asarray(v, np.float64) for k, v in theta.items()}
    p = np.atleast_1d(np.asarray(params, np.float64))
    shape = p.shape
    axes = tuple(range(len(shape)))[-2:]
    m, r = [np.zeros(shape)] * 3, np.zeros(shape)
    vrow, vcol = ([np.zeros(())] * 3, [np.zeros(())] * 3)
    for g in gradients:
        g = np.clip(np.atleast_1d(np.asarray(g, np.float64)), -1000, 1000)
        m = [b * x + (1 - b) * g for b, x in zip((0.9, 0.99, 0.999), m, strict=True)]
        r = 0.95 * r + 0.05 * g * g
        square = g * g + 1e-30
        for k, b in enumerate((0.9, 0.99, 0.999)):
            if len(shape) < 2:
                vrow[k] = b * vrow[k] + (1 - b) * square
            else:
                d1, d0 = ft.factored_axes(shape)
                vrow[k] = b * vrow[k] + (1 - b) * square.mean(d0, keepdims=True)
                vcol[k] = b * vcol[k] + (1 - b) * square.mean(d1, keepdims=True)
    s = 1 / np.sqrt(r + 1e-8)
    if len(shape) < 2:
        scales = [1 / np.sqrt(v + 1e-9) for v in vrow]
    else:
        R = [1 / np.sqrt(np.maximum(v / (v.mean(d1, keepdims=True) + 1e-9), 1e-9)) for v in vrow]
        scales = [a / np.sqrt(np.maximum(v, 1e-9)) for a, v in zip(R, vcol, strict=True)]
    cols = [g, np.clip(g, -0.1, 0.1), p, *m, r, *(x * s for x in m), s, *(g * x for x in scales), g * s]
    if len(shape) >= 2:
        cols += [*vrow, *vcol, *(1 / np.sqrt(v + 1e-8) for v in (*vrow, *vcol))]
        cols += [x * y for x, y in zip(m, scales, strict=True)]
    x = np.stack([np.broadcast_to(c, shape) for c in cols], -1)
    x = x / np.sqrt(1e-9 + (x * x).mean(axes, keepdims=True))
    h = np.maximum(x @ theta["w0"][: len(cols)] + theta["b0"], 0)
    h = np.maximum(h @ theta["w1"] + theta["b1"], 0)
    d = (h @ theta["w2"] + theta["b2"])[..., 0]
    return -(d / np.sqrt(1e-9 + (d * d).mean(axes, keepdims=True))).reshape(np.shape(params))


SHAPES = [(), (1,), (7,), (32,), (4096,), (5, 3), (3, 5), (32, 10), (64, 32), (50, 48), (6, 1), (1, 6), (1, 1)]
SHAPES += [(2, 3, 4), (3, 3, 8, 16), (5, 5, 2, 4), (16, 1, 1)]
SOME = [
    (),
    (7,),
    (5, 3),
    (3, 5),
    (1, 6),
    (6, 1),
    (2, 3, 4),
]  # compiling a network of sums for every shape takes seconds


@pytest.mark.parametrize(
    ("shapes", "hidden", "accelerator"),
    [
        (SOME, 8, False),
        pytest.param(SHAPES, 8, False, marks=pytest.mark.slow),
        ([(5, 3), (9,)], 2, False),
        ([(5, 3), (64, 16), (9,)], 32, False),
        ([*SOME, (2100, 129)], 8, True),
        pytest.param([*SHAPES, (2100, 129)], 8, True, marks=pytest.mark.slow),
        ([(5, 3), (64, 16), (9,)], 32, True),
    ],
)
def test_update_is_the_formula_s(shapes, hidden, accelerator, accelerate):
    if accelerator:
        accelerate()
    rng = np.random.default_rng(0)
    rule = celo2(hidden_size=hidden, published=True)
    noise = lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    theta = jax.tree.map(noise, rule.init(jax.random.key(1)))
    params = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    gradients = [[rng.normal(size=s).astype(np.float32) * 10.0 ** rng.uniform(-3, 3) for s in shapes] for _ in range(3)]
    tx = rule.build(theta)
    state, update = tx.init(params), jax.jit(tx.update)
    for g in gradients:
        updates, state = update([jnp.asarray(x) for x in g], state, params)
    for i, shape in enumerate(shapes):
        expected = reference(theta, params[i], [g[i] for g in gradients])
        np.testing.assert_allclose(updates[i], expected, atol=5e-5, err_msg=str(shape))


@pytest.mark.parametrize(("shape", "hidden"), [((4115, 64), 8), ((2100, 129), 8), ((4115, 64), 32)])
def test_large_matrices_give_the_same(shape, hidden):
    rng = np.random.default_rng(0)
    rule = celo2(hidden_size=hidden, published=True)
    theta = rule.init(jax.random.key(1))
    p, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    tx = rule.build(theta)
    compiled = jax.jit(tx.update).lower(g, tx.init(p), p).compile()
    updates, _ = compiled(g, tx.init(p), p)
    np.testing.assert_allclose(updates, reference(theta, p, [g]), atol=5e-5)


def test_updates_have_unit_rms_and_point_downhill_from_the_start():
    p = jax.random.normal(jax.random.key(0), (16, 8))
    g = 1e-4 * jax.random.normal(jax.random.key(1), (16, 8))
    rule = celo2()
    for seed in range(3):
        tx = rule.build(rule.init(jax.random.key(seed)))
        u, _ = tx.update(g, tx.init(p), p)
        assert abs(float(jnp.sqrt(jnp.mean(u * u))) - 1) < 1e-3
        # momentum over root second moment is the sign of the first gradient: its cosine with that is sqrt(2 / pi)
        assert float(jnp.sum(u * g) / jnp.linalg.norm(u) / jnp.linalg.norm(g)) < -0.6


def test_batched_meta_parameters_give_what_each_gives_alone():
    rule = celo2()
    theta = jax.vmap(rule.init)(jax.random.split(jax.random.key(0), 3))
    p = {"w": jax.random.normal(jax.random.key(1), (8, 16)), "b": jnp.ones(10)}

    def run(theta):
        tx = rule.build(theta)
        return tx.update(jax.tree.map(jnp.sin, p), tx.init(p), p)[0]

    together = jax.jit(jax.vmap(run))(theta)
    for i in range(3):
        alone = jax.jit(run)(jax.tree.map(lambda x, i=i: x[i], theta))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=2e-5), together, alone)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (2, 5, 3)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    x = newton_schulz(jax.random.normal(jax.random.key(0), shape))
    values = np.linalg.svd(x, compute_uv=False)
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(newton_schulz(x)))(jnp.zeros(shape))))


@pytest.mark.parametrize("shape", [(24, 24), (64, 512)])
def test_newton_schulz_in_bfloat16_on_accelerators(shape, monkeypatch):
    """Singular values near 1 all the same; float32 where a precision is asked for."""
    x = jax.random.normal(jax.random.key(0), shape)
    exact = newton_schulz(x)
    monkeypatch.setattr("learned_opt.newton_schulz.on_cpu", lambda: False)
    found = newton_schulz(x)
    assert found.dtype == jnp.float32
    assert 1e-4 < np.max(np.abs(found - exact)) < 0.1
    values = np.linalg.svd(np.asarray(found), compute_uv=False)
    assert np.all((values < 0.1) | ((values > 0.5) & (values < 1.3)))  # those of tiny ones are still on their way
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(newton_schulz(x), exact, atol=2e-3)


@pytest.mark.parametrize("shape", [(64, 300), (300, 64), (2, 64, 256)])
def test_newton_schulz_steps_of_long_matrices_may_be_multiplied_up(shape):
    """Against the steps one by one in float64, on singular values from 1 to 1e-8."""
    x = np.random.default_rng(0).normal(size=shape)
    u, _, v = np.linalg.svd(x, full_matrices=False)
    x = (u * np.geomspace(1, 1e-8, 64)) @ v
    wanted = x / np.linalg.norm(x, axis=(-2, -1), keepdims=True)
    for _ in range(5):
        a = wanted @ np.swapaxes(wanted, -1, -2)
        wanted = 3.4445 * wanted + (-4.775 * a + 2.0315 * (a @ a)) @ wanted
    found = newton_schulz(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())


def test_too_small_a_network_is_refused():
    with pytest.raises(ValueError, match="hidden_size >= 2"):
        celo2(hidden_size=1)
