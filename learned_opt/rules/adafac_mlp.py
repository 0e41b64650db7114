"""The per-parameter MLP over Adafactor's features, with learned decays."""

import functools

import jax
import jax.numpy as jnp

from ..base import LearnedOptimizer
from ..features import column_inputs, factored_squares, moments_after, no_moments
from ..kernels import column_mlp
from ..tensors import each, rule_transform
from .mlp import step_of
from .networks import network, network_init, with_time, without_factors
from .recurrent import TIMES

PAPER = "Metz et al. 2022, Practical tradeoffs between memory, compute, and performance, arXiv:2203.11860"

MOMENTUM = (0.9, 0.99, 0.999)
RMS = (0.999,)
FACTORED = (0.9, 0.99, 0.999)
COLUMNS = 28
_THROUGH = 6  # the column m_.9 s
_EPS = 1e-5
_ROOT_EPS = 1e-6


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
        *(*row, *col, *(jax.lax.rsqrt(x + 1e-8) for x in (*row, *col))),
        *(x * y for x, y in zip(m, last, strict=True)),
    ]


def matrix_squares(*inputs) -> list[jax.Array]:
    """The squares of :func:`columns` from rank 2 on."""
    squares = factored_squares(*inputs, eps=_ROOT_EPS)
    return [squares[0], *squares[2:14], *squares[15:]]  # without those of clip(g) and g s


def adafac_mlp(*, hidden_size: int = 4, published: bool = False) -> LearnedOptimizer:
    """A small MLP that sees Adafactor's statistics of each parameter, with learned decays ("small_fc_lopt").

    Per tensor, of the gradient ``g``: momenta ``m`` (.9, .99, .999), second moment ``r`` (.999) and factored second
    moments (.9, .99, .999), where these decays are only the start: ``b = 1 - exp(10 (ln(1 - b0) / 10 + theta))``. The
    28 columns of :func:`columns`, each at unit RMS over the tensor (``x rsqrt(1e-5 + mean(x^2))``), and
    ``tanh(t / tau - 1)`` of the number ``t`` of updates done, for eleven ``tau`` from 1 to 100,000, go through an MLP
    39-h-h-2 with ReLU. Of its outputs ``d, a``: ``update = -.001 d exp(.001 a)``.

    A fresh rule is nearly Adam at unit RMS and step .001. Non-finite gradient entries count as 0, those beyond +-1e15
    are clipped, and what has no gradient rests (:func:`learned_opt.tensors.rule_transform`). State: 4 numbers and a
    byte a parameter, and 6 a row or column. Meta-parameters: 197 for ``hidden_size=4``, 2,409 for 32.

    Args:
        hidden_size: units in either hidden layer, at least 2.
        published: what has no gradient moves, as in the reference implementation.

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

    def step(theta, t, g, p, moments):
        momentum = decays(theta["momentum_decays"], MOMENTUM)
        rms = jnp.maximum(decays(theta["rms_decays"], RMS)[0], 0)
        factored = jnp.maximum(decays(theta["factored_decays"], FACTORED), 0)
        moments = moments_after(moments, g, momentum=momentum, rms=rms, factored=factored)
        layers, matrix = with_time(network(theta), t, COLUMNS), g.ndim >= 2
        layers, squares = (layers, matrix_squares) if matrix else (without_factors(layers, 13), None)
        inputs = column_inputs(g, p, moments)
        (u,) = column_mlp(columns, inputs, layers, eps=_EPS, outputs=2, finish=step_of, squares_of=squares)
        return u, moments

    def build(theta, num_steps=None, layout=None):
        del num_steps

        def update(groups, t, shared, value):
            del value
            return each(functools.partial(step, theta, t), groups), shared

        return rule_transform("adafac_mlp", start=no_moments, update=update, rest=not published, layout=layout)

    return LearnedOptimizer(init, build)
