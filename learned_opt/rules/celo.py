"""Celo: one per-parameter MLP, and an LSTM that schedules its step size by the loss."""

import functools
import math

import jax
import jax.numpy as jnp

from ..base import LearnedOptimizer, Theta
from ..features import no_moments
from ..tensors import each, rule_transform
from . import recurrent
from .recurrent import FRACTIONS, LOSSES, Clock, LossBuffer, LSTMState
from .velo import bank_init, mix, tensor_step, unmix

PAPER = "Moudgil et al. 2025, Celo: training versatile learned optimizers on a compute diet, arXiv:2501.12670"

_INPUTS = FRACTIONS + LOSSES


def scheduler_init(key: jax.Array, lstm_size: int) -> Theta:
    """Meta-parameters of :func:`schedule` at which the multiplier is 1. As published, one layer is ``unused``."""
    k_pooled, k_unused = jax.random.split(key)
    return recurrent.pooled_init(k_pooled, _INPUTS, lstm_size) | {
        "step_size": {"w": jnp.zeros((lstm_size, 1)), "b": jnp.full((1,), math.log(10))},
        "unused": recurrent.linear_init(k_unused, _INPUTS, lstm_size),
    }


def schedule(
    theta: Theta, step: jax.Array, loss: LossBuffer, memory: LSTMState, value: jax.Array, num_steps
) -> tuple[jax.Array, LossBuffer, LSTMState]:
    """The multiplier ``.1 exp(linear(h))`` of the step size, ``h`` the output of an LSTM over time.

    Args:
        theta: as :func:`scheduler_init` makes it.
        step: updates done.
        loss: running means before this update.
        memory: of the LSTM, likewise; one row.
        value: the loss.
        num_steps: planned number of updates.

    Returns:
        ``(multiplier [1], loss, memory)``, the latter two after this update.
    """
    losses, loss = recurrent.loss_update(loss, value, num_steps)
    x = jnp.concatenate([recurrent.fraction_embedding(step, num_steps, losses.dtype), losses])
    memory = recurrent.pooled_lstm(theta, x[None], memory)
    return 0.1 * jnp.exp(recurrent.linear(theta["step_size"], memory.hidden)[0]), loss, memory


def celo(
    *,
    hidden_size: int = 4,
    bank_size: int = 1,
    lstm_size: int = 64,
    scheduled: bool = True,
    published: bool = False,
) -> LearnedOptimizer:
    """Celo: one small MLP gives every parameter its direction; an LSTM that reads the loss schedules the step size.

    The MLP, its 30 columns and its accumulators are those of :func:`learned_opt.rules.velo.velo`:
    ``update = -mult .001 sqrt(mean(p^2) + 1e-9) d exp(.001 a)``. The LSTM sees nothing of the tensors, only how much of
    the run is done and how the loss has gone (:func:`learned_opt.rules.recurrent.loss_update`), so one
    ``mult = .1 exp(linear(h))`` serves all of them. With a bank of several MLPs the weights are ``mean_k(c_k W_k)``,
    ``c = softmax(linear(h))``.

    It is meta-trained in two phases: the MLP alone (``scheduled=False``, training ``theta["bank"]``), then the LSTM
    around the finished MLP (training ``theta["scheduler"]``).

    A fresh rule is nearly Adam at unit RMS, its step .001 of the tensor's own RMS. Non-finite gradient entries count as
    0, others are clipped to +-1000, and what has no gradient rests (:func:`learned_opt.tensors.rule_transform`). State:
    4 numbers and a byte a parameter and 6 a row or column. Meta-parameters: 37,089, of
    which 36,930 are the LSTM's; among them one linear layer and with ``bank_size=1`` ``controls`` have no effect, as
    published.

    Args:
        hidden_size: units in either hidden layer of the MLP, at least 2.
        bank_size: number of MLPs.
        lstm_size: units of the LSTM.
        scheduled: ``False`` leaves out the LSTM: ``mult`` is 1, ``c`` is ``1/K``, and neither loss nor number of steps
            is needed.
        published: what has no gradient moves, as in the reference implementation.

    Returns:
        A rule that needs ``value`` and ``num_steps``; theta is ``{"bank": ..., "scheduler": ...}``.

    Raises:
        ValueError: if ``hidden_size`` is below 2 or another size below 1.

    Example:
        >>> rule = celo()
        >>> tx = rule.build(rule.init(jax.random.key(0)), num_steps=100)
        >>> p = jnp.ones((2, 3))
        >>> updates, state = tx.update(p, tx.init(p), p, value=jnp.float32(1.5))
    """
    if hidden_size < 2 or min(bank_size, lstm_size) < 1:
        raise ValueError("celo needs hidden_size >= 2, and bank_size and lstm_size >= 1")

    def init(key):
        k_bank, k_scheduler, k_controls = jax.random.split(key, 3)
        bank = jax.tree.map(lambda w: bank_size * w, bank_init(k_bank, bank_size, hidden_size))
        controls = recurrent.linear_init(k_controls, lstm_size, bank_size)
        return {"bank": bank, "scheduler": scheduler_init(k_scheduler, lstm_size) | {"controls": controls}}

    def build(theta, num_steps=None, layout=None):
        scheduler = theta["scheduler"]

        def start_shared(dtype):
            if scheduled:
                recurrent.required_num_steps(num_steps, "celo")
            return Clock(recurrent.loss_start(dtype), recurrent.lstm_start(scheduler["lstm"], 1, dtype))

        def update(groups, count, clock, value):
            dtype = clock.memory.hidden.dtype
            if scheduled:
                total = recurrent.required_num_steps(num_steps, "celo")
                mult, loss, memory = schedule(scheduler, count, clock.loss, clock.memory, value, total)
                controls = jax.nn.softmax(recurrent.linear(scheduler["controls"], memory.hidden))
                clock = Clock(loss, memory)
            else:
                mult, controls = jnp.ones((1,), dtype), jnp.full((1, bank_size), 1 / bank_size, dtype)
            weights = jax.tree.map(lambda w: w[0], unmix(mix(theta["bank"], controls), theta["bank"]))
            return each(functools.partial(tensor_step, weights=weights, mult=mult[0]), groups), clock

        return rule_transform(
            "celo",
            start=no_moments,
            start_shared=start_shared,
            update=update,
            reads_loss=scheduled,
            rest=not published,
            layout=layout,
        )

    return LearnedOptimizer(init, build, needs=("value", "num_steps") if scheduled else ())
