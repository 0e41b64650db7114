"""Where the per-parameter networks of the rules start from, and what is common to the tensors they see."""

import math

import jax
import jax.numpy as jnp

from ..base import Theta
from ..features import truncated_normal
from ..kernels import Layers
from .recurrent import time_embedding


def network_init(key: jax.Array, columns: int, hidden_size: int, outputs: int, through: int) -> Theta:
    """A ReLU network with two hidden layers whose first output is nearly the column ``through``.

    Two units of either hidden layer carry that column, one for either sign. All other weights are random with standard
    deviation ``1/sqrt(fan-in)``, a tenth of that towards the outputs. With random weights alone a fresh rule would walk
    at random; this one follows a column that points downhill, and meta-training moves all weights freely.

    Returns:
        ``w0 [columns, h], b0 [h], w1 [h, h], b1 [h], w2 [h, outputs], b2 [outputs]``.
    """
    draw = truncated_normal(key, (columns + hidden_size + outputs, hidden_size), 1)  # three would compile slower
    w0, w1, w2 = jnp.split(draw, [columns, columns + hidden_size])
    w0, w1, w2 = w0 / math.sqrt(columns), w1 / math.sqrt(hidden_size), 0.1 * w2.T / math.sqrt(hidden_size)
    w0 = w0.at[:, :2].set(0).at[through, :2].set(jnp.array([1.0, -1.0]))
    w1 = w1.at[:, :2].set(jnp.eye(hidden_size, 2))
    w2 = w2.at[:2, 0].set(jnp.array([1.0, -1.0]))
    zeros = jnp.zeros((hidden_size,))
    return {"w0": w0, "b0": zeros, "w1": w1, "b1": zeros, "w2": w2, "b2": jnp.zeros((outputs,))}


def network(theta: Theta) -> Layers:
    """The layers of a network as :func:`network_init` makes it."""
    return Layers((theta["w0"], theta["b0"]), ((theta["w1"], theta["b1"]),), (theta["w2"], theta["b2"]))


def with_context(layers: Layers, context: jax.Array, columns: int) -> Layers:
    """The network with its inputs from ``columns`` on, the same for a whole tensor, taken into the first bias."""
    w, b = layers.first
    context = jnp.matmul(context[None], w[columns:].astype(context.dtype), precision=jax.lax.Precision.HIGHEST)[0]
    return layers._replace(first=(w[:columns], b.astype(context.dtype) + context))


def with_time(layers: Layers, t: jax.Array, columns: int) -> Layers:
    """The network with its inputs from ``columns`` on, the embedding of the time, taken into the first bias."""
    return with_context(layers, time_embedding(t, layers.first[0].dtype), columns)


def without_factors(layers: Layers, first: int) -> Layers:
    """The network for tensors below rank 2, whose columns for ``row`` and ``col`` would be the same twice.

    Args:
        layers: with the twelve columns ``row (3), col (3), rsqrt row (3), rsqrt col (3)`` from ``first`` on.
        first: see above.
    """
    w, b = layers.first
    twice = w[first : first + 12].reshape(2, 2, 3, -1)
    return layers._replace(first=(jnp.concatenate([w[:first], *jnp.sum(twice, 1), w[first + 12 :]]), b))
