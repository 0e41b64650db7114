"""The unsupervised rule: its formulas against plain NumPy, its symmetries, what it compiles, how it is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import learned_opt
from learned_opt import unsupervised
from learned_opt.unsupervised import network
from learned_opt.unsupervised import rule as rule_module

SIZES = (6, 5, 4, 3)


def randomised(rule, seed=0):
    """Meta-parameters away from their tidy start, in float64."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x, np.float64) + 0.2 * rng.normal(size=x.shape)),
        rule.init_theta(jax.random.key(seed)),
    )


def network64(activation="tanh", seed=1, sizes=SIZES):
    """A network with weights of order one, in float64."""
    rng = np.random.default_rng(seed)
    phi = network.init(jax.random.key(seed), sizes, activation)
    return phi._replace(layers=jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), phi.layers))


# --- a second implementation, example by example and unit by unit where that is how the formula reads


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


NONLINEARITIES = {
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu": lambda z: np.maximum(z, 0.1 * z),
    "tanh": np.tanh,
    "swish": lambda z: z * sigmoid(z),
    "sigmoid": sigmoid,
    "step": lambda z: np.where(z > 0, 1.0, 0.0),
}


def np_forward(phi, x, activation):
    xs, zs = [x], []
    for w, _, b in phi:
        y = xs[-1] @ w
        z = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5) + b
        zs.append(z)
        xs.append(NONLINEARITIES[activation](z))
    return xs, zs


def np_standardise(x):
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)


def np_normalised_channels(inputs):
    """[batch, units, channels]: each channel over everything."""
    return (inputs - inputs.mean((0, 1))) / np.sqrt(inputs.var((0, 1)) + 1e-4)


def np_equivariant(theta, inputs, unit_inputs):
    h = np_normalised_channels(inputs) @ theta["w"] + theta["b"]
    h = h + inputs.mean(0, keepdims=True) @ theta["unit"] + inputs.mean(1, keepdims=True) @ theta["example"]
    h = np.maximum(h + unit_inputs @ theta["statistics"], 0)
    out = h @ theta["w2"] + theta["b2"]
    out = out + h.mean(0, keepdims=True) @ theta["unit2"] + h.mean(1, keepdims=True) @ theta["example2"]
    return np.maximum(out, 0)


def np_unit_axis(theta, inputs, unit_inputs):
    units = inputs.shape[1]
    angle = np.arange(units) / max(units - 1, 1) * 4 * np.pi
    unit_inputs = np.concatenate([unit_inputs, np.sin(angle)[:, None], np.cos(angle)[:, None]], axis=1)
    h = np.maximum(np_normalised_channels(inputs) @ theta["w"] + theta["b"] + unit_inputs @ theta["statistics"], 0)
    nothing = np.zeros_like(h[:, 0])
    mixed = np.stack(
        [
            np.concatenate([h[:, i - 1] if i else nothing, h[:, i], h[:, i + 1] if i + 1 < units else nothing], axis=-1)
            for i in range(units)
        ],
        axis=1,
    )
    h = h + np.maximum(np_normalised_channels(mixed) @ theta["neighbours"] + theta["b_neighbours"], 0)
    return np.maximum(np_normalised_channels(h) @ theta["w2"] + theta["b2"], 0)


NP_FRONT_ENDS = {"equivariant": np_equivariant, "unit_axis": np_unit_axis}


def np_unit_inputs(phi, i, bias):
    def stats(w, axis):
        rms = np.sqrt((w**2).mean(axis) + 1e-6)
        return [np.abs(w).mean(axis), rms, w.mean(axis), np.sqrt(w.var(axis) + 1e-8)]

    below = stats(phi[i - 1][0], 0) if i else stats(phi[0][0], 1)
    above = stats(phi[i][0], 1) if i < len(phi) else below
    table = np.array(below + above)
    return np.vstack([table / np.sqrt((table**2).mean() + 1e-6), bias]).T


def np_weight_change(merge, w, lower_x, upper_x, lower, upper):
    """``lower``, ``upper``: read-outs [parts, channels, batch, units]."""

    def normalise(g, epsilon=1.0):
        return g / np.sqrt(epsilon + (g**2).mean(0))

    def low_rank(a, b):  # mean over channels, and over the batch
        return sum(x.T @ y for x, y in zip(a, b, strict=True)) / len(a) / batch

    def symmetric(a, b):
        u = low_rank(a, b)
        u = (u + u.T) / np.sqrt(2)
        return (u - np.diag(np.diag(u))) / np.sqrt(len(u))

    batch = len(lower_x)
    w = w / np.sqrt((w**2).mean(0) + 1e-6)
    lo, up = np_standardise(lower_x), np_standardise(upper_x)
    decorrelation = w @ (up.T @ up) / batch / np.sqrt(up.shape[1])
    root = np.sqrt(1 + w**2) - 1
    psd = low_rank(upper[5], upper[5]) / np.sqrt(w.shape[1])
    terms = {
        "base": w,
        "decay": w**2 * np.sign(w),
        "hebbian": -lo.T @ up / batch,
        "decorrelation": decorrelation / np.sqrt((decorrelation**2).mean() + 1e-8),
        "plain": low_rank(lower[0], upper[0]),
        "gated": low_rank(lower[1], upper[1]) * np.exp(-(w**2)),
        "times_w": low_rank(lower[2], upper[2]) * w,
        "above_symmetric": w @ symmetric(upper[3], upper[4]),
        "above_psd": w @ psd,
        "below_symmetric": symmetric(lower[3], lower[4]) @ w,
        "above_symmetric_square": (root @ symmetric(upper[6], upper[7])) * np.sign(w),
        "below_symmetric_square": (symmetric(lower[5], lower[6]) @ root) * np.sign(w),
    }
    change = sum(c * normalise(terms[name]) for c, name in zip(merge, unsupervised.TERMS, strict=True)) / 12
    change = change - w * max((change * w).mean(), 0)
    return normalise(change / np.sqrt(12), 1e-6) - w / 7


def np_update(theta, phi, x, activation, front_end, channels):
    front = NP_FRONT_ENDS[front_end]
    xs, zs = np_forward(phi, x, activation)
    zs = [x, *zs]
    biases = [np.zeros(x.shape[1]), *(b for _, _, b in phi)]
    s, top = np_standardise(xs[-1]), len(phi)
    batch, units = s.shape
    similar_units = s @ (s.T @ s) / (batch * np.sqrt(units))
    similar_examples = (s @ s.T) @ s / (units * np.sqrt(batch))
    inputs = np.stack([s, zs[-1], similar_units, similar_examples], axis=-1)
    d = front(theta["top"], inputs, np_unit_inputs(phi, top, biases[-1])) @ theta["top_signal"]
    signal_size = d.shape[-1]
    hs = {}
    for i in range(top, -1, -1):
        inputs = np.concatenate([xs[i][..., None], zs[i][..., None], d], axis=-1)
        hs[i] = front(theta["front"], inputs, np_unit_inputs(phi, i, biases[i]))
        if i:
            to_signal = theta["read"][:, 15 * channels : 15 * channels + signal_size]
            delta = d * sigmoid(zs[i])[..., None] + hs[i] @ to_signal
            d = np.einsum("bjk,ij->bik", delta, phi[i - 1][1])
            d = d / np.sqrt((d**2).mean(-1, keepdims=True) + 1e-6)

    def read(h, first, parts):
        r = h @ theta["read"][:, first * channels : (first + parts) * channels]
        return r.reshape(*h.shape[:2], parts, channels).transpose(2, 3, 0, 1)

    rate_w, rate_b = np.exp(theta["log_rate"])
    out = []
    for i, (w, v, b) in enumerate(phi):
        change = np_weight_change(theta["merge"], w, xs[i], xs[i + 1], read(hs[i], 8, 7), read(hs[i + 1], 0, 8))
        change_b = (hs[i + 1] @ theta["read"][:, -1]).mean(0)
        change_b = change_b + max(-change_b.mean(), 0)
        change_b = change_b / np.sqrt(0.5 + (change_b**2).mean())
        out.append(
            (
                w * (1 - rate_w) - rate_w * change,
                v * (1 - rate_w) - rate_w * change,
                b * (1 - rate_b) - rate_b * change_b,
            )
        )
    return out


@pytest.mark.parametrize(
    ("front_end", "activation", "channels"),
    [("equivariant", "tanh", 2), ("equivariant", "relu", 1), ("unit_axis", "swish", 3)],
)
def test_an_update_equals_the_formulas(front_end, activation, channels):
    with jax.enable_x64(True):
        rule = unsupervised.unsupervised(hidden_size=7, signal_size=3, channels=channels, front_end=front_end)
        theta = randomised(rule)
        phi = network64(activation)
        x = np.random.default_rng(2).normal(size=(9, SIZES[0])) + 0.3
        new = jax.jit(rule.update)(theta, phi, jnp.asarray(x))
        expected = np_update(
            jax.tree.map(np.asarray, theta),
            [tuple(map(np.asarray, layer)) for layer in phi.layers],
            x,
            activation,
            front_end,
            channels,
        )
        for layer, want in zip(new.layers, expected, strict=True):
            for found, wanted in zip(layer, want, strict=True):
                np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-10)
        moved = max(float(jnp.max(jnp.abs(a.w - b.w))) for a, b in zip(new.layers, phi.layers, strict=True))
        assert moved > 1e-4


def test_the_twelve_terms_are_those_of_the_reference():
    assert len(unsupervised.TERMS) == len(set(unsupervised.TERMS)) == 12


@pytest.mark.parametrize("activation", unsupervised.ACTIVATIONS)
def test_activations_and_features(activation):
    phi = network64(activation)
    x = np.random.default_rng(3).normal(size=(11, SIZES[0])).astype(np.float32)
    phi = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype != jnp.int32 else a, phi)
    expected = np_forward([tuple(map(np.asarray, layer)) for layer in phi.layers], x, activation)[0][-1]
    rule = unsupervised.unsupervised()
    features = jax.jit(rule.features)
    found = features(phi, jnp.asarray(x))
    if activation == "step":
        assert set(np.unique(found)) <= {0.0, 1.0}
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
    # By frozen moments, rows are mapped one by one; by those of the same rows, as before.
    moments = jax.jit(unsupervised.statistics)(phi, jnp.asarray(x))
    np.testing.assert_allclose(features(phi, jnp.asarray(x), moments), found, rtol=1e-5, atol=1e-6)
    alone = jnp.concatenate([features(phi, jnp.asarray(x[i : i + 1]), moments) for i in range(len(x))])
    np.testing.assert_allclose(alone, found, rtol=1e-4, atol=1e-5)


def permuted(phi, orders):
    """The same network with the units of each level, inputs too, in another order."""
    layers = []
    for i, layer in enumerate(phi.layers):
        rows, columns = orders[i], orders[i + 1]
        layers.append(unsupervised.Layer(layer.w[rows][:, columns], layer.v[rows][:, columns], layer.b[columns]))
    return phi._replace(layers=tuple(layers))


@pytest.mark.parametrize("front_end", unsupervised.FRONT_ENDS)
def test_the_order_of_units_matters_only_where_it_should(front_end):
    with jax.enable_x64(True):
        rule = unsupervised.unsupervised(hidden_size=5, signal_size=2, channels=1, front_end=front_end)
        theta, phi = randomised(rule), network64()
        x = jnp.asarray(np.random.default_rng(4).normal(size=(8, SIZES[0])))
        rng = np.random.default_rng(5)
        orders = [rng.permutation(size) for size in SIZES]
        update = jax.jit(rule.update)
        direct = permuted(update(theta, phi, x), orders)
        other = update(theta, permuted(phi, orders), x[:, orders[0]])
        same = all(
            np.allclose(a, b, rtol=1e-9, atol=1e-12)
            for a, b in zip(jax.tree.leaves(direct), jax.tree.leaves(other), strict=True)
        )
        assert same == (front_end == "equivariant")
        # The order of the examples never matters.
        shuffled = update(theta, phi, x[rng.permutation(8)])
        for a, b in zip(jax.tree.leaves(update(theta, phi, x)), jax.tree.leaves(shuffled), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_without_its_learned_terms_it_is_the_hand_set_rule():
    with jax.enable_x64(True):
        learned, simple = unsupervised.unsupervised(hidden_size=4), unsupervised.hand_set(rate=0.01)
        by_hand = simple.init_theta(jax.random.key(0))
        theta = randomised(learned) | {"merge": by_hand["merge"], "log_rate": jnp.full(2, jnp.log(0.01))}
        phi = network64("relu")
        x = jnp.asarray(np.random.default_rng(6).normal(size=(8, SIZES[0])))
        found, expected = jax.jit(learned.update)(theta, phi, x), jax.jit(simple.update)(by_hand, phi, x)
        for a, b, before in zip(found.layers, expected.layers, phi.layers, strict=True):
            np.testing.assert_allclose(a.w, b.w, rtol=1e-7)
            np.testing.assert_array_equal(b.b, before.b)


def test_hebbian_growth_finds_the_direction_of_largest_variance():
    """One linear-ish unit on data of one strong direction: the weights turn to it."""
    rule = unsupervised.hand_set(decorrelation=0.0, rate=0.01)
    direction = np.array([3.0, -2.0, 1.0, 0.5], np.float32)
    rng = np.random.default_rng(7)
    update = jax.jit(rule.update)
    theta, phi = rule.init_theta(jax.random.key(0)), rule.init(jax.random.key(1), (4, 1), "tanh")
    for _ in range(200):
        x = rng.normal(size=(64, 1)) * direction + 0.3 * rng.normal(size=(64, 4))
        phi = update(theta, phi, jnp.asarray(x, jnp.float32))
    w = np.asarray(phi.layers[0].w[:, 0])
    # Inputs enter the rule standardised one by one, so it is their signs that count.
    assert np.all(np.sign(w * direction) == np.sign(w[0] * direction[0]))
    assert np.abs(w).min() > 0.5 * np.abs(w).max()


def test_one_compilation_serves_every_activation():
    rule = unsupervised.unsupervised(hidden_size=4)
    theta = rule.init_theta(jax.random.key(0))
    update = jax.jit(lambda *arguments: rule.update(*arguments))  # with a cache of its own
    x = jnp.asarray(np.random.default_rng(8).normal(size=(8, 6)), jnp.float32)
    outputs = []
    for activation in unsupervised.ACTIVATIONS:
        phi = rule.init(jax.random.key(1), (6, 5, 4), activation)
        outputs.append(update(theta, phi, x).layers[0].w)
    assert update._cache_size() == 1
    assert len({float(jnp.sum(w)) for w in outputs}) == len(outputs)
    update(theta, rule.init(jax.random.key(1), (6, 5), "relu"), x)
    assert update._cache_size() == 2


@pytest.mark.parametrize(
    ("sizes", "activation", "batch"),
    [((3, 1), "step", 2), ((7, 9, 2, 5, 4), "sigmoid", 5), ((40, 3), "leaky_relu", 33)],
)
def test_any_depth_width_batch_and_activation(sizes, activation, batch):
    rule = unsupervised.unsupervised(hidden_size=3, signal_size=2, channels=1)
    phi = rule.init(jax.random.key(1), sizes, activation)
    x = jnp.asarray(np.random.default_rng(9).normal(size=(batch, sizes[0])), jnp.float32)
    new = jax.jit(rule.update)(rule.init_theta(jax.random.key(0)), phi, x)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(lambda a: (a.shape, a.dtype), phi)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(new))


def test_inputs_far_from_zero_are_standardised():
    """Their variance is not the difference of two large numbers."""
    x = 1e4 + np.random.default_rng(0).normal(size=(1, 50, 20)).astype(np.float32)
    w, _ = rule_module._fold(jnp.asarray(x), jnp.ones((1, 3)), jnp.zeros(3))
    np.testing.assert_allclose(w, 1 / x.astype(np.float64).std(), rtol=1e-3)


def test_degenerate_batches_stay_finite():
    rule = unsupervised.unsupervised(hidden_size=3)
    theta = rule.init_theta(jax.random.key(0))
    phi = rule.init(jax.random.key(1), (4, 3, 2))
    update = jax.jit(rule.update)
    for x in (jnp.zeros((5, 4)), jnp.full((5, 4), 1e4), jnp.tile(jnp.arange(4.0)[None], (5, 1))):
        new = update(theta, phi, x)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize(
    ("sizes", "activation", "wrong"),
    [((4,), "relu", "sizes"), ((4, 0), "relu", "sizes"), ((4, 3), "gelu", "unknown activation 'gelu'")],
)
def test_networks_that_cannot_be(sizes, activation, wrong):
    with pytest.raises(ValueError, match=wrong):
        network.init(jax.random.key(0), sizes, activation)


def test_rules_that_cannot_be():
    with pytest.raises(ValueError, match="unknown front end 'x'"):
        unsupervised.unsupervised(front_end="x")
    with pytest.raises(ValueError, match="at least 1"):
        unsupervised.unsupervised(channels=0)


# --- the store


@pytest.fixture
def saved(tmp_path):
    kwargs = {"hidden_size": 3, "channels": 1}
    theta = unsupervised.unsupervised(**kwargs).init_theta(jax.random.key(3))
    return learned_opt.save(tmp_path / "mine", "unsupervised", theta, kwargs=kwargs), theta


def test_a_saved_rule_comes_back(saved):
    folder, theta = saved
    rule, loaded, *_ = unsupervised.load(folder)
    assert isinstance(rule, unsupervised.UnsupervisedRule)
    assert jax.tree.structure(loaded) == jax.tree.structure(theta)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(theta), strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_is_not_taken_for_an_optimizer(saved):
    for load in (learned_opt.load, learned_opt.load_rule):
        with pytest.raises(learned_opt.StoreError, match=r"is an unsupervised rule.*LearnedFeatures") as caught:
            load(saved[0])
        assert "\n" not in str(caught.value)
    with pytest.raises(learned_opt.StoreError, match="is an optimizer"):
        unsupervised.load("flagship-1")
    assert not set(learned_opt.available()) & set(unsupervised.available())


def test_a_damaged_rule_is_refused(saved):
    folder, _ = saved
    weights = folder / "weights.safetensors"
    contents = bytearray(weights.read_bytes())
    contents[-1] ^= 1
    weights.write_bytes(contents)
    with pytest.raises(learned_opt.StoreError, match="sha256"):
        unsupervised.load(folder)


def test_theta_of_other_sizes_is_refused(tmp_path):
    theta = unsupervised.unsupervised(hidden_size=4).init_theta(jax.random.key(0))
    with pytest.raises(learned_opt.StoreError, match="does not fit the rule"):
        learned_opt.save(tmp_path / "mine", "unsupervised", theta)
