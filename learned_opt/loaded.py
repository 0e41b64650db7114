"""What :func:`learned_opt.load` adds to a rule: nothing on a device before its first use, decay, and a step size."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Build = Callable[..., optax.GradientTransformationExtraArgs]
Mask = Any  # a pytree of bools, a prefix of the parameters', or a function of them that gives one


def late(build: Build) -> Build:
    """A rule's ``build`` that leaves theta on the host, as NumPy arrays, and is called when the transform is used.

    So building starts no backend: ``jax.distributed.initialize`` and the number of CPU devices may still follow. And
    theta belongs to no mesh: a JAX array would be of the one that was set where it was made.

    Args:
        build: ``(theta, num_steps=None, ...) -> transform``.

    Returns:
        The same function; what ``build`` raises comes at first use, but a bad ``num_steps`` at once.
    """

    def built(theta, num_steps=None, **more):
        check_num_steps(num_steps)
        if not any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(theta)):
            return build(theta, num_steps=num_steps, **more)

        @functools.cache
        def transform():
            with jax.ensure_compile_time_eval():  # arrays, though the first use be inside of a function that is traced
                return build(theta, num_steps=num_steps, **more)

        def init_fn(params):
            return transform().init(params)

        def update_fn(updates, state, params=None, **extra_args):
            return transform().update(updates, state, params, **extra_args)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return built


class DecayState(NamedTuple):
    """State of a weight decay on a schedule.

    Attributes:
        step: int32 scalar, updates done.
    """

    step: jax.Array


def decay_weights(weight_decay: optax.ScalarOrSchedule, mask: Mask | None = None) -> optax.GradientTransformation:
    r""":math:`u \leftarrow u - \lambda_t p`, for updates that point downhill; dtypes stay those of the updates.

    Args:
        weight_decay: :math:`\lambda_t`, a number, a scalar array or a schedule.
        mask: which parameters decay, as for ``optax.adamw``; all by default.

    Returns:
        An Optax transform.
    """

    def init_fn(params):
        del params
        return DecayState(jnp.zeros((), jnp.int32)) if callable(weight_decay) else optax.EmptyState()

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("weight_decay needs the parameters: tx.update(grads, state, params)")
        factor = weight_decay(state.step) if callable(weight_decay) else weight_decay

        def decayed(update, param):
            if update is None:
                return None
            return update - jnp.asarray(factor, update.dtype) * jnp.asarray(param, update.dtype)

        updates = jax.tree.map(decayed, updates, params, is_leaf=lambda x: x is None)
        if callable(weight_decay):
            state = DecayState(optax.safe_increment(state.step))
        return updates, state

    tx = optax.GradientTransformation(init_fn, update_fn)
    return tx if mask is None else optax.masked(tx, mask)


def check_rate(name: str, value: Any) -> None:
    """Refuses what is no number, scalar array or schedule, and a number that is negative or not finite.

    Raises:
        ValueError: with the argument's name, in one line.
    """
    if callable(value):
        return
    number = isinstance(value, int | float | np.number | np.ndarray | jax.Array) and not isinstance(value, bool)
    if not number or jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), np.number):
        raise ValueError(f"{name} must be a number, a scalar array or a schedule, not {_shown(value)}")
    if jnp.issubdtype(jnp.result_type(value), np.complexfloating):
        raise ValueError(f"{name} must be real, not {_shown(value)}")
    if not isinstance(value, jax.core.Tracer) and not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, not {_shown(value)}")


def check_num_steps(value: Any) -> None:
    """Refuses what is no number of updates.

    Raises:
        ValueError: in one line.
    """
    if value is None:
        return
    array = isinstance(value, np.ndarray | np.generic | jax.Array)
    if isinstance(value, bool) or not (array or isinstance(value, int)):
        raise ValueError(f"num_steps must be an integer of at least 1, not {_shown(value)}")
    if array and (value.shape or not jnp.issubdtype(value.dtype, np.integer)):
        raise ValueError(f"num_steps must be an integer scalar, not {_shown(value)}")
    if not isinstance(value, jax.core.Tracer) and value < 1:
        raise ValueError(f"num_steps must be at least 1, not {value}; leave it out where it is unknown")


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray | jax.Array) and value.shape:
        return f"an array of shape {value.shape}"
    return " ".join(repr(value).split())[:80]
