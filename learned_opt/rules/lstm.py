"""A small LSTM that runs over the updates of every single parameter."""

import functools
import math

import jax
import jax.numpy as jnp

from ..base import LearnedOptimizer, Theta
from ..features import compute_dtype
from ..tensors import each, rule_transform
from .recurrent import LSTMState, linear, linear_init, lstm_init
from .recurrent import lstm as lstm_step

PAPER = "Andrychowicz et al. 2016, Learning to learn by gradient descent by gradient descent, arXiv:1606.04474"

INPUTS = 2
_RANGE = 10.0  # log-gradients from -10 on are seen as such
_BLOCK = 4096  # parameters at a time: what lies between the layers of a large tensor is never stored whole


def log_and_sign(g: jax.Array) -> jax.Array:
    """Gradients as the LSTM sees them, comparable over many orders of magnitude: ``[*shape, 2]``.

    ``(ln |g| / 10, sign g)`` where ``|g| >= exp(-10)``, else ``(-1, exp(10) g)``.

    >>> print(log_and_sign(jnp.array([math.e, -1.0, 0.0])))
    [[ 0.1  1. ]
     [ 0.  -1. ]
     [-1.   0. ]]
    """
    tiny = math.exp(-_RANGE)
    large = jnp.abs(g) >= tiny
    log = jnp.log(jnp.where(large, jnp.abs(g), 1)) / _RANGE
    return jnp.stack([jnp.where(large, log, -1), jnp.where(large, jnp.sign(g), math.exp(_RANGE) * g)], -1)


def network(theta: Theta, x: jax.Array, memory: tuple[LSTMState, ...]) -> tuple[jax.Array, tuple[LSTMState, ...]]:
    """One step of the LSTM: inputs ``[n, 2]`` to outputs ``[n]``."""
    new = []
    for layer, old in zip((theta["lstm0"], theta["lstm1"]), memory, strict=True):
        new.append(lstm_step(layer, x, old))
        x = new[-1].hidden
    return linear(theta["out"], x)[:, 0], tuple(new)


def lstm(*, lstm_size: int = 20, output_scale: float = 0.01) -> LearnedOptimizer:
    """One two-layer LSTM for all parameters, each with its own memory, that sees nothing but its gradient.

    For every parameter by itself: :func:`log_and_sign` of its gradient goes through two LSTM layers, and
    ``update = -output_scale (w h + b)`` of the second one's output ``h``.

    ``init`` draws weights of standard deviation ``1/sqrt(fan-in)`` and then gives one unit of either layer to the sign
    of the gradient, and a tenth of the random weight to the other units' outputs: the fresh rule is nearly
    descent along the smoothed sign of the gradient at step .001, where random weights alone would walk at random.

    Non-finite gradient entries count as 0, and what has no gradient rests
    (:func:`learned_opt.tensors.rule_transform`). **The state is large**: ``4 lstm_size`` numbers a parameter, 80 by
    default (320 bytes), forty times Adam's, and an update costs 5,000 multiplications a parameter. It is here as the
    field's first baseline, for small networks. Meta-parameters: 5,221 for ``lstm_size=20``, of which 80 are the memory
    that every parameter starts from (zeros in the paper, and here until meta-trained).

    Args:
        lstm_size: units of either layer, at least 1.
        output_scale: see above.

    Returns:
        A rule; theta is a dict of ``lstm0, lstm1`` (see :func:`learned_opt.rules.recurrent.lstm_init`) and
        ``out {w [H, 1], b [1]}``.

    Raises:
        ValueError: if ``lstm_size`` is below 1.

    Example:
        >>> rule = lstm()
        >>> tx = rule.build(rule.init(jax.random.key(0)))
        >>> g = jnp.ones((2, 3))
        >>> updates, state = tx.update(g, tx.init(g))
    """
    if lstm_size < 1:
        raise ValueError(f"lstm needs lstm_size >= 1, got {lstm_size}")

    def init(key):
        k0, k1, k_out = jax.random.split(key, 3)
        theta = {"lstm0": lstm_init(k0, INPUTS, lstm_size), "lstm1": lstm_init(k1, lstm_size, lstm_size)}
        # the first unit's gates are left at their bias, and what it writes (the second quarter) is the sign
        for name, column in (("lstm0", 1), ("lstm1", 0)):
            w = theta[name]["w"].at[:, ::lstm_size].set(0)
            theta[name]["w"] = w.at[column, lstm_size].set(2.0)
        out = linear_init(k_out, lstm_size, 1)
        theta["out"] = {"w": (0.1 * out["w"]).at[0].set(0.25), "b": out["b"]}
        return theta

    def step(theta, g, p, memory):
        del p
        rows = jax.tree.map(lambda x: x.reshape(g.size, -1), (log_and_sign(g), memory))
        if g.size <= _BLOCK:
            output, new = network(theta, *rows)
        else:

            def one(row):
                output, new = network(theta, *jax.tree.map(lambda x: x[None], row))
                return jax.tree.map(lambda x: x[0], (output, new))

            output, new = jax.lax.map(one, rows, batch_size=_BLOCK)
        return -output_scale * output.reshape(g.shape), jax.tree.map(lambda x, y: x.reshape(y.shape), new, memory)

    def build(theta, num_steps=None, layout=None):
        del num_steps

        def start(p):
            def of_layer(layer):
                zeros = jnp.zeros_like(p, compute_dtype(p.dtype))[..., None]
                lead = (1,) * p.ndim
                return LSTMState(
                    *(zeros + layer[name].astype(zeros.dtype).reshape(*lead, -1) for name in ("hidden", "cell"))
                )

            return of_layer(theta["lstm0"]), of_layer(theta["lstm1"])

        def update(groups, count, shared, value):
            del count, value
            return each(functools.partial(step, theta), groups), shared

        return rule_transform("lstm", start=start, update=update, reads_params=False, layout=layout)

    return LearnedOptimizer(init, build)
