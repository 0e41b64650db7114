"""A control layer: a small network sets a few numbers for each tensor and step, over a fixed direction."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..base import LearnedOptimizer, Theta
from ..features import compute_dtype, ema, emas
from ..layouts import fan_in
from ..tensors import Direction, common_dtype, each, in_order, rule_transform
from . import celo2_soap, nadam
from .recurrent import linear, linear_init

PAPER = "relative steps: Bernstein et al. 2020, arXiv:2002.03432; cautious decay: arXiv:2510.12402"

DIRECTIONS: dict[str, Callable[..., Direction]] = {"celo2_soap": celo2_soap.direction, "nadam": nadam.direction}

_MEMORY = 0.9  # of the mean update
_DECAYS = (0.9, 0.99)  # of what the network reads of a tensor
_SEEN = 4  # see `Controlled.seen`
_FACTS = 4  # of a tensor's shape
RUN = 5  # of the run
_INPUTS = _SEEN * len(_DECAYS) + _FACTS + RUN
_LARGEST = 4.0  # factor: from a quarter of the hand-set value to four times
_VECTOR = 0.05  # the size of a vector, whatever it holds: gains start at 1 and offsets at 0
_WARMUP = 20  # updates, in a run of unknown length
_POWER = 1.2  # of the share that is left, to which steps are proportional
_TINY = 1e-20


class Controlled(NamedTuple):
    """What :func:`control` accumulates of a tensor.

    Attributes:
        direction: the direction's own.
        average: running mean (.9) of the updates, ``[*shape]``.
        seen: ``[2, 4]``, running means (.9, .99) of what the network reads: the cosines of the direction with the
            weights, with minus the gradient and with ``average``, that of minus the gradient with ``average``.
    """

    direction: Any
    average: jax.Array
    seen: jax.Array


def control(
    *,
    direction: str = "celo2_soap",
    direction_kwargs: Mapping[str, Any] | None = None,
    ratio: float = 0.04,
    decay: float = 0.2,
    warmup: float = 0.05,
    longest: float = 8.0,
    hidden_size: int = 8,
) -> LearnedOptimizer:
    r"""A direction whose steps and decay a small network sets for each tensor, in units that carry over to any size.

    A tensor with weights :math:`x` and direction :math:`u` moves by

    .. math:: \kappa_1\, \rho\, s\,
        \bigl(\max(\mathrm{rms}(x), n^{-1/2})\, u' - \kappa_2\, \delta\, [u' x < 0]\, x\bigr)

    with :math:`\rho` the share of its size that it moves by in one update (``ratio``), :math:`n` its fan-in, the root
    of which sets a floor to the size, and :math:`\delta` the cautious ``decay``, which only pulls where the step pulls
    too. :math:`u'` is :math:`u` without a share of what lengthens the weights (:func:`braked`): with steps relative to
    the weights these would grow exponentially. A vector's size counts as .05, whatever it holds; it has neither decay
    nor brake. :math:`s` rises in proportion to the updates over :math:`w`, the share ``warmup`` of the :math:`T`, and
    then falls to 0, :math:`((T - t) / (T - w))^{1.2}`; where ``num_steps`` is not told it rises over 20 updates and
    stays.

    The factors :math:`\kappa = 4^{\tanh(\cdot)}` are a network's with one hidden layer, whose last layer starts at
    zero: fresh meta-parameters are the hand-set values, and no training takes a tensor further than four times from
    them. The network reads of each tensor, as two running means each, the cosines of direction, gradient, weights and
    mean update, fan-in, fan-out and rank, how far the size is above its floor, and of the run its time
    and, where ``num_steps`` is told, the share done. All of it is bounded and has no unit. The network runs once a
    tensor, whatever its size.

    Args:
        direction: a name in :data:`DIRECTIONS`.
        direction_kwargs: arguments of its factory.
        ratio: :math:`\rho`.
        decay: :math:`\delta`.
        warmup: a share of the run.
        longest: times its floor is a matrix that no step lengthens, above 1; see :func:`braked`.
        hidden_size: units of the network.

    Returns:
        A rule that needs nothing; theta is ``{"direction": ..., "control": ...}``.

    Raises:
        ValueError: unknown direction, or a number out of range.

    Example:
        >>> rule = control(direction="nadam")
        >>> params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
        >>> tx = rule.build(rule.init(jax.random.key(0)), num_steps=100)
        >>> updates, state = tx.update(params, tx.init(params), params)  # of five steps of warm-up the first
        >>> print(jnp.round(updates["b"], 4))
        [-0.0006 -0.0006]
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}; directions: {', '.join(DIRECTIONS)}")
    if not (ratio > 0 and decay >= 0 and 0 <= warmup < 1 and longest > 1 and hidden_size >= 1):
        raise ValueError("control needs ratio > 0, decay >= 0, warmup in [0, 1), longest > 1 and hidden_size >= 1")
    try:
        inner = DIRECTIONS[direction](**(direction_kwargs or {}))
    except TypeError as error:
        raise ValueError(f"the direction {direction!r} cannot be made with {direction_kwargs}: {error}") from None

    def init(key):
        k_direction, k_control = jax.random.split(key)
        layers = control_init(k_control, _INPUTS, hidden_size, 2)
        return {"direction": inner.init(k_direction), "control": layers}

    def start(p):
        zeros = jnp.zeros_like(p, compute_dtype(p.dtype))
        return Controlled(inner.start(p), zeros, jnp.zeros((len(_DECAYS), _SEEN), zeros.dtype))

    def step(theta, count, rate, g, p, tensor, factors):
        u, accumulators = inner.step(theta, count, g, p, tensor.direction)
        pairs = [(u, p), (u, -g), (u, tensor.average), (-g, tensor.average)]
        seen = emas(tensor.seen, jnp.stack([cosine(x, y) for x, y in pairs]), _DECAYS)
        u = braked(u, p, longest) if p.ndim >= 2 else u
        move, pull = factors.astype(p.dtype) * jnp.array([1, decay if p.ndim >= 2 else 0], p.dtype)
        update = move * rate.astype(p.dtype) * (size_of(p) * u - pull * jnp.where(u * p < 0, p, 0))
        return update, Controlled(accumulators, ema(tensor.average, update, _MEMORY), seen)

    def build(theta, num_steps=None, layout=None):
        def update(groups, count, shared, value):
            del value
            if not groups:
                return [], shared
            total = jnp.asarray(0 if num_steps is None else num_steps)  # here: of the mesh that the update is under
            dtype = common_dtype([group.param for group in groups])
            rows = [jax.vmap(facts)(group.param, group.tensors.seen).astype(dtype) for group in groups]
            factors = control_factors(theta["control"], in_order(rows, groups), run_facts(count, total, dtype))
            rate = ratio * schedule(count, total, warmup, dtype)
            results = each(functools.partial(step, theta["direction"], count, rate), groups, factors)
            settled = inner.settle(count, [tensor.direction for _, tensor in results])
            return [
                (u, tensor._replace(direction=new)) for (u, tensor), new in zip(results, settled, strict=True)
            ], shared

        return rule_transform("control", start=start, update=update, layout=layout)

    return LearnedOptimizer(init, build)


def size_of(p: jax.Array) -> jax.Array:
    """What a tensor's steps are relative to."""
    return jnp.maximum(rms(p), floor_of(p)) if p.ndim >= 2 else jnp.asarray(_VECTOR, p.dtype)


def floor_of(p: jax.Array) -> float:
    """The least size of a matrix: the root mean square of weights that keep the size of their inputs."""
    return max(fan_in(p.shape), 1) ** -0.5


def rms(p: jax.Array) -> jax.Array:
    """The root mean square of a tensor."""
    return jnp.sqrt(jnp.mean(p * p) + _TINY)


def braked(u: jax.Array, p: jax.Array, longest: float) -> jax.Array:
    r"""A matrix's direction less a share of its part along the weights, where that lengthens them.

    .. math:: u' = u - b \max(\langle u, x\rangle, 0)\, x / \langle x, x\rangle

    with :math:`b` from 0, where the weights' size is at its floor or below, to 1 at ``longest`` times the floor.

    Args:
        u: the direction, ``[*shape]``.
        p: the weights, likewise.
        longest: see above.

    Returns:
        ``[*shape]``.

    Reference: weights of fixed norm, "Hyperball", 2026, arXiv:2606.16899.
    """
    size = rms(p)
    share = jnp.clip((size / floor_of(p) - 1) / (longest - 1), 0, 1)
    return u - share * jnp.maximum(jnp.mean(u * p), 0) / size**2 * p


def schedule(count: jax.Array, total: jax.Array, warmup: float, dtype) -> jax.Array:
    """The share ``s`` of the full step after ``count`` of ``total`` updates; ``total`` 0 stands for unknown."""
    done, last = count.astype(dtype), total.astype(dtype)
    warm = jnp.where(total > 0, warmup * last, _WARMUP)
    left = jnp.where(total > 0, jnp.clip((last - done) / jnp.maximum(last - warm, 1), 0, 1), 1)
    return jnp.minimum((done + 1) / jnp.maximum(warm, 1), left**_POWER)


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """The cosine of the angle between two tensors, 0 where one is 0."""
    return jnp.sum(x * y) * jax.lax.rsqrt(jnp.sum(x * x) * jnp.sum(y * y) + _TINY)


def facts(p: jax.Array, seen: jax.Array) -> jax.Array:
    """What the network reads of a tensor: ``[12]``.

    Args:
        p: its weights.
        seen: of :class:`Controlled`.
    """
    above = jnp.log(size_of(p) / floor_of(p)) if p.ndim >= 2 else 0.0
    of_size = jnp.stack([jnp.tanh(above), *shape_facts(p.shape)])
    return jnp.concatenate([seen.reshape(-1), of_size.astype(seen.dtype)])


def shape_facts(shape: tuple[int, ...]) -> tuple[float, float, float]:
    """What it reads of a shape: fan-in and fan-out, as a quarter of their logarithms to 10, and 1 for a matrix."""
    inputs, outputs = math.log10(fan_in(shape)), math.log10(max(shape[-1:], default=1))
    return inputs / 4, outputs / 4, float(len(shape) >= 2)


def run_facts(count: jax.Array, total: jax.Array, dtype) -> jax.Array:
    """What it reads of the run: ``[5]``; two of the time, and whether the length is known, the share done, its root."""
    known = (total > 0).astype(dtype)
    done = known * jnp.clip(count.astype(dtype) / jnp.maximum(total, 1).astype(dtype), 0, 1)
    time = jnp.log1p(count.astype(dtype))
    return jnp.stack([jnp.tanh(time / 4), jnp.tanh(time / 10), known, done, jnp.sqrt(done)])


def control_init(key: jax.Array, inputs: int, hidden_size: int, outputs: int) -> Theta:
    """A fresh network of factors, all 1."""
    last = {"w": jnp.zeros((hidden_size, outputs)), "b": jnp.zeros((outputs,))}
    return {"hidden": linear_init(key, inputs, hidden_size), "last": last}


def control_factors(theta: Theta, tensors: jax.Array, run: jax.Array) -> jax.Array:
    """The factors of each tensor: ``[tensors, 2]`` within 1/4 and 4, from ``[tensors, 12]`` and ``[5]``."""
    inputs = jnp.concatenate([tensors, jnp.broadcast_to(run, (len(tensors), RUN))], axis=1)
    hidden = jnp.tanh(linear(theta["hidden"], inputs))
    return _LARGEST ** jnp.tanh(linear(theta["last"], hidden))
