"""The lift against the dense lift by jvp, for every kind of module, in float64."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from learned_opt import self_tuning as st
from learned_opt.self_tuning import flax_modules
from learned_opt.self_tuning.haiku_modules import MODULES
from learned_opt.self_tuning.response import BestResponse

B, H = 3, 2


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def attention(x):
    return hk.MultiHeadAttention(2, 3, w_init=hk.initializers.VarianceScaling())(x, x, jnp.flip(x, 1))


def lstm(x):
    core = hk.LSTM(4)
    return hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0]


def gru(x):
    core = hk.GRU(4)
    outputs, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
    return hk.BatchApply(hk.Linear(2))(outputs)


def embed(x):
    ids = jnp.argmax(x, -1)  # [B, T]
    one_hot = hk.Embed(x.shape[-1], 3, lookup_style="ONE_HOT")
    return hk.Linear(2)(hk.Embed(x.shape[-1], 3)(ids)) + jnp.sum(one_hot(ids), -1, keepdims=True)


def norms(x):
    x = hk.LayerNorm(-1, True, True)(hk.Linear(4)(x))
    x = hk.GroupNorm(2)(jnp.tanh(x))
    x = hk.RMSNorm(-1, create_scale=True)(x)
    return hk.Bias(bias_dims=[-1])(hk.InstanceNorm(True, True)(x), 0.5)


def convolutions(x):  # [B, H, W, C]
    x = jnp.tanh(hk.Conv2D(4, 3, stride=2, feature_group_count=2)(x))
    x = jnp.tanh(hk.Conv2DTranspose(3, 2, stride=2)(x))
    x = hk.LayerNorm((1, 2, 3), True, True, param_axis=(1, 3))(x)
    return hk.DepthwiseConv2D(2, 2, data_format="NHWC")(x)


def channels_first(x):  # [B, C, H, W]
    x = jnp.tanh(hk.Conv2D(4, 3, data_format="NCHW")(x))
    return hk.GroupNorm(2, data_format="NCHW")(hk.Conv2DTranspose(2, 2, data_format="NCHW")(x))


def conv1d(x):  # [B, T, C]
    x = jnp.tanh(hk.Conv1D(4, 3)(x))
    return hk.Conv1DTranspose(2, 3, stride=2)(x)


def conv3d(x):
    return hk.Conv3DTranspose(2, 2, with_bias=False)(jnp.tanh(hk.Conv3D(3, 2)(x)))


def remat(x):
    layer = hk.Linear(4)
    return hk.nets.MLP([3, 2], activation=jnp.tanh)(hk.remat(lambda y: jnp.tanh(layer(y)))(x))


class Scaled(hk.Linear):
    """A subclass whose call is not hk.Linear's, and calls it."""

    def __call__(self, inputs):
        return 2.0 * super().__call__(inputs)


class Flax(nn.Module):
    """A Flax network of a function."""

    function: Callable

    @nn.compact
    def __call__(self, x):
        return self.function(x)


class FlaxScaled(nn.Dense):
    """A subclass whose call is not nn.Dense's, and calls it."""

    def __call__(self, inputs):
        return 2.0 * super().__call__(inputs)


class FlaxSetup(nn.Module):
    """Layers made in setup, one used twice."""

    def setup(self):
        self.first = nn.Dense(4)
        self.second = nn.Dense(4, use_bias=False)

    def __call__(self, x):
        return self.second(jnp.tanh(self.second(jnp.tanh(self.first(x)))))


def flax_embed(x):
    return nn.Dense(2)(nn.Embed(x.shape[-1], 3)(jnp.argmax(x, -1)))


def flax_norms(x):
    x = nn.LayerNorm()(nn.Dense(4)(x))
    x = nn.GroupNorm(2)(jnp.tanh(x))
    x = nn.InstanceNorm()(nn.RMSNorm()(x))
    return nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1), use_bias=False)(x)


def flax_convolutions(x):
    x = jnp.tanh(nn.Conv(4, (3, 3), strides=2, feature_group_count=2)(x))
    x = jnp.tanh(nn.ConvTranspose(3, (2, 2), strides=(2, 2))(x))
    return nn.ConvTranspose(3, (2, 2), transpose_kernel=True)(x)


def flax_attention(x):
    return nn.MultiHeadDotProductAttention(2, qkv_features=6, out_features=5)(x, jnp.flip(x, 1))


def flax_remat(x):
    return nn.Dense(2)(nn.remat(nn.Dense)(3)(x))


# function or module, input shape, batch axis
NETWORKS = {
    "mlp": (lambda x: hk.nets.MLP([4, 3], activation=jnp.tanh)(x), (B, 4), 0),
    "rank 3": (lambda x: Scaled(2)(jnp.tanh(hk.Linear(4)(x))), (B, 2, 3), 0),
    "attention": (attention, (B, 2, 5), 0),
    "lstm": (lstm, (4, B, 2), 1),
    "gru": (gru, (4, B, 2), 1),
    "embed": (embed, (B, 4, 5), 0),
    "merged": (lambda x: hk.BatchApply(hk.nets.MLP([4, 3], activation=jnp.tanh))(x), (B, 2, 3), 0),
    "norms": (norms, (B, 2, 3), 0),
    "conv": (convolutions, (B, 4, 4, 2), 0),
    "channels first": (channels_first, (B, 2, 3, 3), 0),
    "conv1d": (conv1d, (B, 5, 2), 0),
    "conv3d": (conv3d, (B, 2, 3, 2, 2), 0),
    "remat": (remat, (B, 3), 0),
    "flax mlp": (Flax(lambda x: nn.Dense(3)(jnp.tanh(nn.Dense(4)(x)))), (B, 4), 0),
    "flax dense": (nn.Dense(3), (B, 4), 0),
    "flax setup": (FlaxSetup(), (B, 4), 0),
    "flax rank 3": (Flax(lambda x: FlaxScaled(2)(jnp.tanh(nn.DenseGeneral(4)(x)))), (B, 2, 3), 0),
    "flax attention": (Flax(flax_attention), (B, 2, 5), 0),
    "flax lstm": (Flax(lambda x: nn.RNN(nn.LSTMCell(3, param_dtype=jnp.float64))(x)), (B, 4, 2), 0),
    "flax lstm, time-major": (
        Flax(lambda x: nn.RNN(nn.LSTMCell(3, param_dtype=jnp.float64), time_major=True)(x)),
        (4, B, 2),
        1,
    ),
    "flax gru": (Flax(lambda x: nn.RNN(nn.GRUCell(3, param_dtype=jnp.float64))(x)), (B, 4, 2), 0),
    "flax embed": (Flax(flax_embed), (B, 4, 5), 0),
    "flax norms": (Flax(flax_norms), (B, 2, 3), 0),
    "flax conv": (Flax(flax_convolutions), (B, 4, 4, 2), 0),
    "flax remat": (Flax(flax_remat), (B, 3), 0),
    "mobile net block": (lambda x: hk.nets.MobileNetV1((1,), (8,), 3, use_bn=False)(x, True), (B, 4, 4, 3), 0),
}


def randomised(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape)), tree)


class Network(NamedTuple):
    """Either library's network as pure functions of its parameters."""

    init: Callable
    init_response: Callable
    apply: Callable


def setup(function, shape, batch_axis):
    """The plain network and the lifted one, an input, parameters and a response, of a function or a Flax module."""
    if isinstance(function, nn.Module):
        made = st.lift(function, in_axes=batch_axis, out_axes=batch_axis)
        own = lambda apply: lambda params, x: apply({"params": params}, x)  # noqa: E731
        init = lambda key, x: made.init(key, x)["params"]  # noqa: E731
        network, lifted = (Network(init, made.init_response, own(net.apply)) for net in (function, made))
    else:
        network = hk.without_apply_rng(hk.transform(function))
        lifted = st.lift(network, in_axes=batch_axis, out_axes=batch_axis)
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape))
    params = jax.eval_shape(lambda: lifted.init(jax.random.key(0), x))
    response = jax.eval_shape(lambda: lifted.init_response(jax.random.key(1), H, x))
    paths = lambda tree, leaf: {p for p, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=leaf)}  # noqa: E731
    assert paths(response, lambda x: isinstance(x, st.Gated)) == paths(params, None)
    return network, lifted, x, randomised(params), randomised(response, 2)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_lift_equals_the_dense_one(name):
    function, shape, batch_axis = NETWORKS[name]
    network, lifted, x, params, response = setup(function, shape, batch_axis)
    reference = st.dense_lift(network.apply, batch_axis=batch_axis)
    own = jnp.asarray(np.random.default_rng(3).normal(size=(B, H)))

    def pairs(params, response):
        yield from ((apply(BestResponse(params, response, own, True), x)) for apply in (lifted.apply, reference))
        shared = BestResponse(params, response, own[0])
        yield from (lifted.apply(shared, x), network.apply(st.materialise(shared), x))

    linear, dense_linear, out, dense_out = jax.jit(lambda p, r: list(pairs(p, r)))(params, response)
    np.testing.assert_allclose(linear, dense_linear, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(out, dense_out, rtol=1e-9, atol=1e-9)


def test_the_other_forms_equal_the_dense_one():
    network, lifted, x, params, response = setup(*NETWORKS["rank 3"])
    reference = st.dense_lift(network.apply)
    own = jnp.asarray(np.random.default_rng(3).normal(size=(B, H)))

    def pairs(params, response):
        for delta, linear in ((own, False), (own[0], True), (0 * own, True)):
            best = BestResponse(params, response, delta, linear)
            yield lifted.apply(best, x), reference(best, x)
        yield lifted.apply(BestResponse(params, response, 0 * own), x), network.apply(params, x)

    for ours, expected in jax.jit(lambda p, r: list(pairs(p, r)))(params, response):
        np.testing.assert_allclose(ours, expected, rtol=1e-9)


# Networks in which an axis could be taken for that of the examples: T is a multiple of B, or B itself.


def positions(x):
    return hk.Linear(3)(x) + hk.Embed(x.shape[1], 3)(jnp.arange(x.shape[1]))[None]


def learned_queries(x):
    queries = hk.Linear(4, name="query")(hk.Embed(2 * B, 4, name="queries")(jnp.arange(2 * B)))
    keys = hk.Linear(4, name="key")(x)
    return hk.Linear(2)(jax.nn.softmax(jnp.einsum("qd,btd->bqt", queries, keys), -1) @ keys)


def mapped(x):
    return hk.vmap(hk.nets.MLP([4, 3], activation=jnp.tanh), split_rng=False)(x)


def two_views(x):
    first, second = jnp.split(hk.nets.MLP([4, 3], activation=jnp.tanh)(jnp.concatenate([x, -x])), 2)
    return first * second


def interleaved_views(x):
    views = hk.Linear(3)(jnp.repeat(x, 2, axis=0) * jnp.array([1.0, -1.0] * len(x))[:, None])
    return jnp.tanh(views).reshape(len(x), 2, 3)[:, 0]


def time_major(x):
    core = hk.LSTM(4)
    out, _ = hk.dynamic_unroll(core, x.swapaxes(0, 1), core.initial_state(len(x)))
    return hk.Linear(2)(out).swapaxes(0, 1)


def flipped(x):
    return hk.Linear(2)(jnp.tanh(hk.Linear(3)(x[::-1])))[::-1]


def vector_a_layer(x):
    return jnp.tanh(hk.Linear(3)(x[0]))[None] if len(x) == 1 else jnp.tanh(hk.Linear(3)(x))


def flax_positions(x):
    return nn.Dense(3)(x) + nn.Embed(x.shape[1], 3)(jnp.arange(x.shape[1]))[None]


def flax_two_views(x):
    first, second = jnp.split(nn.Dense(3)(jnp.tanh(nn.Dense(4)(jnp.concatenate([x, -x])))), 2)
    return first * second


def flax_time_major(x):
    return nn.Dense(2)(nn.RNN(nn.LSTMCell(3, param_dtype=jnp.float64), time_major=True)(x.swapaxes(0, 1))).swapaxes(
        0, 1
    )


def flax_mapped(x):
    layer = nn.vmap(nn.Dense, in_axes=0, variable_axes={"params": None}, split_rngs={"params": False})
    return layer(3)(x)


AMBIGUOUS = {
    "positions, T = 2 B": (positions, (B, 2 * B, 4)),
    "positions, T = B": (positions, (B, B, 4)),
    "positions, T prime to B": (positions, (B, 5, 4)),
    "learned queries": (learned_queries, (B, 2, 4)),
    "hk.vmap over the batch": (mapped, (B, 4)),
    "two views": (two_views, (B, 4)),
    "interleaved views": (interleaved_views, (B, 4)),
    "time-major inside, T = B": (time_major, (B, B, 2)),
    "reversed batch": (flipped, (B, 4)),
    "flax positions, T = 2 B": (Flax(flax_positions), (B, 2 * B, 4)),
    "flax two views": (Flax(flax_two_views), (B, 4)),
    "flax time-major inside, T = B": (Flax(flax_time_major), (B, B, 2)),
    "flax nn.vmap over the batch": (Flax(flax_mapped), (B, 4)),
    "no batch axis inside": (vector_a_layer, (B, 4)),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
@pytest.mark.parametrize("linear", [False, True])
def test_every_example_alone_with_its_own_hyperparameters(name, linear):
    function, shape = AMBIGUOUS[name]
    network, lifted, x, params, response = setup(function, shape, 0)
    own = jnp.asarray(np.random.default_rng(3).normal(size=(B, H)))
    dense = st.to_dense(params, response)

    def alone(delta, row):
        step = jax.tree.map(lambda d: jnp.tensordot(delta, d, 1), dense)
        run = lambda p: network.apply(p, row[None])[0]  # noqa: E731
        if not linear:
            return run(jax.tree.map(jnp.add, params, step))
        return sum(jax.jvp(run, (params,), (step,)))

    ours, rows = jax.jit(
        lambda: (
            lifted.apply(BestResponse(params, response, own, linear), x),
            jnp.stack([alone(own[i], x[i]) for i in range(B)]),
        )
    )()
    np.testing.assert_allclose(ours, rows, rtol=1e-9, atol=1e-9)
    assert np.all(np.max(np.abs(ours - network.apply(params, x)), tuple(range(1, ours.ndim))) > 1e-3)


def test_an_argument_that_examples_share_has_to_be_said():
    network = hk.without_apply_rng(hk.transform(lambda x, places: hk.Linear(3)(x) + hk.Embed(B, 3)(places)[None]))
    x, places = jnp.ones((B, B, 4)), jnp.arange(B)
    with pytest.raises(ValueError, match="in_axes"):
        st.lift(network).init_response(jax.random.key(0), H, x, places)
    lifted = st.lift(network, in_axes=(0, None))
    response = jax.eval_shape(lambda: lifted.init_response(jax.random.key(0), H, x, places))
    params = randomised(jax.eval_shape(lambda: lifted.init(jax.random.key(0), x, places)))
    response = randomised(response, 2)
    own = jnp.asarray(np.random.default_rng(3).normal(size=(B, H)))
    ours = lifted.apply(BestResponse(params, response, own), x, places)
    for i in range(B):
        alone = network.apply(st.materialise(BestResponse(params, response, own[i])), x[i : i + 1], places)
        np.testing.assert_allclose(ours[i], alone[0], rtol=1e-9)
    with pytest.raises(ValueError, match="differ in their number of examples"):
        st.lift(network).init_response(jax.random.key(0), H, x[:1], places)
    with pytest.raises(ValueError, match="does not fit the 2 arguments"):
        st.lift(network, in_axes=(0,)).init_response(jax.random.key(0), H, x, places)


COUPLED = {
    "batch statistics of its own": lambda x: hk.Linear(2)(x - x.mean(0, keepdims=True)),
    "attention over the batch": lambda x: jax.nn.softmax(hk.Linear(3)(x) @ x[:, :3].T) @ hk.Linear(2)(x),
    "rolled": lambda x: hk.Linear(2)(x) * jnp.roll(x, 1, 0)[:, :2],
    "a shared sum": lambda x: hk.Linear(2)(x) + jnp.sum(x),
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_network_that_mixes_examples_is_refused_or_asked_for(name):
    network = hk.without_apply_rng(hk.transform(COUPLED[name]))
    x = jnp.ones((B, 4))
    with pytest.raises(ValueError, match="depends on the other example"):
        st.lift(network).init_response(jax.random.key(0), H, x)
    lifted = st.lift(network, coupled=True)
    response = randomised(jax.eval_shape(lambda: lifted.init_response(jax.random.key(0), H, x)), 2)
    params = randomised(jax.eval_shape(lambda: lifted.init(jax.random.key(0), x)))
    shared = BestResponse(params, response, jnp.ones(H))
    np.testing.assert_allclose(lifted.apply(shared, x), network.apply(st.materialise(shared), x), rtol=1e-9)
    with pytest.raises(ValueError, match="coupled"):
        lifted.apply(BestResponse(params, response, jnp.ones((B, H))), x)


OUTPUTS = {
    "views one after the other": lambda x: hk.Linear(2)(jnp.concatenate([x, -x])),
    "a mean over the batch": lambda x: jnp.mean(hk.Linear(2)(x)),
    "no axis of examples": lambda x: hk.Linear(2)(x)[0],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_is_not_one_row_an_example_is_an_error(name):
    network = hk.without_apply_rng(hk.transform(OUTPUTS[name]))
    x = jnp.ones((B, 4))
    with pytest.raises(ValueError, match="output of shape"):
        st.lift(network).init_response(jax.random.key(0), H, x)
    lifted = st.lift(network, coupled=False)
    params = randomised(jax.eval_shape(lambda: lifted.init(jax.random.key(0), x)))
    response = {"linear": {"w": st.Gated(jnp.ones((4, 2)), jnp.ones((H, 1, 2)))}}
    with pytest.raises(ValueError, match="output of shape"):
        lifted.apply(BestResponse(params, response, jnp.ones((B, H))), x)


def test_a_state_that_differs_by_example_is_an_error():
    def network(x):
        out = hk.Linear(2)(x)
        hk.set_state("last", out[0])
        return out

    lifted = st.lift(hk.without_apply_rng(hk.transform_with_state(network)))
    x = jnp.ones((B, 4))
    params, state = jax.eval_shape(lambda: lifted.init(jax.random.key(0), x))
    response = randomised(jax.eval_shape(lambda: lifted.init_response(jax.random.key(0), H, x)), 2)
    best = BestResponse(randomised(params), response, jnp.ones((B, H)))
    with pytest.raises(ValueError, match="state differs from example to example"):
        lifted.apply(best, randomised(state), x)


def test_every_example_draws_its_own_random_numbers():
    network = hk.transform(lambda x: hk.dropout(hk.next_rng_key(), 0.5, hk.Linear(50)(x)))
    lifted = st.lift(network)
    x = jnp.ones((B, 4))
    params, response = jax.jit(
        lambda: (lifted.init(jax.random.key(0), x), lifted.init_response(jax.random.key(1), H, x))
    )()
    for key in (jax.random.key(2), jax.random.PRNGKey(2), 2):
        out = np.asarray(lifted.apply(BestResponse(params, response, jnp.ones((B, H))), key, x)) == 0
        assert len(np.unique(out, axis=0)) == B
        assert out.sum(1).min() > 15


def test_examples_see_their_own_hyperparameters_alone():
    _, lifted, x, params, response = setup(*NETWORKS["mlp"])
    delta = jnp.zeros((B, H)).at[1].set(1.0)
    moved = lifted.apply(BestResponse(params, response, delta), x) - lifted.apply(params, x)
    assert np.all(np.abs(moved[1]) > 1e-3)
    assert not np.any(moved[::2])


def test_batch_norm_responds_and_counts_its_calls_once():
    network = hk.transform_with_state(lambda x, training: hk.BatchNorm(True, True, 0.9)(hk.Linear(3)(x), training))
    lifted = st.lift(network)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(B, 4)))
    params, state = jax.jit(lambda: lifted.init(jax.random.key(0), x, True))()
    response = jax.eval_shape(lambda: lifted.init_response(jax.random.key(1), H, x, True))
    params, response = randomised(params), randomised(response, 2)
    delta = jnp.asarray([0.5, -1.0])
    dense = st.to_dense(params, response)
    step = jax.tree.map(lambda d: jnp.tensordot(delta, d, 1), dense)

    def run(p):
        return network.apply(p, state, None, x, True)

    def both():
        for linear in (False, True):
            best = BestResponse(params, response, delta, linear)
            at = params if linear else st.materialise(best)
            expected, tangent = jax.jvp(lambda p: run(p)[0], (at,), (step,))
            yield lifted.apply(best, state, None, x, True), (expected + linear * tangent, run(at)[1])

    for ours, theirs in jax.jit(lambda: list(both()))():
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)
    # With running statistics examples are apart, so each may have hyperparameters of its own.
    own = jnp.asarray(np.random.default_rng(3).normal(size=(B, H)))
    reference = st.dense_lift(lambda p, x: network.apply(p, state, None, x, False)[0])
    best = BestResponse(params, response, own, True)
    ours, theirs = jax.jit(lambda: (lifted.apply(best, state, None, x, False)[0], reference(best, x)))()
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_batch_norm_in_training_has_the_statistics_of_all_and_a_gate_for_each():
    """By hand, for Linear, BatchNorm, Linear: each row at its own gates, statistics over the rows; state as a batch."""
    network = hk.transform_with_state(
        lambda x: hk.Linear(2, name="out")(hk.BatchNorm(True, True, 0.9)(hk.Linear(3)(x), True))
    )
    lifted = st.lift(network)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(B, 4)))
    params, state = jax.jit(lambda: lifted.init(jax.random.key(0), x))()
    response = jax.eval_shape(lambda: lifted.init_response(jax.random.key(1), H, x))
    params, response = randomised(params), randomised(response, 2)
    own = jnp.asarray(np.random.default_rng(3).normal(size=(B, H)))

    def by_hand(delta):
        rows = jax.vmap(lambda d: st.materialise(BestResponse(params, response, d)))(delta)
        h = jnp.einsum("bi,bio->bo", x, rows["linear"]["w"]) + rows["linear"]["b"]
        mean, var = h.mean(0, keepdims=True), h.var(0, keepdims=True)
        normalised = (h - mean) / jnp.sqrt(var + 1e-5)
        h = normalised * rows["batch_norm"]["scale"][:, 0] + rows["batch_norm"]["offset"][:, 0]
        return jnp.einsum("bi,bio->bo", h, rows["out"]["w"]) + rows["out"]["b"], mean

    apply = jax.jit(
        lambda delta, linear: lifted.apply(BestResponse(params, response, delta, linear), state, None, x),
        static_argnums=1,
    )
    (out, new_state), (expected, mean) = apply(own, False), jax.jit(by_hand)(own)
    np.testing.assert_allclose(out, expected, rtol=1e-9)
    np.testing.assert_allclose(new_state["batch_norm/~/mean_ema"]["average"], mean, rtol=1e-9)
    at, along = jax.jit(lambda d: jax.jvp(lambda d: by_hand(d)[0], (0 * d,), (d,)))(own)
    linear, new_state = apply(own, True)
    np.testing.assert_allclose(linear, at + along, rtol=1e-9)
    _, whole = network.apply(params, state, None, x)
    for ours, theirs in zip(jax.tree.leaves(new_state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


class FlaxBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x, training):
        norm = nn.BatchNorm(not training, momentum=0.9, param_dtype=jnp.float64, force_float32_reductions=False)
        return nn.Dense(2)(norm(nn.Dense(3)(x)))


@pytest.mark.parametrize("training", [True, False])
def test_flax_batch_norm_is_as_haikus(training):
    network = hk.transform_with_state(
        lambda x, training: hk.Linear(2, name="out")(hk.BatchNorm(True, True, 0.9)(hk.Linear(3)(x), training))
    )
    haiku, flax = st.lift(network), st.lift(FlaxBatchNorm())
    x = jnp.asarray(np.random.default_rng(1).normal(size=(B, 4)))
    variables = jax.eval_shape(lambda: flax.init(jax.random.key(0), x, True))
    response = jax.eval_shape(lambda: flax.init_response(jax.random.key(1), H, x, True))
    params, response = randomised(variables["params"]), randomised(response, 2)
    stats = jax.tree.map(lambda s: jnp.ones(s.shape), variables["batch_stats"])
    _, state = jax.jit(lambda: network.init(jax.random.key(0), x, True))()
    state = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), state)
    own = jnp.asarray(np.random.default_rng(3).normal(size=(B, H)))

    def named(tree):  # as Haiku's, whose scale and offset are [1, C]
        last, norm, first = tree["Dense_0"], tree["BatchNorm_0"], tree["Dense_1"]  # as constructed
        wide = lambda leaf: jax.tree.map(lambda x: x[..., None, :], leaf)  # noqa: E731
        return {
            "linear": {"w": first["kernel"], "b": first["bias"]},
            "batch_norm": {"scale": wide(norm["scale"]), "offset": wide(norm["bias"])},
            "out": {"w": last["kernel"], "b": last["bias"]},
        }

    def both(delta, linear):
        best = BestResponse(params, response, delta, linear)
        if training:
            out, new = flax.apply({"params": best, "batch_stats": stats}, x, training, mutable=["batch_stats"])
        else:
            out, new = flax.apply({"params": best, "batch_stats": stats}, x, training), None
        named_best = BestResponse(named(params), named(response), delta, linear)
        return (out, new), haiku.apply(named_best, state, None, x, training)

    for delta, linear in ((own, True), (own, False), (own[0], True)):
        (out, new), (expected, _) = jax.jit(both, static_argnums=1)(delta, linear)
        np.testing.assert_allclose(out, expected, rtol=1e-9)
        if training:
            _, plain = FlaxBatchNorm().apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
            if linear:
                for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(plain), strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-9)


def test_flaxs_arguments_reach_it():
    class Net(nn.Module):
        @nn.compact
        def features(self, x):
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(50)(x))

        def __call__(self, x):
            return self.features(x)

    lifted = st.lift(Net())
    x = jnp.ones((B, 4))
    params = lifted.init(jax.random.key(0), x)["params"]
    response = lifted.init_response(jax.random.key(1), H, x, method=Net.features)
    best = {"params": BestResponse(params, response, jnp.ones((B, H)), True)}
    out = lifted.apply(best, x, rngs={"dropout": jax.random.key(2)}, method="features")
    assert len(np.unique(np.asarray(out) == 0, axis=0)) == B
    with pytest.raises(ValueError, match="plain or a BestResponse"):
        lifted.apply(best["params"].params, x)


class FlaxCustom(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("theta", nn.initializers.ones, (x.shape[-1],))[None]


def flax_tied(x):
    embed = nn.Embed(4, 4)
    return embed.attend(embed(jnp.argmax(x, -1)))


FLAX_STUCK = {
    "custom": (lambda x: nn.Dense(2)(FlaxCustom()(x)), r"FlaxCustom_0/theta cannot respond .*Dense"),
    "tied": (flax_tied, "outside the module's own call"),
    "stacked": (
        lambda x: nn.scan(
            lambda layer, c, _: (jnp.tanh(layer(c)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )(nn.Dense(4), x, None)[0],
        "Dense_0/.*stacks it",
    ),
    "optimized": (
        lambda x: nn.RNN(nn.OptimizedLSTMCell(3))(x.astype(jnp.float32)[:, None]),
        "OptimizedLSTMCell_0/.*cannot respond",
    ),
}


@pytest.mark.parametrize("name", FLAX_STUCK)
def test_what_cannot_respond_in_flax_is_named(name):
    function, message = FLAX_STUCK[name]
    with pytest.raises(ValueError, match=message):
        st.lift(Flax(function)).init_response(jax.random.key(0), H, jnp.ones((B, 4)))
    if name == "custom":
        lifted = st.lift(Flax(function), unresponsive=["FlaxCustom_0"])
        response = jax.eval_shape(lambda: lifted.init_response(jax.random.key(0), H, jnp.ones((B, 4))))
        assert set(response) == {"Dense_0"}


@pytest.mark.parametrize("linear", [True, False])
def test_gradients_equal_the_dense_ones(linear):
    """Of parameters, response and delta, and second derivatives: meta-gradients run through all of them."""
    network, lifted, x, params, response = setup(*NETWORKS["mlp"])
    reference = st.dense_lift(network.apply)
    delta = jnp.asarray(np.random.default_rng(3).normal(size=(B, H)))
    directions = randomised((params, response, delta), 4)

    def loss(apply, point):
        return jnp.sum(jnp.sin(apply(BestResponse(point[0], point[1], point[2], linear), x)))

    def both(apply):
        grad = jax.grad(lambda point: loss(apply, point))
        return jax.jvp(grad, ((params, response, delta),), (directions,))

    ours, theirs = jax.jit(lambda: (both(lifted.apply), both(reference)))()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
        assert np.any(a)


def test_linearised_gradients_compute_no_zero_matmuls():
    """Two layers, 5 matmuls a layer less the first's two along the input: no backward pass through the primal."""
    _, lifted, x, params, response = setup(lambda x: hk.Linear(3)(jnp.tanh(hk.Linear(4)(x))), (B, 4), 0)
    delta = jnp.ones((B, H))

    def loss(response):
        return jnp.sum(jnp.square(lifted.apply(BestResponse(params, response, delta, True), x)))

    text = jax.jit(jax.grad(loss)).lower(response).as_text()
    weights = 2 * 5 - 2  # the rest are of gates: forward and backward, a weight's and a bias's a layer
    assert text.count("dot_general") == weights + 2 * 2 * 2


def test_bfloat16_stays_bfloat16():
    lifted = st.lift(hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 3])(x))))
    x = jnp.ones((B, 4), jnp.bfloat16)
    init = lambda: (lifted.init(jax.random.key(0), x), lifted.init_response(jax.random.key(1), H, x))  # noqa: E731
    params, response = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), jax.eval_shape(init))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves((params, response)))
    for linear in (True, False):
        best = BestResponse(params, response, jnp.ones((B, H), jnp.float32), linear)
        assert jax.eval_shape(lambda best=best: lifted.apply(best, x)).dtype == jnp.bfloat16


def test_a_fresh_response_does_nothing_and_has_a_gradient():
    _, lifted, x, params, _ = setup(*NETWORKS["mlp"])
    response = jax.jit(lambda: lifted.init_response(jax.random.key(1), H, x))()
    apply = lambda r: lifted.apply(BestResponse(params, r, jnp.ones((B, H)), True), x)  # noqa: E731
    grad = jax.grad(lambda r: jnp.sum(apply(r)))
    out, plain, grads = jax.jit(lambda r: (apply(r), lifted.apply(params, x), grad(r)))(response)
    np.testing.assert_array_equal(out, plain)
    assert all(np.all(np.any(np.asarray(g.gate), 0)) for own in grads.values() for g in own.values())


class Custom(hk.Module):
    def __call__(self, x):
        return x * hk.get_parameter("theta", (x.shape[-1],), x.dtype, init=jnp.ones)[None]


def tied(x):
    embed = hk.Embed(4, 3)
    return embed(jnp.argmax(x, -1)) @ embed.embeddings.T


def test_what_cannot_respond_is_named_or_left():
    x = jnp.ones((B, 4))
    custom = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(2)(Custom()(x))))
    with pytest.raises(ValueError, match=r"custom/theta cannot respond .*Conv.*unresponsive=\['custom'\]"):
        st.lift(custom).init_response(jax.random.key(0), H, x)
    with pytest.raises(ValueError, match="outside the module's own call"):
        st.lift(hk.without_apply_rng(hk.transform(tied))).init_response(jax.random.key(0), H, x)
    for unresponsive in (["custom"], "rest"):
        lifted = st.lift(custom, unresponsive=unresponsive)
        params = jax.eval_shape(lambda lifted=lifted: lifted.init(jax.random.key(0), x))
        response = jax.eval_shape(lambda lifted=lifted: lifted.init_response(jax.random.key(0), H, x))
        assert set(response) == {"linear"}
    best = BestResponse(randomised(params), randomised(response), jnp.ones((B, H)), True)
    ours, expected = jax.jit(lambda: (lifted.apply(best, x), st.dense_lift(custom.apply)(best, x)))()
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
    only_custom = st.lift(hk.transform(lambda x: Custom()(x)), unresponsive="rest")
    with pytest.raises(ValueError, match="no module that can respond"):
        only_custom.init_response(jax.random.key(0), H, x)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"hk\.transform"):
        st.lift(lambda x: x)
    network, lifted, x, params, response = setup(*NETWORKS["mlp"])
    with pytest.raises(ValueError, match="unresponsive"):
        st.lift(network, unresponsive="mlp")
    with pytest.raises(ValueError, match=r"argument 0 of shape \(3, 4\) does not have the 2 examples"):
        lifted.apply(BestResponse(params, response, jnp.ones((2, H))), x)
    with pytest.raises(ValueError, match="no common parameters"):
        st.materialise(BestResponse(params, response, jnp.ones((B, H))))


def test_every_kind_of_module_is_tested():
    used = set()

    def watch(next_call, args, kwargs, context):
        used.add(context.orig_class)
        return next_call(*args, **kwargs)

    def watch_flax(next_call, args, kwargs, context):
        used_flax.add(flax_modules._liftable(context))
        return next_call(*args, **kwargs)

    used_flax = set()
    with nn.intercept_methods(watch_flax):
        for function, shape, _ in NETWORKS.values():
            if isinstance(function, nn.Module):
                jax.eval_shape(lambda f=function, s=shape: f.init(jax.random.key(0), jnp.ones(s)))
    used_names = {liftable.module for liftable in used_flax if liftable}
    assert {liftable.module for liftable in flax_modules.LIFTABLE} - used_names == {nn.BatchNorm}
    with hk.intercept_methods(watch):
        for function, shape, _ in NETWORKS.values():
            if isinstance(function, nn.Module):
                continue
            network = hk.transform(lambda x, f=function: f(x))
            jax.eval_shape(lambda net=network, s=shape: net.init(jax.random.key(0), jnp.ones(s)))
    assert set(MODULES) - used == {hk.BatchNorm}  # which has a test of its own


def test_equinox_and_nnx_go_by_the_dense_lift():
    """As pure functions of their parameters: neither has calls of modules that could be intercepted."""
    with jax.enable_x64(False):
        x = jnp.asarray(np.random.default_rng(1).normal(size=(B, 4)), jnp.float32)
        weights, static = eqx.partition(eqx.nn.MLP(4, 2, 3, 1, key=jax.random.key(0)), eqx.is_inexact_array)
        graph, state = nnx.split(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
        of_equinox = lambda params, x: jax.vmap(eqx.combine(params, static))(x)  # noqa: E731
        of_nnx = lambda params, x: nnx.merge(graph, params)(x)  # noqa: E731
        own = jnp.asarray(np.random.default_rng(3).normal(size=(B, H)), jnp.float32)
        for function, params in ((of_equinox, weights), (of_nnx, state)):
            response = jax.tree.map(lambda p: 0.1 * jnp.ones((H, *p.shape)), params)
            out = st.dense_lift(function)(BestResponse(params, response, own), x)
            for i in range(B):
                moved = jax.tree.map(lambda p, i=i: p + 0.1 * jnp.sum(own[i]), params)
                np.testing.assert_allclose(out[i], function(moved, x)[i], rtol=1e-4, atol=1e-5)


def test_flaxs_own_jit_inside_a_network_does_not_keep_a_delta():
    network = Flax(lambda x: nn.Dense(2)(nn.jit(nn.Dense)(3)(x)))
    _, lifted, x, params, response = setup(network, (B, 4), 0)
    for seed in (3, 4):
        own = jnp.asarray(np.random.default_rng(seed).normal(size=(B, H)))
        ours = lifted.apply(BestResponse(params, response, own), x)
        for i in range(B):
            alone = network.apply({"params": st.materialise(BestResponse(params, response, own[i]))}, x[i : i + 1])
            np.testing.assert_allclose(ours[i], alone[0], rtol=1e-9)
