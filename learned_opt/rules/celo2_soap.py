"""Celo2 in SOAP's coordinates: the per-parameter network sees gradients in Shampoo's eigenbasis."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import features as ft
from ..base import LearnedOptimizer
from . import celo2 as base
from .column_mlp import settle
from .eigenbasis import Side, follow, is_rotated, rotate, rotate_back, side_zeros

PAPER = "Celo2, 2026, in the basis of SOAP, Vyas et al. 2024, arXiv:2409.11321"

_DECAY = 0.95  # of the statistics whose eigenvectors are the basis


class Celo2SoapState(NamedTuple):
    """Accumulators of Celo2 in the eigenbasis; ``sides`` holds a leaf ``(left, right)`` a matrix, ``()`` a vector.

    Attributes:
        step: int32, updates taken.
        m: momenta in the parameters' own coordinates, one tree a decay; matrices are flattened to rank 2.
        r: the second moment in the eigenbasis.
        row: factored second moments by row, of the rotated gradient.
        col: the same by column.
        sides: the bases, a list in the order of the parameters' leaves.
    """

    step: jax.Array
    m: tuple[optax.Updates, ...]
    r: optax.Updates
    row: optax.Updates
    col: optax.Updates
    sides: list[Any]


def celo2_soap(
    *, hidden_size: int = 8, orthogonalize: bool = True, every: int = 10, max_dim: int = 1024
) -> LearnedOptimizer:
    r"""Celo2 in SOAP's coordinates: rotated gradients go through its network, and the direction is rotated back.

    A tensor of rank >= 2 is a matrix of its last axis against the others. With :math:`Q_L, Q_R` the eigenvectors of
    running means (.95) of :math:`G G^\top` and :math:`G^\top G`, Celo2's features are those of
    :math:`Q_L^\top G Q_R`, of the momenta and the parameters turned alike, and its output :math:`d` gives

    .. math:: u = -\mathrm{NS}(Q_L\, d\, Q_R^\top)

    at unit RMS, with NS five Newton-Schulz steps towards the nearest orthogonal matrix. Vectors get Celo2 as it is.
    Weights that were meta-trained for :func:`~learned_opt.rules.celo2.celo2` fit, and the other way round.

    Meta-gradients take the basis for a constant. Non-finite gradient entries count as 0. State: 4 numbers a
    parameter, 6 a row or column, and two ``n x n`` matrices a side of ``n <= max_dim`` rows. An update costs five
    rotations there and back besides Celo2's network, and a QR decomposition a side every ``every`` steps.

    Args:
        hidden_size: units in either hidden layer, at least 2.
        orthogonalize: take the Newton-Schulz steps.
        every: updates between two corrections of the basis.
        max_dim: a longer side of a matrix is not rotated.

    Returns:
        A rule; theta is that of :func:`learned_opt.rules.celo2.celo2`.

    Raises:
        ValueError: if ``hidden_size`` is below 2 or ``every`` below 1.

    Example:
        >>> rule = celo2_soap()
        >>> tx = rule.build(rule.init(jax.random.key(0)))
        >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> print(jax.tree.map(jnp.shape, updates))
        {'b': (2,), 'w': (3, 2)}
    """
    if every < 1:
        raise ValueError(f"celo2_soap needs every >= 1, got {every}")
    plain = base.celo2(hidden_size=hidden_size)

    @jax.jit  # traced once for all tensors of a shape
    def update_tensor(theta, step, gradient, p, *accumulators):
        dtype = ft.compute_dtype(p.dtype)
        g, p = _as_matrix(ft.clean(gradient, base._CLIP, dtype)), _as_matrix(p.astype(dtype))
        *m, r, row, col, sides = accumulators
        m = [ft.ema(x, g, b) for x, b in zip(m, base.MOMENTUM, strict=True)]
        seen: Any = (g, p, *m)
        if sides:
            left, right = sides
            if is_rotated(left):
                left, order = follow(left, g, step, decay=_DECAY, every=every)
                r, row, col = (_reorder(x, order, -2) for x in (r, row, col))
            if is_rotated(right):
                right, order = follow(right, g.T, step, decay=_DECAY, every=every)
                r, row, col = (_reorder(x, order, -1) for x in (r, row, col))
            seen, sides = rotate(jnp.stack(seen), left, right), (left, right)
        r = ft.ema(r, seen[0] * seen[0], base.RMS)
        row, col = ft.factored_update(row, col, seen[0], base.FACTORED)
        d = base.direction(theta, seen[0], seen[1], list(seen[2:]), r, row, col)
        if sides:
            d = rotate_back(d, *sides)
            d = base.newton_schulz(d) if orthogonalize else d
        u = ft.unit_rms(d, base._EPS, tuple(range(d.ndim)[-2:]))
        return -u.reshape(gradient.shape).astype(gradient.dtype), *m, r, row, col, sides

    def build(theta, num_steps=None):
        del num_steps

        def init_fn(params):
            ft.check_params(params)
            flat = jax.tree.map(_as_matrix, params)
            m = tuple(ft.zeros(flat) for _ in base.MOMENTUM)
            sides = [_sides(x, max_dim) for x in jax.tree.leaves(flat)]
            accumulators = (m, ft.zeros(flat), *ft.factored_zeros(flat, len(base.FACTORED)))
            return Celo2SoapState(jnp.zeros((), jnp.int32), *accumulators, sides)

        def update_fn(updates, state, params=None, **extra_args):
            del extra_args
            params, step = ft.required_params(params, "celo2_soap"), state.step + 1
            update = functools.partial(update_tensor, settle(theta, jax.tree.leaves(updates)), step)
            structure: Any = jax.tree.structure(params)
            sides = structure.unflatten(state.sides)
            accumulators = (*state.m, state.r, state.row, state.col, sides)
            updates, *m, r, row, col, sides = ft.map_tensors(update, updates, params, *accumulators)
            return updates, Celo2SoapState(step, tuple(m), r, row, col, structure.flatten_up_to(sides))

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return LearnedOptimizer(plain.init, build, learning_rate=plain.learning_rate)


def _as_matrix(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x


def _sides(x: jax.Array, max_dim: int) -> tuple[Side, ...]:
    dtype = ft.compute_dtype(x.dtype)
    return tuple(side_zeros(x, axis, max_dim, dtype) for axis in (0, 1)) if x.ndim == 2 else ()


def _reorder(x: jax.Array, order: jax.Array, axis: int) -> jax.Array:
    """What is accumulated for directions, moved with them; an axis of size one holds their mean."""
    return jnp.take(x, order, axis=axis) if x.shape[axis] == order.size else x
