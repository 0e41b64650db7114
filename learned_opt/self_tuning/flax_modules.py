"""Flax Linen networks: which modules respond to hyperparameters, and how the lift runs them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype

from .modules import Call, Combine, Lifted, Parameter, Scaled, with_examples

OutAxes = Callable[[Any], dict[str, tuple[int, ...]]]
Handler = Callable[[Call, Any, type, tuple, dict, Lifted], Any]


class Liftable(NamedTuple):
    """A module class that responds.

    Attributes:
        module: the class whose ``__call__`` is handled.
        handler: see :func:`_linear`.
        out_axes: ``module -> {weight: axes of its output units}``; other parameters are gated whole.
        obstacle: ``module -> why it cannot respond``, empty where it can.
    """

    module: type
    handler: Handler
    out_axes: OutAxes = lambda module: {}
    obstacle: Callable[[Any], str] = lambda module: ""


def _axes(axes: Any) -> tuple[int, ...]:
    return tuple(axes) if isinstance(axes, tuple | list) else (axes,)


def _linear(weight: str) -> Handler:
    """Handle a module that is linear in its weight and may add a bias, its output units on the last axes."""

    def handler(call: Call, module: Any, cls: type, args: tuple, kwargs: dict, lifted: Lifted) -> jax.Array:
        out = call()
        bare = module.clone(parent=None, name=None, **({"use_bias": False} if hasattr(module, "use_bias") else {}))
        gated = lifted.entry[weight]
        response = bare.apply({"params": {weight: gated.weight}}, *args, method=cls.__call__, **kwargs)
        units = len(_axes(module.features))
        shape = (1,) * (out.ndim - units) + out.shape[out.ndim - units :]
        extra = lifted.gate(weight, shape, out.dtype) * response
        if "bias" in lifted.entry:
            extra = extra + lifted.vector("bias", shape, out.dtype)
        return lifted.combine(out, extra)

    return handler


def _norm(call: Call, module: Any, cls: type, args: tuple, kwargs: dict, lifted: Lifted) -> jax.Array:
    """Handle a normalisation: scale and bias respond. A twin without them runs in the module's own place."""
    del call
    bare = {name: False for name in ("use_scale", "use_bias") if hasattr(module, name)}
    held = [module.scope.get_variable("params", name) for name in ("scale", "bias")]  # None where it has none
    dtype = canonicalize_dtype(*args[:1], *held, dtype=module.dtype)  # to theirs the twin by itself would not promote
    normalised = _twin(module, lifted.own, **bare, dtype=dtype)(cls, args, kwargs)
    shape = [1] * normalised.ndim
    for axis in _feature_axes(module):
        shape[axis] = normalised.shape[axis]
    out, extra = normalised, jnp.zeros((), normalised.dtype)
    for name in ("scale", "bias"):
        if not module.scope.has_variable("params", name):
            continue
        own = module.scope.get_variable("params", name).reshape(shape).astype(normalised.dtype)
        change = lifted.vector(name, tuple(shape), normalised.dtype)
        out = out * own if name == "scale" else out + own
        extra = normalised * change if name == "scale" else extra + change
    return lifted.combine(out, jnp.broadcast_to(extra, out.shape))


def _twin(module: Any, own: bool, **changes: Any) -> Callable[[type, tuple, dict], Any]:
    """A module with other options on the same variables; a batch normalisation's statistics are over all examples."""
    if own and isinstance(module, nn.BatchNorm):
        changes = changes | {"axis_name": with_examples(module.axis_name)}
    twin = module.clone(parent=module.scope, **changes)
    return lambda cls, args, kwargs: cls.__call__(twin, *args, **kwargs)


def _feature_axes(module: Any) -> tuple[int, ...]:
    return _axes(getattr(module, "feature_axes", getattr(module, "axis", -1)))


def _norm_obstacle(module: Any) -> str:
    axes = _feature_axes(module)
    if any(axis >= 0 for axis in axes) or list(axes) != sorted(axes):
        return "its feature axes are not counted from the last, in order"
    return ""


def _dense_general_obstacle(module: Any) -> str:
    return "it has batch_dims" if _axes(module.batch_dims) else ""


def _conv_obstacle(module: Any) -> str:
    return "" if module.shared_weights else "its weights are not shared along space"


LIFTABLE = (
    Liftable(nn.Dense, _linear("kernel"), lambda module: {"kernel": (-1,)}),
    Liftable(
        nn.DenseGeneral,
        _linear("kernel"),
        lambda module: {"kernel": tuple(range(-len(_axes(module.features)), 0))},
        _dense_general_obstacle,
    ),
    Liftable(nn.Conv, _linear("kernel"), lambda module: {"kernel": (-1,)}, _conv_obstacle),
    Liftable(nn.ConvTranspose, _linear("kernel"), lambda module: {"kernel": (-2 if module.transpose_kernel else -1,)}),
    Liftable(nn.Embed, _linear("embedding"), lambda module: {"embedding": (-1,)}),
    Liftable(nn.LayerNorm, _norm, obstacle=_norm_obstacle),
    Liftable(nn.RMSNorm, _norm, obstacle=_norm_obstacle),
    Liftable(nn.GroupNorm, _norm),
    Liftable(nn.InstanceNorm, _norm, obstacle=_norm_obstacle),
    Liftable(nn.BatchNorm, _norm, obstacle=_norm_obstacle),
)


def _raw(method: Any) -> Any:
    """The function below Flax's wrappers, as an interceptor's context has it."""
    while hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    return method


# By the function that runs: subclasses that call or inherit it respond too.
METHODS = {_raw(liftable.module.__call__): liftable for liftable in LIFTABLE}


def _liftable(context: Any) -> Liftable | None:
    return METHODS.get(_raw(getattr(context.orig_method, "func", context.orig_method)))


def _entry(response: Any, path: tuple[str, ...]) -> dict[str, Scaled] | None:
    node = response
    for part in path:
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node if all(isinstance(leaf, Scaled) for leaf in node.values()) else None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Options:
    """Those arguments of Flax's ``apply`` that are not the network's."""

    method: Any = None
    mutable: Any = False
    capture_intermediates: Any = False


def options(kwargs: dict[str, Any]) -> tuple[Options, dict[str, Any]]:
    """Take Flax's own arguments out of keyword arguments."""
    names = [field.name for field in dataclasses.fields(Options)]
    own = {name: kwargs[name] for name in names if name in kwargs}
    if isinstance(own.get("mutable"), list):
        own["mutable"] = tuple(own["mutable"])
    return Options(**own), {name: x for name, x in kwargs.items() if name not in names}


def survey(network: Any, args: tuple, kwargs: dict) -> tuple[dict[tuple[str, ...], Parameter], Any, Any]:
    """Return a network's parameters by path, the shapes of its parameters and those of its other variables."""
    found: dict[tuple[str, ...], tuple[Liftable, Any, dict[str, tuple[int, ...]]]] = {}
    outside: set[tuple[str, ...]] = set()

    def interceptor(next_call, call_args, call_kwargs, context):
        out = next_call(*call_args, **call_kwargs)
        module = context.module
        if context.method_name == "attend":
            outside.add(module.path)
        liftable = _liftable(context)
        if liftable is not None and context.method_name == "__call__":
            inner = module.scope.variables().get("params", {})
            found[module.path] = liftable, module, {name: p.shape for name, p in inner.items()}
        return out

    def init():  # a function of its own at each call: JAX would remember the trace, and nothing would be intercepted
        return network.init(jax.random.key(0), *args, **kwargs)

    with nn.intercept_methods(interceptor):
        variables = nn.meta.unbox(dict(jax.eval_shape(init)))
    params = variables.pop("params", {})
    can = ", ".join(sorted(liftable.module.__name__ for liftable in LIFTABLE))
    described = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = tuple(part.key for part in path)
        module_path, name = keys[:-1], keys[-1]
        axes, obstacle = None, f"modules that can: {can}, and those made of them"
        if module_path in found:
            liftable, module, shapes = found[module_path]
            axes, obstacle = liftable.out_axes(module).get(name), liftable.obstacle(module)
            if shapes.get(name) != leaf.shape:
                obstacle = "a transform such as nn.scan or nn.vmap stacks it"
        if module_path in outside:
            obstacle = "it is used outside the module's own call"
        is_row = module_path in found and found[module_path][0].module is nn.Embed
        described[keys] = Parameter(leaf.shape, leaf.dtype, axes, is_row, obstacle)
    return described, params, variables


def run(apply: Callable[[], Any], response: Any, combine: Combine, own: bool) -> Any:
    """Run a network with its modules responding; ``apply`` calls it with the elementary parameters.

    ``response`` is that of :func:`~.modules.scaled`.
    """
    handling: list[tuple[str, ...]] = []

    def interceptor(next_call, call_args, call_kwargs, context):
        liftable = _liftable(context) if context.method_name == "__call__" and not handling else None
        if liftable is None:
            return next_call(*call_args, **call_kwargs)
        module = context.module
        entry = _entry(response, module.path)
        handling.append(module.path)
        try:
            if entry is None:
                if own and liftable.module is nn.BatchNorm:
                    return _twin(module, own)(liftable.module, call_args, call_kwargs)
                return next_call(*call_args, **call_kwargs)
            call = lambda: next_call(*call_args, **call_kwargs)  # noqa: E731
            lifted = Lifted(entry, combine, own)
            return liftable.handler(call, module, liftable.module, call_args, call_kwargs, lifted)
        finally:
            handling.pop()

    with nn.intercept_methods(interceptor):
        return apply()


def without_batch_norm(apply: Callable[[], Any]) -> Any:
    """Run a network with its batch normalisations left out: nothing of their kind couples examples then."""

    def interceptor(next_call, call_args, call_kwargs, context):
        liftable = _liftable(context)
        if liftable is not None and liftable.module is nn.BatchNorm:
            return call_args[0] if call_args else call_kwargs["x"]
        return next_call(*call_args, **call_kwargs)

    with nn.intercept_methods(interceptor):
        return apply()
