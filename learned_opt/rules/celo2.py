"""Celo2: a normalised per-parameter MLP that needs neither loss nor step count."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import features as ft
from ..base import LearnedOptimizer, Theta

PAPER = "Celo2, 2026, after Moudgil et al. 2025 (Celo), arXiv:2501.12670"

MOMENTUM = (0.9, 0.99, 0.999)
RMS = (0.95,)
FACTORED = (0.9, 0.99, 0.999)
INPUTS = 30  # columns of the first layer; below rank 2 only the first 15 are used
OUTPUTS = 3  # only the first moves the parameters
_CLIP = 1000.0
_EPS = 1e-9


class Celo2State(NamedTuple):
    """Accumulators of Celo2.

    Attributes:
        m: momenta, one tree of the parameters' shapes a decay.
        r: second moments, likewise.
        row, col: factored second moments, see :func:`learned_opt.features.factored_init`.
    """

    m: tuple[optax.Updates, ...]
    r: tuple[optax.Updates, ...]
    row: optax.Updates
    col: optax.Updates


def columns(g, p, m, r, row, col) -> list[jax.Array]:
    """The MLP's input columns in order, each of the tensor's shape or with size-one axes where it is constant."""
    s = jax.lax.rsqrt(r + 1e-8)
    cols = [g, jnp.clip(g, -0.1, 0.1), p, *m, r, *(x * s for x in m), s]
    if g.ndim < 2:
        return [*cols, *(g * jax.lax.rsqrt(jnp.maximum(v + 1e-9, 1e-9)) for v in row), g * s]
    R, C = ft.factored_scales(row, col, g.shape)
    cols += [*(g * a * b for a, b in zip(R, C, strict=True)), g * s, *row, *col]
    cols += [*jax.lax.rsqrt(row + 1e-8), *jax.lax.rsqrt(col + 1e-8)]
    return [*cols, *(x * a * b for x, a, b in zip(m, R, C, strict=True))]


def direction(theta: Theta, cols: list[jax.Array], shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """The MLP's first output, every column at unit RMS over ``axes``."""
    dtype = cols[0].dtype
    x = jnp.stack([jnp.broadcast_to(ft.unit_rms(c, _EPS, axes), shape) for c in cols])
    w0, b0, w1, b1, w2, b2 = (theta[k].astype(dtype) for k in ("w0", "b0", "w1", "b1", "w2", "b2"))
    column = (-1, *(1,) * len(shape))
    h = jax.nn.relu(jnp.tensordot(w0[: len(cols)], x, (0, 0)) + b0.reshape(column))
    h = jax.nn.relu(jnp.tensordot(w1, h, (0, 0)) + b1.reshape(column))
    return jnp.tensordot(w2[:, 0], h, (0, 0)) + b2[0]


def newton_schulz(x: jax.Array) -> jax.Array:
    """Five quintic Newton-Schulz steps towards the nearest (semi-)orthogonal matrix, on the last two axes.

    ``X <- d / (|d|_F + 1e-8)``; ``A = X X'``, ``X <- 3.4445 X + (-4.775 A + 2.0315 A A) X`` (Jordan et al. 2024, Muon).
    """
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    # the derivative of the norm is finite at 0 only with something under the root
    x = x / (jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True) + 1e-30) + 1e-8)
    for _ in range(5):
        a = x @ jnp.swapaxes(x, -1, -2)
        x = 3.4445 * x + (-4.775 * a + 2.0315 * (a @ a)) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x


def celo2(*, hidden_size: int = 8, orthogonalize: bool = False) -> LearnedOptimizer:
    """Celo2: one small MLP gives every parameter its direction; inputs and outputs are normalised by RMS.

    Per tensor: momenta ``m`` (.9, .99, .999), second moment ``r`` (.95) and factored second moments (.9, .99, .999) of
    the gradient clipped to +-1000; their 30 columns (15 below rank 2), each at unit RMS over the last two axes, go
    through an MLP 30-h-h-3 with ReLU. Its first output ``d``, at unit RMS over the same axes, is the direction:
    ``update = -d rsqrt(1e-9 + mean(d^2))``. It holds no step size: multiply it by a learning rate.

    ``init`` draws weights of standard deviation ``1/sqrt(fan-in)`` and then gives two hidden units of either layer to
    the column ``m_.9 rsqrt(r)``, one for either sign, and a tenth of their weight to the other units' outputs: the fresh
    rule is nearly RMS-normalised Adam, plus a small random direction, and not a random walk. Meta-training moves
    all weights freely.

    Non-finite gradient entries count as 0. State: 4 numbers a parameter, and 6 a row or column. Meta-parameters: 347
    for ``hidden_size=8``.

    Args:
        hidden_size: units in either hidden layer, at least 2.
        orthogonalize: replace ``d`` of tensors of rank >= 2 by five Newton-Schulz steps towards the nearest orthogonal
            matrix.

    Returns:
        A rule; theta is a dict of ``w0 [30, h], b0 [h], w1 [h, h], b1 [h], w2 [h, 3], b2 [3]``.

    Raises:
        ValueError: if ``hidden_size`` is below 2.
    """
    if hidden_size < 2:
        raise ValueError(f"celo2 needs hidden_size >= 2, got {hidden_size}")

    def init(key):
        k0, k1, k2 = jax.random.split(key, 3)
        w0 = ft.truncated_normal(k0, (INPUTS, hidden_size), INPUTS)
        w1 = ft.truncated_normal(k1, (hidden_size, hidden_size), hidden_size)
        w2 = 0.1 * ft.truncated_normal(k2, (hidden_size, OUTPUTS), hidden_size)
        w0 = w0.at[:, :2].set(0).at[7, :2].set(jnp.array([1.0, -1.0]))
        w1 = w1.at[:, :2].set(jnp.eye(hidden_size, 2))
        w2 = w2.at[:2, 0].set(jnp.array([1.0, -1.0]))
        zeros = jnp.zeros((hidden_size,))
        return {"w0": w0, "b0": zeros, "w1": w1, "b1": zeros, "w2": w2, "b2": jnp.zeros((OUTPUTS,))}

    def update_tensor(theta, g, p, m, r, row, col):
        dtype = ft.compute_dtype(p.dtype)
        shape, out = p.shape, g.dtype
        g, p = ft.clean(g, _CLIP, dtype), p.astype(dtype)
        m = [ft.ema(x, g, b) for x, b in zip(m, MOMENTUM, strict=True)]
        r = [ft.ema(r[0], g * g, RMS[0])]
        row, col = ft.factored_update(row, col, g, FACTORED)
        axes = tuple(range(max(g.ndim, 1))[-2:])
        vector = [jnp.atleast_1d(x) for x in (g, p, *m, *r)]
        v = row.reshape(len(FACTORED), 1) if not shape else row
        d = direction(theta, columns(*vector[:2], vector[2:5], vector[5], v, col), vector[0].shape, axes)
        if orthogonalize and len(shape) >= 2:
            d = newton_schulz(d)
        u = ft.unit_rms(d, _EPS, axes).reshape(shape)
        return -u.astype(out), m, r, row, col

    def build(theta, num_steps=None):
        del num_steps

        def init_fn(params):
            ft.check_params(params)
            zeros = lambda x: jnp.zeros(jnp.shape(x), ft.compute_dtype(jnp.result_type(x)))  # noqa: E731
            pair = jax.tree.map(
                lambda x: ft.factored_init(jnp.shape(x), len(FACTORED), ft.compute_dtype(jnp.result_type(x))), params
            )
            row, col = (jax.tree.map(lambda _, q, i=i: q[i], params, pair) for i in range(2))
            return Celo2State(
                m=tuple(jax.tree.map(zeros, params) for _ in MOMENTUM),
                r=tuple(jax.tree.map(zeros, params) for _ in RMS),
                row=row,
                col=col,
            )

        def update_fn(updates, state, params=None, **extra_args):
            del extra_args
            if params is None:
                raise ValueError("celo2 reads the parameters: call update(gradients, state, params)")
            leaves, tree = jax.tree.flatten(updates)
            flat = tree.flatten_up_to
            m, r = zip(*map(flat, state.m), strict=True), zip(*map(flat, state.r), strict=True)
            rest = zip(leaves, flat(params), m, r, flat(state.row), flat(state.col), strict=True)
            new = [update_tensor(theta, *args) for args in rest]
            u, m, r, row, col = zip(*new, strict=True) if new else ((), (), (), (), ())
            back = tree.unflatten
            m = tuple(back(x) for x in zip(*m, strict=True)) if new else state.m
            r = tuple(back(x) for x in zip(*r, strict=True)) if new else state.r
            return back(u), Celo2State(m, r, back(row), back(col))

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return LearnedOptimizer(init, build, learning_rate=1e-3)
