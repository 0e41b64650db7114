"""What learned rules see of a tensor: averages, factored second moments and the columns that are made of them.

All of it is per tensor, and element-wise or a reduction over axes. What is constant along an axis keeps that axis with
size one.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .kernels import fenced

# Saved rules record it. Raise it when a change here makes trained weights mean something else.
VERSION = 1


def compute_dtype(dtype) -> jnp.dtype:
    """The dtype that a rule computes in: that of the parameters, and float32 at least.

    >>> compute_dtype(jnp.bfloat16)
    dtype('float32')
    """
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize > 4 else jnp.dtype(jnp.float32)


def clean(gradient: jax.Array, limit: float | jax.Array, dtype) -> jax.Array:
    """The gradient as ``dtype``, non-finite entries counted as 0, the others clipped to ``[-limit, limit]``."""
    g = gradient.astype(dtype)
    limit = jnp.asarray(limit, dtype)
    return jnp.where(jnp.isfinite(g), jnp.clip(g, -limit, limit), jnp.zeros((), dtype))


def ema(old: jax.Array, new: jax.Array, decay) -> jax.Array:
    """Exponential moving average ``b old + (1 - b) new``, in the dtype of ``new``; no bias correction.

    ``1 - b`` is taken in that dtype: from the rounded decay, so that the two weights add up to one.
    """
    b = jnp.asarray(decay, new.dtype)
    return b * old.astype(new.dtype) + (1 - b) * new


def zeros(p: jax.Array, count: int) -> jax.Array:
    """Zeros ``[count, *shape]`` in the dtype that a rule computes in, sharded as ``p``."""
    return jnp.stack([jnp.zeros_like(p, compute_dtype(p.dtype))] * count)


def emas(old: jax.Array, new: jax.Array, decays) -> jax.Array:
    """:func:`ema` of one tensor for several decays: ``[k, *shape]``."""
    return ema(old, new[None], jnp.asarray(decays, new.dtype).reshape(-1, *(1,) * new.ndim))


# --- factored second moments (Shazeer & Stern 2018, arXiv:1804.04235)


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The two axes ``(d1, d0)`` of a factored second moment: the second largest and the largest.

    Equal sizes keep their order, the later axis being ``d0``. ``None`` below rank 2, where nothing is factored.

    >>> factored_axes((3, 3, 64, 32))
    (3, 2)
    """
    if len(shape) < 2:
        return None
    order = np.argsort(np.asarray(shape), kind="stable")
    return int(order[-2]), int(order[-1])


def factored_zeros(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Zero factored second moments of a tensor, for ``count`` decays.

    Returns:
        ``(row, col)``, ``[count, *shape]`` with axis ``d0`` (``d1`` in ``col``) of size one. Below rank 2 ``row`` is
        the whole second moment ``[count, *shape]`` and ``col`` an unused ``[1]``.
    """
    stack = zeros(x, count)
    axes = factored_axes(x.shape)
    if axes is None:
        return stack, jnp.zeros((1,), stack.dtype)
    row, col = (jnp.max(stack, axis + 1, keepdims=True, initial=0) for axis in axes[::-1])
    return row, col


def factored_update(row: jax.Array, col: jax.Array, g: jax.Array, decays) -> tuple[jax.Array, jax.Array]:
    """Factored second moments after the gradient ``g``.

    ``row <- c row + (1 - c) (mean_d0(g^2) + 1e-30)``, and ``col`` with the mean over ``d1``; below rank 2 the whole
    ``v <- c v + (1 - c) (g^2 + 1e-30)``.

    Args:
        row: as :func:`factored_zeros` made it, any float dtype.
        col: likewise.
        g: the gradient ``[*shape]``; its dtype is that of the result.
        decays: ``[k]`` in ``[0, 1]``.
    """
    axes, square = factored_axes(g.shape), g * g
    b = jnp.reshape(jnp.asarray(decays, g.dtype), (-1, *(1,) * g.ndim))
    mean_d0, mean_d1 = (square, square) if axes is None else (jnp.mean(square, i, keepdims=True) for i in axes[::-1])
    row = b * row.astype(g.dtype) + (1 - b) * (mean_d0 + jnp.asarray(1e-30, g.dtype))[None]
    if axes is None:
        return row, col.astype(g.dtype)
    return row, b * col.astype(g.dtype) + (1 - b) * (mean_d1 + jnp.asarray(1e-30, g.dtype))[None]


def factored_scales(row: jax.Array, col: jax.Array, shape: tuple[int, ...]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Lists ``(R, C)`` such that ``g R_k C_k`` is the gradient preconditioned by the k-th factored second moment.

    ``R = rsqrt(max(row / (mean_d1(row) + 1e-9), 1e-9))``, ``C = rsqrt(max(col, 1e-9))``. Below rank 2
    ``R = rsqrt(max(v + 1e-9, 1e-9))``, and there is no ``C``.
    """
    axes = factored_axes(shape)
    if axes is None:
        return list(jax.lax.rsqrt(jnp.maximum(row + 1e-9, 1e-9))), []
    mean = fenced(jnp.mean(row, axes[0] + 1, keepdims=True))
    R = jax.lax.rsqrt(jnp.maximum(row / (mean + 1e-9), 1e-9))
    return list(R), list(jax.lax.rsqrt(jnp.maximum(col, 1e-9)))


# --- the accumulators and columns of the VeLO family


class Moments(NamedTuple):
    """What is accumulated of a tensor's gradients.

    Attributes:
        m: momenta ``[decays, *shape]``.
        r: the second moment ``[*shape]``.
        row: factored second moments by row, ``[decays, ...]``, see :func:`factored_zeros`.
        col: the same by column.
    """

    m: jax.Array
    r: jax.Array
    row: jax.Array
    col: jax.Array


def no_moments(p: jax.Array) -> Moments:
    """The moments of a tensor before its first gradient, of three decays each but for ``r``."""
    return Moments(zeros(p, 3), jnp.zeros_like(p, compute_dtype(p.dtype)), *factored_zeros(p, 3))


def moments_after(moments: Moments, g: jax.Array, *, momentum, rms, factored) -> Moments:
    """The moments with the gradient ``g`` in them; ``momentum``, ``rms`` and ``factored`` are decays."""
    row, col = factored_update(moments.row, moments.col, g, factored)
    return Moments(emas(moments.m, g, momentum), ema(moments.r, g * g, rms), row, col)


def column_inputs(g: jax.Array, p: jax.Array, moments: Moments) -> tuple:
    """The arguments of :func:`factored_columns`; below rank 2 there are no columns for ``col``."""
    R, C = factored_scales(moments.row, moments.col, g.shape)
    col = list(moments.col) if g.ndim >= 2 else []
    return g, p, list(moments.m), moments.r, R, C, list(moments.row), col


def factored_columns(g, p, m, r, R, C, row, col, *, eps: float) -> list[jax.Array]:
    """Columns of the Celo and VeLO rules.

    ``g, clip(g, +-.1), p, m (3), r, m s (3), s, g R C (3), g s`` with ``s = rsqrt(r + eps)``; given rows and columns,
    also ``row (3), col (3), rsqrt(row + 1e-8) (3), rsqrt(col + 1e-8) (3), m R C (3)``.

    Args:
        g: the gradient, of the tensor's shape.
        p: the parameters, likewise.
        m: the momenta, a list of such.
        r: the second moment.
        R: list as :func:`factored_scales` gives it.
        C: the other list, or empty.
        row: list, the factored second moments by row; possibly empty.
        col: the same by column.
        eps: under the root.
    """
    columns, last = _products(g, jnp.clip(g, -0.1, 0.1), p, m, r, jax.lax.rsqrt(r + eps), R, C)
    if row:
        columns += [*row, *col, *(jax.lax.rsqrt(x + 1e-8) for x in (*row, *col)), *last]
    return columns


def factored_squares(g, p, m, r, R, C, row, col, *, eps: float) -> list[jax.Array]:
    """Squares of :func:`factored_columns`, which need no roots. The arguments are the same."""
    R, C, m = ([x * x for x in xs] for xs in (R, C, m))
    columns, last = _products(g * g, jnp.minimum(g * g, 0.01), p * p, m, r * r, 1 / (r + eps), R, C)
    if row:
        columns += [*(x * x for x in (*row, *col)), *(1 / (x + 1e-8) for x in (*row, *col)), *last]
    return columns


def _products(g, clipped, p, m, r, s, R, C) -> tuple[list[jax.Array], list[jax.Array]]:
    """The columns that are products, the last three apart."""
    scales = [a * b for a, b in zip(R, C, strict=True)] if C else R
    columns = [g, clipped, p, *m, r, *(x * s for x in m), s, *(g * x for x in scales), g * s]
    return columns, [x * y for x, y in zip(m, scales, strict=True)]


def unit_rms(x: jax.Array, eps: float, axes: tuple[int, ...]) -> jax.Array:
    """``x rsqrt(eps + mean(x^2))`` over ``axes``."""
    return x * jax.lax.rsqrt(eps + fenced(jnp.mean(x * x, axes, keepdims=True)))


def truncated_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Initial weights of a linear layer: truncated normal, standard deviation ``1 / sqrt(fan_in)``."""
    return jax.random.truncated_normal(key, -2.0, 2.0, shape) / math.sqrt(fan_in)
