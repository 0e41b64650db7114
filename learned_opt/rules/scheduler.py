"""A learned step-size schedule, driven by the loss, for any other rule."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import rules  # the whole registry: read only when a scheduler is made, after it is complete
from ..base import LearnedOptimizer, Theta
from ..features import compute_dtype
from ..tensors import check_params, common_dtype, required_loss
from . import recurrent
from .celo import PAPER
from .recurrent import LOSSES, RUN, LossBuffer, LSTMState

__all__ = ["PAPER", "SchedulerState", "over", "scheduler"]

_INPUTS = RUN + LOSSES
_HORIZON = 10_000  # updates, of the slowest mean of the loss
# Name -> step size at a fraction of the run, as a share of the run's own.
SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "constant": jnp.ones_like,
    "cosine": lambda done: 0.5 * (1 + jnp.cos(jnp.pi * done)),
}


def scheduled(name: str, step: jax.Array, num_steps: Any, dtype) -> jax.Array:
    """The factor of a fixed schedule after ``step`` of ``num_steps`` updates; 1 where that is ``None`` or 0."""
    total = jnp.asarray(0 if num_steps is None else num_steps)
    done = jnp.minimum(step / jnp.maximum(total, 1), 1).astype(dtype)
    return jnp.where(total > 0, SCHEDULES[name](done), 1)


class SchedulerState(NamedTuple):
    """State of the rule ``scheduler``.

    Attributes:
        step: int32 scalar, updates done.
        loss: running means of the loss.
        memory: of the LSTM, one row.
        base: the state of the rule that is scheduled.
    """

    step: jax.Array
    loss: LossBuffer
    memory: LSTMState
    base: optax.OptState


def scheduler(
    *,
    base: str = "celo2",
    base_kwargs: Mapping[str, Any] | None = None,
    learning_rate: float | None = None,
    lstm_size: int = 16,
    schedule: str = "constant",
) -> LearnedOptimizer:
    """Any rule under a learned step-size schedule that reads the loss.

    ``update = mult s(t / T) lr u`` with ``u`` the update of ``base``, ``s`` a fixed schedule over the run's ``T``
    updates and ``mult = exp(linear(h))``, ``h`` the output of an LSTM over time as in Celo. It reads the number
    ``t`` of updates done (``tanh(t / tau - 1)`` for eleven ``tau`` from 1 to 100,000), how much of the run is done,
    and how the loss stands to its running means (:func:`learned_opt.rules.recurrent.loss_update`, of horizons from
    10 to 10,000 updates whatever the run's length). The planned number of updates is optional: without it, or with
    0, ``s`` is 1, the nine inputs for the fraction done are 0 and one more says so. A schedule that shall do
    without it should have met that in meta-training (``told_length`` of ``meta_train.train.learners.task_learner``).

    The fresh multiplier is 1. ``theta["base"]`` and ``theta["scheduler"]`` may be trained together or apart
    (:func:`learned_opt.rules.parts.only`). Losses that are not finite count as twice their largest running mean. State:
    that of ``base``, and about ``2 lstm_size`` numbers. Meta-parameters: those of ``base`` and 3,153.

    Args:
        base: a name in :data:`learned_opt.RULES`.
        base_kwargs: arguments of its factory.
        learning_rate: ``lr``; by default the base's own default, 1 for a base that sets its own step size.
        lstm_size: units of the LSTM.
        schedule: ``s``, where learning starts from: ``"constant"``, or ``"cosine"``, from 1 to 0.

    Returns:
        A rule that needs ``value`` and what ``base`` needs; theta is ``{"base": ..., "scheduler": ...}``.

    Raises:
        ValueError: if there is no such base, it cannot be made with its arguments, or a number is out of range.

    Example:
        >>> rule = scheduler(base="adam")
        >>> tx = rule.build(rule.init(jax.random.key(0)))
        >>> updates, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2), value=jnp.float32(1.5))
    """
    if base not in rules.RULES:
        raise ValueError(f"unknown base {base!r} of a scheduler; rules: {', '.join(sorted(rules.RULES))}")
    if lstm_size < 1 or (learning_rate is not None and not learning_rate > 0):
        raise ValueError("scheduler needs lstm_size >= 1 and a positive learning_rate")
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; schedules: {', '.join(SCHEDULES)}")
    try:
        inner = rules.RULES[base](**(base_kwargs or {}))
    except TypeError as error:
        raise ValueError(f"the base {base!r} cannot be made with {base_kwargs}: {error}") from None
    rate = learning_rate or inner.learning_rate or 1.0

    def init(key):
        k_base, k_scheduler = jax.random.split(key)
        step_size = {"w": jnp.zeros((lstm_size, 1)), "b": jnp.zeros((1,))}
        layers = recurrent.pooled_init(k_scheduler, _INPUTS, lstm_size) | {"step_size": step_size}
        return {"base": inner.init(k_base), "scheduler": layers}

    def build(theta, num_steps=None, layout=None):
        transform = inner.build(theta["base"], num_steps=num_steps, layout=layout)
        return stepped(transform, theta["scheduler"], rate, schedule, num_steps)

    return LearnedOptimizer(init, build, needs=("value", *(need for need in inner.needs if need != "value")))


def stepped(
    transform: optax.GradientTransformation, layers: Theta, rate: float, schedule: str, num_steps: int | None
) -> optax.GradientTransformationExtraArgs:
    """Any Optax transform under a learned schedule: :func:`scheduler`'s ``mult s(t / T) lr u``.

    Args:
        transform: gives ``u``.
        layers: the ``theta["scheduler"]`` of a :func:`scheduler`.
        rate: ``lr``.
        schedule: ``s``, as for :func:`scheduler`.
        num_steps: ``T``, or ``None``.

    Returns:
        An Optax transform; its ``update`` needs ``value=loss``.

    Example:
        >>> import learned_opt
        >>> layers = learned_opt.load_rule("flagship-1-auto").theta["scheduler"]
        >>> tx = stepped(learned_opt.soap(1.0), layers, 3e-3, "cosine", num_steps=1000)
        >>> params = jnp.ones((3, 2))
        >>> updates, state = tx.update(params, tx.init(params), params, value=jnp.float32(1.5))
    """
    transform = optax.with_extra_args_support(transform)

    def init_fn(params):
        check_params(params)
        dtype = common_dtype(params)
        memory = recurrent.lstm_start(layers["lstm"], 1, dtype)
        start = recurrent.loss_start(dtype)
        return SchedulerState(jnp.zeros((), jnp.int32), start, memory, transform.init(params))

    def update_fn(updates, state, params=None, *, value=None, **extra_args):
        value = required_loss(value, "scheduler")
        losses, loss = recurrent.loss_update(state.loss, value, _HORIZON)
        read = jnp.concatenate([recurrent.run_embedding(state.step, num_steps, losses.dtype), losses])
        memory = recurrent.pooled_lstm(layers, read[None], state.memory)
        scale = rate * jnp.exp(recurrent.linear(layers["step_size"], memory.hidden)[0, 0])
        scale = scale * scheduled(schedule, state.step, num_steps, scale.dtype)
        updates, inner_state = transform.update(updates, state.base, params, value=value, **extra_args)

        def scaled(u):
            dtype = compute_dtype(u.dtype)
            return (scale.astype(dtype) * u.astype(dtype)).astype(u.dtype)

        updates = jax.tree.map(scaled, updates)
        return updates, SchedulerState(optax.safe_increment(state.step), loss, memory, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def over(
    base: str, theta: Theta, key: jax.Array, *, base_kwargs: Mapping[str, Any] | None = None, **kwargs
) -> tuple[dict[str, Any], Theta]:
    """A fresh scheduler over a trained rule: what :func:`learned_opt.save` takes, to meta-train from there.

    Args:
        base: the trained rule's name.
        theta: its meta-parameters.
        key: of the scheduler's.
        base_kwargs: arguments of the trained rule's factory.
        **kwargs: other arguments of :func:`scheduler`, such as the ``learning_rate`` that was found for the rule.

    Returns:
        ``(arguments of scheduler, its theta)``.

    Raises:
        ValueError: as :func:`scheduler`.

    Example:
        >>> import learned_opt
        >>> saved = learned_opt.load_rule("flagship-1")
        >>> facts = {"base_kwargs": saved.kwargs, "learning_rate": saved.learning_rate}
        >>> kwargs, theta = over(saved.name, saved.theta, jax.random.key(0), **facts)
        >>> sorted(theta)
        ['base', 'scheduler']
    """
    kwargs = {"base": base, "base_kwargs": dict(base_kwargs or {})} | kwargs
    return kwargs, scheduler(**kwargs).init(key) | {"base": theta}
