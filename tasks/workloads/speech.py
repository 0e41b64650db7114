"""Denoising: a U-Net on spectrograms of speech."""

import math

import haiku as hk
import jax
import jax.numpy as jnp

from ..base import TaskFamily
from ..data import load
from ..data.sources import DataError
from ..families.batches import draw, take
from .base import network_task, single

_LEAST, _MOST = 0.1, 3.0  # standard deviations of the noise, in those of the data


def unet(
    dataset: str = "speech", *, channels: tuple[int, ...] = (32, 64, 128), frames: int = 64, batch_size: int = 16
) -> TaskFamily:
    """A U-Net that finds the noise in pieces of a spectrogram, told how strong it is, as diffusion models are trained.

    Args:
        dataset: a data set with ``frames``.
        channels: at each resolution, each half the one before.
        frames: length of a piece; ``2 ** (len(channels) - 1)`` divides it and the number of bands.
        batch_size: pieces a batch.

    Returns:
        The family. The loss is the mean squared error of the noise, 1 for a guess of nothing; its strength is drawn
        log-uniformly from a tenth to three standard deviations of the data.

    Raises:
        DataError: the data set is missing or has no frames.
        ValueError: ``frames`` or the bands cannot be halved so often.

    Reference: Ronneberger et al., "U-Net", 2015; Ho et al., "Denoising diffusion probabilistic models", 2020.
    """
    splits = load(dataset)
    if "frames" not in splits["train"]:
        raise DataError(f"the data set {dataset!r} has no frames")
    known = splits["train"]["frames"]
    bands, multiple = known.shape[1], 2 ** (len(channels) - 1)
    if frames % multiple or bands % multiple:
        raise ValueError(f"{frames} frames of {bands} bands: at {len(channels)} resolutions multiples of {multiple}")
    data = {split: {"frames": jnp.asarray(arrays["frames"])} for split, arrays in splits.items()}
    data["scale"] = {"shift": jnp.float32(known.mean()), "factor": jnp.float32(1 / max(known.std(), 1e-6))}

    def block(x: jax.Array, told: jax.Array, size: int, name: str) -> jax.Array:
        y = jax.nn.silu(hk.GroupNorm(math.gcd(8, x.shape[-1]), name=f"{name}_norm_0")(x))
        y = hk.Conv2D(size, 3, name=f"{name}_conv_0")(y) + hk.Linear(size, name=f"{name}_told")(told)[:, None, None]
        y = jax.nn.silu(hk.GroupNorm(math.gcd(8, size), name=f"{name}_norm_1")(y))
        y = hk.Conv2D(size, 3, name=f"{name}_conv_1")(y)
        return y + (x if x.shape[-1] == size else hk.Conv2D(size, 1, name=f"{name}_way")(x))

    def net(x: jax.Array, strength: jax.Array) -> jax.Array:
        waves = jnp.log(strength)[:, None] * (2.0 ** jnp.arange(4, dtype=x.dtype))[None]
        told = jnp.concatenate([jnp.sin(waves), jnp.cos(waves)], axis=-1)
        told = jax.nn.silu(hk.Linear(64, name="told")(told))
        x = x * jax.lax.rsqrt(1 + jnp.square(strength))[:, None, None]
        x = hk.Conv2D(channels[0], 3, name="stem")(x[..., None])
        kept = []
        for level, size in enumerate(channels):
            x = block(x, told, size, f"down_{level}")
            if level + 1 < len(channels):
                kept.append(x)
                x = hk.Conv2D(size, 3, 2, name=f"halve_{level}")(x)
        for level in reversed(range(len(channels) - 1)):
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = block(jnp.concatenate([x, kept[level]], axis=-1), told, channels[level], f"up_{level}")
        x = jax.nn.silu(hk.GroupNorm(math.gcd(8, x.shape[-1]), name="norm_output")(x))
        return hk.Conv2D(1, 3, name="output")(x)[..., 0]

    def build(data):
        def batch(key, split):
            k_start, k_strength, k_noise = jax.random.split(key, 3)
            all_frames = data[split]["frames"]
            starts = draw(k_start, all_frames.shape[0] - frames + 1, batch_size)
            x = take(all_frames, starts[:, None] + jnp.arange(frames)[None]).astype(jnp.result_type(float))
            x = (x - data["scale"]["shift"]) * data["scale"]["factor"]
            strength = _LEAST * (_MOST / _LEAST) ** jax.random.uniform(k_strength, (batch_size,))
            noise = jax.random.normal(k_noise, x.shape)
            return {"x": x + strength[:, None, None] * noise, "strength": strength, "noise": noise}

        def loss(network, batch):
            return jnp.mean(jnp.square(network(batch["x"], batch["strength"]) - batch["noise"]))

        bands = data["train"]["frames"].shape[1]
        return network_task(net, lambda: (jnp.zeros((1, frames, bands)), jnp.ones(1)), batch, loss)

    return single(data, build)
