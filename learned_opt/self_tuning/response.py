r"""The lift: any Haiku or Flax Linen network, unmodified, gets a structured best response to its hyperparameters.

Parameters p are what the training loss favours at hyperparameters :math:`\ell_0`; the response says what it favours at
:math:`\ell_0 + \delta`, for a :math:`\delta` of each example's own.
"""

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from . import haiku_modules
from .examples import Axes, check_apart, over_examples
from .modules import Combine, Gated, Parameter, init_gated, scaled

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


class Framework(NamedTuple):
    """A network of one library, as the lift sees it: its arguments apart from weights, state and random keys.

    Attributes:
        survey: ``(args, kwargs) -> ({path: Parameter}, shapes of params, shapes of state)``.
        inputs: ``keyword arguments of init -> those of the network``.
        split: ``(the arguments of apply) -> (params, frozen, rngs, args, kwargs)``; ``frozen`` is what examples share.
        call: ``(params, frozen, rngs, args, kwargs) -> (outputs, state)``.
        join: ``(outputs, state, frozen) -> what apply returns``.
        run: ``(apply, scaled response, combine, own) -> apply()`` with its modules responding.
        without_batch_norm: ``apply -> apply()`` without batch normalisation.
    """

    survey: Callable[[tuple, dict], tuple[dict[tuple[str, ...], Parameter], Any, Any]]
    inputs: Callable[[dict], dict]
    split: Callable[..., tuple[Any, Any, Any, tuple, dict]]
    call: Callable[..., tuple[Any, Any]]
    join: Callable[[Any, Any, Any], Any]
    run: Callable[[Callable[[], Any], Any, Combine, bool], Any]
    without_batch_norm: Callable[[Callable[[], Any]], Any]


def _haiku(network: hk.Transformed | hk.TransformedWithState) -> Framework:
    stateful = isinstance(network, hk.TransformedWithState)
    with_rng = "rng" in inspect.signature(network.apply).parameters  # hk.without_apply_rng takes it away

    def survey(args: tuple, kwargs: dict):
        found, state = haiku_modules.survey(network, args, kwargs)
        params: dict[str, dict[str, Any]] = {}
        for (module, name), leaf in found.items():
            params.setdefault(module, {})[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return found, params, state

    def split(params: Any, *args: Any, **kwargs: Any):
        rest = list(args)
        state = rest.pop(0) if stateful else None
        rng = (kwargs.pop("rng") if "rng" in kwargs else rest.pop(0)) if with_rng else None
        return params, state, jax.random.PRNGKey(rng) if isinstance(rng, int) else rng, tuple(rest), kwargs

    def call(params: Any, state: Any, rng: Any, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        lead = (*((state,) if stateful else ()), *((rng,) if with_rng else ()))
        out = network.apply(params, *lead, *args, **kwargs)
        return out if stateful else (out, None)

    def join(out: Any, new_state: Any, state: Any) -> Any:
        del state
        return (out, new_state) if stateful else out

    return Framework(survey, dict, split, call, join, haiku_modules.run, haiku_modules.without_batch_norm)


def _flax(network: Any) -> Framework:
    flax_modules = importlib.import_module(".flax_modules", __package__)  # Flax is no dependency

    def survey(args: tuple, kwargs: dict):
        found, params, state = flax_modules.survey(network, args, kwargs)
        return found, params, (state, flax_modules.options(kwargs)[0])

    def split(variables: Any, *args: Any, **kwargs: Any):
        own, kwargs = flax_modules.options(kwargs)
        rest = dict(variables)
        if "params" not in rest:
            raise ValueError("lift: a Flax network is applied to {'params': ...}, plain or a BestResponse")
        return rest.pop("params"), (rest, own), kwargs.pop("rngs", None), args, kwargs

    def call(params: Any, frozen: Any, rngs: Any, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        rest, own = frozen
        own_kwargs = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
        out = network.apply({"params": params, **rest}, *args, rngs=rngs, **own_kwargs, **kwargs)
        return out if own.mutable is not False else (out, None)

    def join(out: Any, state: Any, frozen: Any) -> Any:
        return out if frozen[1].mutable is False else (out, state)

    inputs = lambda kwargs: flax_modules.options(kwargs)[1]  # noqa: E731
    return Framework(survey, inputs, split, call, join, flax_modules.run, flax_modules.without_batch_norm)


def _framework(network: Any) -> Framework:
    if isinstance(network, hk.Transformed | hk.TransformedWithState):
        return _haiku(network)
    linen = sys.modules.get("flax.linen")  # who has a Flax module has imported it
    if linen is not None and isinstance(network, linen.Module):
        return _flax(network)
    raise ValueError(
        "lift: network must come from hk.transform or hk.transform_with_state, or be a flax.linen.Module, got "
        f"{network!r}; dense_lift takes any pure function"
    )


def lift(
    network: Any,
    *,
    unresponsive: Collection[str] | str = (),
    in_axes: Axes = 0,
    out_axes: Axes = 0,
    coupled: bool = False,
) -> LiftedNetwork:
    r"""Give a Haiku or Flax Linen network a structured best response.

    Every layer becomes :math:`y = Wx + b + (V\delta) \odot (W_h x) + (C\delta) \odot b_h`, with gates
    :math:`V\delta, C\delta` a number an output unit (channel, embedding dimension). What responds:

    * of Haiku: Linear, convolutions (transpose and depthwise too), Embed, LayerNorm, RMSNorm, GroupNorm, InstanceNorm,
      BatchNorm's scale and offset, Bias, GRU, and whatever is made of them: LSTM, MultiHeadAttention, ``hk.nets``;
    * of Flax: Dense, DenseGeneral, Conv, ConvTranspose, Embed, LayerNorm, RMSNorm, GroupNorm, InstanceNorm, BatchNorm's
      scale and bias, and whatever is made of them: LSTMCell, GRUCell, RNN, MultiHeadDotProductAttention.

    With a delta [B, H] the network runs on each example with its own delta, mapped by ``jax.vmap``: inside it sees
    batches of one. So what is no example's (an embedding of positions, learned queries) responds to each example's
    delta in that example. BatchNorm takes its statistics over all examples, as without the lift; every example draws
    random numbers of its own. With a delta [H] it runs on the batch as it is.

    Args:
        network: of ``hk.transform`` or ``hk.transform_with_state``, or a ``flax.linen.Module``. A Flax network's
            ``apply`` takes ``{"params": best, ...}``, with ``rngs``, ``mutable`` and ``method`` as Flax's own.
        unresponsive: names (paths in Flax) of modules to leave without a response, or ``"rest"`` for all that cannot
            have one.
        in_axes: where the arguments (after weights, state and keys) have their examples: an int, or a tuple with an
            int, None (shared by all) or a tree of these for each. Scalars are shared; keyword arguments have them on
            axis 0.
        out_axes: where the outputs have them, one row an example: an int or a tree.
        coupled: the network mixes the examples of a batch by other means than BatchNorm. They can have no
            hyperparameters of their own then. Else ``init_response`` checks that they are apart, on two made-up ones.

    Returns:
        A :class:`LiftedNetwork`. ``init_response`` gives a tree like the parameters, of :class:`Gated`, apart from
        them. At ``delta = 0`` a :class:`BestResponse` computes what its ``params`` do.

    Raises:
        ValueError: if ``network`` is of neither library. ``init_response``: if a parameter cannot respond, by name; if
            examples are not where ``in_axes`` and ``out_axes`` say, or depend on each other.

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
    framework = _framework(network)
    if isinstance(unresponsive, str) and unresponsive != "rest":
        raise ValueError(f"lift: unresponsive must be module names, or 'rest', got {unresponsive!r}")

    def init_response(key: jax.Array, num_hyperparameters: int, *args: Any, **kwargs: Any) -> Response:
        parameters, params, state = framework.survey(args, kwargs)
        response: dict[str, Any] = {}
        stuck: dict[str, list[str]] = {}
        for path, parameter in parameters.items():
            module = "/".join(path[:-1])
            if module in unresponsive or (unresponsive == "rest" and parameter.obstacle):
                continue
            if parameter.obstacle:
                stuck.setdefault(module, []).append(path[-1])
                continue
            key, own = jax.random.split(key)
            inner = response
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1]] = init_gated(own, parameter, num_hyperparameters)
        for module, names in stuck.items():
            why = next(p.obstacle for path, p in parameters.items() if "/".join(path[:-1]) == module and p.obstacle)
            raise ValueError(
                f"lift: {', '.join(f'{module}/{name}' for name in names)} cannot respond to hyperparameters ({why}); "
                f"pass unresponsive=[{module!r}] or unresponsive='rest' to leave it as it is"
            )
        if not response:
            raise ValueError("lift: the network has no module that can respond to hyperparameters")
        if not coupled:

            def forward(weights: Any, args: tuple, kwargs: dict) -> Any:
                run = lambda: framework.call(*weights, jax.random.key(0), args, kwargs)[0]  # noqa: E731
                return framework.without_batch_norm(run)

            check_apart(forward, (params, state), args, framework.inputs(kwargs), in_axes, out_axes)
        return response

    def apply(params: Params | BestResponse, *args: Any, **kwargs: Any) -> Any:
        best, frozen, rngs, args, kwargs = framework.split(params, *args, **kwargs)
        if not isinstance(best, BestResponse):
            return framework.join(*framework.call(best, frozen, rngs, args, kwargs), frozen)
        own = best.delta.ndim > 1
        if own and coupled:
            raise ValueError(
                "lift: the network is coupled, so its examples can have no hyperparameters of their own: make them "
                "per_example=False"
            )

        def respond(delta: jax.Array, rngs: Any, args: tuple, kwargs: dict) -> tuple[Any, Any]:
            response = scaled(best.response, delta)

            def run(scale: jax.Array) -> tuple[Any, Any]:
                def combine(out: jax.Array, extra: jax.Array) -> jax.Array:
                    return _tangent_only(scale, out, extra) if best.linear else out + extra

                plain = lambda: framework.call(best.params, frozen, rngs, args, kwargs)  # noqa: E731
                return framework.run(plain, response, combine, own)

            zero = jnp.zeros((), delta.dtype)
            if not best.linear:
                return run(zero)
            out, tangents, state = jax.jvp(run, (zero,), (jnp.ones_like(zero),), has_aux=True)
            return add_tangents(out, tangents), state

        if own:
            out, state = over_examples(respond, best.delta, rngs, args, kwargs, in_axes, out_axes)
        else:
            out, state = respond(best.delta, rngs, args, kwargs)
        return framework.join(out, state, frozen)

    return LiftedNetwork(network.init, init_response, apply)


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
        A pytree like ``params`` of arrays ``[H, *p.shape]``; 0 where nothing responds.
    """
    given: Any = jax.tree.structure(response)  # JAX's stubs give the type no comparison
    if given == jax.tree.structure(params):
        return response
    count = next(leaf for leaf in jax.tree.leaves(response, is_leaf=lambda x: isinstance(x, Gated))).gate.shape[0]

    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    gated = dict(jax.tree_util.tree_leaves_with_path(response, is_leaf=lambda x: isinstance(x, Gated)))

    def dense(path: Any, p: jax.Array) -> jax.Array:
        if path not in gated:
            return jnp.zeros((count, *p.shape), p.dtype)
        return gated[path].gate * gated[path].weight[None]

    return jax.tree.unflatten(tree, [dense(path, p) for path, p in flat])
