"""The per-parameter MLP over gradient, parameter, momenta and time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import features as ft
from ..base import LearnedOptimizer
from .column_mlp import settle
from .networks import network, network_init, whole_tensor_mlp, with_time
from .recurrent import TIMES

PAPER = "Metz et al. 2020, Tasks, stability, architecture, and compute, arXiv:2009.11243"

MOMENTUM = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
COLUMNS = 2 + len(MOMENTUM)
_THROUGH = 4  # the column m_.9
_LIMIT = 1e15  # of a gradient's size: sums of its square are still float32; as published, nothing is clipped below
_EPS = 1e-5
_STEP = 1e-3


class MLPState(NamedTuple):
    """State of the rule ``mlp``.

    Attributes:
        step: int32 scalar, updates done.
        m: momenta, one tree of the parameters' shapes a decay.
    """

    step: jax.Array
    m: tuple[optax.Updates, ...]


def columns(g, p, m) -> list[jax.Array]:
    """``g, p, m (6)``."""
    return [g, p, *m]


def step_of(outputs: list[jax.Array]) -> list[jax.Array]:
    """The update ``-.001 d exp(.001 a)`` of a network's first outputs ``d`` and ``a``, and the other outputs."""
    d, a, *others = outputs
    return [-_STEP * d * jnp.exp(_STEP * a), *others]


def mlp(*, hidden_size: int = 32) -> LearnedOptimizer:
    """An MLP that sees each parameter's gradient, value and six momenta, and the time.

    Per tensor: momenta ``m`` (.1, .5, .9, .99, .999, .9999) of the gradient. The columns ``g, p, m``, each at unit RMS
    over the tensor (``x rsqrt(1e-5 + mean(x^2))``), and ``tanh(t / tau - 1)`` of the number ``t`` of updates done, for
    eleven ``tau`` from 1 to 100,000, go through an MLP 19-h-h-2 with ReLU. Of its outputs ``d, a``:
    ``update = -.001 d exp(.001 a)``.

    A fresh rule is nearly gradient descent with momentum .9 at unit RMS and step .001. Non-finite gradient entries
    count as 0, those beyond +-1e15 are clipped. State: 6 numbers a parameter. Meta-parameters: 1,762 for
    ``hidden_size=32``.

    Args:
        hidden_size: units in either hidden layer, at least 2.

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

    @jax.jit  # traced once for all tensors of a shape
    def update_tensor(theta, t, gradient, p, *accumulators):
        dtype = ft.compute_dtype(p.dtype)
        clean = functools.partial(ft.clean, limit=_LIMIT, dtype=dtype)
        g = clean(gradient)
        # not ft.ema: of .5 the compiler makes a simpler form, computed anew in every consumer of a copied state
        m = [x.astype(dtype) for x in accumulators]
        m = [x + (1 - jnp.asarray(b, dtype)) * (g - x) for x, b in zip(m, MOMENTUM, strict=True)]
        layers = with_time(network(theta), t, COLUMNS)

        def columns_of(gradient, p, m):  # cleaned where it is read: the clean gradient need not be stored
            return columns(clean(gradient), p.astype(dtype), m)

        (u,) = whole_tensor_mlp(columns_of, (gradient, p, m), layers, eps=_EPS, outputs=2, finish=step_of)
        return u.astype(gradient.dtype), *m

    def build(theta, num_steps=None):
        del num_steps

        def init_fn(params):
            ft.check_params(params)
            return MLPState(jnp.zeros((), jnp.int32), tuple(ft.zeros(params) for _ in MOMENTUM))

        def update_fn(updates, state, params=None, **extra_args):
            del extra_args
            params = ft.required_params(params, "mlp")
            update = functools.partial(update_tensor, settle(theta, jax.tree.leaves(updates)), state.step)
            updates, *m = ft.map_tensors(update, updates, params, *state.m)
            return updates, MLPState(optax.safe_increment(state.step), tuple(m))

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return LearnedOptimizer(init, build)
