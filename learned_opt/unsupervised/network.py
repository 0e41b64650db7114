"""The network that the unsupervised rule trains: linear maps, batch normalisation, a nonlinearity, backward weights."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ACTIVATIONS = ("relu", "leaky_relu", "tanh", "swish", "sigmoid", "step")

_EPSILON = 1e-5  # of the batch normalisation


class Layer(NamedTuple):
    """One layer's weights."""

    w: jax.Array  # [inputs, units], forward
    v: jax.Array  # [inputs, units], backward: carries the top signal down in place of w
    b: jax.Array  # [units]


class Network(NamedTuple):
    """A network's parameters, phi. The activation is data, so that one compiled function serves them all."""

    layers: tuple[Layer, ...]
    activation: jax.Array  # int32 scalar, an index into ACTIVATIONS


class Moments(NamedTuple):
    """What one layer's batch normalisation subtracts and divides by."""

    mean: jax.Array  # [units]
    variance: jax.Array  # [units]


def init(key: jax.Array, sizes: Sequence[int], activation: str | jax.Array = "relu") -> Network:
    r"""Random weights: :math:`W, V \sim \mathcal{N}(0, 0.01^2)` and :math:`b \sim \mathcal{N}(0, 0.1^2)`, truncated.

    Args:
        key: PRNG key.
        sizes: number of inputs, then of each layer's units; two numbers at least.
        activation: a name in :data:`ACTIVATIONS`, or an int32 scalar that may be traced, an index into it.

    Returns:
        The :class:`Network`.

    Raises:
        ValueError: unknown activation, or no layer, or an empty one.

    Example:
        >>> phi = init(jax.random.key(0), (64, 32, 32), "tanh")
        >>> [layer.w.shape for layer in phi.layers]
        [(64, 32), (32, 32)]
    """
    sizes = check_sizes(sizes, 2, "the number of inputs and then each layer's units")
    if not isinstance(activation, jax.Array):
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; activations: {', '.join(ACTIVATIONS)}")
        activation = jnp.asarray(ACTIVATIONS.index(activation), jnp.int32)
    layers = []
    for k, inputs, units in zip(jax.random.split(key, len(sizes) - 1), sizes[:-1], sizes[1:], strict=True):
        k_w, k_v, k_b = jax.random.split(k, 3)
        w, v = (0.01 * jax.random.truncated_normal(k, -2.0, 2.0, (inputs, units)) for k in (k_w, k_v))
        layers.append(Layer(w, v, 0.1 * jax.random.truncated_normal(k_b, -2.0, 2.0, (units,))))
    return Network(tuple(layers), activation)


def check_sizes(sizes: Sequence[int], least: int, what: str) -> tuple[int, ...]:
    """The sizes as a tuple of Python ints.

    Raises:
        ValueError: they are no sequence of ``least`` or more positive integers; the message says ``what`` they are.
    """
    try:
        listed = list(sizes)
    except TypeError:
        listed = []
    whole = [isinstance(size, int | np.integer) and not isinstance(size, bool) and size >= 1 for size in listed]
    if len(listed) < least or not all(whole):
        raise ValueError(f"sizes must be {what}, positive integers, not {sizes!r}")
    return tuple(int(size) for size in listed)


def activate(activation: jax.Array, z: jax.Array) -> jax.Array:
    """The nonlinearity with the index ``activation``, element by element; the step's derivative is 0."""
    branches = (
        jax.nn.relu,
        lambda z: jnp.where(z > 0, z, 0.1 * z),
        jnp.tanh,
        jax.nn.silu,
        jax.nn.sigmoid,
        lambda z: (z > 0).astype(z.dtype),
    )
    return jax.lax.switch(activation, branches, z)


def forward(phi: Network, x: jax.Array, moments: Sequence[Moments] | None = None):
    r"""All activations, bottom to top: :math:`z = \mathrm{BN}(x W) + b`, :math:`x' = \mathrm{act}(z)`.

    Args:
        phi: the network.
        x: float ``[batch, inputs]``.
        moments: one a layer, to normalise by; by default those of this batch.

    Returns:
        ``(xs, zs, moments)``: ``xs`` has the inputs too, so one more than the layers; ``zs`` are the pre-activations.
    """
    xs, zs, used = [x], [], []
    for i, layer in enumerate(phi.layers):
        y = xs[-1] @ layer.w
        m = Moments(jnp.mean(y, axis=0), jnp.var(y, axis=0)) if moments is None else moments[i]
        scale = jax.lax.rsqrt(m.variance + _EPSILON)
        z = (y - m.mean[None]) * scale[None] + layer.b[None]
        xs.append(activate(phi.activation, z))
        zs.append(z)
        used.append(m)
    return xs, zs, tuple(used)


def statistics(phi: Network, x: jax.Array) -> tuple[Moments, ...]:
    """Each layer's moments over a data set, for :func:`features` of other rows.

    Args:
        phi: the network.
        x: float ``[rows, inputs]``.

    Returns:
        One :class:`Moments` a layer.
    """
    return forward(phi, x)[2]


def features(phi: Network, x: jax.Array, moments: Sequence[Moments] | None = None) -> jax.Array:
    """The top layer's activations.

    Args:
        phi: the network.
        x: float ``[rows, inputs]``.
        moments: from :func:`statistics`: rows are then mapped one by one (inductive). By default the rows are
            normalised by their own moments (transductive), as in Metz et al.

    Returns:
        float ``[rows, units of the top layer]``.

    Example:
        >>> phi = init(jax.random.key(0), (8, 4))
        >>> x = jax.random.normal(jax.random.key(1), (10, 8))
        >>> bool(jnp.all(features(phi, x) == features(phi, x, statistics(phi, x))))
        True
    """
    return forward(phi, x, moments)[0][-1]
