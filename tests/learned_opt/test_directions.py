"""SOAP against the published algorithm in NumPy, against Adam, which it is without rotations, and its symmetry."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt import soap, soap_muon


def test_no_parameters_are_needed():
    gradients = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    for tx in (soap(0.1), soap_muon(0.1)):
        updates, _ = tx.update(gradients, tx.init(gradients))
        assert jax.tree.map(jnp.shape, updates) == {"w": (3, 2), "b": (2,)}


def run(transform, gradients):
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    state, update, trail = transform.init(params), jax.jit(transform.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        trail.append(params)
    return trail


def published(gradients, rate, b1, b2, eps, every):
    """The paper's algorithm for one matrix, the mean of gradients kept in their own coordinates; float64."""
    n, m = gradients[0].shape
    w, mean, square, left, right = (
        np.zeros((n, m)),
        np.zeros((n, m)),
        np.zeros((n, m)),
        np.zeros((n, n)),
        np.zeros((m, m)),
    )
    trail, bases = [], None
    for t, g in enumerate(gradients):
        if bases:  # the first gradient only starts the statistics
            ql, qr = bases
            seen = ql.T @ g @ qr
            mean = b1 * mean + (1 - b1) * g
            square = b2 * square + (1 - b2) * seen**2
            n_hat = (ql.T @ mean @ qr) / (1 - b1**t) / (np.sqrt(square / (1 - b2**t)) + eps)
            w = w - rate * ql @ n_hat @ qr.T
        left, right = b2 * left + (1 - b2) * g @ g.T, b2 * right + (1 - b2) * g.T @ g
        if bases is None:
            bases = [np.linalg.eigh(x)[1][:, ::-1] for x in (left, right)]
        elif t % every == 0:
            for axis, statistic in enumerate((left, right)):
                basis = bases[axis]
                order = np.argsort(-np.diag(basis.T @ statistic @ basis), kind="stable")
                square = np.take(square, order, axis)
                bases[axis] = np.linalg.qr(statistic @ basis[:, order])[0]
        trail.append(w)
    return trail


@pytest.mark.parametrize("every", [1, 4])
def test_it_is_the_published_algorithm(every):
    """The first step too, which moves nothing. Signs of the bases cancel; the first gradient determines them."""
    with jax.enable_x64(True):
        gradients = [
            np.asarray(jax.random.normal(jax.random.key(k), (4, 4)) @ np.diag([1, 3, 0.2, 2])) for k in range(14)
        ]
        ours = run(soap(0.1, b1=0.9, b2=0.95, every=every), [jnp.asarray(g) for g in gradients])
        theirs = published(gradients, 0.1, 0.9, 0.95, 1e-8, every)
        np.testing.assert_array_equal(ours[0], 0)
        np.testing.assert_allclose(np.stack(ours), np.stack(theirs), atol=1e-6)


def test_unrotated_it_is_adam_after_the_first_gradient():
    keys = jax.random.split(jax.random.key(0), 6)
    gradients = [{"w": jax.random.normal(key, (4, 3, 2)), "b": jax.random.normal(key, (5,))} for key in keys]
    ours = run(soap(0.1, b1=0.9, b2=0.99, max_dim=1, weight_decay=0.1), gradients)
    adam = run(optax.adamw(0.1, b1=0.9, b2=0.99, weight_decay=0.1), gradients[1:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours[1:], adam)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("direction", [soap, soap_muon])
def test_turning_the_gradients_turns_the_updates(direction, every):
    """For orthogonal U and V, gradients U G V' give updates U u V'. Adam's do not."""
    with jax.enable_x64(True):
        turn, other = (jnp.linalg.qr(jax.random.normal(jax.random.key(k), (n, n)))[0] for k, n in ((1, 4), (2, 4)))
        gradients = [jax.random.normal(key, (4, 4)) for key in jax.random.split(jax.random.key(0), 8)]
        turned = [turn @ g @ other.T for g in gradients]
        for transform, close in ((direction(0.1, every=every), True), (optax.adam(0.1), False)):
            expected = [turn @ p @ other.T for p in run(transform, gradients)]
            errors = [float(jnp.abs(a - b).max()) for a, b in zip(run(transform, turned), expected, strict=True)]
            assert (max(errors) < 1e-4) == close, errors


def test_soap_muon_s_steps_are_nearly_orthogonal_and_rest_where_there_is_no_gradient():
    gradients = [
        {"w": jax.random.normal(jax.random.key(k), (6, 4)).at[2].set(0), "e": jnp.zeros((3, 2))} for k in range(5)
    ]
    trail = run(soap_muon(0.1), gradients)
    step = trail[-1]["w"] - trail[-2]["w"]
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(step**2)), 0.1, rtol=0.1)  # a row of noise rests
    values = jnp.linalg.svd(step, compute_uv=False)
    assert float(values.max() / values.min()) < 2.5
    np.testing.assert_array_equal(trail[-1]["e"], 0)
    np.testing.assert_array_equal(trail[-1]["w"][2], 0)


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


def test_arguments_that_cannot_be_meant():
    with pytest.raises(ValueError, match="every >= 1"):
        soap(0.1, every=0)
    with pytest.raises(ValueError, match="learning_rate"):
        soap("0.1")
    with pytest.raises(ValueError, match="weight_decay"):
        soap_muon(0.1, weight_decay=None)


def test_empty_trees():
    transform = soap(0.1)
    assert transform.update({}, transform.init({}), {})[0] == {}
