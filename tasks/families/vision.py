"""Families of image tasks: perceptrons, small convolutional nets, autoencoders.

Images are shrunk once to the family's side and stay uint8; a batch is gathered, converted and standardised inside the
compiled step.
"""

import functools
from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from ..base import Cfg, Data, Task, TaskFamily
from ..data import load
from ..data.sources import DataError, Splits
from .batches import mean_squared_error, num_outputs, on_device, supervised, supervised_batch
from .networks import MlpSpec, activate, mlp, mlp_spec, residual, sample_mlp, scaled_normal, transform


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """Shrink square images by averaging over areas, each new pixel the mean of the region it covers.

    Args:
        images: uint8 ``[n, h, h]`` or ``[n, h, h, channels]``.
        side: the new side, at most ``h``; it need not divide ``h``.

    Returns:
        uint8 ``[n, side, side, ...]``, rounded.

    Raises:
        ValueError: the images are smaller than ``side``.

    Example:
        >>> shrink(np.full((1, 28, 28), 7, np.uint8), 8).shape
        (1, 8, 8)
    """
    old = images.shape[1]
    if side > old:
        raise ValueError(f"side {side}: the images are {old} pixels wide, choose at most that")
    if side == old:
        return images
    edges = np.linspace(0, old, side + 1)
    low, high = np.arange(old), np.arange(1, old + 1)
    overlap = np.minimum(edges[1:, None], high) - np.maximum(edges[:-1, None], low)
    weights = (np.clip(overlap, 0, None) * side / old).astype(np.float32)
    smaller = np.einsum("ai,bj,nij...->nab...", weights, weights, images.astype(np.float32), optimize=True)
    return np.round(smaller).astype(np.uint8)


@functools.lru_cache(maxsize=16)
def _images(dataset: str, side: int | None) -> Splits:
    splits = load(dataset)
    if "image" not in splits["train"]:
        raise DataError(f"the data set {dataset!r} has no images")
    side = splits["train"]["image"].shape[1] if side is None else side
    return {name: {**arrays, "image": shrink(arrays["image"], side)} for name, arrays in splits.items()}


def _grid(images: Splits) -> tuple[int, int, int]:
    """Height, width and colours."""
    shape = images["train"]["image"].shape[1:]
    return (shape[0], shape[1], shape[2] if len(shape) == 3 else 1)


def _scale_alone(spec: MlpSpec) -> Callable[[jax.Array], Cfg]:
    """Draws the initial weights' factor; the sizes are fixed."""
    return lambda key: sample_mlp(spec._replace(width=spec.width[:1], depth=(1,)), key)


def image_mlp(
    dataset: str = "fashion_mnist_small",
    *,
    side: int | None = 8,
    width: int | tuple[int, ...] = 32,
    depth: int | tuple[int, ...] = 1,
    activation: str | tuple[str, ...] = "relu",
    init_scale: float | tuple[float, float] = 1.0,
    batch_size: int = 64,
) -> TaskFamily:
    """Classify images with a multilayer perceptron.

    Args:
        dataset: a data set of images, see :mod:`tasks.data`.
        side: the images' side, shrunk to it; None keeps them.
        width: hidden width, or the choices a task draws from.
        depth: number of hidden layers, or the choices a task draws from.
        activation: a name, or the choices a task draws from.
        init_scale: factor of the initial weights, or ``(low, high)``, drawn log-uniformly.
        batch_size: examples a batch.

    Returns:
        The family. ``params``: ``{"hidden_0": {"w", "b"}, ..., "output": {"w", "b"}}``.

    Raises:
        DataError: the data set is missing or has no images.
        ValueError: a size, name or scale is impossible.

    Example:
        >>> family = image_mlp(width=32)  # 64-32-10
        >>> task = family.task(family.data, family.sample(jax.random.key(0)))
        >>> task.init(jax.random.key(1))["hidden_0"]["w"].shape
        (64, 32)
    """
    spec = mlp_spec(width, depth, activation, init_scale)
    images = _images(dataset, side)
    classes = num_outputs(images, dataset)

    def network(cfg: Cfg):
        return transform(lambda x: mlp(spec, cfg, classes, x))

    return supervised(on_device(images, "image"), lambda key: sample_mlp(spec, key), network, batch_size, classes)


def patches3x3(x: jax.Array, stride: int = 1) -> jax.Array:
    """The 3x3 neighbourhoods of an image, zeros beyond its border: a product with them is a convolution.

    On CPUs that is the faster form: under ``vmap`` over weights a convolution becomes a grouped one, and inside a loop
    XLA differentiates it some fifty times slower (jax issue 12868).

    Args:
        x: float ``[batch, h, w, c]``.
        stride: from one neighbourhood to the next.

    Returns:
        ``[batch, ceil(h / stride), ceil(w / stride), 9 c]``, by row, then column, then channel.
    """
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [padded[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifts, axis=-1)


class _Conv3x3(hk.Module):
    """A 3x3 convolution, as a product with :func:`patches3x3`."""

    def __init__(self, channels: int, stride: int, w_init, name: str):
        super().__init__(name)
        self.channels, self.stride, self.w_init = channels, stride, w_init

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, h, h, c]`` to ``[batch, ceil(h / stride), ceil(h / stride), channels]``."""
        inputs = x.shape[-1]
        w = hk.get_parameter("w", (3, 3, inputs, self.channels), x.dtype, self.w_init)
        b = hk.get_parameter("b", (self.channels,), x.dtype, jnp.zeros)
        y = patches3x3(x, self.stride) @ w.reshape(9 * inputs, self.channels)
        return y + jnp.broadcast_to(b, y.shape)


def image_conv(
    dataset: str = "fashion_mnist_small",
    *,
    side: int | None = 14,
    channels: tuple[int, ...] = (8, 16),
    activation: str | tuple[str, ...] = "relu",
    init_scale: float | tuple[float, float] = 1.0,
    batch_size: int = 64,
) -> TaskFamily:
    """Classify images with a small net: 3x3 convolutions of stride 2, the mean over places, a linear layer.

    Args:
        dataset: a data set of images, see :mod:`tasks.data`.
        side: the images' side, shrunk to it; None keeps them.
        channels: output channels of each convolution.
        activation: a name, or the choices a task draws from.
        init_scale: factor of the initial weights, or ``(low, high)``, drawn log-uniformly.
        batch_size: examples a batch.

    Returns:
        The family. ``params``: ``{"conv_0": {"w": [3, 3, in, out], "b": [out]}, ..., "output": {"w", "b"}}``.

    Raises:
        DataError: the data set is missing or has no images.
        ValueError: a size, name or scale is impossible.

    Example:
        >>> family = image_conv(channels=(4,))
        >>> task = family.task(family.data, {})
        >>> task.init(jax.random.key(1))["conv_0"]["w"].shape
        (3, 3, 1, 4)
    """
    spec = mlp_spec(channels or (0,), len(channels), activation, init_scale)
    images = _images(dataset, side)
    classes = num_outputs(images, dataset)
    grid = _grid(images)

    def network(cfg: Cfg):
        def net(x):
            scale = cfg.get("init_scale", spec.init_scale[0])
            x = x.reshape(-1, *grid)
            for layer, size in enumerate(channels):
                w_init = scaled_normal(scale, 9 * x.shape[-1])
                x = activate(spec, cfg, _Conv3x3(size, 2, w_init, name=f"conv_{layer}")(x))
            x = x.mean(axis=(1, 2))
            return hk.Linear(classes, w_init=scaled_normal(scale, x.shape[-1]), name="output")(x)

        return transform(net)

    return supervised(on_device(images, "image"), _scale_alone(spec), network, batch_size, classes)


def image_resnet(
    dataset: str = "fashion_mnist_small",
    *,
    side: int | None = 14,
    channels: tuple[int, ...] = (8, 16),
    blocks: int = 1,
    init_scale: float | tuple[float, float] = 1.0,
    batch_size: int = 64,
) -> TaskFamily:
    """Classify images with a small residual net: a 3x3 stem, residual blocks, the mean over places, a linear layer.

    The stem has stride 2. A block is two 3x3 convolutions, each after group normalisation and a ReLU.

    Args:
        dataset: a data set of images, see :mod:`tasks.data`.
        side: the images' side, shrunk to it; None keeps them.
        channels: of each stage; all but the first halve the side.
        blocks: residual blocks a stage.
        init_scale: factor of the initial weights, or ``(low, high)``, drawn log-uniformly.
        batch_size: examples a batch.

    Returns:
        The family.

    Raises:
        DataError: the data set is missing or has no images.
        ValueError: a size or scale is impossible.

    Example:
        >>> family = image_resnet(channels=(4,))
        >>> task = family.task(family.data, {})
        >>> sorted(task.init(jax.random.key(1)))[:2]
        ['conv_0_0_0', 'conv_0_0_1']

    Reference: He et al., "Identity mappings in deep residual networks", 2016; Wu & He, "Group normalization", 2018.
    """
    spec = mlp_spec(channels or (0,), len(channels), "relu", init_scale)
    if blocks < 1:
        raise ValueError(f"blocks {blocks}: at least 1")
    images = _images(dataset, side)
    classes = num_outputs(images, dataset)
    grid = _grid(images)

    def network(cfg: Cfg):
        scale = cfg.get("init_scale", spec.init_scale[0])

        def conv(x, size, stride, kernel, name):
            w_init = scaled_normal(scale, kernel**2 * x.shape[-1])
            if kernel == 1:
                return hk.Linear(size, False, w_init, name=name)(x[:, ::stride, ::stride])
            return _Conv3x3(size, stride, w_init, name=name)(x)

        return transform(lambda x: residual(x.reshape(-1, *grid), classes, channels, blocks, conv, scale))

    return supervised(on_device(images, "image"), _scale_alone(spec), network, batch_size, classes)


def image_autoencoder(
    dataset: str = "fashion_mnist_small",
    *,
    side: int | None = 8,
    width: int = 32,
    code: int = 8,
    activation: str | tuple[str, ...] = "relu",
    init_scale: float | tuple[float, float] = 1.0,
    batch_size: int = 64,
) -> TaskFamily:
    """Reconstruct standardised images through a bottleneck, pixels-width-code-width-pixels, by mean squared error.

    Args:
        dataset: a data set of images, see :mod:`tasks.data`.
        side: the images' side, shrunk to it; None keeps them.
        width: units of the hidden layers about the code.
        code: units of the bottleneck, which is linear.
        activation: a name, or the choices a task draws from.
        init_scale: factor of the initial weights, or ``(low, high)``, drawn log-uniformly.
        batch_size: examples a batch.

    Returns:
        The family. ``params``: ``{"encoder/hidden_0", "encoder/output", "decoder/hidden_0", "decoder/output"}``.

    Raises:
        DataError: the data set is missing or has no images.
        ValueError: a size, name or scale is impossible.

    Example:
        >>> family = image_autoencoder(code=4)
        >>> task = family.task(family.data, {})
        >>> task.init(jax.random.key(1))["encoder/output"]["w"].shape
        (32, 4)
    """
    spec = mlp_spec(width, 1, activation, init_scale)
    if code < 1:
        raise ValueError(f"code {code}: at least 1")
    data = on_device(_images(dataset, side), "image")
    pixels = data["train"]["x"].shape[1]

    def task(data: Data, cfg: Cfg) -> Task:
        def net(x):
            with hk.experimental.name_scope("encoder"):
                middle = mlp(spec, cfg, code, x)
            with hk.experimental.name_scope("decoder"):
                return mlp(spec, cfg, pixels, middle)

        net_init, net_apply = transform(net)

        def init(key):
            return net_init(key, jnp.zeros((1, pixels), jnp.result_type(float)))

        def batch(key, split):
            return {"x": supervised_batch(data, key, split, batch_size)["x"]}

        def loss(params, key, batch):
            del key
            return mean_squared_error(net_apply(params, batch["x"]), batch["x"]), {}

        return Task(init, batch, loss)

    return TaskFamily(data, lambda key: sample_mlp(spec, key), task)
