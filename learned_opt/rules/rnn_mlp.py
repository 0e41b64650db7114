"""A per-parameter MLP steered by an LSTM over tensors that it talks back to."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..base import LearnedOptimizer
from ..features import compute_dtype, ema, emas, zeros
from ..kernels import column_mlp
from ..tensors import each, in_order, rule_transform
from .mlp import step_of
from .networks import network, network_init, with_context
from .recurrent import TIMES, LSTMState, linear, linear_init, lstm, lstm_init, lstm_start, sine_embedding

PAPER = "Metz et al. 2020, Tasks, stability, architecture, and compute, arXiv:2009.11243"

DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)
COLUMNS = 3 + 4 * len(DECAYS)
_THROUGH = 14  # the column m_.9 s_.9
_TO_MLP = 17  # numbers from the LSTM to the MLP, per tensor
_TO_LSTM = 16  # numbers from the MLP to the LSTM, per tensor
_TO_ALL = 18  # numbers from the LSTM to the next update's, the same for all tensors
_STATISTICS = 18
_EPS = 1e-5
_ROOT_EPS = 1e-6
_TINY = 1e-30  # under a root: no effect on it, but its derivative stays finite at 0
_LOSS_LIMIT = 1e15  # of a loss' size: its square is still a float32


class LossMean(NamedTuple):
    """Running mean and variance of the loss.

    Attributes:
        mean: scalar, not bias-corrected.
        variance: likewise.
        seen: int32 scalar, the number of losses.
    """

    mean: jax.Array
    variance: jax.Array
    seen: jax.Array


class Clipper(NamedTuple):
    """What the gradients are clipped by.

    Attributes:
        step: int32 scalar, one more than the updates done.
        size: scalar, running root mean square of the gradients, not bias-corrected.
    """

    step: jax.Array
    size: jax.Array


class Told(NamedTuple):
    """What concerns all tensors.

    Attributes:
        loss: of the loss.
        clipper: of the gradients.
        from_lstm: ``[18]``, what the LSTM told all tensors.
    """

    loss: LossMean
    clipper: Clipper
    from_lstm: jax.Array


class RNNMLPTensor(NamedTuple):
    """What ``rnn_mlp`` keeps of a tensor.

    Attributes:
        m: momenta, ``[5, *shape]``.
        r: second moments, likewise.
        from_mlp: ``[16]``, what the MLP told the LSTM.
        memory: the LSTM's.
    """

    m: jax.Array
    r: jax.Array
    from_mlp: jax.Array
    memory: LSTMState


def loss_features(state: LossMean, loss: jax.Array) -> tuple[jax.Array, LossMean]:
    """``[2]``: how many standard deviations the loss, and a loss of zero, lie from the running mean; within +-5.

    The second stands for the mean validation loss, of which a rule that sees none of it knows nothing. A loss that is
    not finite is passed over, and counts as the mean.

    Args:
        state: the running mean, the loss not yet in it.
        loss: a scalar.

    Returns:
        ``(features, the running mean with the loss in it)``.
    """
    dtype = state.mean.dtype
    loss = jnp.reshape(loss, ()).astype(dtype)
    usable = jnp.isfinite(loss)
    loss = jnp.where(usable, jnp.clip(loss, -_LOSS_LIMIT, _LOSS_LIMIT), 0)
    mean = ema(state.mean, loss, 0.9)
    new = LossMean(mean, ema(state.variance, jnp.square(mean - loss), 0.9), state.seen + 1)
    new = jax.tree.map(lambda a, b: jnp.where(usable, a, b), new, state)
    correction = 1 / (1 - jnp.asarray(0.9, dtype) ** new.seen.astype(dtype) + 1e-8)
    mean = new.mean * correction
    values = jnp.stack([jnp.where(usable, loss, mean), jnp.zeros((), dtype)])
    return jnp.clip((values - mean) * jax.lax.rsqrt(new.variance * correction + 1e-8), -5, 5), new


def clip_limit(state: Clipper) -> jax.Array:
    """The size that gradients are clipped to, ten times their root mean square so far: ``10 s / (1 - .99^k)``."""
    dtype = state.size.dtype
    return 10 * state.size / (1 - jnp.asarray(0.99, dtype) ** state.step.astype(dtype))


def columns(g, p, m, r) -> list[jax.Array]:
    """``g, p, ln(|p| + 1e-8), m (5), r (5), m s (5), s (5)`` with ``s = rsqrt(r + 1e-6)``, decay by decay."""
    s = [jax.lax.rsqrt(x + _ROOT_EPS) for x in r]
    return [g, p, jnp.log(jnp.abs(p) + 1e-8), *m, *r, *(x * y for x, y in zip(m, s, strict=True)), *s]


def norm(x: jax.Array) -> jax.Array:
    """The Euclidean norm of a whole tensor."""
    return jnp.sqrt(jnp.sum(x * x) + _TINY)


def statistics(g, p, m, r, of_loss) -> jax.Array:
    """What the LSTM sees of a tensor besides what it was told: ``[18]``.

    Args:
        g: the gradient ``[*shape]``.
        p: the parameters, likewise.
        m: the momenta, a list of such.
        r: the second moments, likewise.
        of_loss: ``[2]``.
    """

    def log(x):
        return jnp.clip(jnp.log(1e-8 + jnp.abs(x)), -5, 5)

    def mean(xs):
        return sum(jnp.mean(x) for x in xs) / len(xs)

    def variance(xs):
        center = mean(xs)
        return mean([jnp.square(x - center) for x in xs])

    means = [mean(xs) for xs in (m, r, [p])]
    first = (*g.shape[:3], 1, 1, 1)[:3]
    sizes = np.log([*first, math.prod(g.shape[3:])]) - 1
    return jnp.stack(
        [
            log(norm(g)),
            jnp.full((), 1 if g.ndim == 0 else -1, g.dtype),
            *(y for x in means for y in (log(x), jnp.sign(x))),
            log(norm(p)),
            *jnp.asarray(sizes, g.dtype),
            *of_loss,
            *(log(variance(xs)) for xs in (m, r, [p])),
        ]
    )


def rnn_mlp(*, lstm_size: int = 64, hidden_size: int = 32, published: bool = False) -> LearnedOptimizer:
    """An LSTM over tensors and an MLP over parameters, each telling the other what it found.

    The gradient is clipped to ten times its running root mean square over all tensors (+-10 at first). Per tensor:
    momenta ``m`` and second moments ``r`` (.5, .9, .99, .999, .9999). An LSTM, one row a tensor, reads norms, means and
    variances of ``g, m, r, p``, the shape, how the loss stands to its running mean (18 numbers), what the MLP told it
    of this tensor (16) and what it told all tensors (18) at the last update. Linear maps of its output give the
    latter anew, as a mean over tensors, and 17 numbers for the MLP. That one, 54-h-h-18 with ReLU, reads the 23 columns
    of :func:`columns`, each at unit RMS over the tensor (``x rsqrt(1e-5 + mean(x^2))``), ``sin(t / (pi tau))`` of the
    number ``t`` of updates done for eleven ``tau`` from 1 to 100,000, ``ln(#tensors) - 1``, ``ln |p|``,
    ``ln #elements`` and the 17. Of its outputs ``d, a``: ``update = -.001 d exp(.001 a)``; the means of the others go
    to the LSTM.

    The reference also takes validation losses. None are taken here, which it treats as a validation loss of zero.
    Of ranks above 4 the axes from the fourth on count as one in the shape that the LSTM sees.

    A fresh rule is nearly RMSProp with momentum at unit RMS and step .001. Non-finite gradient entries count as 0, and
    what has no gradient rests (:func:`learned_opt.tensors.rule_transform`). State: 10 numbers and a byte a parameter,
    and ``16 + 2 lstm_size`` a tensor. Meta-parameters: 35,799 for the default sizes.

    Args:
        lstm_size: units of the LSTM, at least 1.
        hidden_size: units in either hidden layer of the MLP, at least 2.
        published: what has no gradient moves, as in the reference implementation.

    Returns:
        A rule that needs the loss; theta is a dict of ``lstm`` (see
        :func:`learned_opt.rules.recurrent.lstm_init`), ``to_mlp`` and ``to_all`` (its linear maps ``{w, b}``),
        ``from_lstm [18]`` and ``from_mlp [16]`` (what either has been told before the first update) and ``mlp``, a dict
        of ``w0 [54, h], b0 [h], w1 [h, h], b1 [h], w2 [h, 18], b2 [18]``.

    Raises:
        ValueError: if a size is too small.

    Example:
        >>> rule = rnn_mlp()
        >>> tx = rule.build(rule.init(jax.random.key(0)))
        >>> p = jnp.ones((2, 3))
        >>> updates, state = tx.update(p, tx.init(p), p, value=jnp.float32(1.5))
    """
    if lstm_size < 1 or hidden_size < 2:
        raise ValueError(f"rnn_mlp needs lstm_size >= 1 and hidden_size >= 2, got {lstm_size} and {hidden_size}")

    def init(key):
        k_lstm, k_mlp, k_to_mlp, k_to_all = jax.random.split(key, 4)
        context = TIMES + 3 + _TO_MLP
        return {
            "lstm": lstm_init(k_lstm, _TO_ALL + _TO_LSTM + _STATISTICS, lstm_size),
            "mlp": network_init(k_mlp, COLUMNS + context, hidden_size, 2 + _TO_LSTM, _THROUGH),
            "to_mlp": linear_init(k_to_mlp, lstm_size, _TO_MLP),
            "to_all": linear_init(k_to_all, lstm_size, _TO_ALL),
            "from_lstm": jnp.zeros((_TO_ALL,)),
            "from_mlp": jnp.zeros((_TO_LSTM,)),
        }

    def step(theta, shared, g, p, tensor):
        limit, from_lstm, of_loss, times, tensors = (x.astype(g.dtype) for x in shared)
        g = jnp.clip(g, -limit, limit)
        m, r = emas(tensor.m, g, DECAYS), emas(tensor.r, g * g, DECAYS)
        seen = jnp.concatenate([from_lstm, tensor.from_mlp, statistics(g, p, list(m), list(r), of_loss)])
        memory = lstm(theta["lstm"], seen[None], tensor.memory)
        facts = jnp.stack([tensors - 1, jnp.log(norm(p) + 1e-8), jnp.log(jnp.asarray(float(p.size), p.dtype))])
        context = jnp.concatenate([times, facts, linear(theta["to_mlp"], memory.hidden)[0]])
        layers = with_context(network(theta["mlp"]), context, COLUMNS)
        u, *to_lstm = column_mlp(
            columns, (g, p, list(m), list(r)), layers, eps=_EPS, outputs=2 + _TO_LSTM, finish=step_of
        )
        return u, RNNMLPTensor(m, r, jnp.stack([jnp.mean(x) for x in to_lstm]), memory)

    def build(theta, num_steps=None, layout=None):
        del num_steps

        def start(p):
            dtype = compute_dtype(p.dtype)
            m, r = (zeros(p, len(DECAYS)) for _ in range(2))
            return RNNMLPTensor(m, r, jnp.array(theta["from_mlp"], dtype), lstm_start(theta["lstm"], 1, dtype))

        def start_shared(dtype):
            loss = LossMean(jnp.zeros((), dtype), jnp.zeros((), dtype), jnp.zeros((), jnp.int32))
            clipper = Clipper(jnp.ones((), jnp.int32), jnp.full((), 0.01, dtype))
            return Told(loss, clipper, jnp.array(theta["from_lstm"], dtype))

        def update(groups, count, told, value):
            of_loss, loss = loss_features(told.loss, value)
            if not groups:
                return [], told._replace(loss=loss)
            limit, dtype = clip_limit(told.clipper), told.from_lstm.dtype
            tensors = sum(group.rows.size for group in groups)
            shared = (
                limit,
                told.from_lstm,
                of_loss,
                sine_embedding(count, dtype),
                jnp.log(jnp.asarray(tensors, dtype)),
            )
            results = each(functools.partial(step, theta, shared), groups)

            def size(g, p, tensor):
                del p, tensor
                return jnp.mean(jnp.clip(g, -limit.astype(g.dtype), limit.astype(g.dtype)) ** 2)

            square = jnp.mean(in_order([x.astype(dtype) for x in each(size, groups)], groups))
            clipper = Clipper(told.clipper.step + 1, ema(told.clipper.size, jnp.sqrt(1e-8 + square), 0.99))
            hidden = in_order([tensor.memory.hidden[:, 0].astype(dtype) for _, tensor in results], groups)
            return results, Told(loss, clipper, jnp.mean(linear(theta["to_all"], hidden), 0))

        return rule_transform(
            "rnn_mlp",
            start=start,
            start_shared=start_shared,
            update=update,
            reads_loss=True,
            rest=not published,
            layout=layout,
        )

    return LearnedOptimizer(init, build, needs=("value",))
