r"""Image augmentations whose strengths are hyperparameters: vectorised, with a draw of its own for every image.

Images are floats [B, H, W, C] in [0, 1]; results are not clipped, so that strengths act smoothly. A strength is a
scalar, or floats [B] for a value of each example's own. Draws are uniform.
"""

from typing import Any

import jax
import jax.numpy as jnp

from .regularisers import per_example

LUMA = (0.299, 0.587, 0.114)


def _draw(key: jax.Array, images: jax.Array, strength: Any) -> jax.Array:
    """Return strength times a uniform draw in [-1, 1] an image, [B, 1, 1, 1]."""
    shape = (images.shape[0],) + (1,) * (images.ndim - 1)
    return per_example(strength, images) * jax.random.uniform(key, shape, images.dtype, minval=-1.0)


def _grey(images: jax.Array) -> jax.Array:
    if images.shape[-1] == 1:
        return images
    return jnp.sum(images * jnp.asarray(LUMA, images.dtype).reshape(1, 1, 1, 3), axis=-1, keepdims=True)


def _check_colour(name: str, images: jax.Array) -> None:
    if images.shape[-1] != 3:
        raise ValueError(f"{name}: images must have 3 channels on the last axis, got shape {images.shape}")


def brightness(key: jax.Array, images: jax.Array, strength: Any) -> jax.Array:
    r"""Shift an image's brightness, :math:`x + su`, :math:`u \sim U(-1, 1)`.

    Args:
        key: a PRNG key.
        images: float [B, H, W, C].
        strength: :math:`s \ge 0`, a scalar or [B].

    Returns:
        Float [B, H, W, C].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> brightness(jax.random.key(0), jnp.ones((2, 4, 4, 3)), jnp.array([0.0, 0.1]))[0, 0, 0]
        Array([1., 1., 1.], dtype=float32)
    """
    return images + _draw(key, images, strength)


def contrast(key: jax.Array, images: jax.Array, strength: Any) -> jax.Array:
    r"""Scale an image about its mean, :math:`m + (1 + su)(x - m)`; arguments as :func:`brightness`."""
    mean = jnp.mean(_grey(images) if images.shape[-1] == 3 else images, axis=(1, 2, 3), keepdims=True)
    return mean + (1 + _draw(key, images, strength)) * (images - mean)


def saturation(key: jax.Array, images: jax.Array, strength: Any) -> jax.Array:
    r"""Scale an image about its grey, :math:`g + (1 + su)(x - g)`; arguments as :func:`brightness`, C = 3."""
    _check_colour("saturation", images)
    grey = _grey(images)
    return grey + (1 + _draw(key, images, strength)) * (images - grey)


def hue(key: jax.Array, images: jax.Array, strength: Any) -> jax.Array:
    r"""Turn an image's colours about the grey axis by :math:`2\pi su`, which keeps the channels' sum and norm.

    Args:
        key: a PRNG key.
        images: float [B, H, W, 3].
        strength: :math:`s \in [0, 1/2]`, in turns, a scalar or [B].

    Returns:
        Float [B, H, W, 3].

    Raises:
        ValueError: if the images have not 3 channels.
    """
    _check_colour("hue", images)
    angle = 2 * jnp.pi * _draw(key, images, strength)
    mean = jnp.mean(images, axis=-1, keepdims=True)
    # Rodrigues' formula for the axis (1, 1, 1) / sqrt(3).
    crossed = (jnp.roll(images, 1, axis=-1) - jnp.roll(images, -1, axis=-1)) / jnp.sqrt(jnp.asarray(3.0, images.dtype))
    return mean + jnp.cos(angle) * (images - mean) + jnp.sin(angle) * crossed


def _dtype_of_places(images: jax.Array) -> jnp.dtype:
    """That of the images, and float32 at least: bfloat16 holds no odd number above 256."""
    return jnp.promote_types(images.dtype, jnp.float32)


def translation(key: jax.Array, images: jax.Array, pixels: Any) -> jax.Array:
    r"""Shift an image by :math:`\mathrm{round}(nu)` rows and :math:`\mathrm{round}(nv)` columns, filling with 0.

    Args:
        key: a PRNG key.
        images: float [B, H, W, C].
        pixels: :math:`n \ge 0`, a scalar or [B]; below 0.5 nothing moves.

    Returns:
        Float [B, H, W, C].
    """
    size = images.shape[1:3]
    dtype = _dtype_of_places(images)
    u = jax.random.uniform(key, (2, images.shape[0]), dtype, minval=-1.0)
    reach = jnp.broadcast_to(jnp.asarray(pixels, dtype), images.shape[:1])
    shifts = jnp.round(u * reach[None]).astype(jnp.int32)

    def shift(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        for axis, by in enumerate((rows, columns)):
            source = jnp.arange(size[axis]) - by
            inside = (source >= 0) & (source < size[axis])
            taken = jnp.take(image, jnp.clip(source, 0, size[axis] - 1), axis=axis)
            image = jnp.where(jnp.expand_dims(inside, [i for i in range(3) if i != axis]), taken, 0)
        return image

    return jax.vmap(shift)(images, shifts[0], shifts[1])


def cutout(key: jax.Array, images: jax.Array, length: Any, count: Any = 1, max_count: int = 4) -> jax.Array:
    """Blank squares of an image, centred on random pixels and cut off at its edges.

    Args:
        key: a PRNG key.
        images: float [B, H, W, C].
        length: the squares' side in pixels, a scalar or [B]; whole numbers, such as a discrete hyperparameter's.
        count: squares an image, a scalar or [B], up to ``max_count``.
        max_count: the most squares: what is computed, whatever the count.

    Returns:
        Float [B, H, W, C].

    Reference:
        DeVries & Taylor, "Improved regularization of convolutional neural networks with Cutout", 2017.
    """
    batch, height, width = images.shape[:3]
    dtype = _dtype_of_places(images)
    k_rows, k_columns = jax.random.split(key)
    side = jnp.broadcast_to(jnp.asarray(length, dtype), (batch,))[:, None, None]
    wanted = jnp.broadcast_to(jnp.asarray(count, dtype), (batch,))[:, None]

    def covered(key: jax.Array, size: int) -> jax.Array:  # [B, max_count, size]
        centre = jax.random.randint(key, (batch, max_count, 1), 0, size).astype(dtype)
        low = centre - jnp.floor(side / 2)
        at = jnp.arange(size, dtype=dtype).reshape(1, 1, -1)
        return (at >= low) & (at < low + side)

    used = (jnp.arange(max_count, dtype=dtype)[None] < wanted)[..., None]
    rows, columns = covered(k_rows, height) & used, covered(k_columns, width)
    blank = jnp.any(rows[:, :, :, None] & columns[:, :, None, :], axis=1)
    return jnp.where(blank[..., None], 0, images)


def _shares(key: jax.Array, images: jax.Array, alpha: Any, probability: Any) -> jax.Array:
    """Return the share [B] that an image keeps: drawn from Beta(alpha, alpha) with the probability, else 1."""
    k_beta, k_used = jax.random.split(key)
    count, dtype = images.shape[:1], jnp.promote_types(images.dtype, jnp.float32)
    strength = jnp.maximum(jnp.broadcast_to(jnp.asarray(alpha, dtype), count), 1e-3)
    share = jax.random.beta(k_beta, strength, strength, count, dtype)
    used = jax.random.uniform(k_used, count, dtype) < jnp.asarray(probability, dtype)
    return jnp.where(used, share, 1).astype(images.dtype)


def mixup(
    key: jax.Array, images: jax.Array, labels: jax.Array, alpha: Any, probability: Any = 1.0
) -> tuple[jax.Array, jax.Array]:
    r"""Mix an image and its label with another's, :math:`\lambda x_i + (1 - \lambda) x_j`.

    With :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)`, and j of a random permutation of the batch.

    Args:
        key: a PRNG key.
        images: float [B, ...], images or any inputs.
        labels: float [B, K], one-hot or soft.
        alpha: :math:`\alpha > 0`, a scalar or [B].
        probability: how likely an image is mixed at all, a scalar or [B].

    Returns:
        Images and labels, mixed.

    Reference:
        Zhang et al., "mixup: beyond empirical risk minimization", 2018.
    """
    k_share, k_partner = jax.random.split(key)
    share = _shares(k_share, images, alpha, probability)
    partner = jax.random.permutation(k_partner, images.shape[0])

    def mixed(x: jax.Array) -> jax.Array:
        kept = per_example(share, x)
        return kept * x + (1 - kept) * x[partner]

    return mixed(images), mixed(labels)


def cutmix(
    key: jax.Array, images: jax.Array, labels: jax.Array, alpha: Any, probability: Any = 1.0
) -> tuple[jax.Array, jax.Array]:
    r"""Paste a box of another image, and mix the labels by area.

    A box of :math:`(1 - \lambda) H W` pixels, :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)`, about a random pixel
    and cut off at the edges, comes from image j of a random permutation of the batch.

    Args:
        key: a PRNG key.
        images: float [B, H, W, C].
        labels: float [B, K], one-hot or soft.
        alpha: :math:`\alpha > 0`, a scalar or [B].
        probability: how likely an image is mixed at all, a scalar or [B].

    Returns:
        Images and labels, mixed.

    Reference:
        Yun et al., "CutMix: regularization strategy to train strong classifiers with localizable features", 2019.
    """
    k_share, k_partner, *k_axes = jax.random.split(key, 4)
    share = _shares(k_share, images, alpha, probability)
    partner = jax.random.permutation(k_partner, images.shape[0])
    dtype = _dtype_of_places(images)
    side = jnp.sqrt(1 - share.astype(dtype))[:, None]

    def covered(key: jax.Array, size: int) -> jax.Array:  # [B, size]
        centre = jax.random.randint(key, (images.shape[0], 1), 0, size).astype(dtype)
        low = centre - jnp.round(side * size) // 2
        at = jnp.arange(size, dtype=dtype)[None]
        return (at >= low) & (at < low + jnp.round(side * size))

    box = covered(k_axes[0], images.shape[1])[:, :, None] & covered(k_axes[1], images.shape[2])[:, None, :]
    kept = per_example(1 - jnp.mean(box, axis=(1, 2), dtype=images.dtype), labels)
    return jnp.where(box[..., None], images[partner], images), kept * labels + (1 - kept) * labels[partner]
