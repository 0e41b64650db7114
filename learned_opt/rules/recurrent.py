"""Parts of the rules with memory: an LSTM, what it reads of the loss and of the time.

The LSTM runs over tensors, one batch row each, or over a single row when it sees nothing of the tensors.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..base import Theta
from ..features import truncated_normal

_HIGHEST = jax.lax.Precision.HIGHEST

_TIMESCALES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
_FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
TIMES = len(_TIMESCALES)
FRACTIONS = len(_FRACTIONS)
RUN = TIMES + FRACTIONS + 1
_AVERAGES = 10
LOSSES = _AVERAGES - 1


# --- layers


def linear_init(key: jax.Array, inputs: int, outputs: int) -> Theta:
    """Meta-parameters ``{"w": [inputs, outputs], "b": [outputs]}``: truncated normal and zeros."""
    return {"w": truncated_normal(key, (inputs, outputs), inputs), "b": jnp.zeros((outputs,))}


def linear(theta: Theta, x: jax.Array) -> jax.Array:
    """``x w + b`` for rows ``x [n, inputs]``, in the dtype of ``x``."""
    w, b = theta["w"].astype(x.dtype), theta["b"].astype(x.dtype)
    return jnp.matmul(x, w, precision=_HIGHEST) + b[None]


class LSTMState(NamedTuple):
    """Memory of an LSTM, one row a tensor.

    Attributes:
        hidden: ``[n, H]``, the last output.
        cell: ``[n, H]``.
    """

    hidden: jax.Array
    cell: jax.Array


def lstm_init(key: jax.Array, inputs: int, hidden_size: int) -> Theta:
    """Meta-parameters of an LSTM: ``{"w": [inputs + H, 4 H], "b": [4 H], "hidden": [H], "cell": [H]}``.

    ``hidden`` and ``cell`` are the learned initial memory, zero at first.
    """
    zeros = jnp.zeros((hidden_size,))
    return linear_init(key, inputs + hidden_size, 4 * hidden_size) | {"hidden": zeros, "cell": zeros}


def lstm_start(theta: Theta, rows: int, dtype) -> LSTMState:
    """The learned initial memory, repeated for ``rows`` tensors."""

    def repeat(x):
        return jnp.broadcast_to(x.astype(dtype)[None], (rows, x.shape[0]))

    return LSTMState(repeat(theta["hidden"]), repeat(theta["cell"]))


def lstm(theta: Theta, x: jax.Array, state: LSTMState) -> LSTMState:
    """One step of an LSTM (Hochreiter & Schmidhuber 1997), with 1 added to the forget gate.

    ``i, g, f, o = split([x, h] w + b)``; ``c <- sigmoid(f + 1) c + sigmoid(i) tanh(g)``; ``h <- sigmoid(o) tanh(c)``.

    Args:
        theta: as :func:`lstm_init` makes it.
        x: inputs ``[n, inputs]``; their dtype is that of the result.
        state: the memory before.

    Returns:
        The memory after; its ``hidden`` is the output.
    """
    h, c = state.hidden.astype(x.dtype), state.cell.astype(x.dtype)
    i, g, f, o = jnp.split(linear(theta, jnp.concatenate([x, h], 1)), 4, axis=1)
    c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return LSTMState(jax.nn.sigmoid(o) * jnp.tanh(c), c)


def pooled_init(key: jax.Array, inputs: int, hidden_size: int) -> Theta:
    """Meta-parameters of :func:`pooled_lstm`: the linear layers ``pooled`` and ``own``, and ``lstm``."""
    k_pooled, k_own, k_lstm = jax.random.split(key, 3)
    return {
        "pooled": linear_init(k_pooled, inputs, hidden_size),
        "own": linear_init(k_own, inputs, hidden_size),
        "lstm": lstm_init(k_lstm, hidden_size, hidden_size),
    }


def pooled_lstm(theta: Theta, x: jax.Array, state: LSTMState) -> LSTMState:
    """One step of an LSTM whose rows hear of each other: it reads ``own(x) + max over rows of relu(pooled(x))``.

    Args:
        theta: as :func:`pooled_init` makes it.
        x: inputs ``[n, inputs]``, at least one row.
        state: the memory before.

    Returns:
        The memory after; its ``hidden`` is the output.
    """
    pooled = jnp.max(jax.nn.relu(linear(theta["pooled"], x)), 0, keepdims=True)
    return lstm(theta["lstm"], linear(theta["own"], x) + pooled, state)


# --- time


def time_embedding(t: jax.Array, dtype) -> jax.Array:
    """``tanh(t / tau - 1)`` of the number of updates done, for eleven ``tau`` from 1 to 100,000: ``[11]``."""
    return jnp.tanh(jnp.asarray(t, dtype) / np.asarray(_TIMESCALES, dtype) - 1)


def sine_embedding(t: jax.Array, dtype) -> jax.Array:
    """``sin(t / (pi tau))`` of the number of updates done, for the same ``tau``: ``[11]``."""
    return jnp.sin(jnp.asarray(t, dtype) / (np.pi * np.asarray(_TIMESCALES, dtype)))


def fraction_embedding(t: jax.Array, num_steps: Any, dtype) -> jax.Array:
    """``tanh(10 (t / num_steps - u))`` for nine ``u`` from 0.03 to 1.1: ``[9]``."""
    fraction = jnp.asarray(t, dtype) / jnp.maximum(jnp.asarray(num_steps, dtype), 1)
    return jnp.tanh(10 * (fraction - np.asarray(_FRACTIONS, dtype)))


def run_embedding(t: jax.Array, num_steps: Any, dtype) -> jax.Array:
    """The time, how much of the run is done, and whether that is known: ``[21]``.

    Args:
        t: updates done.
        num_steps: planned number of updates; ``None`` or 0 where it is not known, which makes the fractions 0.
        dtype: of the result.
    """
    total = jnp.asarray(0 if num_steps is None else num_steps)
    known = (total > 0).astype(dtype)
    return jnp.concatenate([time_embedding(t, dtype), known * fraction_embedding(t, total, dtype), known[None]])


def required_num_steps(num_steps: Any, rule: str) -> Any:
    """``num_steps``, or a ``ValueError`` that tells how to pass it."""
    if num_steps is None:
        raise ValueError(f"{rule} reads the planned number of updates: pass num_steps=... to build or load")
    return num_steps


# --- the loss


class LossBuffer(NamedTuple):
    """Running means of the loss over ten horizons.

    Attributes:
        means: ``[10]``, not bias-corrected.
        minima: ``[10]``, the least that each bias-corrected mean has been.
        seen: int32 scalar, the number of losses.
    """

    means: jax.Array
    minima: jax.Array
    seen: jax.Array


class Clock(NamedTuple):
    """What an LSTM that schedules by the loss remembers: running means of the loss, and its memory, one row."""

    loss: LossBuffer
    memory: LSTMState


def loss_start(dtype) -> LossBuffer:
    """No loss seen yet."""
    return LossBuffer(
        jnp.zeros(_AVERAGES, dtype), jnp.full(_AVERAGES, 999_999_999_999, dtype), jnp.zeros((), jnp.int32)
    )


def correction(decays: jax.Array, count: jax.Array) -> jax.Array:
    """``1 - d^n``, what a running mean from 0 is divided by, without the cancellation."""
    return -jnp.expm1(count.astype(decays.dtype) * jnp.log1p(decays - 1))


def _decays(horizon: Any, dtype) -> jax.Array:
    """``exp(-1 / h_i)`` for ten ``h_i`` from 10 to ``horizon``."""
    if isinstance(horizon, int | float):
        return jnp.asarray(np.exp(-1 / np.logspace(1, np.log10(max(horizon, 1)), _AVERAGES)), dtype)
    horizon = jnp.maximum(jnp.asarray(horizon, dtype), 1)
    exponents = jnp.linspace(jnp.ones((), dtype), jnp.log10(horizon), _AVERAGES)
    return jnp.exp(-1 / 10**exponents)


def loss_update(state: LossBuffer, loss: jax.Array, horizon: Any) -> tuple[jax.Array, LossBuffer]:
    """Take in a loss; say how its running means stand between their own minima and the slower means.

    Ten means with decays ``d_i = exp(-1 / h_i)``, the ``h_i`` from 10 to ``horizon`` evenly on a log scale. A loss
    above twice the largest mean is cut to that, unless all means are 0. Feature ``i`` is
    ``(m_i - min_i) / (m_{i+1} - min_i) - 1`` in ``[-1, 1]``, of the bias-corrected means: below 0 while the loss falls.
    Zero for the first two updates.

    Losses that are not finite count as that cut; before the first finite one they are passed over.

    Args:
        state: the means before.
        loss: a scalar.
        horizon: of the slowest mean, in updates; may be traced.

    Returns:
        ``(features [9], the means after)``.
    """
    means, dtype = state.means, state.means.dtype
    decays, seen = _decays(horizon, dtype), state.seen + 1
    corrections = correction(decays, seen)
    loss = jnp.reshape(loss, ()).astype(dtype)
    loss = jnp.where(jnp.isnan(loss), jnp.inf, loss)
    # as published, the correction is one update ahead of the means here
    largest = jnp.max(means / corrections)
    cut = 2 * jnp.abs(jnp.where((state.seen == 0) | jnp.all(means == 0), loss, largest))
    loss = jnp.minimum(cut, loss)
    usable = jnp.isfinite(loss)
    means = decays * means + (1 - decays) * jnp.where(usable, loss, 0)
    corrected = means / corrections  # once: where it is a new minimum, the difference must be exactly 0
    new = LossBuffer(means, jnp.minimum(state.minima, corrected), seen)
    new = jax.tree.map(lambda a, b: jnp.where(usable, a, b), new, state)
    faster, low = corrected[:-1], new.minima[:-1]
    # of means with the same decay, not even the rounding may differ
    slower = jnp.where(decays[:-1] == decays[1:], faster, corrected[1:])
    features = (faster - low) / jnp.maximum(slower - low, 1e-8) - 1
    return jnp.where(usable & (seen > 2), jnp.clip(features, -1, 1), 0), new
