"""The learned direction of ``celo2_soap``, in relative steps that a second network sets for each tensor."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..base import LearnedOptimizer
from ..tensors import Group, common_dtype, each, in_order, rule_transform
from . import celo2_soap
from .relative import factors_init, floor_of, rms, settings, size_of

PAPER = "relative steps: Bernstein et al. 2020, arXiv:2002.03432; cautious decay: arXiv:2510.12402"

_USUAL = 600.0  # updates of a run whose steps have the length that is set
_FULL = 200  # updates, in a run of unknown length, after which steps fall as 1 / t
_SHORTER = 1 / 3  # the power of a run's length that its steps fall with


def control(
    *,
    ratio: float = 0.04,
    decay: float = 0.2,
    warmup: float = 0.05,
    longest: float = 8.0,
    hidden_size: int = 8,
    every: int = 10,
    max_dim: int = 1024,
) -> LearnedOptimizer:
    r"""``celo2_soap`` with steps and decay that a second small network sets, in units that carry over to any size.

    A tensor with weights :math:`x` and :math:`u` the direction of :func:`~learned_opt.rules.celo2_soap.celo2_soap`
    moves by

    .. math:: \kappa_1\, \rho\, (600 / T)^{1/3}\, s\,
        \bigl(\max(\mathrm{rms}(x), f)\, u' - \kappa_2\, \delta\, [u' x < 0]\, x\bigr)

    with :math:`\rho` the share of its size that it moves by in one update of a run of 600 (``ratio``), :math:`T` the
    updates of this run, :math:`f` a floor to the size, :math:`n^{-1/2}` with :math:`n` the fan-in, but of
    embeddings higher in longer runs (:func:`floors`), and :math:`\delta` the cautious ``decay``, which only pulls
    where the step pulls too. :math:`u'` is :math:`u` without a share of what lengthens the weights
    (:func:`braked`): with steps relative to the weights these would grow exponentially. A vector's size counts as
    .05, whatever it holds; it has neither decay nor brake. :math:`s` is
    :func:`~learned_opt.rules.relative.schedule`: it rises over the share ``warmup`` of the run and then falls to 0.
    Where ``num_steps`` is not told it rises over 20 updates and stays, and in place of the cube root of the length
    there is :math:`\min(1, 200 / t)`, with :math:`t` the number of the update.

    The factors :math:`\kappa = 4^{\tanh(\cdot)}` are a network's with one hidden layer, whose last layer starts at
    zero: fresh meta-parameters are the hand-set values, and no training takes a tensor further than four times from
    them. The network reads a tensor's fan-in, fan-out and rank and the number of all parameters, and of the run its
    time and, where ``num_steps`` is told, the share done. It runs once a tensor, whatever its size.

    Args:
        ratio: :math:`\rho`.
        decay: :math:`\delta`.
        warmup: a share of the run.
        longest: times its floor is a matrix whose steps have no part along its weights, above 1; see :func:`braked`.
        hidden_size: units of the network.
        every: updates between two corrections of a basis, of ``celo2_soap``.
        max_dim: a longer side of a matrix is not rotated, likewise; with 0 none is.

    Returns:
        A rule that needs nothing; theta is ``{"direction": ..., "control": ...}``. State: that of ``celo2_soap``.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> rule = control()
        >>> params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
        >>> tx = rule.build(rule.init(jax.random.key(0)), num_steps=100)
        >>> updates, state = tx.update(params, tx.init(params), params)  # of five steps of warm-up the first
        >>> print(jnp.round(updates["b"], 4))
        [-0.0007 -0.0007]
    """
    if not (ratio > 0 and decay >= 0 and 0 <= warmup < 1 and longest > 1 and hidden_size >= 1):
        raise ValueError("control needs ratio > 0, decay >= 0, warmup in [0, 1), longest > 1 and hidden_size >= 1")
    direction = celo2_soap.direction(every=every, max_dim=max_dim)

    def init(key):
        k_direction, k_control = jax.random.split(key)
        return {"direction": direction.init(k_direction), "control": factors_init(k_control, hidden_size, 2)}

    def step(theta, g, p, tensor, own, floor):
        u, tensor = direction.step(theta, g, p, tensor)
        move, pull, floor = (x.astype(p.dtype) for x in (*own, floor))
        if p.ndim < 2:
            return move * size_of(p, floor) * u, tensor
        u = braked(u, p, floor, longest)
        return move * (size_of(p, floor) * u - pull * jnp.where(u * p < 0, p, 0)), tensor

    def build(theta, num_steps=None, layout=None):
        def update(groups, count, shared, value):
            del value
            if not groups:
                return [], shared
            dtype = common_dtype([group.param for group in groups])
            total = jnp.asarray(0 if num_steps is None else num_steps)  # here: of the mesh that the update is under
            usual = ratio * for_length(total, count, dtype)
            own = settings(theta["control"], groups, count, total, warmup, (usual, decay))
            least = floors(groups, total.astype(dtype))
            results = each(functools.partial(step, theta["direction"]), groups, own, least)
            tensors = direction.settle(count, [tensor for _, tensor in results])
            return [(u, new) for (u, _), new in zip(results, tensors, strict=True)], shared

        return rule_transform("control", start=direction.start, update=update, layout=layout)

    return LearnedOptimizer(init, build)


def for_length(total: int | jax.Array, count: int | jax.Array = 0, dtype: Any = float) -> jax.Array:
    r"""What steps are multiplied by: :math:`(600 / T)^{1/3}` in a run of :math:`T` updates.

    Where the length is unknown, :math:`\min(1, 200 / t)` with :math:`t` the number of the update, so that a run may be
    stopped anywhere.

    Args:
        total: :math:`T`; 0 stands for unknown.
        count: :math:`t - 1`, the updates done.
        dtype: of the result.

    Returns:
        A number above 0.

    Reference: Bjorck et al., "Scaling optimal LR across token horizons", 2025, arXiv:2409.19913, who find such a power.
    """
    length, number = jnp.asarray(total, dtype), jnp.asarray(count, dtype) + 1
    told = (_USUAL / jnp.maximum(length, 1)) ** _SHORTER
    return jnp.where(length > 0, told, jnp.minimum(1, _FULL / number))


def floors(groups: Sequence[Group], length: jax.Array) -> jax.Array:
    r"""The least size that a matrix's steps are relative to: :math:`n^{-1/2}`, and of embeddings a higher one.

    .. math:: \min\bigl(1, n^{-1/2} \max(1, T / 600)\bigr)

    with :math:`n` the fan-in, which of a table is its rows. A row is looked up by itself, so that its natural size is
    1; but in short runs tables that stay small end at lower losses (reports/control/embeddings.csv). Tables that
    start at a size of 1 move as they would without this, and tied ones are tables too.

    Args:
        groups: all tensors.
        length: :math:`T`; 0 where it is unknown.

    Returns:
        ``[tensors]``; a vector's entry is not used.
    """

    def of(group):
        return floor_of(group.param.shape[1:]) * jnp.where(group.tables, jnp.maximum(1, length / _USUAL), 1)

    return jnp.minimum(1, in_order([of(group) for group in groups], groups))


def braked(u: jax.Array, p: jax.Array, floor: float | jax.Array, longest: float) -> jax.Array:
    r"""A matrix's direction less a share of its part along the weights, where that lengthens them.

    .. math:: u' = u - b \max(\langle u, x\rangle, 0)\, x / \langle x, x\rangle

    with :math:`b` from 0, where the weights' size is at its floor or below, to 1 at ``longest`` times the floor.

    Args:
        u: the direction, ``[*shape]``.
        p: the weights, likewise.
        floor: of their size.
        longest: see above.

    Returns:
        ``[*shape]``.

    Reference: weights of fixed norm, "Hyperball", 2026, arXiv:2606.16899.
    """
    size = rms(p)
    share = jnp.clip((size / floor - 1) / (longest - 1), 0, 1)
    return u - share * jnp.maximum(jnp.mean(u * p), 0) / size**2 * p
