"""Hypergradients through the last steps: against finite differences, closed forms, and runs from bad rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt import self_tuning as st

N, D, KEY = 20, 3, jax.random.key(0)
RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(2, N, D)), RNG.normal(size=D)
T = X @ W + 0.3 * RNG.normal(size=(2, N))
PREDICT = st.dense_lift(lambda w, x: jnp.tanh(x @ w))


def loss(w, batch):
    return 0.5 * (PREDICT(w, batch[0]) - batch[1]) ** 2


def train_loss(w, hparams, key, batch):
    return loss(w, batch) + 0.5 * hparams.get("l2", 0.0) * st.squared_norm(w)


def data(dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), ((X[0], np.tanh(T[0])), (X[1], np.tanh(T[1]))))


def made(specs, weights, **options):
    return st.tuner(specs, train_loss, loss, lambda d, k: d[0], lambda d, k: d[1], weights=weights, **options)


def through(start, **options):
    return st.log(start, by="hypergradient", **options)


SPECS = {"rate": through(0.03), "momentum": st.logit(0.8, by="hypergradient")}
WEIGHTS = {
    "sgd": lambda h: optax.sgd(h["rate"], momentum=h["momentum"]),
    "adam": lambda h: optax.adam(h["rate"], b1=h["momentum"]),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_with_full_memory_it_is_the_derivative_of_the_whole_run(name):
    """10 steps in 2 cycles, none of them a validation step; central differences in float64."""
    with jax.enable_x64(True):
        tuner = made(SPECS, WEIGHTS[name], memory=1.0, warmup=9)
        w = jnp.full(D, 0.1)

        @jax.jit
        def ended(mean):
            state = tuner.init(w, st.dense_response(w, 2))
            state = state._replace(hyper=state.hyper._replace(mean=mean))
            return tuner.run(state, KEY, data(jnp.float64), 2)[0]

        mean, _ = st.hyperparameters.start(SPECS)
        trace, step = ended(mean).trace[0], 1e-5
        for i, direction in enumerate(jnp.eye(2)):
            ahead, behind = (ended(mean + sign * step * direction).params for sign in (1, -1))
            np.testing.assert_allclose(trace[i], (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-10)


def test_without_memory_it_is_the_last_steps_own():
    """One step of gradient descent moves by -rate * gradient, whose derivative by the rate's logarithm is the same."""
    with jax.enable_x64(True):
        tuner = made({"rate": through(0.03)}, lambda h: optax.sgd(h["rate"]), memory=0.0, warmup=9)
        state = tuner.init(jnp.full(D, 0.1), st.dense_response(jnp.zeros(D), 1))
        before = made({"rate": through(0.03)}, lambda h: optax.sgd(h["rate"]), memory=0.0, warmup=9, train_steps=4)
        w = before.run(state, KEY, data(jnp.float64), 1)[0].params
        state, _ = tuner.run(state, KEY, data(jnp.float64), 1)
        np.testing.assert_allclose(state.trace[0][0], state.params - w, rtol=1e-10)


def test_the_validation_step_descends_along_it():
    with jax.enable_x64(True):
        specs = {"rate": through(0.03)}
        tuner = made(specs, lambda h: optax.sgd(h["rate"]), memory=1.0, hyper=optax.sgd(0.1))
        state = tuner.init(jnp.full(D, 0.1), st.dense_response(jnp.zeros(D), 1))
        start = state.hyper.mean
        state, _ = tuner.run(state, KEY, data(jnp.float64), 1)

        def after(mean):
            w = jnp.full(D, 0.1)
            for _ in range(5):
                w = w - jnp.exp(mean[0]) * jax.grad(lambda w: jnp.mean(loss(w, data(jnp.float64)[0])))(w)
            return jnp.mean(loss(w, data(jnp.float64)[1]))

        expected = start - 0.1 * jax.jit(jax.grad(after))(start)
        np.testing.assert_allclose(state.hyper.mean, expected, rtol=1e-9)
        np.testing.assert_array_equal(state.hyper.scale, st.hyperparameters.start(specs)[1])


def test_both_mechanisms_in_one_run():
    """The rate rises from far too low, l2 is tuned by the response as if the rate were fixed; gates know no rate."""
    specs = {"l2": st.log(0.5, per_example=False, scale=0.1), "rate": through(1e-4)}
    fixed = {**specs, "rate": through(1e-4, tuned=False)}
    ended = {}
    for name, chosen in (("tuned", specs), ("fixed", fixed)):
        tuner = made(chosen, lambda h: optax.adam(h["rate"]), response=optax.adam(0.01), hyper=optax.adam(0.03))
        w = jnp.full(D, 0.1)
        state = tuner.init(w, st.dense_response(w, len(st.names(chosen))))
        ended[name], info = tuner.run(state, KEY, data(jnp.float32), 150)
        assert not np.any(info.skipped)
    assert float(st.values(specs, ended["tuned"].hyper.mean)["rate"]) > 1e-3
    assert float(ended["tuned"].best.loss) < 0.8 * float(ended["fixed"].best.loss)
    assert not np.any(ended["tuned"].response[1])
    assert np.any(ended["tuned"].response[0])
    assert len(ended["fixed"].trace) == 0


def test_a_rate_alone_needs_no_response():
    tuner = made({"rate": through(1.0)}, lambda h: optax.sgd(h["rate"]), hyper=optax.adam(0.05))
    state = tuner.init(jnp.full(D, 0.1), {})
    state, info = tuner.run(state, KEY, data(jnp.float32), 20)
    np.testing.assert_array_equal(info.response_loss, info.train_loss)
    schedule = st.from_run({"rate": through(1.0)}, info, 5)
    replay = st.replay(schedule, train_loss, lambda d, k: d[0], lambda h: optax.sgd(h["rate"]))
    _, losses = replay.run(replay.init(jnp.full(D, 0.1)), KEY, data(jnp.float32), 100)
    np.testing.assert_allclose(losses.reshape(20, 5)[0].mean(), info.train_loss[0], rtol=1e-2)  # rates in between


def test_a_parameter_without_a_gradient_does_not_stop_it():
    """Adam's second moment stays 0 there, as of a dead unit; the rate's course is that of the run without it."""
    ended = []
    for width in (D, D + 1):
        tuner = made({"rate": through(1e-3)}, lambda h: optax.adam(h["rate"]), hyper=optax.adam(0.05))
        state = tuner.init(jnp.full(width, 0.1), {})
        wider = [(jnp.pad(x, [(0, 0), (0, width - D)]), t) for x, t in data(jnp.float32)]
        ended.append(tuner.run(state, KEY, wider, 20)[0].hyper.mean)
    np.testing.assert_allclose(*ended, rtol=1e-5)
    assert ended[0] > np.log(2e-3)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="momentum, rate: tuned by hypergradient, so weights must be a function"):
        made(SPECS, optax.adam(0.1))
    with pytest.raises(ValueError, match="delta_stn"):
        made(SPECS, WEIGHTS["adam"], method="stn")
    with pytest.raises(ValueError, match="memory"):
        made(SPECS, WEIGHTS["adam"], memory=1.5)
    with pytest.raises(ValueError, match="one of"):
        st.log(1.0, by="gradient")
    with pytest.raises(ValueError, match="discrete"):
        st.interval(1.5, 0.0, 4.0, discrete=True, by="hypergradient")
    assert "by hypergradient" in st.describe(SPECS)
    assert st.from_json(st.to_json(SPECS)) == SPECS
