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
from .eigenbasis import as_matrix, follow, rotate, rotate_back, start

PAPER = "Celo2, 2026, in the basis of SOAP, Vyas et al. 2024, arXiv:2409.11321"

_DECAY = 0.95  # of the statistics whose eigenvectors are the basis


class Celo2SoapState(NamedTuple):
    """Accumulators of Celo2 in the eigenbasis.

    Attributes:
        step: int32, updates taken.
        m: momenta in the eigenbasis, one tree a decay; matrices are flattened to rank 2.
        r: the second moment in the eigenbasis.
        row: factored second moments by row, of the rotated gradient.
        col: the same by column.
        sides: the bases, of a matrix ``(left, right)``, of a vector ``()``. A list in the order of the parameters'
            leaves: not every container of parameters can hold tuples in their place (Flax's ``nnx.State`` cannot).
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
    parameter, 6 a row or column, and two ``n x n`` matrices a side of ``n <= max_dim`` rows. An update costs two
    rotations there and one back besides Celo2's network, and every ``every`` steps a QR decomposition a side and three
    rotations of the momenta from the old basis to the new.

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
        g, p = as_matrix(ft.clean(gradient, base.CLIP, dtype)), as_matrix(p.astype(dtype))
        *m, r, row, col, sides = accumulators
        sides, moved, turned = follow(sides, g, step, decay=_DECAY, every=every)
        seen, seen_p = rotate(jnp.stack([g, p]), sides)
        m = [ft.ema(x, seen, b) for x, b in zip(turned(jnp.stack(m)), base.MOMENTUM, strict=True)]
        r, row, col = ft.ema(moved(r), seen * seen, base.RMS), moved(row), moved(col)
        row, col = ft.factored_update(row, col, seen, base.FACTORED)
        d = rotate_back(base.direction(theta, seen, seen_p, m, r, row, col), sides)
        if orthogonalize and d.ndim >= 2:
            d = base.newton_schulz(d)
        u = ft.unit_rms(d, base.EPS, tuple(range(d.ndim)[-2:]))
        return -u.reshape(gradient.shape).astype(gradient.dtype), *m, r, row, col, sides

    def build(theta, num_steps=None):
        del num_steps

        def init_fn(params):
            ft.check_params(params)
            flat = jax.tree.map(as_matrix, params)
            m = tuple(ft.zeros(flat) for _ in base.MOMENTUM)
            sides = [start(x, max_dim, ft.compute_dtype(x.dtype)) for x in jax.tree.leaves(flat)]
            accumulators = (m, ft.zeros(flat), *ft.factored_zeros(flat, len(base.FACTORED)))
            return Celo2SoapState(jnp.zeros((), jnp.int32), *accumulators, sides)

        def update_fn(updates, state, params=None, **extra_args):
            del extra_args
            params, step = ft.required_params(params, "celo2_soap"), state.step + 1
            update = functools.partial(update_tensor, settle(theta, jax.tree.leaves(updates)), step)
            structure: Any = jax.tree.structure(params)
            accumulators = (*state.m, state.r, state.row, state.col, structure.unflatten(state.sides))
            updates, *m, r, row, col, sides = ft.map_tensors(update, updates, params, *accumulators)
            return updates, Celo2SoapState(step, tuple(m), r, row, col, structure.flatten_up_to(sides))

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return LearnedOptimizer(plain.init, build, learning_rate=plain.learning_rate)
