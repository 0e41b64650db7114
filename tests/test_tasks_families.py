"""Task families: shapes, gradients, batches, masks, scales; and no data closed over."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from tasks import batches, data, networks, num_params, sequence, synthetic, tabular, vision

DRAWN = {"width": (4, 8), "depth": (1, 3), "activation": ("relu", "tanh"), "init_scale": (0.5, 2.0)}

FAMILIES = {
    "image_mlp": lambda: vision.image_mlp(width=8, batch_size=16),
    "image_mlp drawn": lambda: vision.image_mlp(**DRAWN, batch_size=16),
    "image_conv": lambda: vision.image_conv("digits", side=8, channels=(2, 3), activation="swish", batch_size=8),
    "image_autoencoder": lambda: vision.image_autoencoder(width=8, code=2, activation="tanh", batch_size=8),
    "tabular_mlp": lambda: tabular.tabular_mlp("wine", width=8, activation=("gelu", "elu"), batch_size=8),
    "tabular_mlp regression": lambda: tabular.tabular_mlp("diabetes", width=8, activation="sigmoid", batch_size=8),
    "logistic_regression": lambda: tabular.logistic_regression("digits", batch_size=8),
    "char_rnn": lambda: sequence.char_rnn(width=4, embedding=3, length=3, init_scale=(0.5, 2.0), batch_size=4),
    "char_transformer": lambda: sequence.char_transformer(width=4, length=3, batch_size=4),
    "quadratic": lambda: synthetic.quadratic(dim=6, noise=0.1),
    "rosenbrock": lambda: synthetic.rosenbrock(dim=4, noise=0.1),
    "rescaled": lambda: synthetic.reparametrise(vision.image_mlp(width=4, batch_size=8)),
    "rescaled per tensor": lambda: synthetic.reparametrise(vision.image_mlp(width=4, batch_size=8), per_tensor=True),
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return FAMILIES[request.param]()


def draw_loss(family, data, key, dtype=None):
    """Draw a task, parameters and a batch, and give all that there is to look at."""
    keys = jax.random.split(key, 4)
    task = family.task(data, family.sample(keys[0]))
    params = task.init(keys[1])
    if dtype is not None:
        params = jax.tree.map(lambda p: p.astype(dtype), params)
    batch = task.batch(keys[2], "train")
    (loss, aux), grads = jax.value_and_grad(task.loss, has_aux=True)(params, keys[3], batch)
    return params, batch, loss, aux, grads


def test_shapes_and_dtypes(family):
    params, batch, loss, aux, grads = jax.eval_shape(
        lambda d, k: draw_loss(family, d, k), family.data, jax.random.key(0)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == num_params(family)
    assert loss.shape == ()
    assert all(value.shape == () for value in aux.values())
    floats = [leaf for leaf in jax.tree.leaves((params, batch, loss)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    half = jax.eval_shape(lambda d, k: draw_loss(family, d, k, jnp.bfloat16), family.data, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(half[-1])} == {jnp.dtype("bfloat16")}


def test_data_are_arguments_and_not_constants(family):
    closed = jax.make_jaxpr(lambda d, k: draw_loss(family, d, k)[2])(family.data, jax.random.key(0))
    assert sum(np.size(constant) for constant in closed.consts) < 100
    assert "uint8[6000,64]" not in str(closed.jaxpr.constvars)


def test_gradient_in_float64_and_determinism(family):
    """Central differences along a random direction; two tasks at once, so that vmap runs over cfg."""

    def check(data, key):
        keys = jax.random.split(key, 5)
        task = family.task(data, family.sample(keys[0]))
        params, batch = task.init(keys[1]), task.batch(keys[2], "valid")
        flat, unflatten = ravel_pytree(params)
        loss = lambda flat: task.loss(unflatten(flat), keys[3], batch)[0]
        direction = jax.random.normal(keys[4], flat.shape) * (1e-3 + jnp.abs(flat))
        step = 1e-5
        difference = (loss(flat + step * direction) - loss(flat - step * direction)) / (2 * step)
        return loss(flat), jnp.vdot(jax.grad(loss)(flat), direction), difference, flat, batch

    with jax.enable_x64(True):
        run = jax.jit(jax.vmap(check, in_axes=(None, 0)))
        keys = jax.random.split(jax.random.key(3), 2)
        loss, slope, difference, flat, batch = run(family.data, keys)
        again, other = run(family.data, keys), run(family.data, keys[::-1])
    assert slope.dtype == flat.dtype == np.float64
    assert np.isfinite(loss).all()
    np.testing.assert_allclose(slope, difference, rtol=1e-5, atol=1e-8)
    assert np.abs(slope).min() > 0
    for leaf, same, swapped in zip(
        *(jax.tree.leaves(x) for x in ((loss, flat, batch), *((x[0], x[3], x[4]) for x in (again, other)))), strict=True
    ):
        np.testing.assert_array_equal(leaf, same)
        np.testing.assert_array_equal(leaf, np.asarray(swapped)[::-1])
        assert (leaf[0] != leaf[1]).any()


# -- batches and losses ----------------------------------------------------------------------------------------------


def test_draw_is_uniform():
    """Each of 10 counts within 5 standard errors, sqrt(n p (1 - p)) = 134, of n p = 20,000."""
    rows = np.asarray(batches.draw(jax.random.key(0), 10, 200_000))
    assert rows.dtype == np.int32
    counts = np.bincount(rows, minlength=10)
    assert len(counts) == 10
    assert np.abs(counts - 20_000).max() < 5 * np.sqrt(200_000 * 0.1 * 0.9)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_cross_entropy_agrees_with_optax(dtype):
    logits = 30 * jax.random.normal(jax.random.key(0), (7, 3, 5))
    labels = jax.random.randint(jax.random.key(1), (7, 3), 0, 5)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    np.testing.assert_allclose(batches.cross_entropy(logits, labels.astype(dtype)), expected, rtol=1e-6)


def test_image_batches_are_standardised_images_with_their_labels():
    family = vision.image_mlp("digits", side=8, batch_size=512)
    batch = family.task(family.data, {}).batch(jax.random.key(0), "train")
    train = data.load("digits")["train"]
    assert abs(float(batch["x"].mean())) < 0.05
    assert abs(float(batch["x"].std()) - 1) < 0.05
    pixels = np.round(np.asarray(batch["x"]) * train["image"].std() + train["image"].mean()).astype(np.uint8)
    known = {image.tobytes(): label for image, label in zip(train["image"], train["label"], strict=True)}
    assert [known[row.tobytes()] for row in pixels] == batch["y"].tolist()


def test_text_batches_predict_the_next_character():
    family = sequence.char_rnn(length=5, batch_size=64)
    for split in ("train", "valid"):
        batch = family.task(family.data, {}).batch(jax.random.key(0), split)
        text = data.load("sotu_small")[split]["text"].tobytes()
        np.testing.assert_array_equal(batch["x"][:, 1:], batch["y"][:, :-1])
        windows = np.concatenate([batch["x"], batch["y"][:, -1:]], axis=1).astype(np.uint8)
        assert all(window.tobytes() in text for window in windows)


def test_shrink_averages_areas():
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    blocks = images.reshape(3, 14, 2, 14, 2).mean((2, 4))
    np.testing.assert_allclose(vision.shrink(images, 14), blocks, atol=0.51)
    small = vision.shrink(images, 8).astype(float)  # 28 / 8 is no integer: areas overlap in part
    np.testing.assert_allclose(small.mean((1, 2)), images.mean((1, 2)), atol=0.2)
    corner = images[:, :4, :4] * np.outer([1, 1, 1, 0.5], [1, 1, 1, 0.5])
    np.testing.assert_allclose(small[:, 0, 0], corner.sum((1, 2)) / 3.5**2, atol=0.51)
    assert vision.shrink(np.zeros((2, 32, 32, 3), np.uint8), 8).shape == (2, 8, 8, 3)
    with pytest.raises(ValueError, match="28 pixels"):
        vision.shrink(images, 29)


# -- networks --------------------------------------------------------------------------------------------------------


def test_drawn_networks_are_the_small_networks_they_stand_for():
    """Loss against NumPy on the part of the weights in use; the gradient of the rest is exactly 0."""
    family = FAMILIES["image_mlp drawn"]()

    def run(data, key):
        cfg = family.sample(key)
        task = family.task(data, cfg)
        params, batch = task.init(key), task.batch(key, "train")
        return cfg, params, batch, *jax.value_and_grad(lambda p: task.loss(p, key, batch)[0])(params)

    found = jax.jit(jax.vmap(run, in_axes=(None, 0)))(family.data, jax.random.split(jax.random.key(0), 24))
    seen = set()
    for index in range(24):
        cfg, params, batch, loss, grads = jax.tree.map(lambda leaf: np.asarray(leaf[index]), found)
        width, depth, activation = int(cfg["width"]), int(cfg["depth"]), int(cfg["activation"])
        seen.add((width, depth, activation))
        act = [lambda x: np.maximum(x, 0), np.tanh][activation]
        x, inputs = batch["x"].astype(np.float64), 64
        for layer in range(3):
            name = f"hidden_{layer}"
            if layer < depth:
                x = act(x @ params[name]["w"][:inputs, :width] + params[name]["b"][:width])
                used = np.zeros(params[name]["w"].shape, bool)
                used[:inputs, :width] = True
                assert np.abs(grads[name]["w"][used]).max() > 0
                assert not grads[name]["w"][~used].any()
                assert not grads[name]["b"][width:].any()
                inputs = width
            else:
                assert not grads[name]["w"].any()
                assert not grads[name]["b"].any()
        assert not grads["output"]["w"][width:].any()
        logits = x @ params["output"]["w"][:width] + params["output"]["b"]
        picked = logits[np.arange(16), batch["y"]]
        np.testing.assert_allclose(loss, (np.log(np.exp(logits).sum(1)) - picked).mean(), rtol=1e-5)
        first = params["hidden_0"]["w"]
        assert first.std() == pytest.approx(0.88 * cfg["init_scale"] / 8, rel=0.15)  # 512 draws: 3% standard error
        assert np.abs(first).max() <= 2 * cfg["init_scale"] / 8 * 1.0001
    assert len(seen) >= 6


def test_one_choice_leaves_nothing_to_draw():
    family = vision.image_mlp(width=32)
    assert family.sample(jax.random.key(0)) == {}
    assert num_params(family) == 2410
    jaxpr = str(jax.make_jaxpr(lambda d, k: draw_loss(family, d, k)[2])(family.data, jax.random.key(0)))
    for costly in ("cond[", "scatter", "one_hot"):
        assert costly not in jaxpr
    assert jaxpr.count("dot_general") == 2 + 3  # two layers forward, and back without the inputs' gradient


def test_convolution_agrees_with_lax():
    import haiku as hk

    x = jax.random.normal(jax.random.key(0), (2, 7, 7, 3))
    init, apply = networks.transform(lambda x: vision._Conv3x3(4, 2, hk.initializers.TruncatedNormal(), name="c")(x))
    params = init(jax.random.key(1), x)
    numbers = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(x, params["c"]["w"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=numbers)
    np.testing.assert_allclose(apply(params, x), expected, atol=1e-5)


def test_transformer_is_causal():
    family = sequence.char_transformer(width=8, length=6, batch_size=1)
    task = family.task(family.data, {})
    params = task.init(jax.random.key(0))

    def loss_at_third(last):
        x = jnp.asarray([[5, 6, 7, 8, 9, last]])
        return task.loss(params, None, {"x": x, "y": jnp.asarray([[6, 7, 8, 9, 10, 11]])})[0]

    def first_losses(last):  # the last character may change the last prediction only
        x = jnp.asarray([[5, 6, 7, 8, 9, last]])
        total = jnp.stack(
            [task.loss(params, None, {"x": x, "y": jnp.full((1, 6), y).at[0, 5].set(0)})[0] for y in (1, 2)]
        )
        return total[0] - total[1]  # the last position's share cancels

    np.testing.assert_allclose(first_losses(10), first_losses(60), atol=1e-6)
    assert abs(float(loss_at_third(10) - loss_at_third(60))) > 1e-4


# -- synthetic functions ---------------------------------------------------------------------------------------------


def test_quadratic_has_the_spectrum_it_drew():
    family = synthetic.quadratic(dim=7, condition=(10.0, 1000.0))
    with jax.enable_x64(True):
        cfg = family.sample(jax.random.key(2))
        loss = lambda x: family.task({}, cfg).loss({"x": x}, None, {})[0]
        hessian = jax.hessian(loss)(jnp.zeros(7))
        np.testing.assert_allclose(np.linalg.eigvalsh(hessian), np.sort(cfg["eigenvalues"]), rtol=1e-9)
        assert 10 <= np.linalg.cond(hessian) <= 1000
        assert np.abs(hessian - np.diag(np.diag(hessian))).max() > 0.01  # not aligned with the axes
        assert float(loss(cfg["centre"])) == pytest.approx(0, abs=1e-20)


def test_rosenbrock_agrees_with_scipy():
    from scipy.optimize import rosen

    family = synthetic.rosenbrock(dim=5, steepness=(100.0, 100.0))
    task = family.task({}, family.sample(jax.random.key(0)))
    x = np.linspace(-1, 1.5, 5)
    assert float(task.loss({"x": jnp.asarray(x)}, None, {})[0]) == pytest.approx(rosen(x) / 4, rel=1e-5)


def test_noise_is_a_slope_of_mean_zero():
    """The mean of 4,000 noisy gradients within 5 standard errors, 0.3 / sqrt(4000)."""
    family = synthetic.quadratic(dim=4, noise=0.3)
    cfg = family.sample(jax.random.key(0))
    task = family.task({}, cfg)
    x = {"x": jnp.ones(4)}

    def grad(key):
        return jax.grad(lambda p: task.loss(p, None, task.batch(key, "train"))[0])(x)["x"]

    noise = jax.vmap(grad)(jax.random.split(jax.random.key(1), 4000))
    exact = jax.grad(lambda p: task.loss(p, None, {})[0])(x)["x"]
    assert np.abs(noise.mean(0) - exact).max() < 5 * 0.3 / np.sqrt(4000)
    np.testing.assert_allclose(noise.std(0), 0.3, rtol=0.1)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_reparametrised_loss_is_the_original_at_scaled_parameters(per_tensor):
    original = vision.image_mlp(width=4, batch_size=8)
    family = synthetic.reparametrise(original, 1e-2, 1e2, per_tensor)
    key = jax.random.key(5)
    with jax.enable_x64(True):
        cfg = family.sample(key)
        plain, scaled = original.task(original.data, cfg["family"]), family.task(family.data, cfg)
        q, p = scaled.init(key), plain.init(key)
        scale = cfg["scale"] if per_tensor else jax.tree.map(lambda _: cfg["scale"], p)
        jax.tree.map(lambda a, b, s: np.testing.assert_allclose(a * s, b, rtol=1e-12), q, p, scale)
        batch = plain.batch(key, "train")
        loss, grads = jax.value_and_grad(lambda p: plain.loss(p, key, batch)[0])(p)
        new_loss, new_grads = jax.value_and_grad(lambda q: scaled.loss(q, key, batch)[0])(q)
        assert float(new_loss) == pytest.approx(float(loss), rel=1e-12)
        jax.tree.map(lambda a, b, s: np.testing.assert_allclose(a, b * s, rtol=1e-9), new_grads, grads, scale)
        assert len({float(s) for s in jax.tree.leaves(cfg["scale"])}) == (4 if per_tensor else 1)


def test_scales_are_log_uniform():
    """Mean and deviation of log s within 5 standard errors, 13.8 / sqrt(12 n), of those of the uniform distribution."""
    family = synthetic.reparametrise(synthetic.rosenbrock())
    logs = np.log(jax.vmap(family.sample)(jax.random.split(jax.random.key(0), 3000))["scale"])
    assert np.abs(logs).max() <= np.log(1e3) + 1e-5
    error = 2 * np.log(1e3) / np.sqrt(12 * 3000)
    assert abs(logs.mean()) < 5 * error
    assert abs(logs.std() - 2 * np.log(1e3) / np.sqrt(12)) < 5 * error


# -- users' mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: vision.image_mlp("wine"), "no images"),
        (lambda: vision.image_mlp("digits", side=28), "8 pixels"),
        (lambda: vision.image_mlp(activation="rellu"), "rellu"),
        (lambda: vision.image_mlp(width=0), "width 0"),
        (lambda: vision.image_mlp(width=()), "width"),
        (lambda: vision.image_mlp(depth=(0, 1)), "depth"),
        (lambda: vision.image_mlp(init_scale=(2.0, 1.0)), "init_scale"),
        (lambda: vision.image_conv(channels=()), "width"),
        (lambda: vision.image_autoencoder(code=0), "code 0"),
        (lambda: tabular.tabular_mlp("digits"), "no features"),
        (lambda: tabular.logistic_regression("sotu_small"), "neither features nor images"),
        (lambda: sequence.char_rnn("wine"), "no text"),
        (lambda: sequence.char_rnn(core="gruu"), "gruu"),
        (lambda: sequence.char_rnn(width=0), "width 0"),
        (lambda: sequence.char_rnn(init_scale=0.0), "init_scale"),
        (lambda: sequence.char_rnn(length=1_000_000), "shorter"),
        (lambda: sequence.char_transformer(width=9, heads=2), "heads"),
        (lambda: synthetic.quadratic(condition=(0.5, 2.0)), "condition"),
        (lambda: synthetic.rosenbrock(dim=1), "dim 1"),
        (lambda: synthetic.reparametrise(synthetic.rosenbrock(), low=0.0), "low"),
    ],
)
def test_mistakes(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
