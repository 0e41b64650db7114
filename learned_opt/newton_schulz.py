"""Newton-Schulz steps towards the nearest orthogonal matrix."""

import jax
import jax.numpy as jnp

from .kernels import on_cpu

COEFFICIENTS = ((3.4445, -4.775, 2.0315),) * 5  # of each step; cheaper ones: reports/direction
_LONG = 4  # times the shorter side, from which on the steps are multiplied up first
_SHORT = 64  # the shorter side from which on that pays


def newton_schulz(x: jax.Array) -> jax.Array:
    """Five quintic Newton-Schulz steps towards the nearest (semi-)orthogonal matrix, on the last two axes.

    ``X <- x / (|x|_F + 1e-8)``; ``A = X X'``, ``X <- 3.4445 X + (-4.775 A + 2.0315 A A) X``.

    All steps are polynomials in the first ``A``: where it is far smaller than ``X`` they are multiplied up first, and
    ``X`` is read only twice. In float32 that differs from the steps one by one by some 1e-4 of the largest entry.

    On accelerators the products are bfloat16's, as Muon's authors have it, unless ``jax_default_matmul_precision`` asks
    for another: the steps only shape the direction, and the loss is level (reports/direction).

    Args:
        x: ``[..., n, m]``.

    Returns:
        ``[..., n, m]`` in the dtype of ``x``, singular values near 1 (0.7 to 1.2) where those of ``x`` are not tiny.

    Reference:
        Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.

    Example:
        >>> values = jnp.linalg.svd(newton_schulz(jnp.diag(jnp.array([3.0, -1.0]))), compute_uv=False)
        >>> bool(jnp.all((0.6 < values) & (values < 1.3)))
        True
    """
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    # the derivative of the norm is finite at 0 only with something under the root
    x = x / (jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True) + 1e-30) + 1e-8)
    (short, long), dtype = x.shape[-2:], products_dtype(x.dtype)
    # rounding to bfloat16 is mended by the next step, but not by a product of all
    by_gram = long >= _LONG * short >= _LONG * _SHORT and dtype == x.dtype
    x = _by_gram(x) if by_gram else _by_steps(x.astype(dtype)).astype(x.dtype)
    return jnp.swapaxes(x, -1, -2) if tall else x


def products_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that the steps of a matrix of this one are multiplied in."""
    asked = jax.config.jax_default_matmul_precision is not None  # type: ignore[attr-defined]
    keep = on_cpu() or asked or dtype != jnp.float32
    return dtype if keep else jnp.dtype(jnp.bfloat16)


def _by_steps(x: jax.Array) -> jax.Array:
    def step(x, coefficients):
        c1, c3, c5 = coefficients
        a = x @ jnp.swapaxes(x, -1, -2)
        return c1 * x + (c3 * a + c5 * (a @ a)) @ x, None

    return jax.lax.scan(step, x, jnp.asarray(COEFFICIENTS, x.dtype))[0]


def _by_gram(x: jax.Array) -> jax.Array:
    a = x @ jnp.swapaxes(x, -1, -2)
    one = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)

    def step(carry, coefficients):
        a, product = carry
        c1, c3, c5 = coefficients
        factor = c1 * one + c3 * a + c5 * (a @ a)
        return (factor @ a @ factor, factor @ product), None

    return jax.lax.scan(step, (a, one + 0 * a), jnp.asarray(COEFFICIENTS, x.dtype))[0][1] @ x
