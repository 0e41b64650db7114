r"""Population-based training: the peer that needs no gradient of hyperparameters, as one vmapped run.

P members train the same network, each at hyperparameters of its own, drawn from the search space. After each round the
worst by the validation loss take the weights and hyperparameters of the best, and change the latter.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .hyperparameters import Specs, draw, span
from .objectives import Batch, Weights, leading_size, make_objectives, transform_at
from .response import Params

Data = Any


class PopulationState(NamedTuple):
    """A population's state: arrays only, members on the leading axis.

    Attributes:
        params: the members' parameters.
        opt_state: their optimizers' states.
        mean: float [P, H], their hyperparameters on the whole line.
        valid_loss: float [P], their validation losses after the last round; infinite before the first, and of a member
            that was replaced.
        round: int32, rounds done.
    """

    params: Params
    opt_state: optax.OptState
    mean: jax.Array
    valid_loss: jax.Array
    round: jax.Array


class RoundInfo(NamedTuple):
    """What a round reports; :attr:`Population.run` stacks it.

    Attributes:
        mean: float [P, H], the hyperparameters that the round's steps used.
        train_loss: float [P], the means of the training losses.
        valid_loss: float [P], the validation losses after the steps, before any member was replaced.
        parent: int32 [P], whose weights each member goes on with; its own number where it was kept.
    """

    mean: jax.Array
    train_loss: jax.Array
    valid_loss: jax.Array
    parent: jax.Array


class Population(NamedTuple):
    """A population-based run, as pure functions.

    Attributes:
        init: ``(key, init_params) -> PopulationState``, with ``init_params`` of ``key -> params``.
        run: ``(state, key, data, num_rounds) -> (state, RoundInfo stacked)``: rounds as one compiled scan. The key of a
            round is ``fold_in(key, state.round)``.
        best: ``state -> (params, mean)`` of the member with the least validation loss.
    """

    init: Callable[..., PopulationState]
    run: Callable[..., tuple[PopulationState, RoundInfo]]
    best: Callable[[PopulationState], tuple[Params, jax.Array]]


def population(
    specs: Specs,
    train_loss: Callable[..., Any],
    valid_loss: Callable[..., Any],
    train_batch: Callable[[Data, jax.Array], Batch],
    valid_batch: Callable[[Data, jax.Array], Batch],
    *,
    weights: Weights,
    members: int = 8,
    train_steps: int = 100,
    replaced: float = 0.25,
    explore: float = 0.5,
    resample: float = 0.25,
    batch_size: Callable[[Batch], int] = leading_size,
) -> Population:
    r"""Tune hyperparameters by population-based training.

    After ``train_steps`` of each member, the worst share takes weights, optimizer state and hyperparameters of members
    drawn from the best share; each hyperparameter then becomes :math:`\ell + \sigma z` with z standard normal or, with
    the probability ``resample``, a new draw from the search space.

    Args:
        specs: the hyperparameters, all of them bounded; either mechanism's, since this one needs none.
        train_loss: as :func:`~learned_opt.self_tuning.tuner`'s; its ``params`` are always plain.
        valid_loss: ``(params, batch) -> loss``.
        train_batch: ``(data, key) -> batch``, each member's own.
        valid_batch: ``(data, key) -> batch``, one for all members, so that they are compared on the same examples.
        weights: the parameters' Optax transform, or a function of the hyperparameters to it; it is given ``value=``.
        members: P, at least 2.
        train_steps: training steps a round.
        replaced: the share that is replaced after a round, in (0, 0.5]; at least one member.
        explore: :math:`\sigma`, the standard deviation of a step in :math:`\ell`.
        resample: how likely a hyperparameter is drawn anew.
        batch_size: as :func:`~learned_opt.self_tuning.tuner`'s.

    Returns:
        A :class:`Population`.

    Raises:
        ValueError: if an option is out of range; from ``init``, if a hyperparameter has no bounds.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from learned_opt import self_tuning as st
        >>> loss = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
        >>> train_loss = lambda w, h, key, batch: loss(w, batch) + h["l2"] * st.squared_norm(w)
        >>> data = (jnp.eye(4), jnp.ones(4))
        >>> made = population({"l2": st.log(0.1, 1e-3, 1.0)}, train_loss, loss, lambda d, k: d, lambda d, k: d,
        ...                   weights=optax.sgd(0.1), members=4, train_steps=10)
        >>> state = made.init(jax.random.key(0), lambda key: jnp.zeros(4))
        >>> state, info = made.run(state, jax.random.key(1), data, 3)
        >>> info.valid_loss.shape
        (3, 4)

    Reference:
        Jaderberg et al., "Population based training of neural networks", 2017.
    """
    if members < 2:
        raise ValueError(f"members must be at least 2, got {members}")
    if train_steps < 1:
        raise ValueError(f"train_steps must be at least 1, got {train_steps}")
    if not 0 < replaced <= 0.5:
        raise ValueError(f"replaced must lie in (0, 0.5], got {replaced}")
    if not explore >= 0 or not 0 <= resample <= 1:
        raise ValueError(f"explore must be at least 0 and resample lie in [0, 1], got {explore} and {resample}")
    objectives = make_objectives(specs, train_loss, valid_loss, batch_size=batch_size)
    worst = min(max(1, round(replaced * members)), members // 2)

    training = functools.partial(transform_at, weights, specs)

    def init(key: jax.Array, init_params: Callable[[jax.Array], Params]) -> PopulationState:
        k_params, k_mean = jax.random.split(key)
        mean = jax.vmap(functools.partial(draw, specs))(jax.random.split(k_mean, members))
        params = jax.vmap(init_params)(jax.random.split(k_params, members))
        opt_state = jax.vmap(lambda p, m: training(m).init(p))(params, mean)
        never = jnp.full(members, jnp.inf, mean.dtype)
        return PopulationState(params, opt_state, mean, never, jnp.zeros((), jnp.int32))

    def train(params: Params, opt_state: optax.OptState, mean: jax.Array, key: jax.Array, data: Data):
        def step(carry, key: jax.Array):
            params, opt_state = carry
            k_batch, k_loss = jax.random.split(key)
            (loss, _), grads = jax.value_and_grad(objectives.elementary, has_aux=True)(
                params, (), mean, k_loss, train_batch(data, k_batch)
            )
            updates, opt_state = training(mean).update(grads, opt_state, params, value=loss)
            return (optax.apply_updates(params, updates), opt_state), loss

        (params, opt_state), losses = jax.lax.scan(step, (params, opt_state), jax.random.split(key, train_steps))
        return params, opt_state, jnp.mean(losses)

    def one_round(state: PopulationState, key: jax.Array, data: Data) -> tuple[PopulationState, RoundInfo]:
        k_train, k_valid, k_parent, k_step, k_which, k_draw = jax.random.split(jax.random.fold_in(key, state.round), 6)
        params, opt_state, train_losses = jax.vmap(train, in_axes=(0, 0, 0, 0, None))(
            state.params, state.opt_state, state.mean, jax.random.split(k_train, members), data
        )
        batch = valid_batch(data, k_valid)
        valid = jax.vmap(lambda p: objectives.judged(p, (), batch))(params).astype(state.mean.dtype)
        valid = jnp.where(jnp.isfinite(valid), valid, jnp.inf)  # diverged: the worst
        order = jnp.argsort(valid)
        chosen = order[jax.random.randint(k_parent, (worst,), 0, worst)]
        parent = jnp.arange(members).at[order[members - worst :]].set(chosen)
        copied = parent != jnp.arange(members)

        moved = state.mean[parent] + explore * jax.random.normal(k_step, state.mean.shape, state.mean.dtype)
        moved = jnp.clip(moved, *(bound[None] for bound in span(specs)))
        anew = jax.vmap(functools.partial(draw, specs))(jax.random.split(k_draw, members))
        moved = jnp.where(jax.random.uniform(k_which, moved.shape) < resample, anew, moved)
        params, opt_state = jax.tree.map(lambda x: x[parent], (params, opt_state))
        info = RoundInfo(state.mean, train_losses, valid, parent.astype(jnp.int32))
        mean = jnp.where(copied[:, None], moved, state.mean)
        valid = jnp.where(copied, jnp.inf, valid)  # its parent's weights, but not with these hyperparameters
        return PopulationState(params, opt_state, mean, valid, state.round + 1), info

    @functools.partial(jax.jit, static_argnames="num_rounds")
    def run(state: PopulationState, key: jax.Array, data: Data, num_rounds: int) -> tuple[PopulationState, RoundInfo]:
        return jax.lax.scan(lambda s, _: one_round(s, key, data), state, None, length=num_rounds)

    def best(state: PopulationState) -> tuple[Params, jax.Array]:
        member = jnp.argmin(state.valid_loss)
        return jax.tree.map(lambda x: x[member], (state.params, state.mean))

    return Population(init, run, best)
