"""Regularisers and augmentations: closed forms, NumPy references, one value or one an example."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learned_opt import self_tuning as st
from learned_opt.self_tuning import augmentations as aug
from learned_opt.self_tuning import regularisers as reg

KEY = jax.random.key(0)
RATES = jnp.array([0.0, 0.2, 0.7])
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 6, 5, 3)), jnp.float32)


def test_dropout_keeps_the_mean_and_drops_each_examples_own_share():
    x = jnp.full((3, 20000), 2.0)
    y = np.asarray(reg.dropout(KEY, x, RATES))
    share = (y == 0).mean(axis=1)
    error = np.sqrt(RATES * (1 - RATES) / 20000)
    assert np.all(np.abs(share - RATES) <= 4 * error)
    assert np.all(np.abs(y.mean(axis=1) - 2.0) <= 4 * 2.0 * error / (1 - RATES) + 1e-6)
    np.testing.assert_allclose(np.unique(y[1]), [0.0, 2.5], rtol=1e-6)
    assert not np.array_equal(y[1] == 0, np.asarray(reg.dropout(jax.random.key(1), x, RATES))[1] == 0)
    np.testing.assert_array_equal(reg.dropout(KEY, x, jnp.full(3, 0.3)), reg.dropout(KEY, x, 0.3))


def test_variational_dropout_lasts_for_the_sequence():
    y = np.asarray(reg.variational_dropout(KEY, jnp.ones((2, 7, 50)), 0.5))
    assert np.all(y == y[:, :1])
    assert 10 < (y[0, 0] == 0).sum() < 40
    assert np.any(y[0] != y[1])


def test_axes_count_from_the_end_too_and_must_be_there():
    x = jnp.ones((3, 50, 4))
    np.testing.assert_array_equal(reg.variational_dropout(KEY, x, 0.5, -2), reg.variational_dropout(KEY, x, 0.5))
    with pytest.raises(ValueError, match="axis 3 is out of bounds"):
        reg.dropout(KEY, x, 0.5, shared_axes=(3,))


def test_a_squared_norm_is_no_sum_in_half_precision():
    params = {"w": jnp.ones((1001, 100), jnp.float16)}
    response = st.BestResponse(params, jax.tree.map(lambda p: jnp.zeros((1, *p.shape), p.dtype), params), jnp.ones(1))
    assert float(reg.squared_norm(params)) == float(reg.squared_norm(response)) == 100100


def test_squares_lie_where_they_should_in_large_images_of_low_precision():
    for images in (jnp.ones((4, 600, 600, 1), dtype) for dtype in (jnp.bfloat16, jnp.float32)):
        cut = aug.cutout(KEY, images, 7.0, 1.0, max_count=1)
        rows = jnp.any(cut == 0, axis=(2, 3)).sum(1)
        np.testing.assert_array_equal(rows, 7)


def test_weight_drop_masks_a_weight_and_its_response_alike():
    w = jnp.ones((30, 20))
    params = {"a": {"w": w, "b": jnp.ones(20)}, "c": {"w": w}}
    response = {"a": {"w": st.Gated(w, jnp.ones((1, 1, 20))), "b": st.Gated(jnp.ones(20), jnp.ones((1, 20)))}}
    best = reg.weight_drop(KEY, st.BestResponse(params, response, jnp.ones((4, 1))), 0.25, ["a"])
    plain = reg.weight_drop(KEY, params, 0.25, ["a"])
    np.testing.assert_array_equal(best.params["a"]["w"], plain["a"]["w"])
    np.testing.assert_array_equal(best.response["a"]["w"].weight, plain["a"]["w"])
    share = float(jnp.mean(plain["a"]["w"] == 0))
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 600)
    np.testing.assert_array_equal(plain["c"]["w"], w)
    np.testing.assert_array_equal(plain["a"]["b"], 1.0)
    with pytest.raises(KeyError, match="no parameter d/w"):
        reg.weight_drop(KEY, params, 0.25, ["d"])
    with pytest.raises(ValueError, match="per_example=False"):
        reg.weight_drop(KEY, params, RATES, ["a"])


def test_modules_are_found_by_path_in_nested_parameters():
    w = jnp.ones((30, 20))
    params = {"block": {"Dense_0": {"kernel": w}, "Dense_1": {"kernel": 2 * w}}}
    response = jax.tree.map(lambda p: st.Gated(p, jnp.ones((1, 1, 20))), params)
    flat = {"block/Dense_0": params["block"]["Dense_0"]}
    flat_response = {"block/Dense_0": response["block"]["Dense_0"]}
    dropped = reg.weight_drop(KEY, st.BestResponse(params, response, jnp.ones(1)), 0.25, ["block/Dense_0"], "kernel")
    expected = reg.weight_drop(KEY, flat, 0.25, ["block/Dense_0"], "kernel")["block/Dense_0"]["kernel"]
    np.testing.assert_array_equal(dropped.params["block"]["Dense_0"]["kernel"], expected)
    np.testing.assert_array_equal(dropped.response["block"]["Dense_0"]["kernel"].weight, expected)
    np.testing.assert_array_equal(dropped.params["block"]["Dense_1"]["kernel"], 2 * w)
    delta = jnp.array([[0.5], [1.0]])
    ours = reg.squared_norm(st.BestResponse(params, response, delta), ["block/Dense_0"])
    np.testing.assert_allclose(ours, reg.squared_norm(st.BestResponse(flat, flat_response, delta)), rtol=1e-6)
    np.testing.assert_allclose(ours, [600 * 1.5**2, 600 * 4.0], rtol=1e-6)


def test_squared_norm_equals_that_of_the_parameters():
    """Structured and dense, against the parameters of each example built one by one."""

    def network(x):
        x = hk.LayerNorm(-1, True, True)(hk.Conv2DTranspose(2, 3)(hk.Conv2D(2, 3)(x)))
        return hk.Linear(3)(x)

    with jax.enable_x64(True):
        net = st.lift(hk.without_apply_rng(hk.transform(network)))
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(
            lambda: (net.init(KEY, jnp.zeros((1, 4, 4, 2))), net.init_response(KEY, 2, jnp.zeros((1, 4, 4, 2))))
        )
        params, response = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes)
        delta = jnp.asarray(rng.normal(size=(3, 2)))

        def norm(tree, modules):
            return sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves([tree[m] for m in modules or tree]))

        def triples():
            for modules in (None, ["conv2_d", "linear"], ["layer_norm"]):
                own = lambda d, m=modules: norm(st.materialise(st.BestResponse(params, response, d)), m)  # noqa: E731
                expected = jax.vmap(own)(delta)
                for form in (response, st.to_dense(params, response)):
                    yield st.squared_norm(st.BestResponse(params, form, delta, linear=True), modules), expected
                    yield st.squared_norm(st.BestResponse(params, form, delta[0]), modules), expected[0]
                yield st.squared_norm(params, modules), norm(params, modules)

        for found, expected in jax.jit(lambda: list(triples()))():
            np.testing.assert_allclose(found, expected, rtol=1e-10)
        with pytest.raises(KeyError, match="no module 'dense'"):
            st.squared_norm(params, ["dense"])


def test_noise_scaling_and_smoothing():
    x = jnp.ones((3, 10000))
    noisy = np.asarray(reg.input_noise(KEY, x, RATES))
    assert np.all(np.abs(noisy.std(axis=1) - RATES) <= 4 * RATES / np.sqrt(20000))
    np.testing.assert_array_equal(noisy[0], 1.0)
    scaled = np.asarray(reg.input_scaling(KEY, x, RATES))
    assert np.all(scaled == scaled[:, :1])
    assert scaled[0, 0] == 1.0
    assert scaled[1, 0] != 1.0
    smooth = reg.label_smoothing(jnp.eye(4)[:3], RATES)
    np.testing.assert_allclose(smooth.sum(axis=-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(smooth[1], [0.05, 0.85, 0.05, 0.05], rtol=1e-6)


def test_activation_penalties():
    h = np.random.default_rng(0).normal(size=(2, 5, 3))
    np.testing.assert_allclose(reg.activation_penalty(jnp.asarray(h)), (h**2).mean(axis=(1, 2)), rtol=1e-5)
    expected = ((h[:, 1:] - h[:, :-1]) ** 2).mean(axis=(1, 2))
    np.testing.assert_allclose(reg.temporal_penalty(jnp.asarray(h)), expected, rtol=1e-5)


AUGMENTATIONS = {
    "brightness": (aug.brightness, 0.3),
    "contrast": (aug.contrast, 0.3),
    "saturation": (aug.saturation, 0.3),
    "hue": (aug.hue, 0.3),
    "translation": (aug.translation, 3.0),
    "cutout": (aug.cutout, 3.0),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_strength_of_0_changes_nothing_and_each_image_has_its_own(name):
    function, strength = AUGMENTATIONS[name]
    run = jax.jit(function)
    for none in (0.0, jnp.zeros(3)):
        np.testing.assert_allclose(run(KEY, IMAGES, none), IMAGES, atol=1e-6)
    same = jnp.broadcast_to(IMAGES[:1], (40, *IMAGES.shape[1:]))
    out = np.asarray(run(KEY, same, jnp.full(40, strength).at[0].set(0.0)))
    np.testing.assert_allclose(out[0], same[0], atol=1e-6)
    assert len(np.unique(out.reshape(40, -1), axis=0)) > 15
    np.testing.assert_array_equal(out[1:], np.asarray(run(KEY, same, strength))[1:])
    assert run(KEY, IMAGES.astype(jnp.bfloat16), strength).dtype == jnp.bfloat16


def test_what_colour_augmentations_keep():
    out = np.asarray(aug.hue(KEY, IMAGES, 0.5))
    np.testing.assert_allclose(out.sum(-1), IMAGES.sum(-1), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(out, axis=-1), jnp.linalg.norm(IMAGES, axis=-1), rtol=1e-5)
    grey = lambda x: np.asarray(x) @ np.array([0.299, 0.587, 0.114])  # noqa: E731
    np.testing.assert_allclose(grey(aug.saturation(KEY, IMAGES, 0.5)), grey(IMAGES), rtol=1e-5)
    means = lambda x: grey(x).mean(axis=(1, 2))  # noqa: E731
    np.testing.assert_allclose(means(aug.contrast(KEY, IMAGES, 0.5)), means(IMAGES), rtol=1e-5)
    shift = np.asarray(aug.brightness(KEY, IMAGES, 0.5) - IMAGES).reshape(3, -1)
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1], shift.shape), atol=1e-6)
    assert aug.contrast(KEY, IMAGES[..., :1], 0.5).shape == (3, 6, 5, 1)
    for function in (aug.hue, aug.saturation):
        with pytest.raises(ValueError, match="3 channels"):
            function(KEY, IMAGES[..., :1], 0.5)


def test_translation_is_a_shift_filled_with_zeros():
    images = jnp.broadcast_to(IMAGES[:1], (60, *IMAGES.shape[1:]))
    out = np.asarray(aug.translation(KEY, images, 2.0))
    image, seen = np.asarray(IMAGES[0]), set()
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    for moved in out:
        matches = [(i, j) for i in range(5) for j in range(5) if np.array_equal(moved, padded[i : i + 6, j : j + 5])]
        assert len(matches) == 1
        seen |= set(matches)
    assert len(seen) > 12


def test_cutout_blanks_squares_of_the_wanted_number():
    images = jnp.ones((200, 12, 12, 1))
    run = jax.jit(lambda **kwargs: aug.cutout(KEY, images, **kwargs) == 0)
    blank = lambda **kwargs: np.asarray(run(**kwargs))[..., 0]  # noqa: E731
    area = blank(length=3.0).sum(axis=(1, 2))
    assert area.max() == 9
    assert set(area) <= {4, 6, 9}
    assert blank(length=3.0, count=0.0).sum() == 0
    assert area.sum() < blank(length=3.0, count=2.0).sum() < 2 * area.sum() + 1
    own = blank(length=jnp.arange(200.0) % 5, count=jnp.arange(200) % 3)
    assert not own[0].any()
    assert own[2::15].any()


def test_a_value_that_fits_no_example_is_named():
    with pytest.raises(ValueError, match="one for each example"):
        reg.dropout(KEY, jnp.ones((4, 2)), RATES)


def test_gradients_reach_the_strengths_of_smooth_ones():
    grad = jax.jit(
        jax.grad(lambda s: jnp.sum(functools.reduce(lambda x, f: f(KEY, x, s), [aug.brightness, aug.hue], IMAGES) ** 2))
    )
    assert np.all(np.asarray(grad(jnp.full(3, 0.2))) != 0)


def test_label_noise_replaces_each_examples_own_share():
    labels = jax.nn.one_hot(jnp.zeros(60000, jnp.int32), 4)
    rates = jnp.repeat(RATES, 20000)
    noisy = np.asarray(reg.label_noise(KEY, labels, rates)).reshape(3, 20000, 4)
    np.testing.assert_array_equal(noisy.sum(-1), 1.0)
    changed = 1 - noisy[..., 0].mean(1)
    expected = np.asarray(RATES) * 3 / 4  # a quarter of the drawn labels is the right one
    assert np.all(np.abs(changed - expected) <= 4 * np.sqrt(expected * (1 - expected) / 20000))
    np.testing.assert_array_equal(reg.label_noise(KEY, labels[:3], 0.0), labels[:3])


def test_stochastic_depth_drops_whole_examples():
    y = np.asarray(reg.stochastic_depth(KEY, jnp.ones((3000, 2, 5)), jnp.repeat(RATES, 1000))).reshape(3, 1000, 10)
    assert np.all(y == y[..., :1])
    error = np.sqrt(RATES * (1 - RATES) / 1000)
    assert np.all(np.abs((y[..., 0] == 0).mean(1) - RATES) <= 4 * error)
    np.testing.assert_allclose(np.unique(y[2]), [0.0, 1 / 0.3], rtol=1e-6)


@pytest.mark.parametrize("function", [aug.mixup, aug.cutmix])
def test_mixing_mixes_labels_as_much_as_images(function):
    """Image i is filled with i and labelled i, so that a mixture can be read off both."""
    count, run = 50, jax.jit(function)
    index = jnp.arange(count, dtype=jnp.float32)
    images = jnp.broadcast_to(index[:, None, None, None], (count, 8, 8, 1))
    x, y = (np.asarray(a) for a in run(KEY, images, jnp.eye(count), jnp.full(count, 1.0)))
    np.testing.assert_allclose(y.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(x.mean((1, 2, 3)), y @ np.asarray(index), rtol=1e-5, atol=1e-5)
    own = np.diagonal(y)
    assert own.min() < 0.3
    assert own.max() > 0.7
    for still in (dict(alpha=1.0, probability=0.0), dict(alpha=1.0, probability=jnp.zeros(count))):
        for a, b in zip(run(KEY, images, jnp.eye(count), **still), (images, jnp.eye(count)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    if function is aug.mixup:
        strengths = jnp.where(index < 25, 1e-3, 100.0)
        own = np.diagonal(np.asarray(run(KEY, images, jnp.eye(count), strengths)[1]))
        assert np.mean((own[:25] < 0.01) | (own[:25] > 0.99)) > 0.9  # Beta(a, a) goes to the ends for small a
        assert np.all(np.abs(own[25:] - 0.5) < 0.25)


def test_small_rates_hold_in_low_precision():
    """bfloat16 knows multiples of 1/128 only: a uniform draw in it drops 1 in 128 at the least."""
    dropped = jnp.mean(reg.dropout(jax.random.key(0), jnp.ones((1000, 1000), jnp.bfloat16), 0.002) == 0)
    assert abs(float(dropped) - 0.002) < 4 * np.sqrt(0.002 / 1e6)


@pytest.mark.parametrize(
    "of",
    [
        lambda key, x, y: reg.label_smoothing(y, 0.2),
        lambda key, x, y: aug.mixup(key, x, y, 0.4),
        lambda key, x, y: aug.cutmix(key, x, y, 0.4),
    ],
)
def test_whole_numbers_are_refused_where_shares_are_made(of):
    with pytest.raises(ValueError, match="int32 cannot be regularised"):
        of(jax.random.key(0), jnp.ones((4, 6, 6, 1)), jnp.eye(4, dtype=jnp.int32))
