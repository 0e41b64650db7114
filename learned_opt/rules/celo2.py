"""Celo2: a normalised per-parameter MLP that needs neither loss nor step count."""

import functools

import jax
import jax.numpy as jnp

from ..base import LearnedOptimizer, Theta
from ..features import (
    Moments,
    column_inputs,
    factored_axes,
    factored_columns,
    factored_squares,
    moments_after,
    no_moments,
    unit_rms,
)
from ..kernels import column_mlp
from ..newton_schulz import newton_schulz
from ..tensors import each, rule_transform
from .networks import network, network_init

PAPER = "Celo2, 2026, after Moudgil et al. 2025 (Celo), arXiv:2501.12670"

MOMENTUM = (0.9, 0.99, 0.999)
RMS = 0.95
FACTORED = (0.9, 0.99, 0.999)
INPUTS = 30  # columns of the first layer
VECTOR_INPUTS = 15  # of which tensors below rank 2 have the first
_NORMALISED_MOMENTUM = 7  # the column m_.9 rsqrt(r)
OUTPUTS = 3  # only the first moves the parameters
EPS = 1e-9
_ROOT_EPS = 1e-8
_CLIP = 1000.0  # of a gradient's entries, as published
_UNIT = 0.01  # the gradients' root mean square as the network sees them

after = functools.partial(moments_after, momentum=MOMENTUM, rms=RMS, factored=FACTORED)


def in_units(g: jax.Array, moments: Moments) -> tuple[jax.Array, Moments]:
    """Gradient and moments in the unit in which the root of the mean of ``r`` is 0.01.

    What the network makes of them then hangs on no unit of the loss.
    """
    mean = jnp.mean(moments.r)
    unit = jnp.sqrt(jnp.where(mean > 0, mean, _UNIT**2)) / _UNIT
    m, r, row, col = moments
    return g / unit, Moments(m / unit, r / unit**2, row / unit**2, col / unit**2)


def direction(theta: Theta, p: jax.Array, g: jax.Array, moments: Moments) -> jax.Array:
    """``d``, the MLP's first output; columns at unit RMS over the last two axes.

    Args:
        theta: the rule's weights.
        p: the parameters, ``[*shape]``.
        g: the clean gradient, likewise.
        moments: with ``g`` in them.

    Returns:
        ``[*shape]``.
    """
    *inputs, row, col = column_inputs(g, p, moments)
    if g.ndim < 2:
        row, col = [], []
    w0 = theta["w0"] if g.ndim >= 2 else theta["w0"][:VECTOR_INPUTS]
    layers = network(theta | {"w0": w0})

    def of_matrix(*inputs):
        columns, squares = (functools.partial(f, eps=_ROOT_EPS) for f in (factored_columns, factored_squares))
        return column_mlp(columns, inputs, layers, eps=EPS, squares_of=squares)[0]

    if g.ndim <= 2:
        return of_matrix(*inputs, row, col)

    def matrices(x):  # statistics that do not factor over the last two axes are spelt out
        factor = set(factored_axes(g.shape) or ()) == {g.ndim - 2, g.ndim - 1}
        return (x if factor else jnp.broadcast_to(x, g.shape)).reshape(-1, *(x if factor else g).shape[-2:])

    return jax.vmap(of_matrix)(*jax.tree.map(matrices, (*inputs, row, col))).reshape(g.shape)


def celo2(*, hidden_size: int = 8, orthogonalize: bool = False, published: bool = False) -> LearnedOptimizer:
    """Celo2: one small MLP gives every parameter its direction; inputs and outputs are normalised by RMS.

    Per tensor: momenta ``m`` (.9, .99, .999), second moment ``r`` (.95) and factored second moments (.9, .99, .999) of
    the gradient; their 30 columns (15 below rank 2), each at unit RMS over the last two axes, go through an MLP
    30-h-h-3 with ReLU. Its first output ``d``, at unit RMS over the same axes, is the direction:
    ``update = -d rsqrt(1e-9 + mean(d^2))``. It holds no step size: multiply it by a learning rate.

    Before that, gradients are scaled so that the root of the mean of ``r`` is 0.01: the loss may have any unit.

    ``init`` draws weights of standard deviation ``1/sqrt(fan-in)`` and then gives two hidden units of either layer to
    the column ``m_.9 rsqrt(r)``, one for either sign, and a tenth of the random weight to the other units' outputs: the
    fresh rule is nearly RMS-normalised Adam plus a small random direction, where random weights alone would walk at
    random. Meta-training moves all weights freely.

    Non-finite gradient entries count as 0, and what has no gradient rests
    (:func:`learned_opt.tensors.rule_transform`). State: 4 numbers and a byte a parameter, and 6 a row or column.
    Meta-parameters: 347 for ``hidden_size=8``.

    Args:
        hidden_size: units in either hidden layer, at least 2.
        orthogonalize: replace ``d`` of tensors of rank >= 2 by five Newton-Schulz steps towards the nearest orthogonal
            matrix.
        published: gradients are clipped to +-1000 in the unit that they come in, and what has no gradient moves: the
            trajectories of the reference implementation.

    Returns:
        A rule; theta is a dict of ``w0 [30, h], b0 [h], w1 [h, h], b1 [h], w2 [h, 3], b2 [3]``.

    Raises:
        ValueError: if ``hidden_size`` is below 2.

    Example:
        Vectors to Adam and matrices to the rule, as Muon's users have it:

        >>> import optax
        >>> rule = celo2(orthogonalize=True)
        >>> adam = optax.chain(optax.scale_by_adam(), optax.scale(-1.0))
        >>> parts = {"adam": adam, "celo2": rule.build(rule.init(jax.random.key(0)))}
        >>> tx = optax.partition(parts, lambda tree: jax.tree.map(lambda p: "adam" if p.ndim < 2 else "celo2", tree))
        >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> print(jnp.round(updates["b"], 3))
        [-1. -1. -1.]
    """
    if hidden_size < 2:
        raise ValueError(f"celo2 needs hidden_size >= 2, got {hidden_size}")

    def init(key):
        return network_init(key, INPUTS, hidden_size, OUTPUTS, _NORMALISED_MOMENTUM)

    def step(theta, g, p, moments):
        g = jnp.clip(g, -_CLIP, _CLIP) if published else g
        moments = after(moments, g)
        d = direction(theta, p, *((g, moments) if published else in_units(g, moments)))
        d = newton_schulz(d) if orthogonalize and d.ndim >= 2 else d
        return -unit_rms(d, EPS, tuple(range(d.ndim)[-2:])), moments

    def build(theta, num_steps=None, layout=None):
        del num_steps

        def update(groups, count, shared, value):
            del count, value
            return each(functools.partial(step, theta), groups), shared

        return rule_transform("celo2", start=no_moments, update=update, rest=not published, layout=layout)

    return LearnedOptimizer(init, build, learning_rate=1e-3)
