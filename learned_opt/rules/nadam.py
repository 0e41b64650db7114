"""NAdam tensor by tensor: the direction that costs least."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..features import compute_dtype, ema
from ..tensors import Direction

_ROOT = 1e-30  # added where a root of 0 would have no derivative
PAPER = "Dozat 2016, Incorporating Nesterov momentum into Adam"


class NadamMoments(NamedTuple):
    """What :func:`direction` accumulates of a tensor.

    Attributes:
        m: mean of the gradients, ``[*shape]``.
        v: mean of their squares.
    """

    m: jax.Array
    v: jax.Array


def direction(*, b1: float = 0.9, b2: float = 0.99, eps: float = 1e-8) -> Direction:
    r"""Adam's direction with Nesterov momentum; it holds no meta-parameters.

    .. math:: u = -\frac{\beta_1 \hat m + (1 - \beta_1)\, g / (1 - \beta_1^t)}{\sqrt{\hat v} + \epsilon},
        \qquad \hat m = \frac{m}{1 - \beta_1^{t+1}}, \quad \hat v = \frac{v}{1 - \beta_2^t}

    Args:
        b1: :math:`\beta_1`.
        b2: :math:`\beta_2`.
        eps: :math:`\epsilon`.
    """

    def start(p):
        m, v = (jnp.zeros_like(p, compute_dtype(p.dtype)) for _ in range(2))  # two buffers: a step may donate them
        return NadamMoments(m, v)

    def step(theta, count, g, p, moments):
        del theta, p
        t = (count + 1).astype(g.dtype)
        m, v = ema(moments.m, g, b1), ema(moments.v, g * g, b2)
        ahead = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        return -ahead / (jnp.sqrt(v / (1 - b2**t) + _ROOT) + eps), NadamMoments(m, v)

    return Direction(lambda key: {}, start, step, lambda count, moments: moments)
