"""A learned outer step for local SGD: Celo2's network on the workers' mean delta, at the delta's own scale."""

import jax
import jax.numpy as jnp
import optax

from .. import features as ft
from ..base import LearnedOptimizer
from . import celo2 as base

PAPER = "after LOpt-A, Joseph et al. 2024, arXiv:2312.02204; the network of Celo2"

_CLIP = 1000.0
_EPS = 1e-30
_GAIN = -1.0  # of the fresh rule: with the momentum's help its steps add up to more than plain averaging's


def outer(*, hidden_size: int = 8) -> LearnedOptimizer:
    """The outer step of local SGD: ``x <- x - e^s rms(delta) d(delta)``, with ``d`` Celo2's direction of unit RMS.

    For :func:`learned_opt.local_sgd`, where the mean delta of the workers takes a gradient's place. The step of each
    tensor is as long as its delta, times a learned gain: it follows the local step size, the delay and the stage of
    training by itself, so that nothing is left to tune. It sees the mean alone and works for any number of workers.

    ``init`` starts from Celo2's own start, which follows the momentum of the normalised deltas, and ``s = -1``.
    Non-finite entries count as 0. State: that of ``celo2``. Meta-parameters: 348 for ``hidden_size=8``.

    Args:
        hidden_size: units in either hidden layer, at least 2.

    Returns:
        A rule; theta is that of :func:`learned_opt.rules.celo2.celo2` and the scalar ``gain``, which is ``s``.

    Raises:
        ValueError: if ``hidden_size`` is below 2.

    Example:
        >>> rule = outer()
        >>> step = rule.build(rule.init(jax.random.key(0)))
        >>> delta = jnp.array([0.3, -0.1])
        >>> updates, _ = step.update(delta, step.init(delta), jnp.ones(2))
        >>> print(jnp.round(jnp.sum(updates**2) / jnp.sum(delta**2), 4) == jnp.round(jnp.exp(-2.0), 4))
        True
    """
    direction = base.celo2(hidden_size=hidden_size)

    def init(key):
        return direction.init(key) | {"gain": jnp.full((), _GAIN)}

    def build(theta, num_steps=None):
        inner = direction.build({name: x for name, x in theta.items() if name != "gain"}, num_steps=num_steps)

        def rescaled(u, delta):
            dtype = ft.compute_dtype(u.dtype)
            x = ft.clean(delta, _CLIP, dtype)
            size = jnp.exp(theta["gain"].astype(dtype)) * jnp.sqrt(jnp.mean(x * x) + _EPS)
            return (size * u.astype(dtype)).astype(u.dtype)

        def update_fn(updates, state, params=None, **extra_args):
            moves, state = inner.update(updates, state, params, **extra_args)
            return jax.tree.map(lambda u, g: rescaled(u, g) if u.size else u, moves, updates), state

        return optax.GradientTransformationExtraArgs(inner.init, update_fn)

    return LearnedOptimizer(init, build)
