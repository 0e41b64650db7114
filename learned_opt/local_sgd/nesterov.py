"""Nesterov's outer step with a share of another one added to it."""

import jax
import jax.numpy as jnp
import optax

_TINY = 1e-30  # of a squared length: its root has a derivative


def add_nesterov(
    outer: optax.GradientTransformation,
    *,
    learning_rate: optax.ScalarOrSchedule = 0.7,
    momentum: float = 0.6,
    share: float = 0.5,
) -> optax.GradientTransformationExtraArgs:
    r"""Take Nesterov's step of the mean delta, and a share of another outer step of it, which is no longer.

    .. math:: v \leftarrow \mu v + d, \quad s = \eta (d + \mu v), \quad o = \mathrm{outer}(d), \qquad
        x_0 \leftarrow x_0 - s + \alpha \min(1, |s| / |o|)\, o

    tensor by tensor. ``learned_opt.load("outer")`` has steps of a length of its own: too short where the workers go far
    in one round, and too long for wide networks, whose weights are small. Nesterov's are as long as the workers went.

    Args:
        outer: any outer transform of :func:`~learned_opt.local_sgd.local_sgd`.
        learning_rate: :math:`\eta`.
        momentum: :math:`\mu`.
        share: :math:`\alpha`, of the other step.

    Returns:
        An Optax transform whose state is the two states.

    Example:
        >>> import jax.numpy as jnp
        >>> delta = jnp.ones(2)
        >>> for rate in (0.1, 100.0):  # -0.7 * 1.5 - 0.5 * 0.1, and -0.7 * 1.5 * 1.5
        ...     tx = add_nesterov(optax.sgd(rate), momentum=0.5)
        ...     updates, _ = tx.update(delta, tx.init(delta))
        ...     print(updates.round(3))
        [-1.1 -1.1]
        [-1.575 -1.575]
    """
    nesterov = optax.sgd(learning_rate, momentum=momentum, nesterov=True)
    other = optax.with_extra_args_support(outer)

    def init(params):
        return nesterov.init(params), other.init(params)

    def update(delta, state, params=None, **extra):
        step, mine = nesterov.update(delta, state[0], params)
        more, theirs = other.update(delta, state[1], params, **extra)
        return jax.tree.map(lambda s, o: s + share * _no_longer(o, s), step, more), (mine, theirs)

    return optax.GradientTransformationExtraArgs(init, update)


def _no_longer(x: jax.Array, than: jax.Array) -> jax.Array:
    """``x``, cut to the length of another step; in float16 squares of small steps would be 0."""
    wide = [jnp.abs(step).astype(jnp.promote_types(jnp.abs(step).dtype, jnp.float32)) for step in (x, than)]
    ours, theirs = (jnp.sqrt(jnp.sum(jnp.square(step)) + _TINY) for step in wide)
    return x * jnp.minimum(1, theirs / ours).astype(x.dtype)
