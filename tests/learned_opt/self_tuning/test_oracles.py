"""Closed forms of ridge regression against the objectives, in float64, expectations by Gauss-Hermite quadrature.

Loss 1/2 mean r^2 + 1/2 e^l |w|^2, A = X'X/N, b = X't/N, r = e^l.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learned_opt import self_tuning as st

N, D = 12, 4
RNG = np.random.default_rng(0)
X, T = RNG.normal(size=(N, D)), RNG.normal(size=N)
XV, TV = RNG.normal(size=(N, D)), RNG.normal(size=N)
A, BT = X.T @ X / N, X.T @ T / N
EYE = np.eye(D)
L0 = -0.7
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def best_w(level):
    """Oracle 1."""
    return np.linalg.solve(A + np.exp(level) * EYE, BT)


def best_slope(level):
    return -np.exp(level) * np.linalg.solve(A + np.exp(level) * EYE, best_w(level))


def loss_valid(w):
    return 0.5 * np.mean((XV @ w - TV) ** 2)


def hypergradient(level):
    return XV.T @ (XV @ best_w(level) - TV) / N @ best_slope(level)


def finite_sigma(level, sigma, centred):
    """Oracle 3: the fixed point (w0, J) of the two methods."""
    r, m = np.exp(level), np.exp(sigma**2 / 2)
    K = np.linalg.inv(A + r * m * (1 + sigma**2) * EYE)
    w0 = best_w(level) if centred else np.linalg.solve(A + r * m * EYE - (r * sigma * m) ** 2 * K, BT)
    return w0, -r * m * K @ w0


def objectives(predict, per_example, **options):
    def train_loss(params, hparams, key, batch):
        return 0.5 * (predict(params, batch[0]) - batch[1]) ** 2 + 0.5 * hparams["l2"] * st.squared_norm(params)

    def valid_loss(params, batch):
        return 0.5 * (predict(params, batch[0]) - batch[1]) ** 2

    specs = {"l2": st.log(float(np.exp(L0)), per_example=per_example)}
    return st.make_objectives(specs, train_loss, valid_loss, **options)


DENSE = st.dense_lift(lambda w, x: x @ w)
LINEAR = st.lift(hk.without_apply_rng(hk.transform(lambda x: hk.Linear(1, with_bias=False)(x)[:, 0])))
TRAIN, VALID, KEY = (X, T), (XV, TV), None


def row(w):
    return {"linear": {"w": jnp.asarray(w)[:, None]}}


def gated(slope):
    """A response of hk.Linear(1) with the given slope dw/dl, shared between weight and gate."""
    return {"linear": {"w": st.Gated(jnp.asarray(slope)[:, None] / 2, jnp.full((1, 1, 1), 2.0))}}


def expected(loss, per_example):
    """E over z of loss(z)."""
    z = jnp.asarray(NODES)[:, None]
    z = jnp.broadcast_to(z[:, None], (len(NODES), N, 1)) if per_example else z
    return jnp.asarray(WEIGHTS) @ jax.vmap(loss)(z)


def minimiser(loss, size):
    """The minimiser of a quadratic."""

    @jax.jit
    def solve():
        zero = jnp.zeros(size)
        return -jnp.linalg.solve(jax.hessian(loss)(zero), jax.grad(loss)(zero))

    return np.asarray(solve())


def fit_response(made, sigma, w):
    """The J that the expected response loss is least at."""

    def loss(slope):
        return expected(
            lambda z: made.response(slope[None], w, (), jnp.array([L0]), jnp.array([sigma]), z, KEY, TRAIN)[0], False
        )

    return minimiser(loss, D)


def test_oracle_1_slope_is_the_derivative():
    ends = [best_w(L0 + h) for h in (1e-5, -1e-5)]
    np.testing.assert_allclose(best_slope(L0), (ends[0] - ends[1]) / 2e-5, rtol=1e-8)
    ends = [loss_valid(best_w(L0 + h)) for h in (1e-5, -1e-5)]
    np.testing.assert_allclose(hypergradient(L0), (ends[0] - ends[1]) / 2e-5, rtol=1e-8)


def test_oracle_1_response_and_hypergradient():
    """Elementary and response losses are least at w* and dw*/dl, and then the validation slope is the hypergradient."""
    made = objectives(DENSE, per_example=False)
    mean = jnp.array([L0])
    w = minimiser(lambda w: made.elementary(w, (), mean, KEY, TRAIN)[0], D)
    np.testing.assert_allclose(w, best_w(L0), atol=1e-9)
    slope = fit_response(made, 1e-4, w)
    np.testing.assert_allclose(slope, best_slope(L0), atol=1e-6)

    def validation(made, params, response, noise):
        grad = jax.grad(lambda h: made.validation(h, params, response, (), mean, 1.0, noise, VALID))
        return grad(st.Hyper(mean, jnp.array([0.0]))).mean[0]

    per_example = objectives(LINEAR.apply, per_example=True)
    for found in (
        validation(made, jnp.asarray(w), jnp.asarray(slope)[None], jnp.zeros(1)),
        validation(per_example, row(w), gated(slope), jnp.zeros((N, 1))),
    ):
        np.testing.assert_allclose(found, hypergradient(L0), atol=1e-6)


def test_oracle_2_two_linear_layers():
    """A gate a hidden unit represents the response of ridge exactly: sigmoid(c - l), c = log(d^2 / N)."""
    U, d, Vt = np.linalg.svd(X, full_matrices=False)
    open_ = lambda level: 1 / (1 + np.exp(level) * N / d**2)  # noqa: E731
    s0 = U.T @ T / d
    np.testing.assert_allclose(Vt.T @ (open_(L0) * s0), best_w(L0), atol=1e-12)
    slope = -open_(L0) * (1 - open_(L0))
    np.testing.assert_allclose(Vt.T @ (slope * s0), best_slope(L0), atol=1e-12)

    def network(x):
        hidden = hk.Linear(D, with_bias=False)(x)
        return hk.Linear(1, with_bias=False)(hidden)[:, 0]

    net = st.lift(hk.without_apply_rng(hk.transform(network)))
    params = {"linear": {"w": jnp.asarray(Vt.T * open_(L0))}, "linear_1": {"w": jnp.asarray(s0[:, None])}}
    response = {
        "linear": {"w": st.Gated(jnp.asarray(Vt.T), jnp.asarray(slope[None, None]))},
        "linear_1": {"w": st.Gated(jnp.ones((D, 1)), jnp.zeros((1, 1, 1)))},
    }
    delta = jnp.asarray(RNG.normal(size=(N, 1)))
    for linear in (True, False):
        best = st.BestResponse(params, response, delta, linear)
        np.testing.assert_allclose(net.apply(best, X), X @ best_w(L0) + X @ best_slope(L0) * delta[:, 0], atol=1e-6)

    def train_loss(params, hparams, key, batch):
        squares = jnp.sum(jnp.square(net.apply(params, jnp.asarray(EYE))))  # of the product of the two weights
        return 0.5 * (net.apply(params, batch[0]) - batch[1]) ** 2 + 0.5 * hparams["l2"] * squares

    made = st.make_objectives({"l2": st.log(float(np.exp(L0)), per_example=False)}, train_loss, None)
    sigma = 1e-4

    @jax.jit
    def gradients():
        loss = lambda r: expected(  # noqa: E731
            lambda z: made.response(r, params, (), jnp.array([L0]), jnp.array([sigma]), z, KEY, TRAIN)[0], False
        )
        elementary = lambda p: made.elementary(p, (), jnp.array([L0]), KEY, TRAIN)[0]  # noqa: E731
        wrong = jax.tree.map(lambda x: 1.1 * x, response)
        return jax.grad(elementary)(params), jax.grad(loss)(response), jax.grad(loss)(wrong)

    elementary, right, wrong = gradients()
    size = lambda tree: max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(tree))  # noqa: E731
    assert size(elementary) < 1e-12
    assert size(right) / sigma**2 < 1e-6
    assert size(wrong) / sigma**2 > 1e-3


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_oracle_3_delta_stn(sigma):
    w0, slope = finite_sigma(L0, sigma, centred=True)
    made = objectives(DENSE, per_example=False)
    np.testing.assert_allclose(fit_response(made, sigma, w0), slope, atol=1e-6)

    # The same through the lift, each example with a perturbation of its own.
    lifted = objectives(LINEAR.apply, per_example=True)

    @jax.jit
    def gradient(response):
        loss = lambda r: expected(  # noqa: E731
            lambda z: lifted.response(r, row(w0), (), jnp.array([L0]), jnp.array([sigma]), z, KEY, TRAIN)[0], True
        )
        return jax.grad(loss)(response)

    assert all(float(jnp.max(jnp.abs(g))) < 1e-6 * sigma**2 for g in jax.tree.leaves(gradient(gated(slope))))
    assert any(float(jnp.max(jnp.abs(g))) > 1e-3 * sigma**2 for g in jax.tree.leaves(gradient(gated(1.1 * slope))))


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_oracle_3_stn(sigma):
    made = objectives(DENSE, per_example=False, centred=False)
    w0, slope = finite_sigma(L0, sigma, centred=False)

    def loss(flat):  # the original form responds to l itself: w0 is what its parameters make of the mean
        both = (flat[:D] - L0 * flat[D:], flat[None, D:])
        one = lambda z: made.joint(both, (), jnp.array([L0]), jnp.array([sigma]), z, KEY, TRAIN)[0]  # noqa: E731
        return expected(one, False)

    found = minimiser(loss, 2 * D)
    np.testing.assert_allclose(found[:D], w0, atol=1e-6)
    np.testing.assert_allclose(found[D:], slope, atol=1e-6)
    assert np.max(np.abs(w0 - best_w(L0))) > 1e-4  # its bias, which centring removes


def test_corrected_response_is_biased_in_fourth_order():
    plain, corrected = (objectives(DENSE, False, correct_bias=c) for c in (False, True))
    error = lambda made, sigma: np.linalg.norm(fit_response(made, sigma, best_w(L0)) - best_slope(L0))  # noqa: E731
    assert 3.8 < error(plain, 0.1) / error(plain, 0.05) < 4.2
    assert 15 < error(corrected, 0.1) / error(corrected, 0.05) < 17
    assert error(corrected, 0.5) < 0.25 * error(plain, 0.5)


def test_bias_weights_count_the_hyperparameters_that_respond():
    """One of three: E[c z^2] = 1 and E[c z^4] = 0, by Gauss's quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    noise = jnp.asarray(np.stack([nodes, 0 * nodes, 0 * nodes], axis=1))
    c = weights / weights.sum() * st.bias_weights(noise, 1)
    np.testing.assert_allclose([c @ nodes**2, c @ nodes**4], [1, 0], atol=1e-5)


def test_one_gated_row_cannot_hold_many_hyperparameters():
    """Ridge with a weight a feature: dw*/dl has full rank, one output unit's response rank one."""
    levels = np.linspace(-1.0, 1.0, D)
    slopes = np.linalg.inv(A + np.diag(np.exp(levels))) @ np.diag(-np.exp(levels))  # times w: dw_i / dl_j
    w = np.linalg.solve(A + np.diag(np.exp(levels)), BT)
    slopes = (slopes * w[None]).T  # [H, D]
    exact = slopes @ XV.T @ (XV @ w - TV) / N
    specs = {"l2": [st.log(float(np.exp(level)), per_example=False) for level in levels]}
    mean, sigma = jnp.asarray(levels), jnp.full(D, 1e-3)
    # Quadratic in sigma z: plus and minus sqrt(H) along each axis have the moments of z up to the third.
    points = jnp.asarray(np.sqrt(D) * np.concatenate([EYE, -EYE]))

    def fitted(predict, params, response, weights_of, fit):
        def train_loss(params, hparams, key, batch):
            penalty = jnp.stack(hparams["l2"]) @ jnp.square(weights_of(st.materialise(params)))
            return 0.5 * (predict(params, batch[0]) - batch[1]) ** 2 + 0.5 * penalty

        made = st.make_objectives(specs, train_loss, lambda p, b: 0.5 * (predict(p, b[0]) - b[1]) ** 2)
        flat, unravel = jax.flatten_util.ravel_pytree(response)

        def loss(flat):
            one = lambda z: made.response(unravel(flat), params, (), mean, sigma, z, KEY, TRAIN)[0]  # noqa: E731
            return jnp.mean(jax.vmap(one)(points)) / sigma[0] ** 2

        found = unravel(jnp.asarray(fit(loss, flat)))
        grad = jax.grad(lambda h: made.validation(h, params, found, (), mean, 1.0, jnp.zeros(D), VALID))
        return st.to_dense(params, found), grad(st.Hyper(mean, jnp.zeros(D))).mean

    def descend(loss, flat):
        step = lambda x, _: (x - 0.1 * jax.grad(loss)(x), None)  # noqa: E731
        return jax.jit(lambda x: jax.lax.scan(step, x, length=2000)[0])(flat)

    dense, gradient = fitted(
        *(DENSE, jnp.asarray(w), jnp.zeros((D, D)), lambda w: w), lambda loss, x: minimiser(loss, x.size)
    )
    np.testing.assert_allclose(dense, slopes, atol=1e-5)
    np.testing.assert_allclose(gradient, exact, atol=1e-5)

    start = {"linear": {"w": st.Gated(jnp.asarray(w)[:, None], -jnp.ones((D, 1, 1)))}}
    rank_one, gradient = fitted(LINEAR.apply, row(w), start, lambda p: p["linear"]["w"][:, 0], descend)
    rank_one = np.asarray(rank_one["linear"]["w"][..., 0])
    assert np.linalg.matrix_rank(rank_one, tol=1e-9) == 1
    left = np.sqrt(np.sum(np.linalg.svd(slopes)[1][1:] ** 2))  # Eckart-Young: nothing of rank one comes closer
    assert np.linalg.norm(rank_one - slopes) >= left > 0.1 * np.linalg.norm(slopes)
    assert np.linalg.norm(gradient - exact) > 0.1 * np.linalg.norm(exact)
