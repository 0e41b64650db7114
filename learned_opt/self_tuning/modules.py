r"""Which Haiku modules respond to hyperparameters, and how: one handler a kind of module.

Every parameter p of a module that responds has a response: a weight of p's shape and a gate, one number a
hyperparameter and output unit. At :math:`\ell_0 + \delta` the parameter is :math:`p + (V\delta) \odot p_h`. Since the
gate is constant along the inputs, a layer at a :math:`\delta` of each example's own costs but one more matmul:

.. math:: y = W x + b + (V\delta) \odot (W_h x) + (C\delta) \odot b_h
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

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


class Lifted(NamedTuple):
    """What a handler needs to know of one call of a module.

    Attributes:
        entry: the module's responses, by parameter name.
        delta: float [H] or [B, H], how far the hyperparameters are from where the parameters stand.
        batch_axis: where rank-3 activations have their examples: 0 for [B, T, D], 1 for [T, B, D].
        combine: how the response's part of an output joins the elementary one.
    """

    entry: dict[str, Gated]
    delta: jax.Array
    batch_axis: int
    combine: Combine


Handler = Callable[[Call, Any, tuple, dict, Lifted], Any]


class Liftable(NamedTuple):
    """A module class that responds: its handler, and its weights' output axis; other parameters are gated whole."""

    handler: Handler
    out_axis: Mapping[str, int] = MappingProxyType({})


def _placed(lifted: Lifted, gate: jax.Array, shape: tuple[int, ...], out: jax.Array, spatial: bool) -> jax.Array:
    """Return delta times gate in ``shape`` (out's rank, 1 along examples), with examples on their axis of ``out``."""
    g = (lifted.delta @ gate.reshape(gate.shape[0], -1).astype(lifted.delta.dtype)).astype(out.dtype)
    if g.ndim == 1:
        return g.reshape(shape)
    examples, axis = g.shape[0], 0
    if lifted.batch_axis == 1 and out.ndim >= 3 and not spatial and out.shape[1] == examples:
        axis = 1
    size = out.shape[axis]
    if out.ndim < 2 or size % examples or size < examples:
        raise ValueError(
            f"an output of shape {out.shape} has no axis of the {examples} examples that have hyperparameters of their "
            "own; pass batch_axis to lift, or make the hyperparameters per_example=False"
        )
    if size > examples:  # a batch merged with time
        repeats = size // examples
        g = jnp.repeat(g, repeats, axis=0) if lifted.batch_axis == 0 else jnp.tile(g, (repeats, 1))
    return g.reshape(*shape[:axis], size, *shape[axis + 1 :])


def _full(x: jax.Array, rank: int) -> jax.Array:
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def _vector(lifted: Lifted, name: str, out: jax.Array, spatial: bool) -> jax.Array:
    """Return the response of a parameter that is gated whole, broadcastable to ``out``."""
    weight, gate = lifted.entry[name]
    weight = _full(weight, out.ndim).astype(out.dtype)
    return _placed(lifted, gate, weight.shape, out, spatial) * weight


def _call_with(call: Call, module: Any, replace: Callable[[str, jax.Array], jax.Array]) -> Any:
    """Call a module with its parameters replaced."""

    def getter(next_getter, value, context):
        return next_getter(replace(context.name, value) if context.module is module else value)

    with hk.custom_getter(getter):
        return call()


def _linear(weight: str, spatial: bool = False) -> Handler:
    """Handle a module that is linear in its weight and may add a bias ``b``."""

    def handler(call: Call, module: Any, args: tuple, kwargs: dict, lifted: Lifted) -> jax.Array:
        del args, kwargs

        def responding(name: str, value: jax.Array) -> jax.Array:
            return lifted.entry[name].weight.astype(value.dtype) if name == weight else jnp.zeros_like(value)

        out = call()
        response = _call_with(call, module, responding)
        channel = module.channel_index if spatial else -1
        if spatial and lifted.delta.ndim > 1 and out.ndim != len(module.kernel_shape) + 2:
            raise ValueError(f"{module.module_name}: examples with hyperparameters of their own need a batch axis")
        shape = [1] * out.ndim
        shape[channel] = out.shape[channel]
        extra = _placed(lifted, lifted.entry[weight].gate, tuple(shape), out, spatial) * response
        if "b" in lifted.entry:
            extra = extra + _vector(lifted, "b", out, spatial)
        return lifted.combine(out, extra)

    return handler


def _norm(call: Call, module: Any, args: tuple, kwargs: dict, lifted: Lifted) -> jax.Array:
    """Handle a normalisation: scale and offset respond. Called once, since it may count its calls in its state."""
    del args, kwargs
    own: dict[str, jax.Array] = {}

    def bare(name: str, value: jax.Array) -> jax.Array:
        own[name] = value
        return jnp.ones_like(value) if name == "scale" else jnp.zeros_like(value)

    normalised = _call_with(call, module, bare)
    spatial = normalised.ndim > 3
    out, extra = normalised, jnp.zeros((), normalised.dtype)
    if "scale" in own:
        out = normalised * _full(own["scale"], normalised.ndim)
        extra = normalised * _vector(lifted, "scale", normalised, spatial)
    if "offset" in own:
        out = out + _full(own["offset"], normalised.ndim)
        extra = extra + _vector(lifted, "offset", normalised, spatial)
    return lifted.combine(out, jnp.broadcast_to(extra, out.shape))


def _bias(call: Call, module: Any, args: tuple, kwargs: dict, lifted: Lifted) -> jax.Array:
    del module
    out = call()
    multiplier = kwargs.get("multiplier", args[1] if len(args) > 1 else None)
    extra = _vector(lifted, "b", out, spatial=out.ndim > 3)
    return lifted.combine(out, jnp.broadcast_to(extra if multiplier is None else extra * multiplier, out.shape))


def _gru(call: Call, module: Any, args: tuple, kwargs: dict, lifted: Lifted) -> Any:
    """Handle a GRU, whose matmuls are its own: hk.GRU's equations with each of them lifted."""
    del call
    inputs, state = (list(args) + [kwargs[k] for k in ("inputs", "state") if k in kwargs])[:2]
    inputs, state = jnp.asarray(inputs), jnp.asarray(state)
    size = module.hidden_size
    own = {
        "w_i": hk.get_parameter("w_i", [inputs.shape[-1], 3 * size], inputs.dtype, init=module.w_i_init),
        "w_h": hk.get_parameter("w_h", [size, 3 * size], inputs.dtype, init=module.w_h_init),
        "b": hk.get_parameter("b", [3 * size], inputs.dtype, init=module.b_init),
    }

    def matmul(x: jax.Array, name: str, part: slice) -> jax.Array:
        weight, gate = lifted.entry[name]
        out = x @ own[name][:, part]
        response = x @ weight[:, part].astype(out.dtype)
        shape = (1,) * (out.ndim - 1) + (out.shape[-1],)
        return lifted.combine(out, _placed(lifted, gate[..., part], shape, out, False) * response)

    gates = matmul(inputs, "w_i", slice(None))
    bias = jnp.broadcast_to(_full(own["b"], gates.ndim), gates.shape)
    gates = gates + lifted.combine(bias, jnp.broadcast_to(_vector(lifted, "b", gates, False), gates.shape))
    update_reset = jax.nn.sigmoid(gates[..., : 2 * size] + matmul(state, "w_h", slice(2 * size)))
    update, reset = update_reset[..., :size], update_reset[..., size:]
    new = jnp.tanh(gates[..., 2 * size :] + matmul(reset * state, "w_h", slice(2 * size, None)))
    state = (1 - update) * state + update * new
    return state, state


# By the class whose __call__ runs: subclasses that call or inherit it respond too.
MODULES: dict[type, Liftable] = {
    hk.Linear: Liftable(_linear("w"), {"w": -1}),
    hk.ConvND: Liftable(_linear("w", spatial=True), {"w": -1}),
    hk.ConvNDTranspose: Liftable(_linear("w", spatial=True), {"w": -2}),
    hk.DepthwiseConv2D.__mro__[1]: Liftable(_linear("w", spatial=True), {"w": -1}),
    hk.Embed: Liftable(_linear("embeddings"), {"embeddings": -1}),
    hk.GRU: Liftable(_gru, {"w_i": -1, "w_h": -1}),
    hk.LayerNorm: Liftable(_norm),
    hk.RMSNorm: Liftable(_norm),
    hk.GroupNorm: Liftable(_norm),
    hk.BatchNorm: Liftable(_norm),
    hk.Bias: Liftable(_bias),
}


def init_gated(key: jax.Array, module: type, name: str, shape: tuple[int, ...], dtype: Any, count: int) -> Gated:
    """Start the response of a parameter: no response yet, but a weight that gives the gate a gradient.

    Args:
        key: a PRNG key.
        module: a class in :data:`MODULES`.
        name: the parameter's name.
        shape: the parameter's shape.
        dtype: the parameter's dtype.
        count: H, the number of hyperparameters.

    Returns:
        A :class:`Gated` with gate 0 and a weight of variance 1 / inputs (1 for embeddings; ones where gated whole).
    """
    axis = MODULES[module].out_axis.get(name)
    if axis is None:
        return Gated(jnp.ones(shape, dtype), jnp.zeros((count, *shape), dtype))
    gate = [1] * len(shape)
    gate[axis] = shape[axis]
    inputs = 1 if module is hk.Embed else math.prod(shape) // shape[axis]
    weight = jax.random.truncated_normal(key, -2, 2, shape, jnp.promote_types(dtype, jnp.float32)) / math.sqrt(inputs)
    return Gated(weight.astype(dtype), jnp.zeros((count, *gate), dtype))
