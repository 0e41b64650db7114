"""A learned outer step for local SGD with AdamW or Muon inside: Nesterov momentum, set by a small network."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..base import LearnedOptimizer, Theta
from ..features import compute_dtype, emas
from ..tensors import common_dtype, each, in_order, rule_transform
from .control import cosine, run_facts
from .recurrent import linear, linear_init

PAPER = (
    "the outer step of DiLoCo, Douillard et al. 2023, arXiv:2311.08105; learned as Joseph et al. 2024, arXiv:2312.02204"
)

_DECAYS = (0.5, 0.9)  # of what the network reads of a tensor, in rounds
_SEEN = 4  # see `Momentum.seen`
_RUN = 5  # of `run_facts`
_INPUTS = 2 * _SEEN * len(_DECAYS) + _RUN
_LARGEST = 4.0  # factor of the rate: from a quarter of the fresh one to four times
_LOGIT = 2.0  # furthest that the momentum's logit is moved: of .6, from .17 to .92
_TINY = 1e-20


class Momentum(NamedTuple):
    """What :func:`outer_nesterov` accumulates of a tensor.

    Attributes:
        sum: the decayed sum of the deltas, ``[*shape]``.
        seen: ``[2, 4]``, running means (.5, .9) of what the network reads: the cosines of the delta with ``sum`` and
            with the weights, and the logarithms of its size over those of ``sum`` and of the weights.
    """

    sum: jax.Array
    seen: jax.Array


def outer_nesterov(*, learning_rate: float = 0.7, momentum: float = 0.6, hidden_size: int = 8) -> LearnedOptimizer:
    r"""Nesterov's outer step, whose rate and momentum a small network sets for each tensor and round.

    For :func:`learned_opt.local_sgd`, where the mean delta :math:`d` of the workers takes a gradient's place:

    .. math:: v \leftarrow \mu v + d, \qquad x \leftarrow x - \eta\,(d + \mu v), \qquad
        \eta = 4^{\tanh f_1} \eta_0, \quad \mu = \sigma(\sigma^{-1}(\mu_0) + 2 \tanh f_2).

    The network :math:`f` reads how well this tensor's deltas agree with one another and how long they are beside each
    other and beside the weights, the same on the mean over all tensors, and the share of the rounds done. All of it is
    without a unit, and the step is in the unit of the deltas, whatever made them: workers may step by any optimizer, at
    any rate. Its last layer starts at zero: fresh meta-parameters are Nesterov's step with the two constants.

    Args:
        learning_rate: :math:`\eta_0`.
        momentum: :math:`\mu_0`.
        hidden_size: units of the network.

    Returns:
        A rule that needs nothing; ``num_steps`` is the number of rounds.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> rule = outer_nesterov()
        >>> step = rule.build(rule.init(jax.random.key(0)), num_steps=10)
        >>> delta = jnp.array([0.3, -0.1])
        >>> updates, _ = step.update(delta, step.init(delta), jnp.ones(2))
        >>> print(jnp.round(updates, 4))  # -0.7 (1 + 0.6) times the delta
        [-0.336  0.112]
    """
    if not (learning_rate > 0 and 0 < momentum < 1 and hidden_size >= 1):
        raise ValueError("outer_nesterov needs a positive learning_rate, momentum in (0, 1) and hidden_size >= 1")

    def init(key):
        last = {"w": jnp.zeros((hidden_size, 2)), "b": jnp.zeros((2,))}
        return {"hidden": linear_init(key, _INPUTS, hidden_size), "last": last}

    def start(p):
        zeros = jnp.zeros_like(p, compute_dtype(p.dtype))
        return Momentum(zeros, jnp.zeros((len(_DECAYS), _SEEN), zeros.dtype))

    def look(d, p, tensor):
        return emas(tensor.seen, facts(d, p, tensor.sum), _DECAYS)

    def step(d, p, tensor, seen, numbers):
        del p
        rate, kept = numbers.astype(d.dtype)
        total = kept * tensor.sum + d
        return -rate * (d + kept * total), Momentum(total, seen.astype(d.dtype))

    def build(theta, num_steps=None, batch_axes=None):
        rounds = jnp.asarray(0 if num_steps is None else num_steps)

        def update(groups, count, shared, value):
            del value
            if not groups:
                return [], shared
            dtype = common_dtype([group.param for group in groups])
            rows = [jax.vmap(look)(group.gradient, group.param, group.tensors).astype(dtype) for group in groups]
            seen = in_order(rows, groups)
            run = run_facts(count, rounds, dtype)
            numbers = nesterov_numbers(theta, seen.reshape(len(seen), -1), run, learning_rate, momentum)
            return each(step, groups, seen, numbers), shared

        return rule_transform("outer_nesterov", start=start, update=update, rest=False, batch_axes=batch_axes)

    return LearnedOptimizer(init, build)


def facts(d: jax.Array, p: jax.Array, total: jax.Array) -> jax.Array:
    """What the network reads of a tensor in one round: ``[4]``, see :class:`Momentum`.

    Args:
        d: the mean delta.
        p: the weights.
        total: the decayed sum of the deltas before this one.
    """
    size = _log_size(d)
    beside = [0.2 * jnp.clip(size - _log_size(x), -10, 10) for x in (total, p)]
    return jnp.stack([cosine(d, total), cosine(d, p), *beside])


def nesterov_numbers(theta: Theta, own: jax.Array, run: jax.Array, learning_rate: float, momentum: float) -> jax.Array:
    """Rate and momentum of each tensor: ``[tensors, 2]``, from ``[tensors, 8]`` and ``[5]``."""
    common = jnp.concatenate([jnp.mean(own, 0), run])
    inputs = jnp.concatenate([own, jnp.broadcast_to(common, (len(own), len(common)))], axis=1)
    moves = jnp.tanh(linear(theta["last"], jnp.tanh(linear(theta["hidden"], inputs))))
    usual = jnp.log(momentum / (1 - momentum))
    rate = learning_rate * _LARGEST ** moves[:, 0]
    return jnp.stack([rate, jax.nn.sigmoid(usual + _LOGIT * moves[:, 1])], axis=1)


def _log_size(x: jax.Array) -> jax.Array:
    return 0.5 * jnp.log(jnp.mean(x * x) + _TINY)
