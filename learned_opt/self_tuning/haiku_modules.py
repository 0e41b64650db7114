"""Haiku networks: which modules respond to hyperparameters, and how the lift runs them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from .modules import Call, Combine, Lifted, Parameter, with_examples

Handler = Callable[[Call, Any, tuple, dict, Lifted], Any]


class Liftable(NamedTuple):
    """A module class that responds: its handler, and its weights' output axis; other parameters are gated whole."""

    handler: Handler
    out_axis: Mapping[str, int] = MappingProxyType({})


def _full(x: jax.Array, rank: int) -> jax.Array:
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def _vector(lifted: Lifted, name: str, out: jax.Array) -> jax.Array:
    """Return the change of a parameter that is gated whole, broadcastable to ``out``."""
    shape = lifted.entry[name].weight.shape
    return lifted.vector(name, (1,) * (out.ndim - len(shape)) + shape, out.dtype)


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
        shape = [1] * out.ndim
        shape[channel] = out.shape[channel]
        extra = lifted.gate(weight, tuple(shape), out.dtype) * response
        if "b" in lifted.entry:
            extra = extra + _vector(lifted, "b", out)
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
    out, extra = normalised, jnp.zeros((), normalised.dtype)
    if "scale" in own:
        out = normalised * _full(own["scale"], normalised.ndim)
        extra = normalised * _vector(lifted, "scale", normalised)
    if "offset" in own:
        out = out + _full(own["offset"], normalised.ndim)
        extra = extra + _vector(lifted, "offset", normalised)
    return lifted.combine(out, jnp.broadcast_to(extra, out.shape))


def _bias(call: Call, module: Any, args: tuple, kwargs: dict, lifted: Lifted) -> jax.Array:
    del module
    out = call()
    multiplier = kwargs.get("multiplier", args[1] if len(args) > 1 else None)
    extra = _vector(lifted, "b", out)
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
        out = x @ own[name][:, part]
        response = x @ lifted.entry[name].weight[:, part].astype(out.dtype)
        gate = lifted.gate(name, (3 * size,), out.dtype)[part]
        return lifted.combine(out, _full(gate, out.ndim) * response)

    gates = matmul(inputs, "w_i", slice(None))
    bias = jnp.broadcast_to(_full(own["b"], gates.ndim), gates.shape)
    gates = gates + lifted.combine(bias, jnp.broadcast_to(_vector(lifted, "b", gates), gates.shape))
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


def _name(module: Any) -> str | None:
    return getattr(module, "module_name", None)


def survey(network: Any, args: tuple, kwargs: dict) -> tuple[dict[tuple[str, ...], Parameter], Any]:
    """Return a network's parameters by path (module, name), and the shapes of its state."""
    classes: dict[str, type] = {}
    outside: set[str] = set()
    inside: list[str] = []

    def interceptor(next_call, call_args, call_kwargs, context):
        name = _name(context.module)
        if context.orig_class not in MODULES or name is None or context.method_name == "__init__":
            return next_call(*call_args, **call_kwargs)
        if context.method_name == "embeddings" and name not in inside:
            outside.add(name)
        if context.method_name != "__call__":
            return next_call(*call_args, **call_kwargs)
        classes[name] = context.orig_class
        inside.append(name)
        try:
            return next_call(*call_args, **call_kwargs)
        finally:
            inside.pop()

    def init():  # a function of its own at each call: JAX would remember the trace, and nothing would be intercepted
        return network.init(jax.random.key(0), *args, **kwargs)

    with hk.intercept_methods(interceptor):
        shapes = jax.eval_shape(init)
    params, state = shapes if isinstance(network, hk.TransformedWithState) else (shapes, {})
    names = ", ".join(sorted(c.__name__ for c in MODULES))
    found: dict[tuple[str, ...], Parameter] = {}
    for module, parameters in params.items():
        obstacle = f"modules that can: {names}, and those made of them" if module not in classes else ""
        if module in outside:
            obstacle = "it is used outside the module's own call"
        for name, leaf in parameters.items():
            cls = classes.get(module)
            axis = None if cls is None else MODULES[cls].out_axis.get(name)
            axes = None if axis is None else (axis,)
            found[module, name] = Parameter(leaf.shape, leaf.dtype, axes, cls is hk.Embed, obstacle)
    return found, state


def run(apply: Callable[[], Any], response: Any, combine: Combine, own: bool) -> Any:
    """Run a network with its modules responding; ``apply`` calls it with the elementary parameters.

    ``response`` is that of :func:`~.modules.scaled`.
    """

    def interceptor(next_call, call_args, call_kwargs, context):
        liftable = MODULES.get(context.orig_class) if context.method_name == "__call__" else None
        if liftable is None:
            return next_call(*call_args, **call_kwargs)
        module = context.module
        call = lambda: next_call(*call_args, **call_kwargs)  # noqa: E731
        if own and context.orig_class is hk.BatchNorm:
            call = _with_statistics_of_all(call, module)
        entry = response.get(_name(module))
        if entry is None:
            return call()
        return liftable.handler(call, module, call_args, call_kwargs, Lifted(entry, combine, own))

    with hk.intercept_methods(interceptor):
        return apply()


def _with_statistics_of_all(call: Call, module: Any) -> Call:
    """Let a BatchNorm that sees one example at a time take its statistics over all."""

    def over_all() -> Any:
        before = module.cross_replica_axis
        module.cross_replica_axis = with_examples(before)
        try:
            return call()
        finally:
            module.cross_replica_axis = before

    return over_all


def without_batch_norm(apply: Callable[[], Any]) -> Any:
    """Run a network with its batch normalisations left out: nothing of their kind couples examples then."""

    def interceptor(next_call, call_args, call_kwargs, context):
        if context.orig_class is hk.BatchNorm and context.method_name == "__call__":
            return call_args[0] if call_args else call_kwargs["inputs"]
        return next_call(*call_args, **call_kwargs)

    with hk.intercept_methods(interceptor):
        return apply()
