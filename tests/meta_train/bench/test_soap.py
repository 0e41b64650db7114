"""SOAP against Adam, which it is without rotations, and against its defining symmetry."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_train.bench.soap import soap


def run(transform, gradients):
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    state, update, trail = transform.init(params), jax.jit(transform.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        trail.append(params)
    return trail


def test_unrotated_it_is_adam():
    keys = jax.random.split(jax.random.key(0), 6)
    gradients = [{"w": jax.random.normal(key, (4, 3, 2)), "b": jax.random.normal(key, (5,))} for key in keys]
    ours = run(soap(0.1, b1=0.9, b2=0.99, max_dim=1, weight_decay=0.1), gradients)
    adam = run(optax.adamw(0.1, b1=0.9, b2=0.99, weight_decay=0.1), gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, adam)


@pytest.mark.parametrize("every", [1, 3])
def test_turning_the_gradients_turns_the_updates(every):
    """For orthogonal U and V, gradients U G V' give updates U u V'. Adam's do not."""
    with jax.enable_x64(True):
        turn, other = (jnp.linalg.qr(jax.random.normal(jax.random.key(k), (n, n)))[0] for k, n in ((1, 4), (2, 3)))
        gradients = [jax.random.normal(key, (4, 3)) for key in jax.random.split(jax.random.key(0), 8)]
        turned = [turn @ g @ other.T for g in gradients]
        for transform, close in ((soap(0.1, every=every), True), (optax.adam(0.1), False)):
            expected = [turn @ p @ other.T for p in run(transform, gradients)]
            found = run(transform, turned)
            # The first gradient alone leaves a row of L undetermined: its direction is anybody's, its step is 0 / eps.
            errors = [float(jnp.abs(a - b).max()) for a, b in zip(found, expected, strict=True)]
            assert (max(errors) < 1e-4) == close, errors


def test_the_rotation_diagonalises_what_it_should():
    with jax.enable_x64(True):
        gradients = [jnp.diag(jnp.arange(1.0, 5.0)) @ jax.random.normal(key, (4, 3)) for key in
                     jax.random.split(jax.random.key(3), 60)]  # fmt: skip
        transform = soap(0.1, b2=0.99, every=1)
        params = jnp.zeros((4, 3))
        state, update = transform.init(params), jax.jit(transform.update)
        for gradient in gradients:
            _, state = update(gradient, state, params)
        for statistic, basis in state[0].sides:
            np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-10)
            inside = basis.T @ statistic @ basis
            off = inside - np.diag(np.diag(inside))
            assert np.abs(off).max() < 0.1 * np.diag(inside).max()


def test_a_noisy_linear_problem_stays_stable():
    """Least squares with inputs of very different sizes, where a basis out of order lets small directions leap."""
    scales = 10.0 ** -jnp.arange(8.0)
    target = jax.random.normal(jax.random.key(5), (8, 4))

    def loss(w, key):
        x = jax.random.normal(key, (16, 8)) * scales[None]
        return jnp.mean(jnp.square(x @ (w - target)))

    transform = soap(0.3)
    params = jnp.zeros((8, 4))

    def step(carry, key):
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params, key)
        updates, state = transform.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), value

    _, losses = jax.lax.scan(step, (params, transform.init(params)), jax.random.split(jax.random.key(6), 400))
    assert losses.max() < 5 * losses[0]
    assert losses[-50:].mean() < 0.01 * losses[0]


def test_empty_trees():
    transform = soap()
    assert transform.update({}, transform.init({}), {})[0] == {}
