"""Celo2: a normalised per-parameter MLP that needs neither loss nor step count."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import features as ft
from ..base import LearnedOptimizer, Theta
from .column_mlp import Layers, column_mlp, is_short, settle, spread
from .networks import network_init

PAPER = "Celo2, 2026, after Moudgil et al. 2025 (Celo), arXiv:2501.12670"

MOMENTUM = (0.9, 0.99, 0.999)
RMS = 0.95
FACTORED = (0.9, 0.99, 0.999)
INPUTS = 30  # columns of the first layer
VECTOR_INPUTS = 15  # of which tensors below rank 2 have the first
_NORMALISED_MOMENTUM = 7  # the column m_.9 rsqrt(r)
OUTPUTS = 3  # only the first moves the parameters
CLIP = 1000.0
EPS = 1e-9
_ROOT_EPS = 1e-8
_QUINTIC = (3.4445, -4.775, 2.0315)  # of a Newton-Schulz step
_SHORT = 64  # the shorter side from which on Newton-Schulz steps of long matrices are multiplied up


class Celo2State(NamedTuple):
    """Accumulators of Celo2.

    Attributes:
        m: momenta, one tree of the parameters' shapes a decay.
        r: the second moment, likewise.
        row: factored second moments by row, see :func:`learned_opt.features.factored_zeros`.
        col: the same by column.
    """

    m: tuple[optax.Updates, ...]
    r: optax.Updates
    row: optax.Updates
    col: optax.Updates


def direction(theta: Theta, g, p, m, r, row, col) -> jax.Array:
    """``d``, the MLP's first output; columns at unit RMS over the last two axes.

    Args:
        theta: the rule's weights.
        g: the clean gradient, ``[*shape]``.
        p: the parameters, likewise.
        m: the momenta, a list of such.
        r: the second moment.
        row: factored second moments by row.
        col: the same by column.

    Returns:
        ``[*shape]``.
    """
    shape, matrix = g.shape, g.ndim >= 2
    w0 = theta["w0"] if matrix else theta["w0"][:VECTOR_INPUTS]
    layers = Layers((w0, theta["b0"]), ((theta["w1"], theta["b1"]),), (theta["w2"], theta["b2"]))
    R, C = (list(x) for x in ft.factored_scales(row, col, shape))
    if g.ndim == 2 and is_short(shape):
        R, C = list(spread(jnp.stack(R), shape) * spread(jnp.stack(C), shape)), []
    inputs = (g, p, m, r, R, C, list(row), list(col)) if matrix else (g, p, m, r, R, [], [], [])

    def run(*inputs):
        features = functools.partial(ft.factored_columns, eps=_ROOT_EPS)
        squares = functools.partial(ft.factored_squares, eps=_ROOT_EPS)
        return column_mlp(features, inputs, layers, eps=EPS, order=ft.FACTORED_COLUMNS_ORDER, squares=squares)[0]

    if g.ndim == 2 and is_short(shape) and not is_short(shape[::-1]):
        inputs = (g, p, m, r, *(list(x) for x in ft.factored_scales(row, col, shape)), list(row), list(col))
        return jnp.swapaxes(run(*jax.tree.map(lambda x: jnp.swapaxes(x, -1, -2), inputs)), -1, -2)
    if g.ndim == 2:
        return run(*inputs)
    if not matrix:
        return run(*jax.tree.map(ft.as_matrix, inputs)).reshape(shape)
    # a matrix for each index of the leading axes; statistics that do not factor over the last two axes are spelt out
    flat = None if set(ft.factored_axes(shape) or ()) == {g.ndim - 2, g.ndim - 1} else shape
    inputs = jax.tree.map(lambda x: ft.stack_of_matrices(x, flat), inputs)
    return jax.vmap(run)(*inputs).reshape(shape)


def newton_schulz(x: jax.Array) -> jax.Array:
    """Five quintic Newton-Schulz steps towards the nearest (semi-)orthogonal matrix, on the last two axes.

    ``X <- d / (|d|_F + 1e-8)``; ``A = X X'``, ``X <- 3.4445 X + (-4.775 A + 2.0315 A A) X`` (Jordan et al. 2024, Muon).

    All steps are polynomials in the first ``A``: where it is far smaller than ``X`` they are multiplied up first, and
    ``X`` is read only twice. In float32 that differs from the steps one by one by some 1e-4 of the largest entry.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    # the derivative of the norm is finite at 0 only with something under the root
    x = x / (jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True) + 1e-30) + 1e-8)
    short, long = x.shape[-2:]
    x = _by_gram(x) if long >= 4 * short >= 4 * _SHORT else _by_steps(x)
    return jnp.swapaxes(x, -1, -2) if tall else x


def _by_steps(x: jax.Array) -> jax.Array:
    for _ in range(5):
        a = x @ jnp.swapaxes(x, -1, -2)
        x = _QUINTIC[0] * x + (_QUINTIC[1] * a + _QUINTIC[2] * (a @ a)) @ x
    return x


def _by_gram(x: jax.Array) -> jax.Array:
    a = x @ jnp.swapaxes(x, -1, -2)
    one = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    factors = []
    for _ in range(5):
        factors.append(_QUINTIC[0] * one + _QUINTIC[1] * a + _QUINTIC[2] * (a @ a))
        a = factors[-1] @ a @ factors[-1]
    return functools.reduce(jnp.matmul, reversed(factors)) @ x


def celo2(*, hidden_size: int = 8, orthogonalize: bool = False, adam_on: Sequence[str] = ()) -> LearnedOptimizer:
    """Celo2: one small MLP gives every parameter its direction; inputs and outputs are normalised by RMS.

    Per tensor: momenta ``m`` (.9, .99, .999), second moment ``r`` (.95) and factored second moments (.9, .99, .999) of
    the gradient clipped to +-1000; their 30 columns (15 below rank 2), each at unit RMS over the last two axes, go
    through an MLP 30-h-h-3 with ReLU. Its first output ``d``, at unit RMS over the same axes, is the direction:
    ``update = -d rsqrt(1e-9 + mean(d^2))``. It holds no step size: multiply it by a learning rate.

    ``init`` draws weights of standard deviation ``1/sqrt(fan-in)`` and then gives two hidden units of either layer to
    the column ``m_.9 rsqrt(r)``, one for either sign, and a tenth of the random weight to the other units' outputs: the
    fresh rule is nearly RMS-normalised Adam plus a small random direction, where random weights alone would walk at
    random. Meta-training moves all weights freely.

    Non-finite gradient entries count as 0. State: 4 numbers a parameter, and 6 a row or column. Meta-parameters: 347
    for ``hidden_size=8``.

    Args:
        hidden_size: units in either hidden layer, at least 2.
        orthogonalize: replace ``d`` of tensors of rank >= 2 by five Newton-Schulz steps towards the nearest orthogonal
            matrix.
        adam_on: kinds of tensors that Adam moves instead: ``"vectors"`` (below rank 2) and ``"embeddings"`` (those with
            "embed" in their path), as Muon's users do. With ``load(..., weight_decay=...)`` that is AdamW, at the same
            learning rate. Their state is Adam's, 8 bytes a parameter.

    Returns:
        A rule; theta is a dict of ``w0 [30, h], b0 [h], w1 [h, h], b1 [h], w2 [h, 3], b2 [3]``.

    Raises:
        ValueError: if ``hidden_size`` is below 2, or ``adam_on`` names another kind.

    Example:
        >>> rule = celo2(orthogonalize=True, adam_on=["vectors", "embeddings"])
        >>> params = {"embed": jnp.ones((5, 2)), "w": jnp.ones((2, 3)), "b": jnp.ones(3)}
        >>> tx = rule.build(rule.init(jax.random.key(0)))
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> print(jnp.round(updates["b"], 3))  # Adam's first step
        [-1. -1. -1.]
    """
    if hidden_size < 2:
        raise ValueError(f"celo2 needs hidden_size >= 2, got {hidden_size}")
    if unknown := set(adam_on) - set(KINDS):
        raise ValueError(f"celo2: adam_on knows {', '.join(KINDS)}, not {', '.join(sorted(unknown))}")

    def init(key):
        return network_init(key, INPUTS, hidden_size, OUTPUTS, through=_NORMALISED_MOMENTUM)

    @jax.jit  # traced once for all tensors of a shape
    def update_tensor(theta, gradient, p, *accumulators):
        dtype = ft.compute_dtype(p.dtype)
        g, p = ft.clean(gradient, CLIP, dtype), p.astype(dtype)
        *m, r, row, col = accumulators
        m = [ft.ema(x, g, b) for x, b in zip(m, MOMENTUM, strict=True)]
        r = ft.ema(r, g * g, RMS)
        row, col = ft.factored_update(row, col, g, FACTORED)
        d = direction(theta, g, p, m, r, row, col)
        if orthogonalize and d.ndim >= 2:
            d = newton_schulz(d)
        u = ft.unit_rms(d, EPS, tuple(range(d.ndim)[-2:]))
        return -u.astype(gradient.dtype), *m, r, row, col

    def build(theta, num_steps=None):
        del num_steps

        def init_fn(params):
            ft.check_params(params)
            m = tuple(ft.zeros(params) for _ in MOMENTUM)
            return Celo2State(m, ft.zeros(params), *ft.factored_zeros(params, len(FACTORED)))

        def update_fn(updates, state, params=None, **extra_args):
            del extra_args
            params = ft.required_params(params, "celo2")
            update = functools.partial(update_tensor, settle(theta, jax.tree.leaves(updates)))
            updates, *m, r, row, col = ft.map_tensors(update, updates, params, *state.m, state.r, state.row, state.col)
            return updates, Celo2State(tuple(m), r, row, col)

        learned = optax.GradientTransformationExtraArgs(init_fn, update_fn)
        if not adam_on:
            return learned
        clean = optax.stateless_with_tree_map(lambda g, p: ft.clean(g, CLIP, g.dtype))
        adam = optax.chain(clean, optax.scale_by_adam(), optax.scale(-1.0))
        return optax.partition({True: adam, False: learned}, functools.partial(_is_one_of, adam_on))

    return LearnedOptimizer(init, build, learning_rate=1e-3)


# What `adam_on` may name: whether a tensor of that path is of the kind.
KINDS: dict[str, Callable[[str, jax.Array], bool]] = {
    "embeddings": lambda path, x: "embed" in path.lower(),
    "vectors": lambda path, x: jnp.ndim(x) < 2,
}


def _is_one_of(kinds: Sequence[str], params: optax.Params) -> optax.Params:
    def of_one(path, x):
        return any(KINDS[kind](jax.tree_util.keystr(path), x) for kind in kinds)

    return jax.tree_util.tree_map_with_path(of_one, params)
