"""The tuner: ridge to its optimum, resume, guard, best pairs, options, and gradients through it."""

import flax
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import learned_opt
from learned_opt import self_tuning as st
from learned_opt.self_tuning.hyperparameters import span
from learned_opt.self_tuning.tuner import balanced

N, D = 12, 4
RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(2, N, D)), RNG.normal(size=D)
T = X @ W + 0.8 * RNG.normal(size=(2, N))
SPECS = {"l2": st.log(0.5, per_example=False, scale=0.1)}
PREDICT = st.dense_lift(lambda w, x: x @ w)
KEY = jax.random.key(0)


def data(dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), ((X[0], T[0]), (X[1], T[1])))


def train_loss(w, hparams, key, batch):
    return jnp.mean(0.5 * (PREDICT(w, batch[0]) - batch[1]) ** 2) + 0.5 * hparams["l2"] * st.squared_norm(w)


def valid_loss(w, batch):
    return jnp.mean(0.5 * (PREDICT(w, batch[0]) - batch[1]) ** 2)


def ridge(specs=SPECS, train=train_loss, **options):
    options = {"weights": optax.adam(0.02)} | options
    return st.tuner(specs, train, valid_loss, lambda d, k: d[0], lambda d, k: d[1], **options)


def start(made, hyperparameters=1, dtype=jnp.float32):
    w = jnp.zeros(D, dtype)
    return made.init(w, st.dense_response(w, hyperparameters))


def optimum():
    """The best l, by a fine grid."""
    A, b = X[0].T @ X[0] / N, X[0].T @ T[0] / N
    grid = np.linspace(-6, 3, 9001)
    losses = [np.mean((X[1] @ np.linalg.solve(A + np.exp(level) * np.eye(D), b) - T[1]) ** 2) for level in grid]
    return grid[int(np.argmin(losses))]


def test_ridge_reaches_the_optimum_from_both_sides_in_either_form():
    """Vmapped over starts and seeds; steps decay to 0, the perturbations' noise left is below the tolerance."""
    assert -3 < optimum() < 0
    cycles = 1500
    for method, tolerance in (("delta_stn", 0.005), ("stn", 0.3)):
        decay = lambda steps: optax.adam(optax.cosine_decay_schedule(0.02, cycles * steps))  # noqa: E731
        made = ridge(weights=decay(5), hyper=decay(1), method=method, tune_scale=False, warmup=20)

        def run(level, seed, made=made):
            state = start(made)
            state = state._replace(hyper=state.hyper._replace(mean=level[None]))
            return made.run(state, jax.random.key(seed), data(), cycles)[1].mean[-1, 0]

        found = jax.jit(jax.vmap(run))(jnp.array([-4.0, -4.0, 2.0, 2.0]), jnp.arange(4))
        np.testing.assert_allclose(found, optimum(), atol=tolerance)


@pytest.fixture(scope="module")
def short():
    made = ridge(warmup=2, entropy=0.1)
    return made, made.run(start(made), KEY, data(), 8)


def test_a_resumed_run_goes_on_exactly(short):
    made, (whole, info) = short
    state, first = made.run(start(made), KEY, data(), 4)
    leaves, tree = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    state = jax.tree.unflatten(tree, [jnp.asarray(np.array(leaf)) for leaf in leaves])  # through storage
    state, second = made.run(state, KEY, data(), 4)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.concatenate([first.mean, second.mean]), info.mean)


def test_the_best_weights_keep_their_hyperparameters(short):
    _, (state, info) = short
    best = int(np.argmin(info.valid_loss))
    np.testing.assert_allclose(state.best.loss, info.valid_loss[best], rtol=1e-6)
    np.testing.assert_allclose(valid_loss(state.best.params, data()[1]), state.best.loss, rtol=1e-5)
    np.testing.assert_array_equal(state.best.hyper.mean, info.mean[best])


def test_warmup_holds_the_hyperparameters_and_the_entropy_widens_them(short):
    _, (_, info) = short
    np.testing.assert_array_equal(info.mean[:3], jnp.full((3, 1), jnp.log(0.5)))
    assert np.all(np.diff(info.mean[2:, 0]) != 0)
    np.testing.assert_allclose(info.sigma[:3], 0.1, rtol=1e-6)
    assert np.all(np.diff(info.sigma[2:, 0]) > 0)
    assert info.skipped.sum() == 0
    assert not info.rolled_back.any()


def test_the_guard_ends_a_divergence():
    """Steps of 3 / r diverge without bound; with the guard they are halved until they do not."""
    options = {"weights": optax.sgd(6.0), "response": optax.adam(0.01)}
    bare = ridge(guard=None, **options)
    state, _ = bare.run(start(bare), KEY, data(), 60)
    assert not float(valid_loss(state.params, data()[1])) < 1e3
    made = ridge(guard=3.0, **options)
    state, info = made.run(start(made), KEY, data(), 60)
    assert info.rolled_back.sum() >= 2
    assert float(state.best.loss) < 0.5 * float(valid_loss(jnp.zeros(D), data()[1]))
    assert np.isfinite(info.mean).all()
    assert float(state.damping) < 0.5
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((state.params, state.response)))


def test_a_response_that_diverged_is_no_best_state():
    """In the centred form the parameters' loss falls on while the response is far off."""
    made = ridge(guard=3.0, weights=optax.sgd(0.02), response=optax.sgd(0.02))
    state, _ = made.run(start(made), KEY, data(), 4)
    state, before = state._replace(response=state.response + 1e6), state.best
    state, info = made.run(state, KEY, data(), 4)
    assert info.rolled_back.tolist() == [True, False, False, False]
    assert float(jnp.abs(state.response).max()) < 10
    assert float(state.best.loss) < float(before.loss)


def test_steps_without_a_finite_gradient_are_left_out():
    def broken(w, hparams, key, batch):
        bad = jax.random.bernoulli(key, 0.3)
        return train_loss(w, hparams, key, batch) * jnp.where(bad, jnp.nan, 1.0)

    made = ridge(train=broken, guard=None)
    state, info = made.run(start(made), KEY, data(), 20)
    assert 10 < int(info.skipped.sum()) < 50  # 100 draws at .3, 4 standard errors
    assert np.isfinite(state.params).all()
    assert np.isfinite(state.hyper.mean).all()


def test_trust_bounds_a_step_and_annealing_scales_sigma():
    made = ridge(hyper=optax.sgd(1e6), trust=0.5, anneal=lambda cycle: 0.5**cycle, tune_scale=False)
    state, info = made.run(start(made), KEY, data(), 4)
    np.testing.assert_allclose(info.sigma[:, 0], 0.1 * 0.5 ** np.arange(4), rtol=1e-5)
    moves = np.abs(np.diff(np.append(info.mean[:, 0], state.hyper.mean)))
    np.testing.assert_allclose(moves, 0.05 * 0.5 ** np.arange(4), rtol=1e-3)


def test_the_validation_perturbations_sum_to_zero():
    for rows in (6, 7):
        (noise,) = balanced(jax.random.normal(KEY, (rows, 2)))
        assert noise.shape == (rows, 2)
        np.testing.assert_allclose(jnp.sum(noise, 0), noise[3] * (rows % 2), atol=1e-6)
    one, other = balanced(jnp.array([0.5, -2.0]))
    np.testing.assert_array_equal(one, -other)


def test_a_sigmoid_s_flat_ends_are_not_entered_and_a_start_there_is_kept():
    specs = {"a": st.logit(0.5), "b": st.interval(1.001, 1.0, 3.0), "c": st.log(0.5)}
    low, high = span(specs)
    np.testing.assert_allclose(high, [5, np.log(1.999 / 0.001), np.inf], rtol=1e-4)
    np.testing.assert_array_equal(low, -high)
    made = ridge({"l2": st.logit(0.5, per_example=False, scale=0.1)}, hyper=optax.sgd(1e6), trust=None)
    _, info = made.run(start(made), KEY, data(), 4)
    np.testing.assert_allclose(np.abs(info.mean[1:, 0]), 5)


def test_fixed_hyperparameters_stay_and_many_are_tuned_at_once():
    specs = {
        "l2": [st.log(0.5, per_example=False), st.positive(0.2), st.log(9.0, tuned=False)],
        "noise": st.interval(0.1, 0.0, 1.0),
    }
    seen = []

    def train(w, hparams, key, batch):
        seen.append(jax.tree.map(jnp.shape, hparams))
        x = st.regularisers.input_noise(key, batch[0], hparams["noise"])
        penalty = sum(jnp.mean(l2 * st.squared_norm(w)) for l2 in hparams["l2"])
        return 0.5 * (PREDICT(w, x) - batch[1]) ** 2 + 0.5 * penalty

    half = lambda batch: jax.tree.map(lambda x: x[: N // 2], batch)  # noqa: E731
    made = ridge(specs, train, response_batch=half)
    _, info = made.run(start(made, 3), KEY, data(), 3)
    assert info.mean.shape == (3, 3)
    assert {"l2": [(), (N,), ()], "noise": (N,)} in seen
    assert {"l2": [(), (N // 2,), ()], "noise": (N // 2,)} in seen
    assert np.all(info.mean[0] != info.mean[2])


def test_a_learned_rule_trains_the_weights_and_is_given_the_loss():
    rule = learned_opt.RULES["celo2"]()
    learned = rule.build(rule.init(jax.random.key(1)))
    given = []

    def update(grads, state, params=None, *, value, **extra):
        given.append(value.shape)
        return learned.update(grads, state, params, value=value, **extra)

    made = ridge(weights=optax.chain(optax.GradientTransformationExtraArgs(learned.init, update), optax.scale(0.01)))
    state, _ = made.run(start(made), KEY, data(), 2)
    assert given
    assert set(given) == {()}
    assert np.any(state.params)


@pytest.mark.parametrize("method", ["delta_stn", "stn"])
def test_meta_gradients_equal_finite_differences(method):
    """Of the validation loss after cycles, with respect to the weights' learning rate and the start of l."""
    with jax.enable_x64(True):

        def outcome(theta):
            made = ridge(
                weights=optax.sgd(jnp.exp(theta[0])),
                response=optax.sgd(5.0 if method == "delta_stn" else 0.1),
                hyper=optax.sgd(0.5),
                trust=None,
                guard=None,
                method=method,
                train_steps=3,
            )
            state = start(made, dtype=jnp.float64)
            state = state._replace(hyper=state.hyper._replace(mean=theta[1:]))
            state, _ = made.run(state, KEY, data(jnp.float64), 4)
            return valid_loss(state.params, data()[1]) + jnp.sum(state.hyper.mean**2)

        theta = jnp.array([-1.5, -1.0])
        run = jax.jit(jax.value_and_grad(outcome))
        grad = run(theta)[1]
        assert grad.dtype == jnp.float64
        for i in range(2):
            step = jnp.zeros(2).at[i].set(1e-5)
            slope = (run(theta + step)[0] - run(theta - step)[0]) / 2e-5
            np.testing.assert_allclose(grad[i], slope, rtol=1e-6)
            assert abs(slope) > 1e-3


def test_a_network_with_state_dropout_and_per_example_hyperparameters():
    def network(x, rate, training):
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(8)(x), training)
        x = jnp.tanh(x)
        if training:
            x = st.regularisers.dropout(hk.next_rng_key(), x, rate)
        return hk.Linear(1)(x)[:, 0]

    net = st.lift(hk.transform_with_state(network))
    specs = {"dropout": st.logit(0.2), "l2": st.log(1e-2)}

    def train(params, net_state, hparams, key, batch):
        out, net_state = net.apply(params, net_state, key, batch[0], hparams["dropout"], True)
        return (out - batch[1]) ** 2 + hparams["l2"] * st.squared_norm(params, ["linear", "linear_1"]), net_state

    def valid(params, net_state, batch):
        return (net.apply(params, net_state, None, batch[0], 0.0, False)[0] - batch[1]) ** 2

    made = st.tuner(
        *(specs, train, valid, lambda d, k: d[0], lambda d, k: d[1]),
        weights=optax.adam(0.01),
        stateful=True,
        correct_bias=True,
    )

    @jax.jit
    def begin(key):
        params, net_state = net.init(key, data()[0][0], 0.0, True)
        return made.init(params, net.init_response(key, 2, data()[0][0], 0.0, True), net_state)

    first = begin(KEY)
    state, info = made.run(first, KEY, data(), 30)
    assert float(info.valid_loss[-1]) < float(info.valid_loss[0])
    assert np.all(info.mean[-1] != info.mean[0])
    assert int(state.net_state["batch_norm/~/mean_ema"]["counter"]) == 30 * 5
    assert info.skipped.sum() == 0


def test_mistakes_are_named():
    for options, message in (
        ({"method": "adam"}, "method must be one of"),
        ({"train_steps": 0}, "train_steps must be at least 1"),
        ({"scale_range": (1.0, 0.5)}, "scale_range"),
        ({"guard": 0.0}, "guard must be above 0"),
        ({"method": "stn", "correct_bias": True}, "belong to method='delta_stn'"),
    ):
        with pytest.raises(ValueError, match=message):
            ridge(**options)
    with pytest.raises(ValueError, match="no hyperparameter is tuned"):
        start(ridge({"l2": st.log(1.0, tuned=False)}))
    made = ridge(
        {"l2": st.log(1.0)}, lambda w, h, k, b: jnp.mean(h["l2"]) * jnp.sum(PREDICT(w, b[0])), correct_bias=True
    )
    with pytest.raises(ValueError, match="one loss an example"):
        made.run(start(made), KEY, data(), 1)


def test_a_state_is_donated_from_the_start():
    made = ridge()
    w = jnp.zeros(D)
    state = made.init(w, st.dense_response(w, 1))
    step = jax.jit(made.cycle, donate_argnums=0)
    for key in jax.random.split(KEY, 2):
        state, _ = step(state, key, data())
    assert int(state.cycle) == 2
    assert not w.is_deleted()


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(jnp.tanh(nn.Dense(3)(x)))


def test_a_flax_network_is_tuned_as_the_same_haiku_network():
    flax = st.lift(Mlp())
    haiku = st.lift(hk.without_apply_rng(hk.transform(lambda x: hk.Linear(1)(jnp.tanh(hk.Linear(3)(x))))))
    x = data()[0][0]
    params = flax.init(jax.random.key(0), x)["params"]
    response = flax.init_response(jax.random.key(1), 2, x)
    specs = {"noise": st.interval(0.1, 0.0, 1.0), "l2": st.log(0.1, per_example=False)}
    names = {"Dense_0": "linear", "Dense_1": "linear_1", "kernel": "w", "bias": "b"}
    named = lambda tree: {names[m]: {names[n]: x for n, x in own.items()} for m, own in tree.items()}  # noqa: E731

    def ended(apply, params, response):
        def train_loss(params, hparams, key, batch):
            noisy = st.regularisers.input_noise(key, batch[0], hparams["noise"])
            return (apply(params, noisy)[:, 0] - batch[1]) ** 2 + hparams["l2"] * st.squared_norm(params)

        def valid_loss(params, batch):
            return (apply(params, batch[0])[:, 0] - batch[1]) ** 2

        made = st.tuner(specs, train_loss, valid_loss, lambda d, k: d[0], lambda d, k: d[1], weights=optax.adam(0.01))
        state, info = made.run(made.init(params, response), KEY, data(), 4)
        return state.params, state.response, state.hyper, info.valid_loss

    ours = ended(lambda params, x: flax.apply({"params": params}, x), params, response)
    theirs = ended(haiku.apply, named(params), named(response))
    ours = (named(ours[0]), named(ours[1]), *ours[2:])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("valid_steps", [1, 2, 4])
def test_validation_steps_of_a_cycle_go_on_along_one_response(valid_steps):
    """Weights that follow l exactly, from 0 to the best validation's 1: each step halves what is left."""
    still = {"weights": optax.sgd(0.0), "response": optax.sgd(0.0), "hyper": optax.sgd(0.5)}
    made = st.tuner(
        {"l2": st.log(1.0, per_example=False, scale=1e-3)},
        lambda w, hparams, key, batch: jnp.mean(PREDICT(w, batch)) * hparams["l2"],
        lambda w, batch: jnp.mean(0.5 * (PREDICT(w, batch) - 1) ** 2),
        *(lambda d, k: d,) * 2,
        **still,
        valid_steps=valid_steps,
        tune_scale=False,
        trust=None,
    )
    state = made.init(jnp.zeros(1), st.dense_response(jnp.zeros(1), 1))
    state = state._replace(response=jax.tree.map(jnp.ones_like, state.response))
    state, _ = made.cycle(state, KEY, jnp.ones((2, 1)))
    np.testing.assert_allclose(state.hyper.mean, 1 - 0.5**valid_steps, atol=1e-5)


def test_a_run_that_goes_back_goes_on_with_its_optimizers():
    """A schedule of the rate would otherwise begin again."""
    made = ridge(weights=optax.chain(optax.sgd(6.0), optax.scale_by_schedule(lambda count: 1.0)), guard=3.0)
    state, info = made.run(start(made), KEY, data(), 30)
    assert info.rolled_back.any()
    best, taken = (np.inf, 0), 0  # the least loss and the steps that led to it; the steps that led here
    for loss, back in zip(info.valid_loss, info.rolled_back, strict=True):
        taken += 5
        best = min(best, (float(loss), taken), key=lambda pair: pair[0] if np.isfinite(pair[0]) else np.inf)
        taken = best[1] if back else taken
    assert [int(count) for count in jax.tree.leaves(state.weights_opt)] == [taken]


def test_the_response_s_loss_is_reported_without_the_weights_of_its_bias():
    infos = [
        made.run(start(made), KEY, data(), 1)[1]
        for made in (ridge(correct_bias=corrected, scale_range=(1e-4, 1.0)) for corrected in (False, True))
    ]
    np.testing.assert_allclose(infos[1].response_loss, infos[0].response_loss, rtol=1e-2)


def test_an_output_of_whole_numbers_has_no_response():
    both = st.dense_lift(lambda w, x: (x @ w, jnp.argmax(x, -1)))
    w = jnp.ones(3)
    phi = jax.tree.map(lambda x: x + 1.0, st.dense_response(w, 2))
    outputs, places = both(st.BestResponse(w, phi, jnp.ones((4, 2)), linear=True), jnp.eye(4, 3))
    np.testing.assert_array_equal(places, jnp.argmax(jnp.eye(4, 3), -1))
    assert outputs.shape == (4,)


def test_flax_networks_keep_their_types_and_take_every_filter():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm()(nn.Dense(4, dtype=jnp.bfloat16)(x))

    x, module = jnp.ones((2, 3)), Mixed()
    net, params = st.lift(module), module.init(KEY, x)["params"]
    still = st.BestResponse(params, net.init_response(KEY, 1, x), jnp.zeros((2, 1)), linear=True)
    plain, lifted = (net.apply({"params": p}, x) for p in (params, still))
    assert plain.dtype == lifted.dtype == jnp.float32
    np.testing.assert_allclose(lifted, plain, atol=1e-6)
    out, state = net.apply({"params": still}, x, mutable=flax.core.DenyList("params"))
    np.testing.assert_allclose(out, plain, atol=1e-6)
    assert not state
