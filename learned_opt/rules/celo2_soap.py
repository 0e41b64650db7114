"""Celo2 in SOAP's coordinates: the per-parameter network sees gradients in Shampoo's eigenbasis."""

import functools
from typing import NamedTuple

import jax.numpy as jnp

from .. import eigenbasis
from ..base import LearnedOptimizer
from ..features import Moments, compute_dtype, no_moments, unit_rms
from ..newton_schulz import newton_schulz
from ..tensors import Direction, each, rule_transform
from . import celo2
from .celo2 import EPS, after, in_units

PAPER = "Celo2, 2026, in the basis of SOAP, Vyas et al. 2024, arXiv:2409.11321"


class Rotated(NamedTuple):
    """What ``celo2_soap`` accumulates of a tensor.

    Attributes:
        moments: Celo2's, in the eigenbasis; a matrix for a tensor of rank >= 2.
        sides: the matrix's statistics and bases.
    """

    moments: Moments
    sides: eigenbasis.Sides


def celo2_soap(
    *,
    hidden_size: int = 8,
    orthogonalize: bool = True,
    every: int = 10,
    max_dim: int = 1024,
    max_ratio: float = 2.0,
) -> LearnedOptimizer:
    r"""Celo2 in SOAP's coordinates: rotated gradients go through its network, and the direction is rotated back.

    A tensor of rank >= 2 is a matrix of its last axis against the others. With :math:`Q_L, Q_R` the eigenvectors of
    running means (.95) of :math:`G G^\top` and :math:`G^\top G`, Celo2's features are those of
    :math:`Q_L^\top G Q_R`, of the momenta and the parameters turned alike, and its output :math:`d` gives

    .. math:: u = -\mathrm{NS}(Q_L\, d\, Q_R^\top)

    at unit RMS, with NS five Newton-Schulz steps towards the nearest orthogonal matrix. Vectors get Celo2 as it is.
    Weights that were meta-trained for :func:`~learned_opt.rules.celo2.celo2` fit, and the other way round.

    A gradient is seen in the bases that were there before it: in its own eigenbasis all but a diagonal would be
    rounding noise. Bases start as the identity; the matrices of one shape are corrected in turns, each once in
    ``every`` updates (:func:`learned_opt.eigenbasis.correct`).

    Meta-gradients take the basis for a constant. Non-finite gradient entries count as 0, and what has no gradient rests
    (:func:`learned_opt.tensors.rule_transform`). State: 4 numbers and a byte a parameter, 6 a row or column, and two
    ``n x n`` matrices a rotated side of ``n`` rows. An update costs two rotations there and one back besides Celo2's
    network, and every ``every`` steps a QR decomposition a side and three rotations of the momenta from the old basis
    to the new.

    Args:
        hidden_size: units in either hidden layer, at least 2.
        orthogonalize: take the Newton-Schulz steps.
        every: updates between two corrections of a basis.
        max_dim: a longer side of a matrix is not rotated.
        max_ratio: nor is one of more than so many times the other side: on transformers its rotation takes a fifth of
            a step, for a loss that was 1.6 % lower on a small one (reports/direction).

    Returns:
        A rule; theta is that of :func:`learned_opt.rules.celo2.celo2`.

    Raises:
        ValueError: if ``hidden_size`` is below 2 or ``every`` below 1.

    Example:
        >>> import jax
        >>> rule = celo2_soap()
        >>> tx = rule.build(rule.init(jax.random.key(0)))
        >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> print(jax.tree.map(jnp.shape, updates))
        {'b': (2,), 'w': (3, 2)}
    """
    rotated = direction(
        hidden_size=hidden_size, orthogonalize=orthogonalize, every=every, max_dim=max_dim, max_ratio=max_ratio
    )

    def build(theta, num_steps=None, layout=None):
        del num_steps

        def update(groups, count, shared, value):
            del value
            results = each(functools.partial(rotated.step, theta), groups)
            tensors = rotated.settle(count, [accumulators for _, accumulators in results])
            return [(u, new) for (u, _), new in zip(results, tensors, strict=True)], shared

        return rule_transform("celo2_soap", start=rotated.start, update=update, layout=layout)

    return LearnedOptimizer(rotated.init, build, learning_rate=1e-3)


def direction(
    *,
    hidden_size: int = 8,
    orthogonalize: bool = True,
    every: int = 10,
    max_dim: int = 1024,
    max_ratio: float = 2.0,
) -> Direction:
    """The rule tensor by tensor; the arguments are those of :func:`celo2_soap`.

    Raises:
        ValueError: likewise.
    """
    if every < 1:
        raise ValueError(f"celo2_soap needs every >= 1, got {every}")

    def start(p):
        matrix = eigenbasis.as_matrix(p)
        sides = eigenbasis.start(matrix, max_dim=max_dim, max_ratio=max_ratio, dtype=compute_dtype(p.dtype))
        return Rotated(no_moments(matrix), sides)

    def step(theta, gradient, p, rotated):
        g, sides = eigenbasis.as_matrix(gradient), rotated.sides
        seen, seen_p = eigenbasis.rotate(jnp.stack([g, eigenbasis.as_matrix(p)]), sides)
        moments = after(rotated.moments, seen)
        d = eigenbasis.rotate_back(celo2.direction(theta, seen_p, *in_units(seen, moments)), sides)
        d = newton_schulz(d) if orthogonalize and d.ndim >= 2 else d
        u = -unit_rms(d, EPS, tuple(range(d.ndim)[-2:]))
        return u.reshape(gradient.shape), Rotated(moments, eigenbasis.observe(sides, g))

    def corrected(count, tensors):
        stacks = [eigenbasis.Stack(x.sides, x.moments.m, x.moments[1:]) for x in tensors]
        stacks = eigenbasis.correct(count, stacks, every=every)
        return [Rotated(Moments(x.turning, *x.squares), x.sides) for x in stacks]

    return Direction(celo2.celo2(hidden_size=hidden_size).init, start, step, corrected)
