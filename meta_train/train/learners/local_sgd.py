"""The learner whose inner process is local SGD: what a learned outer optimizer is meta-trained on."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from learned_opt import hidden_matrices, load
from learned_opt.base import LearnedOptimizer, Theta
from tasks.base import Cfg, Params, TaskFamily
from tasks.families.networks import log_uniform

from .base import MEASURES, Learner, default_rates, drawn_length, meta_loss_of, told, unit_of

# What workers may step by, at a rate of 1, by the number of their steps. Muon's matrices and kernels move as far as
# Adam's (an RMS of 0.2); `flagship` sets its own steps, which fall over the run, and a rate multiplies them.
LOCAL_OPTIMIZERS: dict[str, Callable[[jax.Array | None], optax.GradientTransformation]] = {
    "adamw": lambda _: optax.adamw(1.0, b2=0.99, weight_decay=0.05),
    "flagship": lambda num_steps: load("flagship", num_steps=num_steps),
    "muon": lambda _: optax.contrib.muon(
        1.0, consistent_rms=0.2, weight_decay=0.05, muon_weight_dimension_numbers=hidden_matrices
    ),
    "sgd": lambda _: optax.sgd(1.0),
}


class LocalSGDLearnerState(NamedTuple):
    """The state of :func:`local_sgd_learner`: one run of local SGD in progress."""

    anchor: Params  # the synchronised parameters
    inner: tuple[optax.OptState, ...]  # the workers', of every local optimizer: [K, ...]
    outer: optax.OptState
    cfg: Cfg
    workers: jax.Array  # int32, K of this episode
    delay: jax.Array  # int32, H of this episode
    optimizer: jax.Array  # int32, which of the local optimizers this episode has
    local_rate: jax.Array  # float, the workers' step size
    falls: jax.Array  # bool, whether it falls to 0 by a half cosine over the rounds
    learning_rate: jax.Array  # float, the outer step size
    taken: jax.Array  # int32, rounds taken
    num_rounds: jax.Array  # int32, rounds of this episode
    told: jax.Array  # int32, what the rule knows of that: it, or 0
    initial_loss: jax.Array  # float, what the losses are divided by


def local_sgd_learner(
    outer: LearnedOptimizer,
    family: TaskFamily,
    *,
    max_workers: int = 8,
    delays: tuple[int, int] = (2, 32),
    local_optimizers: Mapping[str, tuple[float, float]] = {"sgd": (0.05, 0.4)},
    rounds: tuple[int, int] = (20, 200),
    multiple_of: int = 1,
    learning_rates: tuple[float, float] | None = None,
    max_loss: float = 4.0,
    measure: Callable[[jax.Array], jax.Array] = MEASURES["relative"],
    told_length: float = 1.0,
) -> Learner:
    r"""The learner of a learned outer step under local SGD, one round a step.

    An episode draws a task, a number of workers :math:`K` uniform in 1 to ``max_workers``, what these step by, a delay
    :math:`H` and a local step size log-uniform, and whether that falls over the rounds. In a round each worker takes
    :math:`H` steps from the anchor :math:`x`, and

    .. math:: d = \frac1K \sum_{i \le K} (x - x_i), \qquad x \leftarrow x + \eta\, u(\theta, d),

    as ``learned_opt.local_sgd.local_sgd(optax.adamw(local_rate), outer, sync_every=H)`` does. The rule sees the mean
    alone, so that what it learns holds for any number of workers. The meta-loss is the loss at the anchor on all
    workers' first batches, over that at the start, capped.

    Args:
        outer: the learned rule of the outer step; its ``value=`` is that loss.
        family: the tasks; its ``data`` may be traced.
        max_workers: most workers; that many are always computed, the ones above :math:`K` at weight 0.
        delays: least and most local steps a round.
        local_optimizers: names of :data:`LOCAL_OPTIMIZERS` to the ranges of their step sizes, one drawn uniformly.
        rounds: least and most rounds of an episode.
        multiple_of: rounds are rounded to multiples of it (the estimator's window).
        learning_rates: range of :math:`\eta`, for a rule that has a free step size; by default always its own.
        max_loss: cap of the loss, in units of the initial loss.
        measure: the meta-loss of the loss in units of the initial one, of :data:`meta_train.train.learners.MEASURES`.
        told_length: share of the episodes in which the rule is told the number of rounds.

    Returns:
        A :class:`~meta_train.train.learners.Learner` whose state is a :class:`LocalSGDLearnerState`.

    Reference:
        Joseph et al., "Meta-learning optimizers for communication-efficient learning" (LOpt-A), 2024.
    """
    learning_rates = learning_rates or default_rates(outer)
    lows, highs = (jnp.asarray(ends, jnp.float32) for ends in zip(*local_optimizers.values(), strict=True))

    def locals_of(num_steps):
        return [LOCAL_OPTIMIZERS[name](num_steps) for name in local_optimizers]

    def local_update(locals_, optimizer, grads, states, params):
        """One step of the episode's optimizer, whose state alone goes on."""

        def branch(i):
            def update():
                updates, state = locals_[i].update(grads, states[i], params)
                return updates, (*states[:i], state, *states[i + 1 :])

            return update

        return jax.lax.switch(optimizer, [branch(i) for i in range(len(locals_))])

    def init(theta: Theta, key: jax.Array) -> LocalSGDLearnerState:
        k_cfg, k_params, k_workers, k_delay, k_local, k_rate, k_rounds, k_loss = jax.random.split(key, 8)
        k_optimizer, k_falls, k_local = jax.random.split(k_local, 3)
        cfg = family.sample(k_cfg)
        task = family.task(family.data, cfg)
        anchor = task.init(k_params)
        num_rounds = drawn_length(k_rounds, rounds, multiple_of)
        loss, _ = task.loss(anchor, k_loss, task.batch(k_loss, "train"))
        optimizer = jax.random.randint(k_optimizer, (), 0, len(local_optimizers))
        everyone = jax.tree.map(lambda x: jnp.broadcast_to(x, (max_workers, *x.shape)), anchor)
        return LocalSGDLearnerState(
            anchor=anchor,
            inner=tuple(jax.vmap(local.init)(everyone) for local in locals_of(None)),
            outer=outer.build(theta, num_steps=num_rounds).init(anchor),
            cfg=cfg,
            workers=jax.random.randint(k_workers, (), 1, max_workers + 1),
            delay=jnp.round(log_uniform(k_delay, *delays)).astype(jnp.int32),
            optimizer=optimizer,
            local_rate=lows[optimizer] * (highs / lows)[optimizer] ** jax.random.uniform(k_local),
            falls=jax.random.bernoulli(k_falls),
            learning_rate=log_uniform(k_rate, *learning_rates),
            taken=jnp.zeros((), jnp.int32),
            num_rounds=num_rounds,
            told=told(key, num_rounds, told_length),
            initial_loss=unit_of(loss),
        )

    def step(theta: Theta, state: LocalSGDLearnerState, key: jax.Array) -> tuple[LocalSGDLearnerState, jax.Array]:
        task = family.task(family.data, state.cfg)
        left = 0.5 * (1 + jnp.cos(jnp.pi * state.taken / state.num_rounds))
        rate = state.local_rate * jnp.where(state.falls, left, 1)
        locals_ = locals_of(state.num_rounds * state.delay)

        def worker(key: jax.Array, inner: tuple[optax.OptState, ...]):
            def local_step(i: jax.Array, carry):
                params, inner, first = carry
                k_batch, k_loss = jax.random.split(jax.random.fold_in(key, i))
                batch = task.batch(k_batch, "train")
                loss, grads = jax.value_and_grad(lambda p: task.loss(p, k_loss, batch)[0])(params)
                updates, inner = local_update(locals_, state.optimizer, grads, inner, params)
                params = jax.tree.map(lambda p, u: p + rate.astype(p.dtype) * u, params, updates)
                return params, inner, jnp.where(i == 0, loss, first)

            return jax.lax.fori_loop(0, state.delay, local_step, (state.anchor, inner, jnp.zeros(())))

        ends, inner, losses = jax.vmap(worker)(jax.random.split(key, max_workers), state.inner)
        weights = (jnp.arange(max_workers) < state.workers) / state.workers
        loss = jnp.sum(jnp.where(weights > 0, weights * losses, 0))
        delta = jax.tree.map(
            # an absent worker may have diverged: its 0 must not meet an infinity
            lambda x, ends: jnp.einsum("k,k...->...", weights, jnp.where(_like(weights, ends) > 0, x[None] - ends, 0)),
            state.anchor,
            ends,
        )
        transform = outer.build(theta, num_steps=state.told)
        updates, outer_state = transform.update(delta, state.outer, state.anchor, value=loss)
        anchor = jax.tree.map(lambda p, u: p + (state.learning_rate * u).astype(p.dtype), state.anchor, updates)
        meta_loss = meta_loss_of(loss, state.initial_loss, max_loss, measure)
        state = state._replace(anchor=anchor, inner=inner, outer=outer_state, taken=state.taken + 1)
        return state, meta_loss

    return Learner(init, step, remaining=lambda state: state.num_rounds - state.taken)


def _like(weights: jax.Array, stacked: jax.Array) -> jax.Array:
    return weights.reshape(-1, *(1,) * (stacked.ndim - 1))
