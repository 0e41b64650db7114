"""Adam under Celo's scheduler."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..base import LearnedOptimizer
from ..features import compute_dtype, ema
from ..tensors import each, rule_transform
from . import recurrent
from .celo import PAPER, schedule, scheduler_init
from .recurrent import Clock

__all__ = ["PAPER", "AdamMoments", "celo_adam"]

B1, B2 = 0.9, 0.999
_EPS, _ROOT_EPS = 1e-8, 1e-10
_STEP = 1e-3
_CLIP = 1000.0


class AdamMoments(NamedTuple):
    """First and second moment of a tensor's gradients."""

    m: jax.Array
    r: jax.Array


def celo_adam(*, lstm_size: int = 64) -> LearnedOptimizer:
    """Adam whose step size an LSTM that reads the loss schedules.

    ``update = -.001 mult m / (1 - .9^t) / (1e-8 + sqrt(r / (1 - .999^t) + 1e-10))`` with the moments ``m`` (.9) and
    ``r`` (.999) of the gradient clipped to +-1000, and Celo's ``mult`` (:func:`learned_opt.rules.celo.schedule`).

    A fresh rule is Adam with step .001. Non-finite gradient entries count as 0. State: 2 numbers a parameter.
    Meta-parameters: 36,865, of which one linear layer has no effect, as published.

    Args:
        lstm_size: units of the LSTM.

    Returns:
        A rule that needs ``value`` and ``num_steps``; theta is a dict of ``lstm`` and the layers around it.

    Raises:
        ValueError: if ``lstm_size`` is below 1.

    Example:
        >>> rule = celo_adam()
        >>> tx = rule.build(rule.init(jax.random.key(0)), num_steps=100)
        >>> updates, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2), value=jnp.float32(1.5))
    """
    if lstm_size < 1:
        raise ValueError(f"celo_adam needs lstm_size >= 1, got {lstm_size}")

    def init(key):
        return scheduler_init(key, lstm_size)

    def start(p):
        return AdamMoments(*(jnp.zeros_like(p, compute_dtype(p.dtype)) for _ in range(2)))

    def build(theta, num_steps=None, layout=None):
        def start_shared(dtype):
            recurrent.required_num_steps(num_steps, "celo_adam")
            return Clock(recurrent.loss_start(dtype), recurrent.lstm_start(theta["lstm"], 1, dtype))

        def update(groups, count, clock, value):
            total = recurrent.required_num_steps(num_steps, "celo_adam")
            mult, loss, memory = schedule(theta, count, clock.loss, clock.memory, value, total)

            def step(g, p, moments):
                del p
                g = jnp.clip(g, -_CLIP, _CLIP)
                m, r = ema(moments.m, g, B1), ema(moments.r, g * g, B2)
                mh, rh = (x / recurrent.correction(jnp.asarray(b, g.dtype), count + 1) for x, b in ((m, B1), (r, B2)))
                return -_STEP * mult[0].astype(g.dtype) * mh / (_EPS + jnp.sqrt(rh + _ROOT_EPS)), AdamMoments(m, r)

            return each(step, groups), Clock(loss, memory)

        return rule_transform(
            "celo_adam",
            start=start,
            start_shared=start_shared,
            update=update,
            rest=False,
            reads_params=False,
            reads_loss=True,
            layout=layout,
        )

    return LearnedOptimizer(init, build, needs=("value", "num_steps"))
