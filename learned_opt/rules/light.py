"""NAdam with steps relative to the weights' size, under a learned schedule: for small networks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..base import LearnedOptimizer
from ..features import compute_dtype, ema
from ..tensors import each, in_order, rule_transform
from .relative import factors_init, floor_of, settings, size_of

PAPER = "NAdam: Dozat 2016; cautious decay: arXiv:2510.12402"

_EPS = 1e-8
_ROOT = 1e-30  # added where a root of 0 would have no derivative


class Light(NamedTuple):
    """What :func:`light` accumulates of a tensor.

    Attributes:
        m: mean of the gradients, ``[*shape]``.
        v: mean of their squares.
        missing: ``[2]``, the weight that zeros still have in either.
        size: of the weights at the start, which steps are relative to.
    """

    m: jax.Array
    v: jax.Array
    missing: jax.Array
    size: jax.Array


def light(
    *,
    ratio: float = 0.08,
    decay: float = 0.2,
    warmup: float = 0.05,
    b1: float = 0.9,
    b2: float = 0.99,
    hidden_size: int = 8,
) -> LearnedOptimizer:
    r"""NAdam, whose steps, decay and memory a small network sets by the kind of tensor and the time, in relative units.

    A tensor with weights :math:`x` and gradients :math:`g` moves by

    .. math::
        \kappa_1\, \rho\, s\, u\, \bigl(\sigma + \kappa_2\, \delta\, [u x < 0]\, |x|\bigr), \qquad
        m \leftarrow m + \kappa_3 (1 - \beta_1)(g - m), \quad v \leftarrow v + \kappa_4 (1 - \beta_2)(g^2 - v)

    with :math:`u` the direction of NAdam by these means, :math:`\sigma` the size of the tensor at the start,
    :math:`\max(\mathrm{rms}(x_0), n^{-1/2})` with :math:`n` its fan-in, :math:`\rho` the share of it that it moves by
    in one update (``ratio``), and :math:`\delta` the cautious ``decay``: a step that shortens an entry is longer by a
    share of it. A vector's size counts as .05, whatever it holds; it has no decay. The schedule :math:`s` is that of
    :func:`~learned_opt.rules.relative.schedule`.

    The factors :math:`\kappa = 4^{\tanh(\cdot)}` are a network's with one hidden layer, whose last layer starts at
    zero: fresh meta-parameters are the hand-set values. It reads a tensor's fan-in, fan-out and rank and the number of
    all parameters, and of the run its time and, where ``num_steps`` is told, the share done. It does not look at
    gradients: for tensors of a few thousand entries that costs as much as the update.

    Args:
        ratio: :math:`\rho`.
        decay: :math:`\delta`.
        warmup: a share of the run.
        b1: :math:`\beta_1`.
        b2: :math:`\beta_2`.
        hidden_size: units of the network.

    Returns:
        A rule that needs nothing. State: two numbers a parameter. Theta is ``{"control": ...}``.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> rule = light()
        >>> params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
        >>> tx = rule.build(rule.init(jax.random.key(0)), num_steps=100)
        >>> updates, state = tx.update(params, tx.init(params), params)  # of five steps of warm-up the first
        >>> print(jnp.round(updates["b"], 4))
        [-0.0012 -0.0012]
    """
    if not (ratio > 0 and decay >= 0 and 0 <= warmup < 1 and 0 < b1 < 1 and 0 < b2 < 1 and hidden_size >= 1):
        raise ValueError("light needs ratio > 0, decay >= 0, warmup in [0, 1), b1 and b2 in (0, 1), hidden_size >= 1")

    def init(key):
        return {"control": factors_init(key, hidden_size, 4)}

    def start(p):
        dtype = compute_dtype(p.dtype)
        m, v = (jnp.zeros_like(p, dtype) for _ in range(2))  # two buffers: a step may donate them
        return Light(m, v, jnp.ones(2, dtype), size_of(p.astype(dtype), floor_of(p.shape)))

    def step(g, p, tensor, settings):
        rate, pull, add1, add2, of_m, of_g, of_v, *missing = settings.astype(p.dtype)
        m, v = ema(tensor.m, g, 1 - add1), ema(tensor.v, g * g, 1 - add2)
        u = -(of_m * m + of_g * g) / (jnp.sqrt(of_v * v + _ROOT) + _EPS)
        length = tensor.size + pull * jnp.where(u * p < 0, jnp.abs(p), 0) if p.ndim >= 2 else tensor.size
        return rate * length * u, tensor._replace(m=m, v=v, missing=jnp.stack(missing))

    def build(theta, num_steps=None, layout=None):
        def update(groups, count, shared, value):
            del value
            if not groups:
                return [], shared
            total = jnp.asarray(0 if num_steps is None else num_steps)  # here: of the mesh that the update is under
            own = settings(theta["control"], groups, count, total, warmup, (ratio, decay, 1 - b1, 1 - b2))
            own = own.at[:, 2:].min(1)  # a mean takes in no more than all of a gradient
            missing = in_order([group.tensors.missing.astype(own.dtype) for group in groups], groups)
            return each(step, groups, nadam(own, missing)), shared

        return rule_transform("light", start=start, update=update, rest=False, stack=False, layout=layout)

    return LearnedOptimizer(init, build)


def nadam(settings: jax.Array, missing: jax.Array) -> jax.Array:
    r"""What each tensor's update is made by.

    With what a gradient adds to its two means and what is missing in these, the three factors of NAdam's direction

    .. math:: u = -\frac{c_1 m + c_2 g}{\sqrt{c_3 v} + \epsilon}

    Args:
        settings: ``[tensors, 4]``, step, decay, and what a gradient adds to the means.
        missing: ``[tensors, 2]``, of :class:`Light`.

    Returns:
        ``[tensors, 9]``: the settings, the three factors, and what is missing then.
    """
    add1 = settings[:, 2]
    missing = missing * (1 - settings[:, 2:])
    of_m = (1 - add1) / (1 - missing[:, 0] * (1 - add1))
    columns = [of_m, add1 / (1 - missing[:, 0]), 1 / (1 - missing[:, 1])]
    return jnp.concatenate([settings, jnp.stack(columns, 1), missing], 1)
