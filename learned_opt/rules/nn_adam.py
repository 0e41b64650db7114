"""Adam whose hyperparameters an LSTM sets for every tensor at every update."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..base import LearnedOptimizer
from ..features import compute_dtype, ema
from ..tensors import each, rule_transform
from .recurrent import LSTMState, linear, lstm, lstm_init, lstm_start

PAPER = "NNAdam of the library learned_optimization; Metz et al. 2022, arXiv:2203.11860"

CONTROLS = ("log_learning_rate", "log_one_minus_b1", "log_one_minus_b2", "log_eps")
INPUTS = 19
_START = (1e-3, 1 - 0.9, 1 - 0.999, 1e-8)
_RATE_RANGE, _EPS_RANGE = (1e-8, 1e3), (1e-11, 1e4)
_CLIP = 1000.0
_STEP = 0.01  # of the LSTM's output
_ROOT = 1e-10


class NNAdamTensor(NamedTuple):
    """What ``nn_adam`` keeps of a tensor.

    Attributes:
        m: the momentum.
        r: the second moment.
        controls: ``[4]``, a tenth of the logarithms ``CONTROLS`` that hold at the next update.
        memory: the LSTM's.
    """

    m: jax.Array
    r: jax.Array
    controls: jax.Array
    memory: LSTMState


def hyperparameters(controls: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """``(learning rate, b1, b2, eps)`` of ``controls [4]``, each within its bounds."""
    lr, one_minus_b1, one_minus_b2, eps = controls
    lr = jnp.clip(jnp.exp(10 * lr), *_RATE_RANGE)
    b1, b2 = (1 - jnp.exp(jnp.clip(10 * x, -10, 0)) for x in (one_minus_b1, one_minus_b2))
    return lr, b1, b2, jnp.clip(jnp.exp(10 * eps), *_EPS_RANGE)


def project(controls: jax.Array) -> jax.Array:
    """``controls [4]`` moved to where :func:`hyperparameters` is within its bounds."""
    lr, b1, b2, eps = hyperparameters(controls)
    return jnp.log(jnp.stack([lr, 1 - b1, 1 - b2, eps])) / 10


def inputs(g, p, m, r, controls) -> jax.Array:
    """What the LSTM sees of a tensor: ``[19]``."""

    def size(x):
        return 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(x)), -5, 5)

    def size_and_sign(x):
        return [size(jnp.mean(x)), jnp.sign(jnp.mean(x))]

    lr, b1, b2, eps = 0.2 * jnp.clip(controls, -5, 5)
    one = jnp.ones((), g.dtype)
    return jnp.stack(
        [
            *(b1, b2, eps, one if g.ndim == 1 else -one, one if g.ndim == 0 else -one, lr),
            *size_and_sign(g),
            size(jnp.mean(jnp.abs(g))),
            *size_and_sign(m),
            *size_and_sign(p),
            *size_and_sign(r),
            *(size(jnp.mean(jnp.square(x - jnp.mean(x)))) for x in (g, m, p, r)),
        ]
    )


def nn_adam(*, lstm_size: int = 32) -> LearnedOptimizer:
    """An LSTM that sets Adam's step size, decays and epsilon for each tensor.

    Per tensor, with its own ``lr, b1, b2, eps``: ``m <- b1 m + (1 - b1) g``, ``r <- b2 r + (1 - b2) g^2`` of the
    gradient clipped to +-1000, ``update = -lr (1 + eps) m / (eps + sqrt(r + 1e-10))``; no bias correction. Then an LSTM
    reads means, mean absolute values, signs and variances of ``g, m, r, p``, the tensor's rank and the four logarithms
    (19 numbers), and adds a hundredth of a linear map of its output to a tenth of the logarithms
    ``ln lr, ln(1 - b1), ln(1 - b2), ln eps`` of the next update. They stay within ``lr`` in [1e-8, 1e3], ``b`` in
    [0, 1 - exp(-10)], ``eps`` in [1e-11, 1e4].

    A fresh rule is Adam at .001 (.9, .999, 1e-8) without bias correction: the linear map starts at zero. Non-finite
    gradient entries count as 0. State: 2 numbers a parameter, and ``4 + 2 lstm_size`` a tensor. Meta-parameters: 6,856
    for ``lstm_size=32``.

    Args:
        lstm_size: units of the LSTM, at least 1.

    Returns:
        A rule; theta is a dict of ``controls [4]`` (see ``CONTROLS``, a tenth of them; where every tensor starts),
        ``lstm`` (see :func:`learned_opt.rules.recurrent.lstm_init`) and ``to_controls {w [H, 4], b [4]}``.

    Raises:
        ValueError: if ``lstm_size`` is below 1.

    Example:
        >>> rule = nn_adam()
        >>> tx = rule.build(rule.init(jax.random.key(0)))
        >>> p = jnp.ones((2, 3))
        >>> updates, state = tx.update(p, tx.init(p), p)
        >>> round(float(hyperparameters(state.tensors.controls)[0]), 6)
        0.001
    """
    if lstm_size < 1:
        raise ValueError(f"nn_adam needs lstm_size >= 1, got {lstm_size}")

    def init(key):
        dtype = jnp.result_type(float)
        return {
            "controls": jnp.log(jnp.asarray(_START, dtype)) / 10,
            "lstm": lstm_init(key, INPUTS, lstm_size),
            "to_controls": {"w": jnp.zeros((lstm_size, 4)), "b": jnp.zeros((4,))},
        }

    def step(theta, g, p, tensor):
        g = jnp.clip(g, -_CLIP, _CLIP)
        lr, b1, b2, eps = hyperparameters(tensor.controls)
        m, r = ema(tensor.m, g, b1), ema(tensor.r, g * g, b2)
        u = -lr * (1 + eps) / (eps + jnp.sqrt(r + _ROOT)) * m
        memory = lstm(theta["lstm"], inputs(g, p, m, r, tensor.controls)[None], tensor.memory)
        controls = project(tensor.controls + _STEP * linear(theta["to_controls"], memory.hidden)[0])
        return u, NNAdamTensor(m, r, controls, memory)

    def build(theta, num_steps=None, layout=None):
        del num_steps

        def start(p):
            dtype = compute_dtype(p.dtype)
            m, r = (jnp.zeros_like(p, dtype) for _ in range(2))
            return NNAdamTensor(m, r, jnp.array(theta["controls"], dtype), lstm_start(theta["lstm"], 1, dtype))

        def update(groups, count, shared, value):
            del count, value
            return each(functools.partial(step, theta), groups), shared

        return rule_transform("nn_adam", start=start, update=update, rest=False, layout=layout)

    return LearnedOptimizer(init, build)
