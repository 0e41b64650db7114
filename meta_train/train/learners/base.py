"""Inner learning processes as functions of theta: what an estimator unrolls.

A learner is *any* process that takes a step at meta-parameters theta and says how well it does. The estimators
know nothing else of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from learned_opt.base import LearnedOptimizer, Theta
from tasks.families.networks import log_uniform

LearnerState = Any
ENDLESS = jnp.iinfo(jnp.int32).max
_COIN = 2**31 - 2  # a counter of the generator that no episode's draws reach
_FLOOR = 0.01  # share of the initial loss below which less is hardly better
# Name -> meta-loss of a training loss that is given as a share of the initial one.
MEASURES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "log": lambda share: jnp.log(jnp.maximum(share, 0) + _FLOOR),
    "relative": lambda share: share,
}


def _endless(state: LearnerState) -> jax.Array:
    del state
    return jnp.asarray(ENDLESS, jnp.int32)


class Learner(NamedTuple):
    """An inner learning process.

    Attributes:
        init: ``(theta, key) -> state``, the start of an episode.
        step: ``(theta, state, key) -> (state, loss)``, one inner step; ``loss`` is its meta-loss, a scalar.
        remaining: ``state -> int32 scalar``, how many steps the episode has left. The windowed estimators start a
            new episode when none is. The default never ends.
    """

    init: Callable[[Theta, jax.Array], LearnerState]
    step: Callable[[Theta, LearnerState, jax.Array], tuple[LearnerState, jax.Array]]
    remaining: Callable[[LearnerState], jax.Array] = _endless


def meta_loss_of(
    loss: jax.Array, initial_loss: jax.Array, max_loss: float, measure: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """``measure(min(loss / initial_loss, max_loss))``; a non-finite loss counts as ``max_loss``."""
    return measure(jnp.where(jnp.isfinite(loss), jnp.minimum(loss / initial_loss, max_loss), max_loss))


def unit_of(loss: jax.Array) -> jax.Array:
    """What an episode's losses are divided by: its size at the start, 1 where that is not finite."""
    return jnp.where(jnp.isfinite(loss), jnp.maximum(jnp.abs(loss), 1e-6), 1.0)


def drawn_length(key: jax.Array, bounds: tuple[int, int], multiple_of: int) -> jax.Array:
    """An episode's length, log-uniform in ``bounds`` and rounded to whole windows of ``multiple_of``, at least one."""
    windows = jnp.maximum(jnp.round(log_uniform(key, *bounds) / multiple_of), 1)
    return (multiple_of * windows).astype(jnp.int32)


def told(key: jax.Array, length: jax.Array, share: float) -> jax.Array:
    """The episode's length, or 0 where the rule is not to know it: a coin, thrown at its start with the key of that."""
    return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, _COIN), share), length, 0)


def default_rates(rule: LearnedOptimizer) -> tuple[float, float]:
    """The range of the step size where none is given: the rule's own; 1 for one that has none."""
    rate = 1.0 if rule.learning_rate is None else rule.learning_rate
    return rate, rate
