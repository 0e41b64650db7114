"""Nesterov's outer step with a share of another one added to it."""

import jax
import optax


def add_nesterov(
    outer: optax.GradientTransformation,
    *,
    learning_rate: optax.ScalarOrSchedule = 0.7,
    momentum: float = 0.6,
    share: float = 0.5,
) -> optax.GradientTransformationExtraArgs:
    r"""Take Nesterov's step of the mean delta, and a share of another outer step of it.

    .. math:: v \leftarrow \mu v + d, \qquad x_0 \leftarrow x_0 - \eta (d + \mu v) + \alpha\, \mathrm{outer}(d)

    ``learned_opt.load("outer")`` has steps of a length of its own, too short where the workers go far in one round;
    Nesterov's step is as long as they went.

    Args:
        outer: any outer transform of :func:`~learned_opt.local_sgd.local_sgd`.
        learning_rate: :math:`\eta`.
        momentum: :math:`\mu`.
        share: :math:`\alpha`.

    Returns:
        An Optax transform whose state is the two states.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = add_nesterov(optax.sgd(0.1), momentum=0.5)
        >>> delta = jnp.ones(2)
        >>> updates, _ = tx.update(delta, tx.init(delta))
        >>> print(updates)  # -0.7 * 1.5 - 0.5 * 0.1
        [-1.0999999 -1.0999999]
    """
    nesterov = optax.sgd(learning_rate, momentum=momentum, nesterov=True)
    other = optax.with_extra_args_support(outer)

    def init(params):
        return nesterov.init(params), other.init(params)

    def update(delta, state, params=None, **extra):
        step, mine = nesterov.update(delta, state[0], params)
        more, theirs = other.update(delta, state[1], params, **extra)
        return jax.tree.map(lambda x, y: x + share * y, step, more), (mine, theirs)

    return optax.GradientTransformationExtraArgs(init, update)
