"""How many samples to take: batch schedules ``(step, statistics) -> b``, and the learning rate to go with them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .delays import Scalar, Statistics, at_least_one, floor, or_nan

BatchSchedule = Callable[[Scalar, Statistics], Scalar]


def constant_batch(size: int) -> BatchSchedule:
    """Take b samples a step: b_t = b.

    Args:
        size: b >= 1.

    Returns:
        A batch schedule.
    """
    at_least_one("constant_batch: size", size)
    return lambda step, statistics: size


def geometric_batch(initial: int, *, factor: float, every: int, maximum: int) -> BatchSchedule:
    """Grow the batch geometrically: b_t = min(b_max, floor(b_0 · factor^floor(t / every))).

    Args:
        initial: b_0 >= 1.
        factor: above 1 it grows.
        every: steps between growths.
        maximum: b_max.

    Returns:
        A batch schedule.

    Example:
        >>> [int(geometric_batch(4, factor=2.0, every=10, maximum=16)(t, Statistics())) for t in (0, 9, 10, 25, 99)]
        [4, 4, 8, 16, 16]

    Reference:
        Smith, Kindermans, Ying, Le, "Don't decay the learning rate, increase the batch size", 2018.
    """
    for name, number in (("initial", initial), ("every", every), ("maximum", maximum)):
        at_least_one(f"geometric_batch: {name}", number)

    def schedule(step: Scalar, statistics: Statistics) -> Scalar:
        return floor(initial * jnp.asarray(factor, jnp.float32) ** (step // every), maximum)

    return schedule


def stepwise_batch(sizes: Sequence[int], boundaries: Sequence[int]) -> BatchSchedule:
    """Change the batch at given steps: b_t = sizes[number of boundaries <= t].

    Args:
        sizes: one more than boundaries.
        boundaries: steps, ascending.

    Returns:
        A batch schedule.

    Raises:
        ValueError: if the lengths do not fit, the boundaries do not ascend or a size is below 1.
    """
    if len(sizes) != len(boundaries) + 1 or list(boundaries) != sorted(set(boundaries)) or min(sizes) < 1:
        raise ValueError(
            f"stepwise_batch: needs sizes >= 1, one more than ascending boundaries, got {sizes} and {boundaries}"
        )
    table = np.asarray(sizes, np.int32)
    steps = np.asarray(boundaries, np.int32)
    return lambda step, statistics: jnp.asarray(table)[jnp.sum(jnp.asarray(step) >= steps)]


def noise_scale_batch(
    minimum: int,
    maximum: int,
    *,
    scale: float = 1.0,
    noise_scale: Callable[[Statistics], Scalar] = lambda statistics: statistics.custom,
) -> BatchSchedule:
    """Let the batch follow the gradient noise: b = clip(ceil(c · B_noise), b_min, b_max), B_noise = tr Sigma / |G|^2.

    Args:
        minimum: b_min, also while the noise scale is unknown.
        maximum: b_max.
        scale: c; 1 is the knee between few steps and few samples (1 / P for a worker's share of it).
        noise_scale: statistics -> B_noise, as from :func:`gradient_noise`, smoothed over rounds.

    Returns:
        A batch schedule.

    Reference:
        McCandlish, Kaplan, Amodei et al., "An empirical model of large-batch training", 2018.
    """
    at_least_one("noise_scale_batch: minimum", minimum)
    if maximum < minimum:
        raise ValueError(f"noise_scale_batch: maximum {maximum} is below minimum {minimum}")

    def schedule(step: Scalar, statistics: Statistics) -> Scalar:
        size = jnp.ceil(scale * jnp.asarray(or_nan(noise_scale(statistics))))
        size = jnp.where(jnp.isnan(size), minimum, size)
        return jnp.clip(size, minimum, maximum).astype(jnp.int32)

    return schedule


class GradientNoise(NamedTuple):
    """Unbiased estimates: ``signal`` of |G|^2 and ``noise`` of tr Sigma (one sample's gradient covariance)."""

    signal: Scalar
    noise: Scalar


def gradient_noise(small_sq: Scalar, big_sq: Scalar, small_batch: Scalar, big_batch: Scalar) -> GradientNoise:
    """Estimate the gradient's square and its noise from squared norms at two batch sizes.

    |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b),    tr Sigma = (|g_b|^2 - |g_B|^2) / (1/b - 1/B).

    With P workers, the mean over workers of |g_i|^2 and the |.|^2 of the mean gradient serve (``Statistics.worker_sq``
    and ``delta_sq`` after a round of one plain SGD step, divided by eta^2). Average both over time before dividing: the
    ratio of single estimates is heavy-tailed.

    Args:
        small_sq: |g_b|^2.
        big_sq: |g_B|^2.
        small_batch: b; like B, it may be traced (a growing batch under a mask), and then goes unchecked.
        big_batch: B > b.

    Returns:
        A :class:`GradientNoise`; B_noise = noise / signal.

    Raises:
        ValueError: if not B > b > 0.

    Reference:
        McCandlish et al., "An empirical model of large-batch training", 2018, appendix A.
    """
    traced = isinstance(small_batch, jax.core.Tracer) or isinstance(big_batch, jax.core.Tracer)
    if not traced and not big_batch > small_batch > 0:
        raise ValueError(f"gradient_noise: needs big_batch > small_batch > 0, got {big_batch} and {small_batch}")
    signal = (big_batch * big_sq - small_batch * small_sq) / (big_batch - small_batch)
    return GradientNoise(signal, (small_sq - big_sq) / (1 / small_batch - 1 / big_batch))


def learning_rate_for_batch(
    base: float, base_batch: float, batch: Scalar, *, rule: str = "linear", noise_scale: Scalar | None = None
) -> Scalar:
    """Return the learning rate that goes with a batch size.

    linear: eta_0 b / b_0;    sqrt: eta_0 sqrt(b / b_0);    noise: eta_0 (1 + B/b_0) / (1 + B/b), B the noise scale.

    ``linear`` suits SGD well below the noise scale, ``sqrt`` Adam-like rules; ``noise`` is linear there and constant
    above it.

    Args:
        base: eta_0, right for ``base_batch``.
        base_batch: b_0.
        batch: b.
        rule: ``"linear"``, ``"sqrt"`` or ``"noise"``.
        noise_scale: B, for ``"noise"``.

    Returns:
        The learning rate.

    Raises:
        ValueError: if the rule is unknown or the noise scale is missing.

    Example:
        >>> learning_rate_for_batch(0.1, 8, 32)
        0.4

    Reference:
        Goyal et al., 2017 (linear); Malladi et al., 2022 (square root); McCandlish et al., 2018 (noise).
    """
    if rule == "linear":
        return base * (batch / base_batch)
    if rule == "sqrt":
        return base * (batch / base_batch) ** 0.5
    if rule == "noise":
        if noise_scale is None:
            raise ValueError("learning_rate_for_batch: rule='noise' needs noise_scale=")
        return base * (1 + noise_scale / base_batch) / (1 + noise_scale / batch)
    raise ValueError(f"learning_rate_for_batch: rule must be 'linear', 'sqrt' or 'noise', got {rule!r}")
