"""The per-parameter MLP over gradient, parameter, momenta and time."""

import functools

import jax
import jax.numpy as jnp

from ..base import LearnedOptimizer
from ..features import emas, zeros
from ..kernels import column_mlp
from ..tensors import each, rule_transform
from .networks import network, network_init, with_time
from .recurrent import TIMES

PAPER = "Metz et al. 2020, Tasks, stability, architecture, and compute, arXiv:2009.11243"

MOMENTUM = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
COLUMNS = 2 + len(MOMENTUM)
_THROUGH = 4  # the column m_.9
_EPS = 1e-5
_STEP = 1e-3


def columns(g, p, m) -> list[jax.Array]:
    """``g, p, m (6)``."""
    return [g, p, *m]


def step_of(outputs: list[jax.Array]) -> list[jax.Array]:
    """The update ``-.001 d exp(.001 a)`` of a network's first outputs ``d`` and ``a``, and the other outputs."""
    d, a, *others = outputs
    return [-_STEP * d * jnp.exp(_STEP * a), *others]


def mlp(*, hidden_size: int = 32, published: bool = False) -> LearnedOptimizer:
    """An MLP that sees each parameter's gradient, value and six momenta, and the time.

    Per tensor: momenta ``m`` (.1, .5, .9, .99, .999, .9999) of the gradient. The columns ``g, p, m``, each at unit RMS
    over the tensor (``x rsqrt(1e-5 + mean(x^2))``), and ``tanh(t / tau - 1)`` of the number ``t`` of updates done, for
    eleven ``tau`` from 1 to 100,000, go through an MLP 19-h-h-2 with ReLU. Of its outputs ``d, a``:
    ``update = -.001 d exp(.001 a)``.

    A fresh rule is nearly gradient descent with momentum .9 at unit RMS and step .001. Non-finite gradient entries
    count as 0, those beyond +-1e15 are clipped, and what has no gradient rests
    (:func:`learned_opt.tensors.rule_transform`). State: 6 numbers and a byte a parameter. Meta-parameters: 1,762 for
    ``hidden_size=32``.

    Args:
        hidden_size: units in either hidden layer, at least 2.
        published: what has no gradient moves, as in the reference implementation.

    Returns:
        A rule; theta is a dict of ``w0 [19, h], b0 [h], w1 [h, h], b1 [h], w2 [h, 2], b2 [2]``.

    Raises:
        ValueError: if ``hidden_size`` is below 2.

    Example:
        >>> rule = mlp()
        >>> tx = rule.build(rule.init(jax.random.key(0)))
        >>> p = jnp.ones((2, 3))
        >>> updates, state = tx.update(p, tx.init(p), p)
    """
    if hidden_size < 2:
        raise ValueError(f"mlp needs hidden_size >= 2, got {hidden_size}")

    def init(key):
        return network_init(key, COLUMNS + TIMES, hidden_size, 2, _THROUGH)

    def start(p):
        return zeros(p, len(MOMENTUM))

    def step(theta, t, g, p, m):
        m = emas(m, g, MOMENTUM)
        layers = with_time(network(theta), t, COLUMNS)
        (u,) = column_mlp(columns, (g, p, list(m)), layers, eps=_EPS, outputs=2, finish=step_of)
        return u, m

    def build(theta, num_steps=None, layout=None):
        del num_steps

        def update(groups, t, shared, value):
            del value
            return each(functools.partial(step, theta, t), groups), shared

        return rule_transform("mlp", start=start, update=update, rest=not published, layout=layout)

    return LearnedOptimizer(init, build)
