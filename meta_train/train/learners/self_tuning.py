"""The learner whose inner process is a self-tuning network."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt import self_tuning as st
from learned_opt.base import LearnedOptimizer, Theta
from tasks.base import Data
from tasks.families.networks import log_uniform

from ..problems import Problem, make_tuner
from .base import MEASURES, Learner, default_rates, drawn_length, meta_loss_of, unit_of


class SelfTuningState(NamedTuple):
    """The state of :func:`self_tuning_learner`: one self-tuning run in progress."""

    tuner: st.TunerState
    cycles: jax.Array  # int32, of this episode
    learning_rate: jax.Array  # float, of the weights
    initial_loss: jax.Array  # float, what the validation losses are divided by


def self_tuning_learner(
    rule: LearnedOptimizer,
    problem: Problem,
    data: Data,
    *,
    cycles: tuple[int, int] = (50, 50),
    multiple_of: int = 1,
    learning_rates: tuple[float, float] | None = None,
    max_loss: float = 4.0,
    measure: Callable[[jax.Array], jax.Array] = MEASURES["relative"],
    **options: Any,
) -> Learner:
    r"""The learner that trains a self-tuning network with a learned rule.

    A step is one cycle: the rule takes training steps on the weights at the current hyperparameters, the response
    follows, and the hyperparameters :math:`\ell` descend the validation loss through the response. The meta-loss is
    the validation loss :math:`\min(L_V / L_V^0, c)` at the cycle's end, so that theta is judged by how the network
    generalises under hyperparameters that themselves depend on theta: the meta-gradient runs through the response.

    Args:
        rule: the learned update rule; it moves the weights. The response is moved by Adam.
        problem: what is learned.
        data: ``problem.data``, possibly traced.
        cycles: least and most of an episode, drawn log-uniformly.
        multiple_of: cycles are rounded to multiples of it (the estimator's window).
        learning_rates: range of the weights' rate, drawn log-uniformly, for a rule that has a free one; by default its
            own.
        max_loss: cap :math:`c` of the meta-loss, in units of the loss at the start.
        measure: the meta-loss of the loss in these units, of :data:`meta_train.train.learners.MEASURES`.
        **options: of :func:`learned_opt.self_tuning.tuner`, such as ``train_steps`` and ``hyper``. The guard and the
            bound of the hyperparameters' steps are off unless set: they make the meta-loss jump.

    Returns:
        A :class:`~meta_train.train.learners.Learner`; its state is a :class:`SelfTuningState`.

    Reference:
        MacKay et al., "Self-Tuning Networks", 2019.
    """
    rates = learning_rates or default_rates(rule)
    options = {"response": optax.adam(1e-3), "train_steps": 5, "guard": None, "trust": None} | options

    def tuner(theta: Theta, cycles: jax.Array, rate: jax.Array) -> st.Tuner:
        weights = rule.build(theta, num_steps=cycles * options["train_steps"])
        return make_tuner(problem, weights=optax.chain(weights, optax.scale(rate)), **options)

    def init(theta: Theta, key: jax.Array) -> SelfTuningState:
        k_init, k_batch, k_cycles, k_rate = jax.random.split(key, 4)
        drawn, rate = drawn_length(k_cycles, cycles, multiple_of), log_uniform(k_rate, *rates)
        params, response = problem.init(k_init)
        loss = jnp.mean(problem.valid_loss(params, problem.batch(data["valid"], k_batch)))
        start = tuner(theta, drawn, rate).init(params, response)
        return SelfTuningState(start, drawn, rate, unit_of(loss))

    def step(theta: Theta, state: SelfTuningState, key: jax.Array) -> tuple[SelfTuningState, jax.Array]:
        new, info = tuner(theta, state.cycles, state.learning_rate).cycle(state.tuner, key, data)
        return state._replace(tuner=new), meta_loss_of(info.valid_loss, state.initial_loss, max_loss, measure)

    return Learner(init, step, remaining=lambda state: state.cycles - state.tuner.cycle)
