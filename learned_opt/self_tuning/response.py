r"""The lift: any Haiku network, unmodified, gets a structured best response to its hyperparameters.

Parameters p are what the training loss favours at hyperparameters :math:`\ell_0`; the response says what it favours at
:math:`\ell_0 + \delta`, for a :math:`\delta` of each example's own.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from .modules import MODULES, Gated, Lifted, init_gated

Params = Any
Response = Any


@dataclasses.dataclass(frozen=True)
class BestResponse:
    r"""Parameters that respond to hyperparameters: takes the place of ``params`` in a lifted network's ``apply``.

    No pytree on purpose: summing squares over its leaves would be no weight decay. Use
    :func:`~learned_opt.self_tuning.squared_norm`, and :func:`materialise` where examples share one delta.

    Attributes:
        params: the elementary parameters, those at :math:`\ell_0`.
        response: of :attr:`LiftedNetwork.init_response`, or :func:`~learned_opt.self_tuning.dense_response`.
        delta: float [H], or [B, H] with one row an example: :math:`\ell - \ell_0`.
        linear: whether the output is linearised in delta, :math:`f + J_f \Delta p(\delta)`.
    """

    params: Params
    response: Response
    delta: jax.Array
    linear: bool = False


class LiftedNetwork(NamedTuple):
    """A network whose ``apply`` takes a :class:`BestResponse` in place of parameters.

    Attributes:
        init: the network's own.
        init_response: ``(key, num_hyperparameters, *args) -> response``, with ``args`` as ``init``'s after its key.
        apply: the network's own, with plain parameters or a :class:`BestResponse`.
    """

    init: Callable[..., Any]
    init_response: Callable[..., Response]
    apply: Callable[..., Any]


@jax.custom_jvp
def _tangent_only(scale: jax.Array, out: jax.Array, extra: jax.Array) -> jax.Array:
    """Return ``out`` as it is, whose derivative in ``scale`` (at any scale) is ``extra``."""
    del scale, extra
    return out


@_tangent_only.defjvp
def _tangent_only_jvp(primals, tangents):
    # Written out, since differentiating out + scale * extra at scale 0 carries, and computes, a zero for every matmul.
    scale_dot, out_dot, _ = tangents
    return primals[1], out_dot + scale_dot.astype(primals[1].dtype) * primals[2]


def add_tangents(out: Any, tangents: Any) -> Any:
    """Add tangents to a pytree's float leaves; the others have none."""
    return jax.tree.map(lambda x, t: x + t if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x, out, tangents)


def lift(
    network: hk.Transformed | hk.TransformedWithState,
    *,
    unresponsive: Collection[str] | str = (),
    batch_axis: int = 0,
) -> LiftedNetwork:
    r"""Give a Haiku network a structured best response.

    Every layer becomes :math:`y = Wx + b + (V\delta) \odot (W_h x) + (C\delta) \odot b_h`, with gates
    :math:`V\delta, C\delta` a number an output unit (channel, embedding dimension). Linear, convolutions (transpose
    and depthwise too), Embed, LayerNorm, RMSNorm, GroupNorm, InstanceNorm, BatchNorm's scale and offset, Bias, GRU, and
    whatever is made of them respond: LSTM, MultiHeadAttention, ``hk.nets``.

    Args:
        network: of ``hk.transform`` or ``hk.transform_with_state``.
        unresponsive: names of modules to leave without a response, or ``"rest"`` for all that cannot have one.
        batch_axis: where rank-3 activations have their examples: 0 for [B, T, D], 1 for [T, B, D].

    Returns:
        A :class:`LiftedNetwork`. ``init_response`` gives a tree {module: {parameter: Gated}} apart from the
        parameters. At ``delta = 0`` a :class:`BestResponse` computes what its ``params`` do.

    Raises:
        ValueError: if ``network`` is not transformed. ``init_response``: if a parameter cannot respond, by name.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp
        >>> net = lift(hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 2])(x))))
        >>> x = jnp.ones((4, 3))
        >>> params = net.init(jax.random.key(0), x)
        >>> response = net.init_response(jax.random.key(1), 5, x)
        >>> net.apply(BestResponse(params, response, delta=jnp.zeros((4, 5))), x).shape
        (4, 2)

    Reference:
        MacKay et al., "Self-Tuning Networks", 2019; Bae & Grosse, "Delta-STN", 2020.
    """
    if not isinstance(network, hk.Transformed | hk.TransformedWithState):
        raise ValueError(f"lift: network must come from hk.transform or hk.transform_with_state, got {network!r}")
    if isinstance(unresponsive, str) and unresponsive != "rest":
        raise ValueError(f"lift: unresponsive must be module names, or 'rest', got {unresponsive!r}")
    if batch_axis not in (0, 1):
        raise ValueError(f"lift: batch_axis must be 0 or 1, got {batch_axis}")
    stateful = isinstance(network, hk.TransformedWithState)

    def init_response(key: jax.Array, num_hyperparameters: int, *args: Any, **kwargs: Any) -> Response:
        shapes, classes, outside = _survey(network, args, kwargs)
        response: dict[str, dict[str, Gated]] = {}
        for module, parameters in shapes.items():
            liftable = module in classes and module not in outside
            if module in unresponsive or (unresponsive == "rest" and not liftable):
                continue
            if not liftable:
                why = (
                    "it is used outside the module's own call"
                    if module in outside
                    else f"modules that can: {', '.join(sorted(c.__name__ for c in MODULES))}, and those made of them"
                )
                raise ValueError(
                    f"lift: {', '.join(f'{module}/{name}' for name in parameters)} cannot respond to hyperparameters "
                    f"({why}); pass unresponsive=[{module!r}] or unresponsive='rest' to leave it as it is"
                )
            response[module] = {}
            for name, leaf in parameters.items():
                key, own = jax.random.split(key)
                response[module][name] = init_gated(
                    own, classes[module], name, leaf.shape, leaf.dtype, num_hyperparameters
                )
        if not response:
            raise ValueError("lift: the network has no module that can respond to hyperparameters")
        return response

    def apply(params: Params | BestResponse, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(params, BestResponse):
            return network.apply(params, *args, **kwargs)

        def run(scale: jax.Array) -> Any:
            def combine(out: jax.Array, extra: jax.Array) -> jax.Array:
                return _tangent_only(scale, out, extra) if params.linear else out + extra

            def interceptor(next_call, call_args, call_kwargs, context):
                entry = params.response.get(getattr(context.module, "module_name", None))
                if entry is None or context.method_name != "__call__" or context.orig_class not in MODULES:
                    return next_call(*call_args, **call_kwargs)
                lifted = Lifted(entry, params.delta, batch_axis, combine)
                handler = MODULES[context.orig_class].handler
                call = lambda: next_call(*call_args, **call_kwargs)  # noqa: E731
                return handler(call, context.module, call_args, call_kwargs, lifted)

            with hk.intercept_methods(interceptor):
                out = network.apply(params.params, *args, **kwargs)
            return out if stateful else (out, None)

        if not params.linear:
            out, state = run(jnp.zeros(()))
        else:
            zero = jnp.zeros((), params.delta.dtype)
            out, tangents, state = jax.jvp(run, (zero,), (jnp.ones_like(zero),), has_aux=True)
            out = add_tangents(out, tangents)
        return (out, state) if stateful else out

    return LiftedNetwork(network.init, init_response, apply)


def _survey(network: Any, args: tuple, kwargs: dict) -> tuple[dict[str, dict[str, Any]], dict[str, type], set[str]]:
    """Return a network's parameters' shapes, the classes of its modules that can respond, and those used otherwise."""
    classes: dict[str, type] = {}
    outside: set[str] = set()
    inside: list[str] = []

    def interceptor(next_call, call_args, call_kwargs, context):
        name = getattr(context.module, "module_name", None)
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
    return (shapes[0] if isinstance(network, hk.TransformedWithState) else shapes), classes, outside


def materialise(params: Params | BestResponse) -> Params:
    r"""The parameters :math:`p + \Delta p(\delta)` of a :class:`BestResponse` whose examples share one delta.

    Args:
        params: plain parameters (returned as they are), or a :class:`BestResponse` with delta [H].

    Returns:
        A pytree like the elementary parameters.

    Raises:
        ValueError: if the examples have deltas of their own.
    """
    if not isinstance(params, BestResponse):
        return params
    if params.delta.ndim != 1:
        raise ValueError("materialise: examples with hyperparameters of their own have no common parameters")
    dense = to_dense(params.params, params.response)
    return jax.tree.map(lambda p, d: p + jnp.tensordot(params.delta, d, 1).astype(p.dtype), params.params, dense)


def to_dense(params: Params, response: Response) -> Response:
    r"""A response as :math:`\partial p / \partial\ell`, one tensor a parameter.

    Args:
        params: the elementary parameters.
        response: structured or already dense.

    Returns:
        A pytree like ``params`` of arrays [H, *p.shape]; 0 where nothing responds.
    """
    given: Any = jax.tree.structure(response)  # JAX's stubs give the type no comparison
    if given == jax.tree.structure(params):
        return response
    count = next(leaf for leaf in jax.tree.leaves(response, is_leaf=lambda x: isinstance(x, Gated))).gate.shape[0]

    def dense(module: str, name: str, p: jax.Array) -> jax.Array:
        gated = response.get(module, {}).get(name)
        return jnp.zeros((count, *p.shape), p.dtype) if gated is None else gated.gate * gated.weight[None]

    return {module: {name: dense(module, name, p) for name, p in own.items()} for module, own in params.items()}
