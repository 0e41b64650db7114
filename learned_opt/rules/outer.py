"""A learned outer step for local SGD: `flagship-1`'s direction for the workers' mean delta, with a learned length."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..base import LearnedOptimizer
from ..features import clean, compute_dtype
from ..layouts import outputs_last, seen, unseen, view_of
from ..tensors import RuleState, automatic, common_dtype, where_gradients
from . import celo2 as base
from . import celo2_soap, recurrent
from .networks import network_init
from .scheduler import scheduled

PAPER = "after LOpt-A, Joseph et al. 2024, arXiv:2312.02204; the direction of celo2_soap"

_EPS = 1e-30
_LIMIT = 1e15  # of a delta's entries: its square is still a float32
_MOMENTUM_COLUMN = 3  # m_.9 of Celo2's columns
_STATISTICS = 4  # of a tensor, see `statistics`
_INPUTS = 2 * _STATISTICS + recurrent.RUN
_LENGTH = 0.04  # RMS of the fresh rule's steps, before their schedule
_RANGE = 3.0  # bound of the learned logarithm of the length
_REACH = 100.0  # longest step, in units of the usual delta
_NOTHING = 1e-12  # the length of all deltas below which there was none
_LONG = 2.0  # deltas beyond this many times their usual length are no longer followed in full


class OuterState(NamedTuple):
    """State of the rule ``outer``.

    Attributes:
        step: int32 scalar, rounds done.
        usual: the deltas' usual length, 0 before the first.
        direction: the state of ``celo2_soap`` for the deltas.
    """

    step: jax.Array
    usual: jax.Array
    direction: RuleState


def limit(deltas: list[jax.Array], usual: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""What a round's delta is scaled by, and the usual length after it.

    .. math:: \min(1, (2 \rho / |\delta|)^2), \qquad \rho \leftarrow (\rho + \min(|\delta|, 2 \rho)) / 2.

    The further beyond twice the usual length, the less a round counts: workers that diverged, which nothing but their
    length tells from the others. Where deltas stay long, the usual length reaches them in a few rounds. A round without
    a delta says nothing of it.

    Args:
        deltas: of all tensors.
        usual: the mean :math:`\rho`; 0 before the first delta, which becomes it.
    """
    norm = jnp.sqrt(sum(jnp.sum(x * x).astype(usual.dtype) for x in deltas) + _EPS)
    known, longest = usual > 0, _LONG * usual
    factor = jnp.where(known & (norm > longest), (longest / norm) ** 2, 1)
    after = jnp.where(known, 0.5 * (usual + jnp.minimum(norm, longest)), norm)
    return factor, jnp.where(norm > _NOTHING, after, usual)


def _log_rms(x: jax.Array) -> jax.Array:
    return 0.5 * jnp.log(jnp.mean(x * x) + _EPS)


def _log_mean(m: jax.Array, place: int, step: jax.Array) -> jax.Array:
    """``log rms(m / (1 - b^t))``, of the mean of deltas with the decay ``b`` at a place of Celo2's."""
    decay = jnp.asarray(base.MOMENTUM[place], m.dtype)
    return _log_rms(m) - jnp.log1p(-(decay ** (step.astype(m.dtype) + 1)))


def statistics(delta: jax.Array, m: jax.Array, slow: jax.Array, p: jax.Array, step: jax.Array) -> jax.Array:
    """What the length depends on, ``[4]``: how well a tensor's deltas agree, and their size.

    ``log rms(m_b / (1 - b^t)) / rms(delta)`` for ``b`` of .9 and .99, ``0.1 log rms(delta) / rms(p)``, and
    ``0.1 log rms(delta) / 0.04``.

    Args:
        delta: the mean delta, ``[*shape]``.
        m: its momentum of decay .9, this delta in it, in any basis.
        slow: that of decay .99.
        p: the parameters.
        step: rounds done before this one.
    """
    d = _log_rms(delta)
    sizes = [0.1 * jnp.clip(d - x, -20, 20) for x in (_log_rms(p), jnp.log(_LENGTH))]
    return jnp.stack([_log_mean(m, 0, step) - d, _log_mean(slow, 1, step) - d, *sizes])


def outer(*, hidden_size: int = 8, every: int = 10) -> LearnedOptimizer:
    r"""The outer step of local SGD: the direction of ``celo2_soap`` for the mean delta, with a learned length.

    For :func:`learned_opt.local_sgd`, where the mean delta of the workers takes a gradient's place. For each tensor

    .. math:: x \leftarrow x + \min(e^{s + 3 \tanh(f)}\, c(t / T),\; 100\, \mathrm{rms}(\hat m))\, u,

    with :math:`u` the direction of :func:`~learned_opt.rules.celo2_soap.celo2_soap`, of unit RMS, :math:`c` a half
    cosine over the rounds (0 after the last, 1 where their number is not known), and :math:`\hat m` the mean of the
    deltas (decay .9): a step never goes further than a hundred of them, so that where every example is fitted nothing
    throws the parameters out again. The network :math:`f` reads how well the deltas of this tensor, and of all tensors
    on the mean, agree over the rounds and how long they are (:func:`statistics`), and the share of the rounds done. The
    length does not follow the workers' step size, which is left to the user: 0.1 is what the pretrained one was judged
    at, and at 0.3 a network diverged. It sees the mean alone and works for any number of workers. Deltas far beyond
    their usual length count for little (:func:`limit`). The learned lengths are in the unit of the parameters, as
    deltas are: this is no rule for gradients, whose unit is the loss's.

    ``init`` starts with :math:`f = 0` and steps of RMS 0.04. Non-finite entries count as 0. State: that of
    ``celo2_soap``. Meta-parameters: 597 for ``hidden_size=8``.

    Args:
        hidden_size: units in every hidden layer, at least 2.
        every: rounds between two corrections of the direction's basis.

    Returns:
        A rule; ``num_steps`` is the number of rounds. theta holds ``direction``, that of
        :func:`learned_opt.rules.celo2.celo2`, and ``length``.

    Raises:
        ValueError: if ``hidden_size`` is below 2 or ``every`` below 1.

    Example:
        >>> rule = outer()
        >>> step = rule.build(rule.init(jax.random.key(0)))
        >>> delta = jnp.array([0.3, -0.1])
        >>> updates, _ = step.update(delta, step.init(delta), jnp.ones(2))
        >>> print(jnp.round(jnp.sqrt(jnp.mean(updates**2)), 4))
        0.04
    """
    direction = celo2_soap.celo2_soap(hidden_size=hidden_size, every=every)

    def init(key):
        k_direction, k_length = jax.random.split(key)
        last = {"w": jnp.zeros((hidden_size, 1)), "b": jnp.zeros((1,))}
        return {
            "direction": network_init(k_direction, base.INPUTS, hidden_size, base.OUTPUTS, through=_MOMENTUM_COLUMN),
            "length": {
                "first": recurrent.linear_init(k_length, _INPUTS, hidden_size),
                "last": last,
                "offset": jnp.full((), jnp.log(_LENGTH)),
            },
        }

    def build(theta, num_steps=None, layout=None):
        inner = direction.build(theta["direction"], layout=layout)
        layers = theta["length"]

        def lengths(own, step):
            """``e^(s + 3 tanh f) c`` of every tensor, from the statistics of all, ``[n, 4]``."""
            mean, time = jnp.mean(own, 0), recurrent.run_embedding(step, num_steps, own.dtype)
            shared = jnp.broadcast_to(jnp.concatenate([mean, time])[None], (own.shape[0], mean.size + time.size))
            hidden = jnp.tanh(recurrent.linear(layers["first"], jnp.concatenate([own, shared], 1)))
            f = recurrent.linear(layers["last"], hidden)[:, 0]
            return scheduled("cosine", step, num_steps, f.dtype) * jnp.exp(
                layers["offset"].astype(f.dtype) + _RANGE * jnp.tanh(f)
            )

        def init_fn(params):
            direction = inner.init(params)  # which refuses what no rule can move
            return OuterState(jnp.zeros((), jnp.int32), jnp.zeros((), common_dtype(params)), direction)

        def update_fn(updates, state, params=None, **extra_args):
            del extra_args
            if params is None:
                raise ValueError("outer reads the parameters: call update(gradients, state, params)")
            updates = jax.tree.map(jnp.asarray, updates)
            return automatic(core, (updates, state), where_gradients(updates, params))

        def core(carried, params):
            updates, state = carried
            structure: Any
            given, structure = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
            paths = [path for path, _ in jax.tree.leaves_with_path(updates, is_leaf=lambda x: x is None)]
            at = structure.flatten_up_to(params)
            moving = [i for i, x in enumerate(given) if x is not None and x.size]
            if not moving:
                return carried
            deltas: list[Any] = [
                x if x is None else clean(x, _LIMIT, compute_dtype(p.dtype)) for x, p in zip(given, at, strict=True)
            ]
            factor, usual = limit([deltas[i] for i in moving], state.usual)
            deltas = [x if x is None else x * factor.astype(x.dtype) for x in deltas]
            moves, after = inner.update(structure.unflatten(deltas), state.direction, params)
            flat, momenta = (structure.flatten_up_to(x) for x in (moves, after.tensors.moments.m))
            views = {i: view_of(layout or outputs_last, paths[i], given[i]) for i in moving}

            def tensors(x, i):
                """``[k, ...]``, the ``k`` tensors that a leaf holds."""
                return x.reshape(-1, *x.shape[views[i].layers :])

            own = [
                jax.vmap(lambda d, m, p: statistics(d, m[0], m[1], p.astype(d.dtype), state.step))(
                    *(tensors(x, i) for x in (seen(deltas[i], views[i]), momenta[i], seen(at[i], views[i])))
                )
                for i in moving
            ]
            rows = jnp.concatenate([x.astype(usual.dtype) for x in own])
            scales = jnp.split(lengths(rows, state.step), np.cumsum([x.shape[0] for x in own])[:-1])
            for i, scale in zip(moving, scales, strict=True):
                u = tensors(seen(flat[i], views[i]), i)
                longest = _REACH * jnp.exp(jax.vmap(lambda m: _log_mean(m[0], 0, state.step))(tensors(momenta[i], i)))
                scale = jnp.minimum(scale, longest).astype(u.dtype).reshape(-1, *(1,) * (u.ndim - 1))
                flat[i] = unseen(scale * u, views[i])
            flat = [x if x is None else x.astype(g.dtype) for x, g in zip(flat, given, strict=True)]
            return structure.unflatten(flat), OuterState(optax.safe_increment(state.step), usual, after)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return LearnedOptimizer(init, build)
