"""VeLO: an LSTM over tensors that mixes, for each of them, a small per-parameter MLP from a bank."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import features as ft
from ..base import LearnedOptimizer, Theta
from . import recurrent
from .column_mlp import settle
from .mlp import step_of
from .networks import network, network_init, scale_lists, whole_tensor_mlp, without_factors
from .recurrent import FRACTIONS, LOSSES, LossBuffer, LSTMState

PAPER = "Metz et al. 2022, VeLO: training versatile learned optimizers by scaling up, arXiv:2211.09760"

MOMENTUM = (0.9, 0.99, 0.999)
RMS = 0.999
FACTORED = (0.9, 0.99, 0.999)
COLUMNS = 30
OUTPUTS = 3  # as published; the third has no effect
_RANKS = 5  # classes of the number of axes
_INPUTS = FRACTIONS + LOSSES + 1 + _RANKS + 2 * len(MOMENTUM)
_THROUGH = 7  # the column m_.9 s
_CLIP = 1000.0
_EPS = 1e-5
_ROOT_EPS = 1e-6
_BLOCK = 16384  # elements of one block of a large tensor: its arrays stay in the second-level cache
_TINY = 1e-20  # of a second moment: below, the derivative of its root may overflow


class VeloState(NamedTuple):
    """State of the rules ``velo`` and ``celo``.

    Attributes:
        step: int32 scalar, updates done.
        loss: running means of the loss.
        memory: of the LSTM, a row for each tensor with elements (``celo``: one row).
        m: momenta, one tree of the parameters' shapes a decay.
        r: the second moment, likewise.
        row: factored second moments by row, see :func:`learned_opt.features.factored_zeros`.
        col: the same by column.
        moments: of each tensor's ``m`` and ``r``, see :func:`moments`: the LSTM reads them at the next update
            (``celo``: none).
    """

    step: jax.Array
    loss: LossBuffer
    memory: LSTMState
    m: tuple[optax.Updates, ...]
    r: optax.Updates
    row: optax.Updates
    col: optax.Updates
    moments: optax.Updates


# --- the per-parameter part, shared with celo


def bank_init(key: jax.Array, bank: int, hidden_size: int) -> Theta:
    """``bank`` networks 30-h-h-3, stacked; each nearly gives the column ``m_.9 s``."""
    return jax.vmap(lambda k: network_init(k, COLUMNS, hidden_size, OUTPUTS, _THROUGH))(jax.random.split(key, bank))


def mix(bank: Theta, controls: jax.Array) -> jax.Array:
    """Every tensor's network ``mean_k c_k W_k``, as one vector a tensor: ``controls [n, K]`` to ``[n, weights]``."""
    flat = jnp.concatenate([x.reshape(x.shape[0], -1) for x in jax.tree.leaves(bank)], 1).astype(controls.dtype)
    return jnp.matmul(controls, flat, precision=jax.lax.Precision.HIGHEST) / controls.shape[1]


def unmix(flat: jax.Array, bank: Theta) -> Theta:
    """One network from its vector of weights."""
    tree: Any
    leaves, tree = jax.tree.flatten(bank)
    parts, start = [], 0
    for leaf in leaves:
        size = leaf[0].size
        parts.append(flat[start : start + size].reshape(leaf.shape[1:]))
        start += size
    return tree.unflatten(parts)


matrix_columns = functools.partial(ft.factored_columns, eps=_ROOT_EPS)
matrix_squares = functools.partial(ft.factored_squares, eps=_ROOT_EPS)


def vector_columns(g, p, m, r, R, v) -> list[jax.Array]:
    """:func:`learned_opt.features.factored_columns` below rank 2, where ``row`` and ``col`` are both ``v``: once each.

    The last three are ``m rsqrt(v)``, without an epsilon as published.
    """
    scales = [jax.lax.rsqrt(jnp.where(x < _TINY, jax.lax.stop_gradient(x), x)) for x in v]
    return [
        *matrix_columns(g, p, m, r, R, [], [], []),
        *(*v, *(jax.lax.rsqrt(x + 1e-8) for x in v), *(x * y for x, y in zip(m, scales, strict=True))),
    ]


@jax.jit  # traced once for all tensors of a shape
def update_tensor(gradient: jax.Array, given: tuple, *accumulators: jax.Array):
    """One tensor's update ``-mult .001 sqrt(mean(p^2) + 1e-9) d exp(.001 a)`` and its new accumulators.

    Args:
        gradient: ``[*shape]``.
        given: ``(p [*shape], weights of the tensor's network, mult [])``.
        *accumulators: three momenta, second moment, factored second moments by row and by column.
    """
    p, weights, multiplier = given
    dtype, shape = ft.compute_dtype(p.dtype), p.shape
    g, p = ft.clean(gradient, _CLIP, dtype), p.astype(dtype)
    *m, r, row, col = accumulators
    m = [ft.ema(x, g, b) for x, b in zip(m, MOMENTUM, strict=True)]
    r = ft.ema(r, g * g, RMS)
    row, col = ft.factored_update(row, col, g, FACTORED)
    R, C = scale_lists(row, col, shape)
    apply = functools.partial(whole_tensor_mlp, eps=_EPS, outputs=2, finish=step_of, order=ft.FACTORED_COLUMNS_ORDER)
    if p.ndim >= 2:
        inputs = (g, p, m, r, R, C, list(row), list(col))
        (u,) = apply(matrix_columns, inputs, network(weights), squares=matrix_squares)
    else:
        (u,) = apply(vector_columns, (g, p, m, r, R, list(row)), without_factors(network(weights), 15))
    scale = multiplier.astype(dtype) * jnp.sqrt(jnp.mean(p * p) + 1e-9)
    return (scale * u).astype(gradient.dtype), *m, r, row, col


def start_state(params: optax.Params, memory: LSTMState) -> VeloState:
    """The state before the first update."""
    m = tuple(ft.zeros(params) for _ in MOMENTUM)
    loss = recurrent.loss_start(ft.common_dtype(params))
    factored = ft.factored_zeros(params, len(FACTORED))
    return VeloState(jnp.zeros((), jnp.int32), loss, memory, m, ft.zeros(params), *factored, moments=())


def update_all(updates, params, state: VeloState, loss: LossBuffer, memory: LSTMState, networks: list, mult: jax.Array):
    """Update every tensor with its own network and multiplier.

    Args:
        updates: the gradients.
        params: the parameters.
        state: before the update.
        loss: after it.
        memory: likewise.
        networks: the weights, for each tensor with elements.
        mult: ``[tensors]`` multipliers.

    Returns:
        ``(updates, state)``.
    """
    tree: Any
    leaves, tree = jax.tree.flatten(params)
    parts = iter(zip(networks, mult, strict=True)) if networks else iter(())
    given = tree.unflatten([(p, *next(parts)) if p.size else (p, None, None) for p in leaves])
    updates, *m, r, row, col = ft.map_tensors(update_tensor, updates, given, *state.m, state.r, state.row, state.col)
    return updates, VeloState(optax.safe_increment(state.step), loss, memory, tuple(m), r, row, col, moments=())


# --- the LSTM's view of a tensor


@jax.jit
def tensor_features(p: jax.Array, moments: jax.Array) -> jax.Array:
    """What the LSTM sees of a tensor, ``[12]``: its second moment, rank and the spread of its momenta.

    With ``q = rsqrt(max(1e-9, mean(p^2)))`` and ``l(x) = clip(ln(1e-8 + |10 x|), -5, 5) / 2``: ``l(mean(q r))``, the
    number of axes longer than 1 as one of five classes, ``l(mean((q m - mean(q m))^2))`` for the three momenta, and as
    published ``l(mean((q r - mean(q m))^2))``.

    Args:
        p: the parameters, ``[*shape]``.
        moments: of ``m`` and ``r``, see :func:`moments`.
    """
    p = p.astype(moments.dtype)
    mean_m, mean_r, var_m, var_r = jnp.split(moments, (3, 4, 7))
    q = jax.lax.rsqrt(jnp.maximum(1e-9, jnp.mean(p * p)))
    rank = jax.nn.one_hot(sum(size > 1 for size in p.shape), _RANKS, dtype=p.dtype)
    seen = jnp.concatenate([q * mean_r, q * q * var_m, q * q * (var_r + (mean_r - mean_m) ** 2)])
    logs = 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(10 * seen)), -5, 5)
    return jnp.concatenate([logs[:1], rank, logs[1:]])


@jax.jit
def moments(r: jax.Array, *m: jax.Array) -> jax.Array:
    """Means of the three momenta and of ``r``, then their variances: ``[8]``.

    They are taken right after an update and kept for the next one. The accumulators are then not yet buffers that the
    caller lends: of those, the compiler makes copies for the loop below.
    """
    xs = [*m, r]
    if not r.size:
        return jnp.zeros(8, r.dtype)
    if r.size < 4 * _BLOCK or not ft.on_cpu():
        means = jnp.stack([jnp.mean(x) for x in xs])
        return jnp.concatenate([means, jnp.stack([jnp.mean((x - y) ** 2) for x, y in zip(xs, means, strict=True)])])
    flat = [x.reshape(-1) for x in xs]

    def terms(start, size):
        block = [jax.lax.dynamic_slice_in_dim(x, start, size) for x in flat]
        return [*block, *(x * x for x in block)]

    def add(total, start):  # a running sum for each place in a block: one loop over what the cache holds
        return [x + y for x, y in zip(total, terms(start, _BLOCK), strict=True)], None

    count = r.size // _BLOCK
    total, _ = ft.scan_blocks(add, [jnp.zeros(_BLOCK, r.dtype)] * 8, _BLOCK * jnp.arange(count))
    rest = terms(count * _BLOCK, r.size - count * _BLOCK)
    means, squares = jnp.split(
        jnp.stack([jnp.sum(x) + jnp.sum(y) for x, y in zip(total, rest, strict=True)]) / r.size, 2
    )
    return jnp.concatenate([means, jnp.maximum(squares - means**2, 0)])  # of so many, the mean is small


def velo(
    *,
    hidden_size: int = 4,
    bank_size: int = 256,
    lstm_size: int = 512,
    loss_horizon: int | None = None,
    recurrent_memory: bool = True,
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
    0. State: 4 numbers a parameter, 6 a row or column, and 2 ``lstm_size`` a tensor. Meta-parameters: 2.32 million at
    the default sizes, of which one linear layer is without effect, as published.

    Args:
        hidden_size: units in either hidden layer of the MLPs, at least 2.
        bank_size: ``K``, number of MLPs in the bank.
        lstm_size: units of the LSTM.
        loss_horizon: of the slowest mean of the loss, in updates; by default ``num_steps``. The reference
            implementation has 10 unless told otherwise.
        recurrent_memory: without it the LSTM reads its initial memory at every update, as one released variant does.

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

    def build(theta, num_steps=None):
        def init_fn(params):
            ft.check_params(params)
            recurrent.required_num_steps(num_steps, "velo")
            rows = sum(p.size > 0 for p in jax.tree.leaves(params))
            state = start_state(params, recurrent.lstm_start(theta["lstm"], rows, ft.common_dtype(params)))
            return state._replace(moments=jax.tree.map(lambda r: jnp.zeros(8, r.dtype), state.r))

        def update_fn(updates, state, params=None, *, value=None, **extra_args):
            del extra_args
            params = ft.required_params(params, "velo")
            value = recurrent.required_loss(value, "velo")
            total = recurrent.required_num_steps(num_steps, "velo")
            horizon = total if loss_horizon is None else loss_horizon
            losses, loss = recurrent.loss_update(state.loss, value, horizon)
            dtype = ft.common_dtype(params)
            pairs = zip(jax.tree.leaves(params), jax.tree.leaves(state.moments), strict=True)
            seen = [tensor_features(p, x).astype(dtype) for p, x in pairs if p.size]
            if not seen:
                return updates, state._replace(step=optax.safe_increment(state.step), loss=loss)
            shared = jnp.concatenate([recurrent.fraction_embedding(state.step, total, dtype), losses.astype(dtype)])
            x = jnp.stack([jnp.concatenate([shared, y]) for y in seen])
            memory = recurrent.pooled_lstm(theta, x, state.memory)
            controls = 100 * recurrent.linear(theta["controls"], memory.hidden)
            mult = recurrent.linear(theta["step_size"], memory.hidden)[:, 0]
            flat = settle(mix(theta["bank"], controls), jax.tree.leaves(updates))
            networks = [unmix(weights, theta["bank"]) for weights in flat]
            memory = memory if recurrent_memory else state.memory
            updates, state = update_all(updates, params, state, loss, memory, networks, mult)
            return updates, state._replace(moments=jax.tree.map(moments, state.r, *state.m))

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return LearnedOptimizer(init, build, needs=("value", "num_steps"))
