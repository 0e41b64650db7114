"""The per-parameter MLP over Adafactor's features, with learned decays."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import features as ft
from ..base import LearnedOptimizer
from .column_mlp import settle
from .mlp import step_of
from .networks import network, network_init, scale_lists, whole_tensor_mlp, with_time, without_factors
from .recurrent import TIMES

PAPER = "Metz et al. 2022, Practical tradeoffs between memory, compute, and performance, arXiv:2203.11860"

MOMENTUM = (0.9, 0.99, 0.999)
RMS = (0.999,)
FACTORED = (0.9, 0.99, 0.999)
COLUMNS = 28
_THROUGH = 6  # the column m_.9 s
_LIMIT = 1e15  # of a gradient's size: sums of its square are still float32; as published, nothing is clipped below
_EPS = 1e-5
_ROOT_EPS = 1e-6
# Columns that share a root or a product are next to each other; those with the root are together in the last eight,
# whose squares are summed apart from the eight before: the root need not be stored for both.
_ORDER = (0, 1, 10, 25, 11, 26, 12, 27, *range(2, 10), *range(13, 25))
_VECTOR_ORDER = (*range(10), 13, 16, 10, 19, 14, 17, 11, 20, 15, 18, 12, 21)


class AdafacMLPState(NamedTuple):
    """State of the rule ``adafac_mlp``.

    Attributes:
        step: int32 scalar, updates done.
        m: momenta, one tree of the parameters' shapes a decay.
        r: the second moment, likewise.
        row: factored second moments by row, see :func:`learned_opt.features.factored_zeros`.
        col: the same by column.
    """

    step: jax.Array
    m: tuple[optax.Updates, ...]
    r: optax.Updates
    row: optax.Updates
    col: optax.Updates


def decays(raw: jax.Array, start: tuple[float, ...]) -> jax.Array:
    """``b = 1 - exp(10 (ln(1 - b0) / 10 + raw))``: at ``raw`` = 0 the decays ``start``."""
    b0 = jnp.asarray(start, raw.dtype)
    return 1 - jnp.exp(10 * (jnp.log(1 - b0) / 10 + raw))


def columns(g, p, m, r, R, C, row, col) -> list[jax.Array]:
    """``g, p, m, r, m s, s, g R C, row, col, rsqrt(row + 1e-8), rsqrt(col + 1e-8), m R C``, ``s = rsqrt(r + 1e-6)``.

    Below rank 2 there are no columns for ``col``, and ``m rsqrt(v + 1e-6)`` comes last. See
    :func:`learned_opt.features.factored_columns` for the arguments.
    """
    s = jax.lax.rsqrt(r + _ROOT_EPS)
    scales = [a * b for a, b in zip(R, C, strict=True)] if C else R
    last = scales if col else [jax.lax.rsqrt(v + _ROOT_EPS) for v in row]
    return [
        *(g, p, *m, r, *(x * s for x in m), s, *(g * x for x in scales)),
        *(*row, *col, *ft.roots(row, g.size), *ft.roots(col, g.size)),
        *(x * y for x, y in zip(m, last, strict=True)),
    ]


def matrix_squares(*inputs) -> list[jax.Array]:
    """The squares of :func:`columns` from rank 2 on."""
    squares = ft.factored_squares(*inputs, eps=_ROOT_EPS)
    return [squares[0], *squares[2:14], *squares[15:]]  # without those of clip(g) and g s


def adafac_mlp(*, hidden_size: int = 4) -> LearnedOptimizer:
    """A small MLP that sees Adafactor's statistics of each parameter, with learned decays ("small_fc_lopt").

    Per tensor, of the gradient ``g``: momenta ``m`` (.9, .99, .999), second moment ``r`` (.999) and factored second
    moments (.9, .99, .999), where these decays are only the start: ``b = 1 - exp(10 (ln(1 - b0) / 10 + theta))``. The
    28 columns of :func:`columns`, each at unit RMS over the tensor (``x rsqrt(1e-5 + mean(x^2))``), and
    ``tanh(t / tau - 1)`` of the number ``t`` of updates done, for eleven ``tau`` from 1 to 100,000, go through an MLP
    39-h-h-2 with ReLU. Of its outputs ``d, a``: ``update = -.001 d exp(.001 a)``.

    A fresh rule is nearly Adam at unit RMS and step .001. Non-finite gradient entries count as 0, those beyond +-1e15
    are clipped. State: 4 numbers a parameter, and 6 a row or column. Meta-parameters: 197 for ``hidden_size=4``, 2,409
    for 32.

    Args:
        hidden_size: units in either hidden layer, at least 2.

    Returns:
        A rule; theta is a dict of ``momentum_decays [3], rms_decays [1], factored_decays [3]`` and of
        ``w0 [39, h], b0 [h], w1 [h, h], b1 [h], w2 [h, 2], b2 [2]``.

    Raises:
        ValueError: if ``hidden_size`` is below 2.

    Example:
        >>> rule = adafac_mlp()
        >>> tx = rule.build(rule.init(jax.random.key(0)))
        >>> p = jnp.ones((2, 3))
        >>> updates, state = tx.update(p, tx.init(p), p)
    """
    if hidden_size < 2:
        raise ValueError(f"adafac_mlp needs hidden_size >= 2, got {hidden_size}")

    def init(key):
        start = {"momentum_decays": MOMENTUM, "rms_decays": RMS, "factored_decays": FACTORED}
        raw = {name: jnp.zeros((len(values),)) for name, values in start.items()}
        return raw | network_init(key, COLUMNS + TIMES, hidden_size, 2, _THROUGH)

    @jax.jit  # traced once for all tensors of a shape
    def update_tensor(theta, t, gradient, p, *accumulators):
        dtype, shape = ft.compute_dtype(p.dtype), p.shape
        g, p = ft.clean(gradient, _LIMIT, dtype), p.astype(dtype)
        *m, r, row, col = accumulators
        m = [ft.ema(x, g, b) for x, b in zip(m, decays(theta["momentum_decays"], MOMENTUM), strict=True)]
        r = ft.ema(r, g * g, jnp.maximum(decays(theta["rms_decays"], RMS)[0], 0))
        row, col = ft.factored_update(row, col, g, jnp.maximum(decays(theta["factored_decays"], FACTORED), 0))
        R, C = scale_lists(row, col, shape)
        layers = with_time(network(theta), t, COLUMNS)
        if p.ndim >= 2:
            inputs, more = (g, p, m, r, R, C, list(row), list(col)), {"order": _ORDER, "squares": matrix_squares}
        else:
            inputs, more = (g, p, m, r, R, C, list(row), []), {"order": _VECTOR_ORDER}
            layers = without_factors(layers, 13)
        (u,) = whole_tensor_mlp(columns, inputs, layers, eps=_EPS, outputs=2, finish=step_of, **more)
        return u.astype(gradient.dtype), *m, r, row, col

    def build(theta, num_steps=None):
        del num_steps

        def init_fn(params):
            ft.check_params(params)
            m = tuple(ft.zeros(params) for _ in MOMENTUM)
            factored = ft.factored_zeros(params, len(FACTORED))
            return AdafacMLPState(jnp.zeros((), jnp.int32), m, ft.zeros(params), *factored)

        def update_fn(updates, state, params=None, **extra_args):
            del extra_args
            params = ft.required_params(params, "adafac_mlp")
            update = functools.partial(update_tensor, settle(theta, jax.tree.leaves(updates)), state.step)
            updates, *m, r, row, col = ft.map_tensors(update, updates, params, *state.m, state.r, state.row, state.col)
            return updates, AdafacMLPState(optax.safe_increment(state.step), tuple(m), r, row, col)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return LearnedOptimizer(init, build)
