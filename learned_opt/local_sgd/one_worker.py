"""One worker: the outer step, and a smoothed Nesterov step, around any Optax transform."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .fragments import is_parameter
from .mean import wide
from .transform import LocalSGD, local_sgd


def lookahead(
    optimizer: optax.GradientTransformation,
    outer: optax.GradientTransformation | None = None,
    *,
    every: Any = 30,
    **options: Any,
) -> LocalSGD:
    r"""Let any optimizer step alone, and make an outer step of how far it came every so many steps.

    .. math:: d = x_0 - x_H, \qquad x_0 \leftarrow x_0 + \mathrm{outer}(d), \qquad x = x_0

    It is :func:`~learned_opt.local_sgd.local_sgd` with one worker and no axis: a plain Optax transform for any loop.
    Put it outermost. Beside its own state it keeps the parameters once more, and the state of ``outer``.

    Args:
        optimizer: what steps; its state is kept at an outer step.
        outer: the transform of d; None: ``optax.sgd(0.7, momentum=0.6, nesterov=True)``, MuLoCo's for one worker.
            ``optax.sgd(0.5)`` with ``every=5`` is Lookahead as published.
        every: H, an int or a schedule, as ``sync_every`` of ``local_sgd``.
        **options: of ``local_sgd``: ``inner_state``, ``fragments``, ``statistic``.

    Returns:
        An Optax transform with state :class:`~learned_opt.local_sgd.LocalSGDState`.

    Raises:
        ValueError: as ``local_sgd``.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from learned_opt.local_sgd import lookahead
        >>> optimizer = lookahead(optax.adamw(1e-2), every=2)
        >>> params = jnp.ones(3)
        >>> state = optimizer.init(params)
        >>> for _ in range(2):
        ...     updates, state = optimizer.update(params, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(params.round(4))  # 0.7 times 1.6 of the way of two steps
        [0.9776 0.9776 0.9776]

    Reference:
        Zhang, Lucas, Hinton, Ba, "Lookahead optimizer: k steps forward, 1 step back", 2019; Thérien et al., "MuLoCo:
        Muon is a practical inner optimizer for DiLoCo", 2025 (arXiv:2505.23725), and the authors' ``muloco-1``.
    """
    step = optax.sgd(0.7, momentum=0.6, nesterov=True) if outer is None else outer
    return local_sgd(optimizer, step, sync_every=every, axis_name=(), **options)


class EMANesterovState(NamedTuple):
    """State of :func:`ema_nesterov`.

    Attributes:
        step: int32, steps taken.
        share: float, beta: the parameters in hand are ``share * mean`` ahead of the trained ones.
        mean: m, the params' tree in float32 or wider.
        inner: the optimizer's state.
    """

    step: jax.Array
    share: jax.Array
    mean: Any
    inner: Any


def ema_nesterov(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    *,
    share: optax.ScalarOrSchedule = 0.5,
    decay: float = 0.99,
) -> optax.GradientTransformationExtraArgs:
    r"""Take any optimizer's gradient where the parameters will soon be: ahead by a share of their mean step.

    .. math:: y_t = \theta_t + \beta_t m_t, \qquad \theta_{t+1} = y_t + \mathrm{optimizer}(\nabla f(y_t)), \qquad
        m_{t+1} = \gamma m_t + (1 - \gamma) (\theta_{t+1} - \theta_t)

    The parameters in the loop's hand are y, and the trained ones, to be evaluated and kept, are
    ``optax.tree.add_scale(params, -state.share, state.mean)``: the same where the share ends at 0. To be outermost. A
    steady motion is 1 / (1 - beta) times as fast.

    Args:
        optimizer: what steps; it sees y, and every extra argument of ``update``.
        share: :math:`\beta` in [0, 1), or a schedule of the step; the authors' is 0 in the warm-up and at the end.
        decay: :math:`\gamma` in [0, 1).

    Returns:
        An Optax transform with state :class:`EMANesterovState`.

    Raises:
        ValueError: if a number is out of range, or ``update`` is given no parameters.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from learned_opt.local_sgd import ema_nesterov
        >>> optimizer = ema_nesterov(optax.sgd(0.1), share=0.5, decay=0.9)
        >>> params = jnp.ones(2)
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> params = optax.apply_updates(params, updates)  # 0.9, and 0.5 times 0.1 of -0.1 ahead
        >>> print(params, optax.tree.add_scale(params, -state.share, state.mean))
        [0.895 0.895] [0.9 0.9]

    Reference:
        Yau et al., "EMA-Nesterov: stabilizing Nesterov's lookahead for accelerated deep learning optimization", 2026
        (arXiv:2605.25395).
    """
    if not callable(share) and not 0 <= share < 1:
        raise ValueError(f"share must be within 0 to 1, 1 left out, got {share}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be within 0 to 1, 1 left out, got {decay}")
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    inner = optax.with_extra_args_support(optimizer)

    def share_at(step: jax.Array) -> jax.Array:
        return jnp.asarray(share(step) if callable(share) else share, jnp.result_type(float))

    def init(params: Any) -> EMANesterovState:
        step = jnp.zeros((), jnp.int32)
        mean = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), wide(jnp.asarray(p))), params)
        return EMANesterovState(step, share_at(step), mean, inner.init(params))

    def update(grads: Any, state: EMANesterovState, params: Any = None, **extra: Any) -> tuple[Any, EMANesterovState]:
        if params is None:
            raise ValueError("ema_nesterov: update needs params: optimizer.update(grads, state, params)")
        moved, after = inner.update(grads, state.inner, params, **extra)
        share_next = share_at(state.step + 1)

        def one(p: Any, u: Any, m: jax.Array) -> tuple[Any, jax.Array]:
            if u is None or not is_parameter(p):
                return jnp.zeros_like(p), m
            u = jnp.asarray(u).astype(m.dtype)
            mean = decay * m + (1 - decay) * (u + state.share.astype(m.dtype) * m)
            return u + share_next.astype(m.dtype) * mean, mean

        tree: Any = jax.tree.structure(params)
        columns = zip(*(tree.flatten_up_to(x) for x in (params, moved, state.mean)), strict=True)
        pairs = [one(*column) for column in columns]
        updates, mean = (tree.unflatten([pair[i] for pair in pairs]) for i in (0, 1))
        return updates, EMANesterovState(state.step + 1, share_next, mean, after)

    return optax.GradientTransformationExtraArgs(init, update)
