r"""The response of one parameter, and how it moves a layer's output.

Every parameter p of a module that responds has a response: a weight of p's shape and a gate, one number a
hyperparameter and output unit. At :math:`\ell_0 + \delta` the parameter is :math:`p + (V\delta) \odot p_h`. Since the
gate is constant along the inputs, a layer at a :math:`\delta` of its own costs but one more matmul:

.. math:: y = W x + b + (V\delta) \odot (W_h x) + (C\delta) \odot b_h

Which modules respond, and how, is in :mod:`.haiku_modules` and :mod:`.flax_modules`, one handler a kind of module.
"""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

EXAMPLES = "examples"  # the axis that examples with hyperparameters of their own are mapped over

Combine = Callable[[jax.Array, jax.Array], jax.Array]
Call = Callable[[], Any]


class Gated(NamedTuple):
    """The response of one parameter.

    Attributes:
        weight: float, the parameter's shape.
        gate: float [H, ...], the parameter's shape with 1 along inputs: a matrix [in, out] has gate [H, 1, out].
    """

    weight: jax.Array
    gate: jax.Array


class Scaled(NamedTuple):
    """The response of one parameter at one delta: the parameter changes by ``gate * weight``.

    Attributes:
        weight: float, the parameter's shape.
        gate: float, the parameter's shape with 1 along inputs.
    """

    weight: jax.Array
    gate: jax.Array


def scaled(response: Any, delta: jax.Array) -> Any:
    """Return a structured response at a delta [H], with a :class:`Scaled` in place of each :class:`Gated`.

    Computed once a run of the network, not once a call of a module: a recurrent one is called at every time.
    """

    def at(gated: Gated) -> Scaled:
        gate = gated.gate
        flat = delta @ gate.reshape(gate.shape[0], -1).astype(delta.dtype)
        return Scaled(gated.weight, flat.reshape(gate.shape[1:]).astype(gated.weight.dtype))

    return jax.tree.map(at, response, is_leaf=lambda x: isinstance(x, Gated))


class Lifted(NamedTuple):
    """What a handler needs to know of one call of a module, which sees one example or examples that share a delta.

    Attributes:
        entry: the module's responses at the delta, by parameter name.
        combine: how the response's part of an output joins the elementary one.
        own: whether the call sees one example of several, mapped over the axis :data:`EXAMPLES`.
    """

    entry: dict[str, Scaled]
    combine: Combine
    own: bool

    def gate(self, name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Return a parameter's gate in ``shape``: the output's rank, 1 but for the output units."""
        return self.entry[name].gate.reshape(shape).astype(dtype)

    def vector(self, name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Return the change of a parameter that is gated whole, in ``shape``."""
        weight, gate = self.entry[name]
        return (gate * weight).reshape(shape).astype(dtype)


class Parameter(NamedTuple):
    """A parameter of a network, as :func:`~learned_opt.self_tuning.lift` finds it.

    Attributes:
        shape: of the parameter.
        dtype: of the parameter.
        out_axes: the axes of its output units; None where it is gated whole (a bias, a scale).
        unit_inputs: whether one input reaches an output unit (an embedding's row): its weight starts at variance 1.
        obstacle: why it cannot respond; empty where it can.
    """

    shape: tuple[int, ...]
    dtype: Any
    out_axes: Collection[int] | None = None
    unit_inputs: bool = False
    obstacle: str = ""


def with_examples(axis_name: Any) -> Any:
    """Return a module's axis name with that of the examples added, so that its statistics are over all of them."""
    if axis_name is None:
        return EXAMPLES
    return (*(axis_name if isinstance(axis_name, tuple) else (axis_name,)), EXAMPLES)


def init_gated(key: jax.Array, parameter: Parameter, count: int) -> Gated:
    """Start the response of a parameter: no response yet, but a weight that gives the gate a gradient.

    Args:
        key: a PRNG key.
        parameter: what responds.
        count: H, the number of hyperparameters.

    Returns:
        A :class:`Gated` with gate 0 and a weight of variance 1 / inputs (1 for embeddings; ones where gated whole).
    """
    shape, dtype = parameter.shape, parameter.dtype
    if parameter.out_axes is None:
        return Gated(jnp.ones(shape, dtype), jnp.zeros((count, *shape), dtype))
    outputs = {axis % len(shape) for axis in parameter.out_axes}
    gate = tuple(size if axis in outputs else 1 for axis, size in enumerate(shape))
    inputs = 1 if parameter.unit_inputs else math.prod(shape) // math.prod(gate)
    weight = jax.random.truncated_normal(key, -2, 2, shape, jnp.promote_types(dtype, jnp.float32)) / math.sqrt(inputs)
    return Gated(weight.astype(dtype), jnp.zeros((count, *gate), dtype))
