"""VeLO: an LSTM over tensors that mixes, for each of them, a small per-parameter MLP from a bank."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..base import LearnedOptimizer, Theta
from ..features import (
    Moments,
    column_inputs,
    compute_dtype,
    factored_columns,
    factored_squares,
    moments_after,
    no_moments,
)
from ..kernels import column_mlp
from ..tensors import each, in_order, rule_transform
from . import recurrent
from .mlp import step_of
from .networks import network, network_init, without_factors
from .recurrent import FRACTIONS, LOSSES, LSTMState

PAPER = "Metz et al. 2022, VeLO: training versatile learned optimizers by scaling up, arXiv:2211.09760"

MOMENTUM = (0.9, 0.99, 0.999)
RMS = 0.999
FACTORED = (0.9, 0.99, 0.999)
COLUMNS = 30
OUTPUTS = 3  # as published; the third has no effect
_RANKS = 5  # classes of the number of axes
_INPUTS = FRACTIONS + LOSSES + 1 + _RANKS + 2 * len(MOMENTUM)
_THROUGH = 7  # the column m_.9 s
_CLIP = 1000.0  # of a gradient's entries
_EPS = 1e-5
_ROOT_EPS = 1e-6
_TINY = 1e-20  # of a second moment: below, the derivative of its root may overflow


class VeloTensor(NamedTuple):
    """What ``velo`` keeps of a tensor: the moments of its gradients, and its row of the LSTM's memory."""

    moments: Moments
    memory: LSTMState


# --- the per-parameter part, shared with celo


def bank_init(key: jax.Array, bank: int, hidden_size: int) -> Theta:
    """``bank`` networks 30-h-h-3, stacked; each nearly gives the column ``m_.9 s``."""
    return jax.vmap(lambda k: network_init(k, COLUMNS, hidden_size, OUTPUTS, _THROUGH))(jax.random.split(key, bank))


def mix(bank: Theta, controls: jax.Array) -> jax.Array:
    """Every tensor's network ``mean_k c_k W_k``, as one vector a tensor: ``controls [n, K]`` to ``[n, weights]``."""
    flat = jnp.concatenate([x.reshape(x.shape[0], -1) for x in jax.tree.leaves(bank)], 1).astype(controls.dtype)
    return jnp.matmul(controls, flat, precision=jax.lax.Precision.HIGHEST) / controls.shape[1]


def unmix(flat: jax.Array, bank: Theta) -> Theta:
    """The networks from their weights, ``[n, weights]``: the tree of ``bank`` with ``n`` in place of ``K``."""
    tree: Any
    leaves, tree = jax.tree.flatten(bank)
    parts, start = [], 0
    for leaf in leaves:
        size = leaf[0].size
        parts.append(flat[:, start : start + size].reshape(-1, *leaf.shape[1:]))
        start += size
    return tree.unflatten(parts)


matrix_columns = functools.partial(factored_columns, eps=_ROOT_EPS)
matrix_squares = functools.partial(factored_squares, eps=_ROOT_EPS)


def vector_columns(g, p, m, r, R, C, v, col) -> list[jax.Array]:
    """:func:`learned_opt.features.factored_columns` below rank 2, where ``row`` and ``col`` are both ``v``: once each.

    The last three are ``m rsqrt(v)``, without an epsilon as published.
    """
    scales = [jax.lax.rsqrt(jnp.where(x < _TINY, jax.lax.stop_gradient(x), x)) for x in v]
    return [
        *matrix_columns(g, p, m, r, R, C, [], col),
        *(*v, *(jax.lax.rsqrt(x + 1e-8) for x in v), *(x * y for x, y in zip(m, scales, strict=True))),
    ]


def tensor_step(g: jax.Array, p: jax.Array, moments: Moments, weights: Theta, mult: jax.Array):
    """One tensor's update ``-mult .001 sqrt(mean(p^2) + 1e-9) d exp(.001 a)`` and its new moments.

    Args:
        g: the gradient ``[*shape]``.
        p: the parameters, likewise.
        moments: before the update.
        weights: of the tensor's network.
        mult: its multiplier, a scalar.
    """
    g = jnp.clip(g, -_CLIP, _CLIP)
    moments = moments_after(moments, g, momentum=MOMENTUM, rms=RMS, factored=FACTORED)
    inputs = column_inputs(g, p, moments)
    apply = functools.partial(column_mlp, eps=_EPS, outputs=2, finish=step_of)
    if p.ndim >= 2:
        (u,) = apply(matrix_columns, inputs, network(weights), squares_of=matrix_squares)
    else:
        (u,) = apply(vector_columns, inputs, without_factors(network(weights), 15))
    return mult.astype(p.dtype) * jnp.sqrt(jnp.mean(p * p) + 1e-9) * u, moments


# --- the LSTM's view of a tensor


def tensor_features(g: jax.Array, p: jax.Array, tensor: VeloTensor) -> jax.Array:
    """What the LSTM sees of a tensor, ``[12]``: its second moment, rank and the spread of its momenta.

    With ``q = rsqrt(max(1e-9, mean(p^2)))`` and ``l(x) = clip(ln(1e-8 + |10 x|), -5, 5) / 2``: ``l(mean(q r))``, the
    number of axes longer than 1 as one of five classes, ``l(mean((q m - mean(q m))^2))`` for the three momenta, and as
    published ``l(mean((q r - mean(q m))^2))``.

    Args:
        g: the gradient, of which it sees nothing.
        p: the parameters, ``[*shape]``.
        tensor: before the update.
    """
    del g
    moments = tensor.moments
    q = jax.lax.rsqrt(jnp.maximum(1e-9, jnp.mean(p * p)))
    means = [jnp.mean(x) for x in moments.m]
    spreads = [jnp.mean((x - mean) ** 2) for x, mean in zip(moments.m, means, strict=True)]
    spreads += [jnp.mean((moments.r - mean) ** 2) for mean in means]
    seen = jnp.stack([q * jnp.mean(moments.r), *(q * q * x for x in spreads)])
    logs = 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(10 * seen)), -5, 5)
    rank = jax.nn.one_hot(sum(size > 1 for size in p.shape), _RANKS, dtype=p.dtype)
    return jnp.concatenate([logs[:1], rank, logs[1:]])


def velo(
    *,
    hidden_size: int = 4,
    bank_size: int = 256,
    lstm_size: int = 512,
    loss_horizon: int | None = None,
    recurrent_memory: bool = True,
    published: bool = False,
) -> LearnedOptimizer:
    """VeLO: an LSTM over tensors mixes each tensor's own small MLP from a bank, and its step size.

    Per tensor, a row of the LSTM reads how much of the run is done, how the loss has gone (see
    :func:`learned_opt.rules.recurrent.loss_update`) and :func:`tensor_features`; rows hear of each other through a
    maximum. Linear read-outs of its output are ``c [K]`` and ``mult``; the tensor's weights are
    ``100 mean_k(c_k W_k)``. Momenta (.9, .99, .999), second moment (.999) and factored second moments
    (.9, .99, .999) of the gradient clipped to +-1000 give 30 columns
    (:func:`learned_opt.features.factored_columns`), each at unit RMS over the tensor, ``x rsqrt(1e-5 + mean(x^2))``;
    they go through that MLP, 30-h-h-3 with ReLU. Of its outputs ``d, a``:
    ``update = -mult .001 sqrt(mean(p^2) + 1e-9) d exp(.001 a)``.

    A fresh rule is nearly Adam at unit RMS, its step .001 of the tensor's own RMS. Non-finite gradient entries count as
    0, and what has no gradient rests (:func:`learned_opt.tensors.rule_transform`). State: 4 numbers and a byte a
    parameter, 6 a row or column, and 2 ``lstm_size`` a tensor. Meta-parameters: 2.32 million at the default sizes, of
    which one linear layer is without effect, as published.

    Args:
        hidden_size: units in either hidden layer of the MLPs, at least 2.
        bank_size: ``K``, number of MLPs in the bank.
        lstm_size: units of the LSTM.
        loss_horizon: of the slowest mean of the loss, in updates; by default ``num_steps``. The reference
            implementation has 10 unless told otherwise.
        recurrent_memory: without it the LSTM reads its initial memory at every update, as one released variant does.
        published: what has no gradient moves, as in the reference implementation.

    Returns:
        A rule that needs ``value`` and ``num_steps``; theta is a dict of ``bank``, ``lstm`` and the layers around it.

    Raises:
        ValueError: if ``hidden_size`` is below 2 or another size below 1.

    Example:
        >>> rule = velo(bank_size=4, lstm_size=8)
        >>> tx = rule.build(rule.init(jax.random.key(0)), num_steps=100)
        >>> p = jnp.ones((2, 3))
        >>> updates, state = tx.update(p, tx.init(p), p, value=jnp.float32(1.5))
    """
    if hidden_size < 2 or min(bank_size, lstm_size) < 1 or (loss_horizon is not None and loss_horizon < 1):
        raise ValueError("velo needs hidden_size >= 2, and bank_size, lstm_size and loss_horizon >= 1")

    def init(key):
        k_bank, k_pooled, k_unused, k_controls = jax.random.split(key, 4)
        controls = recurrent.linear_init(k_controls, lstm_size, bank_size)
        step_size = {"w": jnp.zeros((lstm_size, 1)), "b": jnp.ones((1,))}
        return recurrent.pooled_init(k_pooled, _INPUTS, lstm_size) | {
            "bank": bank_init(k_bank, bank_size, hidden_size),
            "controls": jax.tree.map(lambda w: 0.01 * w, controls | {"b": jnp.ones((bank_size,))}),
            "step_size": step_size,
            "unused": recurrent.linear_init(k_unused, _INPUTS, lstm_size),
        }

    def build(theta, num_steps=None, layout=None):
        def start(p):
            return VeloTensor(no_moments(p), recurrent.lstm_start(theta["lstm"], 1, compute_dtype(p.dtype)))

        def start_shared(dtype):
            recurrent.required_num_steps(num_steps, "velo")
            return recurrent.loss_start(dtype)

        def update(groups, count, loss, value):
            total = recurrent.required_num_steps(num_steps, "velo")
            losses, loss = recurrent.loss_update(loss, value, total if loss_horizon is None else loss_horizon)
            if not groups:
                return [], loss
            dtype = losses.dtype
            seen = in_order([x.astype(dtype) for x in each(tensor_features, groups)], groups)
            shared = jnp.concatenate([recurrent.fraction_embedding(count, total, dtype), losses])
            x = jnp.concatenate([jnp.broadcast_to(shared[None], (seen.shape[0], shared.size)), seen], 1)
            old = LSTMState(
                *(
                    in_order([x[:, 0].astype(dtype) for x in one], groups)
                    for one in zip(*(group.tensors.memory for group in groups), strict=True)
                )
            )
            memory = recurrent.pooled_lstm(theta, x, old)
            weights = unmix(mix(theta["bank"], 100 * recurrent.linear(theta["controls"], memory.hidden)), theta["bank"])
            mult = recurrent.linear(theta["step_size"], memory.hidden)[:, 0]
            rows = LSTMState(*(x[:, None] for x in (memory if recurrent_memory else old)))

            def step(g, p, tensor, weights, mult, row):
                u, moments = tensor_step(g, p, tensor.moments, weights, mult)
                return u, VeloTensor(moments, jax.tree.map(lambda x: x.astype(p.dtype), row))

            return each(step, groups, weights, mult, rows), loss

        return rule_transform(
            "velo",
            start=start,
            start_shared=start_shared,
            update=update,
            reads_loss=True,
            rest=not published,
            layout=layout,
        )

    return LearnedOptimizer(init, build, needs=("value", "num_steps"))
