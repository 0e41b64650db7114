"""The learned update: what a layer's units see, what they tell the layers below, and how their weights change."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..base import Theta
from . import network
from .network import Layer, Network

PAPER = "Metz, Maheswaranathan, Cheung and Sohl-Dickstein, Meta-Learning Update Rules for Unsupervised Representation"
PAPER += " Learning, 2019 (arXiv:1804.00222)"

VERSION = 1  # saved rules record it: raise it when a change here makes trained weights mean something else

# The terms of a weight's change, in the order of theta["merge"].
TERMS = (
    *("base", "decay", "hebbian", "decorrelation", "plain", "gated", "times_w"),
    *("above_symmetric", "above_psd", "below_symmetric", "above_symmetric_square", "below_symmetric_square"),
)
_UPPER = 8  # low-rank read-outs that a layer gives as the upper of two
_LOWER = 7  # and as the lower
_TINY = 1e-6


class UnsupervisedRule(NamedTuple):
    """A learned unsupervised update rule: pure functions.

    Attributes:
        init_theta: ``key -> theta``, fresh meta-parameters.
        init: ``(key, sizes, activation="relu") -> phi``, a random network.
        update: ``(theta, phi, x) -> phi``, one step on a batch ``x`` float ``[batch, inputs]``.
        features: ``(phi, x, moments=None) -> [rows, units]``, the top layer's activations.
    """

    init_theta: Callable[[jax.Array], Theta]
    init: Callable[..., Network]
    update: Callable[[Theta, Network, jax.Array], Network]
    features: Callable[..., jax.Array]


@functools.cache  # the same functions for the same arguments: what is compiled for one rule serves the next
def unsupervised(
    *, hidden_size: int = 16, signal_size: int = 8, channels: int = 2, front_end: str = "equivariant"
) -> UnsupervisedRule:
    r"""A learned unsupervised rule: local weight changes from what units see and a learned top-down signal.

    A network over units and examples turns the top activations into a signal :math:`d`. Going down, each layer's
    front end gives :math:`h = \mathrm{net}(x, z, d, \text{weight statistics})`, and
    :math:`\delta = d\,\sigma(z) + h D`, :math:`d_{\text{below}} = \delta V^\top / \mathrm{RMS}`. A weight's change
    :math:`g` is a learned mix of twelve terms (:data:`TERMS`), each normalised, and
    :math:`p \leftarrow (1-\eta) p - \eta g`, with :math:`\eta` learned.

    Args:
        hidden_size: width of the front end.
        signal_size: width of the top-down signal.
        channels: rank of the read-outs, per example.
        front_end: a name in :data:`FRONT_ENDS`. ``"equivariant"`` treats units and examples as sets; ``"unit_axis"``
            is nearer to the published one, which mixes neighbours along the unit axis.

    Returns:
        An :class:`UnsupervisedRule`. Nothing of it depends on depth, widths, batch size or activation.

    Raises:
        ValueError: a size below 1 or an unknown front end.

    Example:
        >>> rule = unsupervised()
        >>> theta = rule.init_theta(jax.random.key(0))
        >>> phi = rule.init(jax.random.key(1), (6, 5, 4), "tanh")
        >>> phi = jax.jit(rule.update)(theta, phi, jax.random.normal(jax.random.key(2), (16, 6)))
        >>> rule.features(phi, jnp.ones((3, 6))).shape
        (3, 4)
    """
    if min(hidden_size, signal_size, channels) < 1:
        raise ValueError("hidden_size, signal_size and channels must be at least 1")
    if front_end not in FRONT_ENDS:
        raise ValueError(f"unknown front end {front_end!r}; front ends: {', '.join(FRONT_ENDS)}")
    init_front, front = FRONT_ENDS[front_end]

    def init_theta(key: jax.Array) -> Theta:
        keys = iter(jax.random.split(key, 5))
        return {
            "top": init_front(next(keys), _TOP_INPUTS, _UNIT_INPUTS, hidden_size),
            "top_signal": _linear(next(keys), hidden_size, signal_size),
            "front": init_front(next(keys), 2 + signal_size, _UNIT_INPUTS, hidden_size),
            # one matrix for all that is read out of h: as upper layer, as lower layer, signal, bias
            "read": _linear(next(keys), hidden_size, (_UPPER + _LOWER) * channels + signal_size + 1),
            "merge": _HAND_SET + jnp.where(_HAND_SET == 0, 0.01, 0.0),
            "log_rate": jnp.log(jnp.asarray([1e-3, 1e-3])),  # of the weights, of the biases
        }

    def update(theta: Theta, phi: Network, x: jax.Array) -> Network:
        xs, zs, _ = network.forward(phi, x)
        zs = [x, *zs]
        biases = [jnp.zeros_like(x[0]), *(layer.b for layer in phi.layers)]
        d = front(theta["top"], _top_inputs(xs[-1], zs[-1]), _unit_inputs(phi.layers, len(phi.layers), biases[-1]))
        d = _project(theta["top_signal"], d)
        read = jnp.split(theta["read"], np.cumsum([_UPPER * channels, _LOWER * channels, signal_size]), axis=1)
        uppers, lowers, bias_changes = [], [], []
        for i in reversed(range(len(xs))):
            bottom, top = i == 0, i == len(phi.layers)
            inputs = jnp.concatenate([xs[i][None], zs[i][None], d])
            h = front(theta["front"], inputs, _unit_inputs(phi.layers, i, biases[i]))
            if not top:
                lowers.append(_project(read[1], h).reshape(_LOWER, -1, h.shape[2]))
            if not bottom:
                uppers.append(_project(read[0], h).reshape(_UPPER, -1, h.shape[2]))
                bias_changes.append(_bias_change(read[3][:, 0] @ jnp.mean(h, axis=1)))
                delta = d * jax.nn.sigmoid(zs[i])[None] + _project(read[2], h)
                d = delta @ phi.layers[i - 1].v.T
                d = d * jax.lax.rsqrt(jnp.mean(d**2, axis=0, keepdims=True) + _TINY)
        rate_w, rate_b = jnp.exp(theta["log_rate"])
        layers = []
        for i, layer in enumerate(phi.layers):
            change = weight_change(theta["merge"], layer.w, xs[i], xs[i + 1], lowers[-1 - i], uppers[-1 - i])
            layers.append(
                Layer(
                    w=layer.w * (1 - rate_w) - rate_w * change,
                    v=layer.v * (1 - rate_w) - rate_w * change,
                    b=layer.b * (1 - rate_b) - rate_b * bias_changes[-1 - i],
                )
            )
        return phi._replace(layers=tuple(layers))

    return UnsupervisedRule(init_theta, network.init, update, network.features)


def hand_set(*, hebbian: float = 0.4, decorrelation: float = 0.1, rate: float = 1e-3) -> UnsupervisedRule:
    r"""The same update with two of its terms and nothing learned: Hebbian growth and decorrelation.

    Args:
        hebbian: how much of :math:`-\hat x^\top \hat x' / B`.
        decorrelation: how much of :math:`\hat W \hat x'^\top \hat x' / (B \sqrt U)`.
        rate: the step size.

    Returns:
        An :class:`UnsupervisedRule`; its theta is ``{"merge": [12], "log_rate": scalar}``. Biases stay.

    Example:
        >>> rule = hand_set()
        >>> phi = rule.init(jax.random.key(1), (6, 5, 4))
        >>> x = jax.random.normal(jax.random.key(2), (16, 6))
        >>> phi = jax.jit(rule.update)(rule.init_theta(jax.random.key(0)), phi, x)
    """
    merge = np.zeros(len(TERMS), np.float32)
    merge[TERMS.index("hebbian")], merge[TERMS.index("decorrelation")] = hebbian, decorrelation

    def init_theta(key: jax.Array) -> Theta:
        del key
        return {"merge": jnp.asarray(merge), "log_rate": jnp.log(jnp.asarray(rate))}

    def update(theta: Theta, phi: Network, x: jax.Array) -> Network:
        xs, _, _ = network.forward(phi, x)
        rate = jnp.exp(theta["log_rate"])
        layers = []
        for layer, lower, upper in zip(phi.layers, xs[:-1], xs[1:], strict=True):
            change = weight_change(theta["merge"], layer.w, lower, upper, None, None)
            layers.append(layer._replace(w=layer.w * (1 - rate) - rate * change))
        return phi._replace(layers=tuple(layers))

    return UnsupervisedRule(init_theta, network.init, update, network.features)


# --- what a unit sees

_TOP_INPUTS = 4
_UNIT_INPUTS = 9


def _standardise(x: jax.Array) -> jax.Array:
    """Each unit over the batch."""
    centred = x - jnp.mean(x, axis=0, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=0, keepdims=True) + _TINY)


def _top_inputs(x: jax.Array, z: jax.Array) -> jax.Array:
    """``[4, batch, units]``: activation, pre-activation, and what similar units and similar examples say."""
    batch, units = x.shape
    s = _standardise(x)
    by_units = (s @ (s.T @ s)) * (1 / (batch * math.sqrt(units)))
    by_examples = ((s @ s.T) @ s) * (1 / (units * math.sqrt(batch)))
    return jnp.stack([s, z, by_units, by_examples])


def _unit_inputs(layers: Sequence[Layer], i: int, bias: jax.Array) -> jax.Array:
    """``[9, units]``: statistics of the weights into and out of the units of activations ``i``, and their biases.

    At the edges, where one of the two does not exist, the other stands for both.
    """
    below = _weight_statistics(layers[i - 1].w, axis=0) if i > 0 else None
    above = _weight_statistics(layers[i].w, axis=1) if i < len(layers) else below
    stats = jnp.stack([*(above if below is None else below), *above])  # type: ignore[misc]
    stats = stats * jax.lax.rsqrt(jnp.mean(stats**2) + _TINY)
    return jnp.concatenate([stats, bias[None]])


def _weight_statistics(w: jax.Array, axis: int) -> list[jax.Array]:
    mean, square = jnp.mean(w, axis), jnp.mean(w**2, axis)
    return [jnp.mean(jnp.abs(w), axis), jnp.sqrt(square + _TINY), mean, jnp.sqrt(jnp.var(w, axis) + 1e-8)]


# --- front ends: what becomes of it, h


def _linear(key: jax.Array, inputs: int, outputs: int) -> jax.Array:
    return jax.random.normal(key, (inputs, outputs)) / math.sqrt(inputs)


def _project(w: jax.Array, inputs: jax.Array) -> jax.Array:
    """Maps channels: ``w [k, m]`` and ``inputs [k, ...]`` to ``[m, ...]``."""
    return (w.T @ inputs.reshape(inputs.shape[0], -1)).reshape(w.shape[1], *inputs.shape[1:])


def _fold(inputs: jax.Array, w: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights and bias that take raw ``inputs [k, batch, units]`` as if each of the k were standardised."""
    mean = jnp.mean(inputs, axis=(1, 2))
    scale = jax.lax.rsqrt(jnp.var(inputs, axis=(1, 2)) + 1e-4)
    w = w * scale[:, None]
    return w, b - mean @ w


def _init_equivariant(key: jax.Array, inputs: int, unit_inputs: int, width: int) -> Theta:
    keys = iter(jax.random.split(key, 7))
    return {
        "w": _linear(next(keys), inputs, width),
        "unit": _linear(next(keys), inputs, width),  # of the mean over examples
        "example": _linear(next(keys), inputs, width),  # of the mean over units
        "statistics": 0.3 * _linear(next(keys), unit_inputs, width),
        "b": jnp.zeros(width),
        "w2": math.sqrt(2) * _linear(next(keys), width, width),
        "unit2": _linear(next(keys), width, width),
        "example2": _linear(next(keys), width, width),
        "b2": jnp.zeros(width),
    }


def _equivariant(theta: Theta, inputs: jax.Array, unit_inputs: jax.Array) -> jax.Array:
    """Two layers over the set of units and the set of examples; means are projected before they are spread out."""
    w, b = _fold(inputs, theta["w"], theta["b"])
    unit = theta["unit"].T @ jnp.mean(inputs, axis=1) + theta["statistics"].T @ unit_inputs + b[:, None]
    example = theta["example"].T @ jnp.mean(inputs, axis=2)
    h = jax.nn.relu(_project(w, inputs) + unit[:, None] + example[..., None])
    unit = theta["unit2"].T @ jnp.mean(h, axis=1) + theta["b2"][:, None]
    example = theta["example2"].T @ jnp.mean(h, axis=2)
    return jax.nn.relu(_project(theta["w2"], h) + unit[:, None] + example[..., None])


def _init_unit_axis(key: jax.Array, inputs: int, unit_inputs: int, width: int) -> Theta:
    keys = iter(jax.random.split(key, 4))
    return {
        "w": _linear(next(keys), inputs, width),
        "statistics": 0.3 * _linear(next(keys), unit_inputs + 2, width),
        "b": jnp.zeros(width),
        "neighbours": _linear(next(keys), 3 * width, width),
        "b_neighbours": jnp.zeros(width),
        "w2": math.sqrt(2) * _linear(next(keys), width, width),
        "b2": jnp.zeros(width),
    }


def _unit_axis(theta: Theta, inputs: jax.Array, unit_inputs: jax.Array) -> jax.Array:
    """Two layers, between them a convolution over neighbouring units, which are told apart by sine and cosine."""
    w, b = _fold(inputs, theta["w"], theta["b"])
    angle = jnp.linspace(0, 4 * jnp.pi, unit_inputs.shape[1], dtype=inputs.dtype)
    unit_inputs = jnp.concatenate([unit_inputs, jnp.sin(angle)[None], jnp.cos(angle)[None]])
    h = jax.nn.relu(_project(w, inputs) + (theta["statistics"].T @ unit_inputs + b[:, None])[:, None])
    padded = jnp.pad(h, ((0, 0), (0, 0), (1, 1)))
    mixed = jnp.concatenate([padded[..., :-2], h, padded[..., 2:]])
    w, b = _fold(mixed, theta["neighbours"], theta["b_neighbours"])
    h = h + jax.nn.relu(_project(w, mixed) + b[:, None, None])
    w, b = _fold(h, theta["w2"], theta["b2"])
    return jax.nn.relu(_project(w, h) + b[:, None, None])


FRONT_ENDS = {"equivariant": (_init_equivariant, _equivariant), "unit_axis": (_init_unit_axis, _unit_axis)}

# The rules that are stored by name, as `learned_opt.RULES` is for optimizers.
RULES: dict[str, Callable[..., UnsupervisedRule]] = {"unsupervised": unsupervised}


# --- how weights and biases change

_HAND_SET = np.zeros(len(TERMS), np.float32)
_HAND_SET[TERMS.index("hebbian")], _HAND_SET[TERMS.index("decorrelation")] = 0.4, 0.1


def _normalise(g: jax.Array, epsilon: float = 1.0) -> jax.Array:
    """By the RMS over each unit's incoming weights."""
    return g * jax.lax.rsqrt(epsilon + jnp.mean(g**2, axis=0, keepdims=True))


def weight_change(merge, w, lower_x, upper_x, lower, upper) -> jax.Array:
    """The change of one layer's weights.

    Args:
        merge: ``[12]``, how much of each term.
        w: ``[inputs, units]``.
        lower_x: ``[batch, inputs]``.
        upper_x: ``[batch, units]``.
        lower: 7 read-outs ``[batch * channels, inputs]`` of the layer below, or ``None`` for no such terms.
        upper: 8 read-outs ``[batch * channels, units]`` of the layer.

    Returns:
        ``[inputs, units]``; the weights move against it.
    """
    w = w * jax.lax.rsqrt(jnp.mean(w**2, axis=0, keepdims=True) + _TINY)
    batch, units = upper_x.shape
    s_lower, s_upper = _standardise(lower_x), _standardise(upper_x)
    decorrelation = w @ (s_upper.T @ s_upper) * (1 / (batch * math.sqrt(units)))
    decorrelation = decorrelation * jax.lax.rsqrt(jnp.mean(decorrelation**2) + 1e-8)
    terms = [w, w * jnp.abs(w), -(s_lower.T @ s_upper) * (1 / batch), decorrelation]
    if lower is not None:
        terms += _read_out_terms(w, batch, lower, upper)
    change = sum(c * _normalise(term) for c, term in zip(merge, terms, strict=False)) * (1 / len(TERMS))
    shrinking = jax.nn.relu(jnp.mean(change * w))
    change = (change - w * shrinking) * (1 / math.sqrt(len(TERMS)))
    return _normalise(change, _TINY) - w * (1 / 7)


def _read_out_terms(w: jax.Array, batch: int, lower: list[jax.Array], upper: list[jax.Array]) -> list[jax.Array]:
    """The eight terms of low rank. No matrix of units by units is ever built: the products associate the other way."""
    inputs, units = w.shape
    scale = 1 / (batch * (lower[0].shape[0] // batch))  # mean over channels, sum over the batch / batch
    root = jnp.sqrt(1 + w**2) - 1
    signs = jnp.sign(w)
    plain, gated, times = (lower[k].T @ upper[k] * scale for k in range(3))
    above = _symmetric(w.T, upper[3], upper[4]).T
    psd = (w @ upper[5].T) @ upper[5]
    above_root = _symmetric(root.T, upper[6], upper[7]).T
    below, below_root = _symmetric(w, lower[3], lower[4]), _symmetric(root, lower[5], lower[6])
    to_above, to_below = scale / math.sqrt(units), scale / math.sqrt(inputs)
    return [
        *(plain, gated * jnp.exp(-(w**2)), times * w),
        *(above * to_above, psd * to_above, below * to_below),
        *(above_root * to_above * signs, below_root * to_below * signs),
    ]


def _symmetric(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    r""":math:`(A^\top B + B^\top A) W / \sqrt 2` without the diagonal of the symmetric matrix."""
    diagonal = 2 * jnp.sum(a * b, axis=0)
    return (a.T @ (b @ w) + b.T @ (a @ w) - diagonal[:, None] * w) * (1 / math.sqrt(2))


def _bias_change(g: jax.Array) -> jax.Array:
    """Biases cannot all grow: the mean change is not negative."""
    g = g + jax.nn.relu(-jnp.mean(g))
    return g * jax.lax.rsqrt(0.5 + jnp.mean(g**2))
