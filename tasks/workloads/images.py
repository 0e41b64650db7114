"""Image classifiers: a residual network and a vision transformer."""

import haiku as hk
import jax
import jax.numpy as jnp

from ..base import TaskFamily
from ..data import load
from ..data.sources import DataError
from ..families.batches import cross_entropy, draw, num_outputs, on_device, take
from ..families.networks import residual
from .base import attend, layer_norm, network_task, normal, single, split_heads, table

_PAD = 4  # pixels that a picture is moved by at most


def resnet(
    dataset: str, *, channels: tuple[int, ...] = (64, 128, 256), blocks: int = 1, batch_size: int = 64
) -> TaskFamily:
    """A residual network: a 3x3 stem of stride 2, blocks with normalisation first, group normalisation, global mean.

    Group normalisation in place of batch normalisation: the loss is a function of the parameters and the batch alone.

    Args:
        dataset: a data set of images.
        channels: of each stage; all but the first halve the side.
        blocks: residual blocks of two 3x3 convolutions a stage.
        batch_size: examples a batch.

    Returns:
        The family. Training pictures are moved by up to four pixels and mirrored at random.

    Raises:
        DataError: the data set is missing or has no images.

    Reference: He et al., "Identity mappings in deep residual networks", 2016; Wu & He, "Group normalization", 2018.
    """

    def conv(x: jax.Array, size: int, stride: int, kernel: int, name: str) -> jax.Array:
        return hk.Conv2D(size, kernel, stride, with_bias=False, name=name)(x)

    def net(x: jax.Array, classes: int) -> jax.Array:
        return residual(x, classes, channels, blocks, conv)

    return _classifier(dataset, net, batch_size)


def vit(
    dataset: str, *, layers: int = 6, heads: int = 4, width: int = 192, patch: int = 4, batch_size: int = 64
) -> TaskFamily:
    """A vision transformer: patches as tokens, learned positions, layer normalisation first, the mean over tokens.

    Args:
        dataset: a data set of images.
        layers: blocks of attention and a perceptron of four times the width.
        heads: attention heads; they divide ``width``.
        width: of the model.
        patch: side of a patch; it divides the images'.
        batch_size: examples a batch.

    Returns:
        The family. Training pictures are moved by up to four pixels and mirrored at random.

    Raises:
        DataError: the data set is missing or has no images.

    Reference: Dosovitskiy et al., "An image is worth 16x16 words", 2020; Beyer et al., "Better plain ViT baselines for
    ImageNet-1k", 2022.
    """

    def net(x: jax.Array, classes: int) -> jax.Array:
        batch, side, _, colours = x.shape
        if side % patch:
            raise ValueError(f"pictures of side {side} and patch {patch}: the patch must divide the side")
        x = x.reshape(batch, side // patch, patch, side // patch, patch, colours).swapaxes(2, 3)
        tokens = (side // patch) ** 2
        x = (
            hk.Linear(width, name="patches")(x.reshape(batch, tokens, -1))
            + table("positions", tokens, width, 0.02)[None]
        )
        for block in range(layers):
            y = layer_norm(f"norm_attention_{block}")(x)
            q, k, v = jnp.split(hk.Linear(3 * width, name=f"qkv_{block}")(y), 3, axis=-1)
            mixed = attend(split_heads(q, heads), split_heads(k, heads), split_heads(v, heads), None)
            x = x + hk.Linear(width, name=f"mix_{block}")(mixed)
            y = hk.Linear(4 * width, name=f"expand_{block}")(layer_norm(f"norm_mlp_{block}")(x))
            x = x + hk.Linear(width, name=f"contract_{block}")(jax.nn.gelu(y))
        return hk.Linear(classes, w_init=normal(0.02), name="output")(layer_norm("norm_output")(x).mean(axis=1))

    return _classifier(dataset, net, batch_size)


def shifted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Moves each picture by up to four pixels, zeros beyond its border, and mirrors half of them.

    Args:
        images: ``[batch, side, side, colours]``.
        key: PRNG key.

    Returns:
        The same shape.
    """
    number, side = images.shape[:2]
    bits = jax.random.bits(key, (number, 3), jnp.uint32)
    moves = (bits[:, :2] % (2 * _PAD + 1)).astype(jnp.int32)
    padded = jnp.pad(images, ((0, 0), (_PAD, _PAD), (_PAD, _PAD), (0, 0)))

    def one(image, move, mirror):
        cut = jax.lax.dynamic_slice(image, (move[0], move[1], 0), (side, side, image.shape[-1]))
        return jnp.where(mirror, cut[:, ::-1], cut)

    return jax.vmap(one)(padded, moves, bits[:, 2] >> 31 == 1)


def _classifier(dataset: str, net, batch_size: int) -> TaskFamily:
    """A family from a network ``(images [batch, side, side, colours], classes) -> logits [batch, classes]``."""
    splits = load(dataset)
    if "image" not in splits["train"]:
        raise DataError(f"the data set {dataset!r} has no images")
    classes = num_outputs(splits, dataset)

    def build(data):
        def batch(key, split):
            k_rows, k_shift = jax.random.split(key)
            part = data[split]
            rows = draw(k_rows, part["x"].shape[0], batch_size)
            x = (take(part["x"], rows).astype(jnp.result_type(float)) - data["shift"]) * data["scale"]
            x = x[..., None] if x.ndim == 3 else x
            return {"x": shifted(x, k_shift) if split == "train" else x, "y": take(part["y"], rows)}

        shape = data["train"]["x"].shape[1:]
        shape = shape if len(shape) == 3 else (*shape, 1)
        return network_task(
            lambda x: net(x, classes),
            lambda: (jnp.zeros((1, *shape)),),
            batch,
            lambda network, batch: cross_entropy(network(batch["x"]), batch["y"]),
        )

    return single(on_device(splits, "image", flat=False), build)
