"""Hand-designed optimizers whose hyperparameters are the meta-parameters.

The updates are Optax's own at the same values. Each hyperparameter is kept unconstrained, as its logarithm or as
``log(1 - decay)``, so that any outer optimizer may move it by any amount. Gradients beyond +-1e18 are clipped.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ..base import LearnedOptimizer, Theta
from ..features import clean, compute_dtype
from ..tensors import as_array, check_params, common_dtype, where_gradients

PAPER = "learned hyperparameters: Maclaurin, Duvenaud & Adams 2015, arXiv:1502.03492; Adam: arXiv:1412.6980"

# Under the square root of the second moment: no effect on a float32 update, but its derivative stays finite at 0.
_ROOT = 1e-30
_LIMIT = 1e18  # of a gradient's size: its square is still a float32


def hyperparameters(theta: Theta) -> dict[str, jax.Array]:
    """The values that ``theta`` stands for.

    ``log_x`` gives ``x = exp(log_x)``, ``log_one_minus_x`` gives ``x = 1 - exp(log_one_minus_x)``.

    >>> {k: round(float(v), 3) for k, v in hyperparameters({"log_one_minus_b1": math.log(0.1)}).items()}
    {'b1': 0.9}
    """
    values = {}
    for name, raw in theta.items():
        if name.startswith("log_one_minus_"):
            values[name.removeprefix("log_one_minus_")] = 1 - jnp.exp(raw)
        else:
            values[name.removeprefix("log_")] = jnp.exp(raw)
    return values


def _learnable(transform: Callable[..., optax.GradientTransformation], **start: float) -> LearnedOptimizer:
    """A rule from an Optax optimizer and the values that its hyperparameters start from."""

    def init(key):
        del key  # a known good start: nothing random
        return {
            name: jnp.asarray(
                math.log(1 - value if name.startswith("log_one_minus_") else value), jnp.result_type(float)
            )
            for name, value in start.items()
        }

    def build(theta, num_steps=None, layout=None):
        del num_steps, layout  # entry by entry

        def inner(dtype):
            values = {name: value.astype(dtype) for name, value in hyperparameters(theta).items()}
            return optax.with_extra_args_support(transform(**values))

        def wide(tree):  # Optax would keep accumulators of half precision, and widen them at the first update
            return jax.tree.map(lambda x: x.astype(compute_dtype(x.dtype)), tree)

        def init_fn(params):
            check_params(params)
            return inner(jnp.float32).init(wide(jax.tree.map(as_array, params)))

        def update_fn(updates, state, params=None, **extra_args):
            updates = jax.tree.map(jnp.asarray, updates)  # numbers have no dtype
            dtypes = jax.tree.map(jnp.result_type, updates)
            params = None if params is None else wide(where_gradients(updates, params))
            updates = jax.tree.map(lambda g: clean(g, _LIMIT, compute_dtype(g.dtype)), updates)
            with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to the power of its count
                updates, state = inner(common_dtype(updates)).update(updates, state, params, **extra_args)
            return jax.tree.map(lambda u, dtype: u.astype(dtype), updates, dtypes), state

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return LearnedOptimizer(init, build)


def sgd(*, learning_rate: float = 0.1) -> LearnedOptimizer:
    """Stochastic gradient descent with a learned step size: ``u = -lr g``.

    Non-finite gradient entries count as 0. State: none. Meta-parameters: 1.

    Args:
        learning_rate: the value that meta-training starts from.

    Returns:
        A rule; theta is ``{"log_learning_rate": []}``.

    Example:
        >>> rule = sgd(learning_rate=0.5)
        >>> tx = rule.build(rule.init(jax.random.key(0)))
        >>> updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
        >>> print(updates)
        [-0.5 -0.5]
    """
    return _learnable(optax.sgd, log_learning_rate=learning_rate)


def sgdm(*, learning_rate: float = 0.01, momentum: float = 0.9) -> LearnedOptimizer:
    """Gradient descent with momentum: ``t <- g + b t``, ``u = -lr t``, with learned ``lr`` and ``b``.

    Non-finite gradient entries count as 0. State: one copy of the parameters. Meta-parameters: 2.

    Args:
        learning_rate: the value that meta-training starts from.
        momentum: likewise.

    Returns:
        A rule; theta is ``{"log_learning_rate": [], "log_one_minus_momentum": []}``.
    """
    return _learnable(optax.sgd, log_learning_rate=learning_rate, log_one_minus_momentum=momentum)


def adam(*, learning_rate: float = 1e-3, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> LearnedOptimizer:
    """Adam with learned hyperparameters (Kingma & Ba 2015, arXiv:1412.6980).

    ``u = -lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)``. Non-finite gradient entries count as 0.
    State: two copies of the parameters and a count. Meta-parameters: 4.

    Args:
        learning_rate: the value that meta-training starts from.
        b1: likewise, as the next ones.
        b2: decay of the second moment.
        eps: added to the root.

    Returns:
        A rule; theta has the scalars ``log_learning_rate, log_one_minus_b1, log_one_minus_b2, log_eps``.
    """

    def transform(**values):
        return optax.adam(**values, eps_root=_ROOT)

    return _learnable(transform, log_learning_rate=learning_rate, log_one_minus_b1=b1, log_one_minus_b2=b2, log_eps=eps)


def nadamw(
    *,
    learning_rate: float = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
) -> LearnedOptimizer:
    """Adam with Nesterov momentum and decoupled weight decay, all learned.

    As :func:`adam` with the Nesterov estimate ``b1 m + (1 - b1) g`` for ``m``, and ``-lr weight_decay p`` added
    (Dozat 2016; Loshchilov & Hutter 2019, arXiv:1711.05101). State: as Adam. Meta-parameters: 5.

    Args:
        learning_rate: the value that meta-training starts from, positive as the others.
        b1: likewise, as the next ones.
        b2: decay of the second moment.
        eps: added to the root.
        weight_decay: of the parameters, times the learning rate.

    Returns:
        A rule; theta has the scalars of :func:`adam` and ``log_weight_decay``. ``update`` needs ``params``.
    """

    def transform(**values):
        return optax.nadamw(**values, eps_root=_ROOT)

    return _learnable(
        transform,
        log_learning_rate=learning_rate,
        log_one_minus_b1=b1,
        log_one_minus_b2=b2,
        log_eps=eps,
        log_weight_decay=weight_decay,
    )
