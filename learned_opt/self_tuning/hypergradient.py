r"""The hypergradient through the last training steps: how the optimizer's own hyperparameters are tuned.

A training step takes parameters and optimizer state :math:`s` to :math:`s' = U(s, \ell)`. Forward mode carries how
they depend on the hyperparameters, and forgets with a factor :math:`\mu` a step:

.. math:: Z' = \mu \, \partial_s U \, Z + \partial_\ell U, \qquad
          \frac{dL_V}{d\ell} \approx \nabla_p L_V(p)^\top Z_p

With :math:`\mu = 0` only the last step counts, with 1 all of them. What is forgotten biases: a short memory judges a
learning rate by what it does at once, and favours small ones (Wu et al. 2018).

Reference:
    Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", 2017; Donini et al., "MARTHE:
    scheduling the learning rate via online hypergradients", 2020.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Trace = list[jax.Array]


def _floats(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]


def _with_floats(tree: Any, floats: list[jax.Array]) -> Any:
    new = iter(floats)
    pick = lambda leaf: next(new) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else leaf  # noqa: E731
    return jax.tree.map(pick, tree)


def start_trace(moving: Any, count: int) -> Trace:
    """The start of Z: zeros [count, ...] for each array of floats of ``moving``, (params, optimizer state)."""
    return [jnp.zeros((count, *jnp.shape(leaf)), jnp.result_type(leaf)) for leaf in _floats(moving)]


def advance(
    step: Callable[[Any, jax.Array], tuple[Any, Any]],
    moving: Any,
    point: jax.Array,
    trace: Trace,
    directions: jax.Array,
    memory: float,
) -> tuple[Any, Any, Trace]:
    r"""Take a training step and carry the trace through it.

    Args:
        step: ``(moving, point) -> (moving, aux)``, differentiable.
        moving: (params, optimizer state).
        point: float [H], the hyperparameters.
        trace: Z, of n hyperparameters.
        directions: float [n, H], one unit vector for each of them.
        memory: :math:`\mu`, the part of Z that a step keeps.

    Returns:
        ``moving`` after the step, aux, and the new trace.
    """

    def floats_of_step(floats: list[jax.Array], point: jax.Array):
        new, aux = step(_with_floats(moving, floats), point)
        return _floats(new), (new, aux)

    def along(tangents: Trace, direction: jax.Array):
        kept = [(memory * t).astype(t.dtype) for t in tangents]
        return jax.jvp(floats_of_step, (_floats(moving), point), (kept, direction), has_aux=True)

    _, trace, (new, aux) = jax.vmap(along, out_axes=(None, 0, None))(trace, directions)
    # Adam's root of a second moment that is 0 yet, as of a dead unit, has no derivative: such an entry does not move
    return new, aux, [jnp.where(jnp.isnan(z), 0, z) for z in trace]


def along_trace(gradient: Any, trace: Trace) -> jax.Array:
    """Return the hypergradient [n]: the validation loss's gradient by the parameters, along each of their changes."""
    leaves = _floats(gradient)  # parameters come first in a trace
    dots = [jnp.tensordot(z.reshape(len(z), -1), g.reshape(-1), 1) for z, g in zip(trace, leaves, strict=False)]
    return sum(dots[1:], dots[0])
