"""What ``control`` and ``light`` share: steps relative to a tensor's size, a schedule, and a network of factors."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..base import Theta
from ..layouts import fan_in
from ..tensors import Group, common_dtype, in_order
from .recurrent import linear, linear_init

_TENSOR, _RUN = 4, 5  # facts that the network reads
_LARGEST = 4.0  # factor: from a quarter of the hand-set value to four times
_VECTOR = 0.05  # the size of a vector, whatever it holds: gains start at 1 and offsets at 0
_WARMUP = 20  # updates, in a run of unknown length
_POWER = 1.2  # of the share that is left, to which steps are proportional
_TINY = 1e-20


def size_of(p: jax.Array, floor: float | jax.Array) -> jax.Array:
    """What a tensor's steps are relative to; the floor is a matrix's."""
    return jnp.maximum(rms(p), floor) if p.ndim >= 2 else jnp.asarray(_VECTOR, p.dtype)


def floor_of(shape: tuple[int, ...]) -> float:
    """The least size of a matrix: the root mean square of weights that keep the size of their inputs."""
    return max(fan_in(shape), 1) ** -0.5


def rms(p: jax.Array) -> jax.Array:
    """The root mean square of a tensor."""
    return jnp.sqrt(jnp.sum(p * p) / max(p.size, 1) + _TINY)


def schedule(count: jax.Array, total: jax.Array, warmup: float, dtype) -> jax.Array:
    r"""The share :math:`s` of the full step after :math:`t` of :math:`T` updates.

    .. math:: s = \min\left(\frac{t + 1}{w}, \left(\frac{T - t}{T - w}\right)^{1.2}\right)

    Args:
        count: :math:`t`.
        total: :math:`T`; 0 stands for unknown, where :math:`w` is 20 updates and nothing falls.
        warmup: :math:`w / T`.
        dtype: of the share.
    """
    done, last = count.astype(dtype), total.astype(dtype)
    warm = jnp.where(total > 0, warmup * last, _WARMUP)
    left = jnp.where(total > 0, jnp.clip((last - done) / jnp.maximum(last - warm, 1), 0, 1), 1)
    return jnp.minimum((done + 1) / jnp.maximum(warm, 1), left**_POWER)


def factors_init(key: jax.Array, hidden_size: int, outputs: int) -> Theta:
    """A fresh network: its last layer is zero, and so every factor is 1."""
    last = {"w": jnp.zeros((hidden_size, outputs)), "b": jnp.zeros((outputs,))}
    return {"hidden": linear_init(key, _TENSOR + _RUN, hidden_size), "last": last}


def settings(
    theta: Theta,
    groups: Sequence[Group],
    count: jax.Array,
    total: jax.Array,
    warmup: float,
    hand_set: Sequence[float | jax.Array],
) -> jax.Array:
    r"""Each tensor's settings: hand-set ones, the first of them under the schedule, times a network's factors.

    The factors are :math:`4^{\tanh(\cdot)}`, within 1/4 and 4. The network reads the tensor's kind and the time.

    Args:
        theta: of :func:`factors_init`.
        groups: all tensors.
        count: updates done.
        total: updates of the run; 0 stands for unknown.
        warmup: a share of these.
        hand_set: as many numbers as the network has outputs; the first is the step.

    Returns:
        ``[tensors, outputs]``.
    """
    dtype = common_dtype([group.param for group in groups])
    entries = sum(group.param.size for group in groups)
    rows = [np.tile(tensor_facts(group.param.shape[1:], entries), (len(group.param), 1)) for group in groups]
    run = jnp.broadcast_to(run_facts(count, total, dtype), (sum(map(len, rows)), _RUN))
    read = jnp.concatenate([in_order([jnp.asarray(x, dtype) for x in rows], groups), run], axis=1)
    factors = _LARGEST ** jnp.tanh(linear(theta["last"], jnp.tanh(linear(theta["hidden"], read))))
    step, *others = hand_set
    return factors * jnp.stack([step * schedule(count, total, warmup, dtype), *others])[None]


def tensor_facts(shape: tuple[int, ...], entries: int) -> np.ndarray:
    """Fan-in, fan-out and the entries of all tensors, as quarters of logarithms to 10, and 1 for a matrix: ``[4]``."""
    sizes = [fan_in(shape), max(shape[-1:], default=1), entries]
    return np.array([*(math.log10(max(size, 1)) / 4 for size in sizes), len(shape) >= 2])


def run_facts(count: jax.Array, total: jax.Array, dtype) -> jax.Array:
    """Two of the time, and whether the run's length is known, the share done and its root: ``[5]``."""
    known = (total > 0).astype(dtype)
    done = known * jnp.clip(count.astype(dtype) / jnp.maximum(total, 1).astype(dtype), 0, 1)
    time = jnp.log1p(count.astype(dtype))
    return jnp.stack([jnp.tanh(time / 4), jnp.tanh(time / 10), known, done, jnp.sqrt(done)])
