"""Task families: shapes, gradients, batches, masks, scales; and no data closed over."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from tasks import data, num_params
from tasks.families import batches, networks, sequence, synthetic, tabular, vision

DRAWN = {"width": (4, 8), "depth": (1, 3), "activation": ("relu", "tanh"), "init_scale": (0.5, 2.0)}

FAMILIES = {
    "image_mlp": lambda: vision.image_mlp(width=8, batch_size=16),
    "image_mlp drawn": lambda: vision.image_mlp(**DRAWN, batch_size=16),
    "image_conv": lambda: vision.image_conv("digits", side=8, channels=(2, 3), activation="swish", batch_size=8),
    "image_resnet": lambda: vision.image_resnet("digits", side=8, channels=(2, 3), batch_size=8),
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


CHECKED_ELSEWHERE = ("image_mlp", "logistic_regression", "rescaled", "rescaled per tensor")  # and slow to compile


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return FAMILIES[request.param]()


# compiled once and run once: compile fast
fast_jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


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
    def shapes(dtype=None):
        return jax.eval_shape(lambda d, k: draw_loss(family, d, k, dtype), family.data, jax.random.key(0))

    params, batch, loss, aux, grads = shapes()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == num_params(family)
    assert loss.shape == ()
    assert all(value.shape == () for value in aux.values())
    floats = [leaf for leaf in jax.tree.leaves((params, batch, loss)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(jnp.bfloat16)[-1])} == {jnp.dtype("bfloat16")}


def test_data_are_arguments_and_not_constants(family):
    closed = jax.make_jaxpr(lambda d, k: draw_loss(family, d, k)[2])(family.data, jax.random.key(0))
    assert sum(np.size(constant) for constant in closed.consts) < 100
    assert "uint8[6000,64]" not in str(closed.jaxpr.constvars)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in CHECKED_ELSEWHERE])
def test_gradient_in_float64_and_determinism(name):
    """Central differences along a random direction; two tasks at once, so that vmap runs over cfg."""

    family = FAMILIES[name]()

    def check(data, key):
        keys = jax.random.split(key, 5)
        task = family.task(data, family.sample(keys[0]))
        params, batch = task.init(keys[1]), task.batch(keys[2], "valid")
        flat, unflatten = ravel_pytree(params)

        def loss(flat):
            return task.loss(unflatten(flat), keys[3], batch)[0]

        direction = jax.random.normal(keys[4], flat.shape) * (1e-3 + jnp.abs(flat))
        step = 1e-5
        high, low = jax.lax.map(loss, jnp.stack([flat + step * direction, flat - step * direction]))
        value, grad = jax.value_and_grad(loss)(flat)
        return value, jnp.vdot(grad, direction), (high - low) / (2 * step), flat, batch

    with jax.enable_x64(True):
        run = fast_jit(jax.vmap(check, in_axes=(None, 0)))
        keys = jax.random.split(jax.random.key(3), 2)
        loss, slope, difference, flat, batch = run(family.data, keys)
        again, other = run(family.data, keys), run(family.data, keys[::-1])
    assert slope.dtype == flat.dtype == np.float64
    assert np.isfinite(loss).all()
    np.testing.assert_allclose(slope, difference, rtol=1e-5, atol=1e-8)
    assert np.abs(slope).min() > 0
    for leaf, same, swapped in zip(
        jax.tree.leaves((loss, flat, batch)),
        *(jax.tree.leaves((x[0], x[3], x[4])) for x in (again, other)),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf, same)
        np.testing.assert_array_equal(leaf, np.asarray(swapped)[::-1])
        assert (leaf[0] != leaf[1]).any()


# -- batches and losses ----------------------------------------------------------------------------------------------


def test_draw_is_uniform():
    """Each of 10 counts within 5 standard errors, sqrt(n p (1 - p)) = 134, of n p = 20,000."""
    rows = np.asarray(fast_jit(lambda key: batches.draw(key, 10, 200_000))(jax.random.key(0)))
    assert rows.dtype == np.int32
    counts = np.bincount(rows, minlength=10)
    assert len(counts) == 10
    assert np.abs(counts - 20_000).max() < 5 * np.sqrt(200_000 * 0.1 * 0.9)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_cross_entropy_agrees_with_optax(dtype):
    random = np.random.default_rng(0)
    logits = random.normal(0, 30, (7, 3, 5)).astype(np.float32)
    labels = random.integers(0, 5, (7, 3)).astype(dtype)

    @fast_jit
    def both(logits, labels):
        reference = optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(np.int32))
        return batches.cross_entropy(logits, labels), reference.mean()

    np.testing.assert_allclose(*both(logits, labels), rtol=1e-6)


def test_image_batches_are_standardised_images_with_their_labels():
    family = vision.image_mlp("digits", side=8, batch_size=512)
    batch = fast_jit(lambda d, k: family.task(d, {}).batch(k, "train"))(family.data, jax.random.key(0))
    train = data.load("digits")["train"]
    assert abs(float(batch["x"].mean())) < 0.05
    assert abs(float(batch["x"].std()) - 1) < 0.05
    pixels = np.round(np.asarray(batch["x"]) * train["image"].std() + train["image"].mean()).astype(np.uint8)
    known = {image.tobytes(): label for image, label in zip(train["image"], train["label"], strict=True)}
    assert [known[row.tobytes()] for row in pixels] == batch["y"].tolist()


def test_text_batches_predict_the_next_character():
    family = sequence.char_rnn(length=5, batch_size=64)
    for split in ("train", "valid"):
        batch = fast_jit(lambda d, k, split=split: family.task(d, {}).batch(k, split))(family.data, jax.random.key(0))
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

    found = fast_jit(jax.vmap(run, in_axes=(None, 0)))(family.data, jax.random.split(jax.random.key(0), 24))
    seen = set()
    leaves, structure = jax.tree.flatten(found)
    for index in range(24):
        cfg, params, batch, loss, grads = structure.unflatten([np.asarray(leaf)[index] for leaf in leaves])
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
    task = family.task(family.data, {})
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = jax.eval_shape(lambda k: task.batch(k, "train"), jax.random.key(0))
    jaxpr = str(jax.make_jaxpr(jax.value_and_grad(lambda p, b: task.loss(p, None, b)[0]))(params, batch))
    for costly in ("cond[", "scatter", "one_hot"):
        assert costly not in jaxpr
    assert jaxpr.count("dot_general") == 2 + 3  # two layers forward, and back without the inputs' gradient


def test_convolution_agrees_with_lax():
    import haiku as hk

    x = np.random.default_rng(0).normal(size=(2, 7, 7, 3)).astype(np.float32)
    init, apply = networks.transform(lambda x: vision._Conv3x3(4, 2, hk.initializers.TruncatedNormal(), name="c")(x))
    params = fast_jit(init)(jax.random.key(1), x)
    numbers = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(x, params["c"]["w"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=numbers)
    np.testing.assert_allclose(fast_jit(apply)(params, x), expected, atol=1e-5)


def test_transformer_is_causal():
    """The last character changes the last prediction only."""
    family = sequence.char_transformer(width=8, length=6, batch_size=1)
    task = family.task(family.data, {})

    @fast_jit
    def losses(key, last):
        params = task.init(key)
        x = jnp.asarray([[5, 6, 7, 8, 9, 0]]).at[0, 5].set(last)
        labels = jnp.asarray([[[6, 7, 8, 9, 10, 11]], [[1, 2, 3, 4, 5, 11]], [[6, 7, 8, 9, 10, 12]]])
        return jax.vmap(lambda y: task.loss(params, None, {"x": x, "y": y})[0])(labels)

    one, two = losses(jax.random.key(0), 10), losses(jax.random.key(0), 60)
    np.testing.assert_allclose(one[0] - one[1], two[0] - two[1], atol=1e-6)  # the last position's share cancels
    assert abs(float((one[0] - one[2]) - (two[0] - two[2]))) > 1e-4


# -- synthetic functions ---------------------------------------------------------------------------------------------


def test_quadratic_has_the_spectrum_it_drew():
    family = synthetic.quadratic(dim=7, condition=(10.0, 1000.0))
    with jax.enable_x64(True):
        cfg = family.sample(jax.random.key(2))

        def loss(x):
            return family.task({}, cfg).loss({"x": x}, None, {})[0]

        hessian = fast_jit(jax.hessian(loss))(jnp.zeros(7))
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

    @fast_jit
    def run(key):
        task = family.task({}, family.sample(key))

        def grad(batch):
            return jax.grad(lambda p: task.loss(p, None, batch)[0])({"x": jnp.ones(4)})["x"]

        batch = jax.vmap(lambda key: task.batch(key, "train"))(jax.random.split(key, 4000))
        return jax.vmap(grad)(batch), grad({})

    noise, exact = run(jax.random.key(0))
    assert np.abs(noise.mean(0) - exact).max() < 5 * 0.3 / np.sqrt(4000)
    np.testing.assert_allclose(noise.std(0), 0.3, rtol=0.1)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_reparametrised_loss_is_the_original_at_scaled_parameters(per_tensor):
    original = vision.image_mlp(width=4, batch_size=8)
    family = synthetic.reparametrise(original, 1e-2, 1e2, per_tensor)

    @fast_jit
    def both(data, key):
        cfg = family.sample(key)
        plain, scaled = original.task(data, cfg["family"]), family.task(data, cfg)
        p, q, batch = plain.init(key), scaled.init(key), plain.batch(key, "train")
        scale = cfg["scale"] if per_tensor else jax.tree.map(lambda _: cfg["scale"], p)
        found = jax.value_and_grad(lambda p: plain.loss(p, key, batch)[0])(p)
        return scale, p, q, *found, *jax.value_and_grad(lambda q: scaled.loss(q, key, batch)[0])(q)

    with jax.enable_x64(True):
        scale, p, q, loss, grads, new_loss, new_grads = both(family.data, jax.random.key(5))
    jax.tree.map(lambda a, b, s: np.testing.assert_allclose(a * s, b, rtol=1e-12), q, p, scale)
    assert float(new_loss) == pytest.approx(float(loss), rel=1e-12)
    jax.tree.map(lambda a, b, s: np.testing.assert_allclose(a, b * s, rtol=1e-9), new_grads, grads, scale)
    assert len({float(s) for s in jax.tree.leaves(scale)}) == (4 if per_tensor else 1)


def test_scales_are_log_uniform():
    """Mean and deviation of log s within 5 standard errors, 13.8 / sqrt(12 n), of those of the uniform distribution."""
    family = synthetic.reparametrise(synthetic.rosenbrock())
    logs = np.log(fast_jit(jax.vmap(family.sample))(jax.random.split(jax.random.key(0), 3000))["scale"])
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
        (lambda: vision.image_resnet(channels=()), "width"),
        (lambda: vision.image_resnet(blocks=0), "blocks"),
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
