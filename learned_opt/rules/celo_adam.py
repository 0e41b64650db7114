"""Adam under Celo's scheduler."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import features as ft
from ..base import LearnedOptimizer
from . import recurrent
from .celo import PAPER, schedule, scheduler_init
from .recurrent import LossBuffer, LSTMState

__all__ = ["PAPER", "CeloAdamState", "celo_adam"]

B1, B2 = 0.9, 0.999
_EPS, _ROOT_EPS = 1e-8, 1e-10
_STEP = 1e-3
_CLIP = 1000.0


class CeloAdamState(NamedTuple):
    """State of the rule ``celo_adam``.

    Attributes:
        step: int32 scalar, updates done.
        loss: running means of the loss.
        memory: of the LSTM, one row.
        m: first moment.
        r: second moment.
    """

    step: jax.Array
    loss: LossBuffer
    memory: LSTMState
    m: optax.Updates
    r: optax.Updates


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

    def build(theta, num_steps=None):
        def init_fn(params):
            ft.check_params(params)
            recurrent.required_num_steps(num_steps, "celo_adam")
            dtype = ft.common_dtype(params)
            memory = recurrent.lstm_start(theta["lstm"], 1, dtype)
            start = recurrent.loss_start(dtype)
            return CeloAdamState(jnp.zeros((), jnp.int32), start, memory, ft.zeros(params), ft.zeros(params))

        def update_fn(updates, state, params=None, *, value=None, **extra_args):
            del extra_args
            params = ft.required_params(params, "celo_adam")
            value = recurrent.required_loss(value, "celo_adam")
            total = recurrent.required_num_steps(num_steps, "celo_adam")
            mult, loss, memory = schedule(theta, state.step, state.loss, state.memory, value, total)
            step = optax.safe_increment(state.step)

            def update_tensor(gradient, p, m, r):
                dtype = ft.compute_dtype(p.dtype)
                g = ft.clean(gradient, _CLIP, dtype)
                m, r = ft.ema(m, g, B1), ft.ema(r, g * g, B2)
                mh, rh = (x / recurrent.correction(jnp.asarray(b, dtype), step) for x, b in ((m, B1), (r, B2)))
                u = -_STEP * mult[0].astype(dtype) * mh / (_EPS + jnp.sqrt(rh + _ROOT_EPS))
                return u.astype(gradient.dtype), m, r

            updates, m, r = ft.map_tensors(update_tensor, updates, params, state.m, state.r)
            return updates, CeloAdamState(step, loss, memory, m, r)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return LearnedOptimizer(init, build, needs=("value", "num_steps"))
