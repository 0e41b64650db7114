"""The learner that optimizes tasks of a family."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt.base import LearnedOptimizer, Theta
from learned_opt.rules.scheduler import SCHEDULES
from tasks.base import Cfg, Params, TaskFamily
from tasks.families.networks import log_uniform

from .base import MEASURES, Learner, default_rates, drawn_length, meta_loss_of, told, unit_of

_BEYOND = 2**31 - 1  # a counter of the generator that no batch's draws reach
_JUDGED = 2**31 - 3  # another


class TaskState(NamedTuple):
    """The state of :func:`task_learner`: one optimization run in progress."""

    params: Params
    opt_state: optax.OptState
    cfg: Cfg
    taken: jax.Array  # int32, steps taken
    num_steps: jax.Array  # int32, steps of this episode
    told: jax.Array  # int32, what the rule knows of that: it, or 0
    learning_rate: jax.Array  # float, the step size of this episode
    initial_loss: jax.Array  # float, what the losses are divided by


def task_learner(
    rule: LearnedOptimizer,
    family: TaskFamily,
    *,
    lengths: tuple[int, int] = (100, 1000),
    multiple_of: int = 1,
    learning_rates: tuple[float, float] | None = None,
    schedule: Callable[[jax.Array], jax.Array] = SCHEDULES["constant"],
    max_loss: float = 4.0,
    measure: Callable[[jax.Array], jax.Array] = MEASURES["relative"],
    told_length: float = 1.0,
    judged_on: str = "train",
    judged_from: float = 0.0,
) -> Learner:
    r"""The learner that optimizes tasks drawn from a family with a learned rule.

    An episode draws a task, its length :math:`T` log-uniform in ``lengths`` and a step size :math:`\eta` log-uniform
    in ``learning_rates``; step :math:`t` draws a training batch and takes
    :math:`p_{t+1} = p_t + s(t/T)\, \eta\, u(\theta, \nabla L_t(p_t), L_t(p_t))`. The meta-loss of the step is
    :math:`f(\min(L_t(p_t) / L_0, c))`, with :math:`L_0` the loss at the start on a batch of its own, so that tasks of
    different scale weigh alike, and :math:`c` = ``max_loss``, which a non-finite loss counts as too. With
    ``judged_on="valid"`` its :math:`L_t(p_t)` is the loss on another batch, of the validation split. Non-finite entries
    of the inner gradient count as 0.

    Args:
        rule: the learned update rule.
        family: the tasks; its ``data`` may be traced.
        lengths: the shortest and the longest episode.
        multiple_of: lengths are rounded to multiples of it (the estimator's window, so that no window straddles two
            episodes).
        learning_rates: range of the step size, for a rule that has a free one; by default always its own default.
        schedule: the shape ``s`` of the step size over an episode, a function of the fraction done.
        max_loss: cap of the loss, in units of the initial loss.
        measure: ``f``; the logarithm weighs what is gained late, where losses are small, like what is gained early.
        told_length: share of the episodes in which the rule is told their length; in the others it is told 0, which
            ``scheduler``, ``control``, ``light`` and ``outer`` take for an unknown length. A rule that needs the
            length is told it always.
        judged_on: the split that the meta-loss is of, ``"train"`` or ``"valid"``; the latter costs one evaluation of
            the loss a step.
        judged_from: the share of an episode before which meta-losses are 0; later ones are divided by the share that is
            left. What counts is then where training ends, and not how fast it begins.

    Returns:
        A :class:`Learner` whose state is a :class:`TaskState`.

    Example:
        >>> import jax, learned_opt
        >>> from tasks.families.synthetic import quadratic
        >>> learner = task_learner(learned_opt.RULES["sgd"](), quadratic(), lengths=(10, 10))
        >>> theta = learned_opt.RULES["sgd"]().init(jax.random.key(0))
        >>> state = learner.init(theta, jax.random.key(1))
        >>> state, loss = learner.step(theta, state, jax.random.key(2))
    """
    learning_rates = learning_rates or default_rates(rule)

    def init(theta: Theta, key: jax.Array) -> TaskState:
        k_cfg, k_params, k_length, k_rate, k_batch, k_loss = jax.random.split(key, 6)
        cfg = family.sample(k_cfg)
        task = family.task(family.data, cfg)
        params = task.init(k_params)
        num_steps = drawn_length(k_length, lengths, multiple_of)
        loss, _ = task.loss(params, k_loss, task.batch(k_batch, "train"))
        return TaskState(
            params=params,
            opt_state=rule.build(theta, num_steps=num_steps).init(params),
            cfg=cfg,
            taken=jnp.zeros((), jnp.int32),
            num_steps=num_steps,
            told=told(key, num_steps, 1.0 if "num_steps" in rule.needs else told_length),
            learning_rate=log_uniform(k_rate, *learning_rates),
            initial_loss=unit_of(loss),
        )

    def step(theta: Theta, state: TaskState, key: jax.Array) -> tuple[TaskState, jax.Array]:
        task = family.task(family.data, state.cfg)
        k_loss = jax.random.fold_in(key, _BEYOND)  # never computed for a loss that draws nothing, as a split would be
        batch = task.batch(key, "train")
        loss, grads = jax.value_and_grad(lambda p: task.loss(p, k_loss, batch)[0])(state.params)
        grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), grads)
        transform = rule.build(theta, num_steps=state.told)
        updates, opt_state = transform.update(grads, state.opt_state, state.params, value=loss)
        rate = state.learning_rate * schedule(state.taken / state.num_steps)
        params = jax.tree.map(lambda p, u: p + (rate * u).astype(p.dtype), state.params, updates)
        if judged_on == "valid":
            loss, _ = task.loss(state.params, k_loss, task.batch(jax.random.fold_in(key, _JUDGED), "valid"))
        meta_loss = meta_loss_of(loss, state.initial_loss, max_loss, measure)
        if judged_from:
            counts = state.taken >= judged_from * state.num_steps
            meta_loss = jnp.where(counts, meta_loss / (1 - judged_from), 0)
        return state._replace(params=params, opt_state=opt_state, taken=state.taken + 1), meta_loss

    return Learner(init, step, remaining=lambda state: state.num_steps - state.taken)
