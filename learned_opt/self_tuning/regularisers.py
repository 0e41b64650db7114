r"""Hyperparameters of the training loss that work out of the box, one value for all examples or one an example.

A rate, strength or amount is a float scalar, or floats [B] for the B examples of the arrays' leading axis: what
:func:`~learned_opt.self_tuning.values` gives. Weight drop takes a scalar alone.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from numpy.lib.array_utils import normalize_axis_tuple

from .modules import Gated
from .response import BestResponse, Params


def per_example(value: Any, x: jax.Array) -> jax.Array:
    """A hyperparameter's value shaped to multiply an array.

    Args:
        value: a scalar, or floats [B].
        x: [B, ...].

    Returns:
        Floats of x's rank and dtype: [1, ...] or [B, 1, ...].

    Raises:
        ValueError: if the value has rows that are not x's, or x holds integers, which would make the value one.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"an array of {x.dtype} cannot be regularised by a real number: make it float, labels too")
    value = jnp.asarray(value, x.dtype)
    if value.ndim and value.shape != x.shape[:1]:
        raise ValueError(
            f"a hyperparameter of shape {value.shape} does not fit an array of shape {x.shape}: give one value, or one "
            "for each example of the leading axis"
        )
    return value.reshape(value.shape[:1] + (1,) * (x.ndim - value.ndim))


def dropout(key: jax.Array, x: jax.Array, rate: Any, shared_axes: Collection[int] = ()) -> jax.Array:
    r"""Dropout, :math:`x \odot m / (1 - r)`, with :math:`m \sim \mathrm{Bernoulli}(1 - r)`.

    Args:
        key: a PRNG key.
        x: float [B, ...].
        rate: :math:`r \in [0, 1)`, a scalar or [B].
        shared_axes: axes along which the mask is the same: ``(1,)`` for [B, T, D] is variational dropout, whose mask
            lasts for the sequence; ``(1, 2)`` for [B, H, W, C] drops channels.

    Returns:
        Float, x's shape and dtype.

    Raises:
        ValueError: x has no such axis.

    Reference:
        Srivastava et al., "Dropout", 2014; Gal & Ghahramani, "A theoretically grounded application of dropout in
        recurrent neural networks", 2016.
    """
    shared = normalize_axis_tuple(tuple(shared_axes), x.ndim)
    shape = tuple(1 if axis in shared else size for axis, size in enumerate(x.shape))
    keep = jnp.broadcast_to(~_chance(key, shape, rate, x), x.shape)
    return jnp.where(keep, x / jnp.maximum(1 - per_example(rate, x), 1e-3), 0)


def _chance(key: jax.Array, shape: Sequence[int], rate: Any, x: jax.Array) -> jax.Array:
    """True with probability ``rate``, drawn in float32 at least: bfloat16 knows only multiples of 1/128."""
    wide = _wide(x)
    return jax.random.uniform(key, shape, wide.dtype) < per_example(rate, wide)


def _wide(x: jax.Array) -> jax.Array:
    """The array in float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def variational_dropout(key: jax.Array, x: jax.Array, rate: Any, time_axis: int = 1) -> jax.Array:
    """Dropout with one mask for all of a sequence: :func:`dropout` of [B, T, D] with the mask shared along time."""
    return dropout(key, x, rate, shared_axes=(time_axis,))


def _of_module(tree: Any, module: str) -> Any:
    """Return the part of a tree that is a module's, by name (Haiku) or path (Flax); {} if there is none."""
    if module in tree:
        return tree[module]
    for part in module.split("/"):
        if not isinstance(tree, Mapping) or part not in tree:
            return {}
        tree = tree[part]
    return tree


def _with_module(tree: Any, module: str, new: Any) -> Any:
    """Return a tree with a module's part replaced."""
    if module in tree or "/" not in module:
        return {**tree, module: new}
    first, rest = module.split("/", 1)
    return {**tree, first: _with_module(tree[first], rest, new)}


def weight_drop(
    key: jax.Array, params: Params | BestResponse, rate: Any, modules: Collection[str], name: str = "w"
) -> Params | BestResponse:
    r"""Drop entries of weight matrices, and of their responses with them, as DropConnect does.

    Args:
        key: a PRNG key.
        params: parameters of Haiku or Flax, or a :class:`BestResponse` with a structured response.
        rate: a scalar: the examples of a batch share their weights, so tune it with ``per_example=False``.
        modules: names (Haiku) or paths such as ``"block/Dense_0"`` (Flax) of the modules whose weights are dropped.
        name: the parameter's name: ``"w"`` in Haiku, ``"kernel"`` in Flax.

    Returns:
        ``params`` with those weights times a mask over 1 - rate.

    Raises:
        ValueError: if the rate has rows. KeyError: if there is no such module.

    Reference:
        Wan et al., "Regularization of neural networks using DropConnect", 2013; Merity et al., "Regularizing and
        optimizing LSTM language models", 2018.
    """
    rate = jnp.asarray(rate)
    if rate.ndim:
        raise ValueError("weight_drop: the examples of a batch share their weights: tune the rate per_example=False")
    own = params.params if isinstance(params, BestResponse) else params
    response = params.response if isinstance(params, BestResponse) else {}
    new, new_response = dict(own), dict(response)
    for i, module in enumerate(modules):
        weights = _of_module(own, module)
        if name not in weights:
            raise KeyError(f"weight_drop: no parameter {module}/{name} among {sorted(own)}")
        weight = weights[name]
        keep = ~_chance(jax.random.fold_in(key, i), weight.shape, rate, weight)
        mask = (keep / jnp.maximum(1 - rate, 1e-3)).astype(weight.dtype)
        new = _with_module(new, module, {**weights, name: weight * mask})
        responding = _of_module(response, module)
        if name in responding:
            gated = responding[name]._replace(weight=responding[name].weight * mask)
            new_response = _with_module(new_response, module, {**responding, name: gated})
    if not isinstance(params, BestResponse):
        return new
    return BestResponse(new, new_response, params.delta, params.linear)


def squared_norm(params: Params | BestResponse, modules: Collection[str] | None = None) -> jax.Array:
    r"""The sum of the parameters' squares, :math:`|p + \Delta p(\delta)|^2`, for weight decay.

    A layer's is :math:`\sum_i |w_i|^2 + 2 g_i \langle w_i, w_{h,i}\rangle + g_i^2 |w_{h,i}|^2`, over output units i
    with gate :math:`g_i`, so that no example's weights are ever built. Sums are float32's at least.

    Args:
        params: plain parameters, or a :class:`BestResponse`.
        modules: names (Haiku) or paths (Flax) of the modules to sum over, for an L2 weight a layer; all by default.

    Returns:
        A float scalar, or [B] where the examples have hyperparameters of their own.

    Raises:
        KeyError: if there is no such module.

    Example:
        >>> import jax.numpy as jnp
        >>> squared_norm({"linear": {"w": jnp.ones((2, 3))}})
        Array(6., dtype=float32)
    """
    own = params.params if isinstance(params, BestResponse) else params
    for module in modules or ():
        if not _of_module(own, module):
            raise KeyError(f"squared_norm: no module {module!r} among {sorted(own)}")
    own = jax.tree.map(_wide, own if modules is None else {module: _of_module(own, module) for module in modules})
    total = jnp.asarray(sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(own)))
    if not isinstance(params, BestResponse):
        return total
    response, delta = jax.tree.map(_wide, (params.response, params.delta))
    if isinstance(response, dict) and modules is not None:
        response = {module: found for module in modules if (found := _of_module(response, module))}
    paths = {path: p for path, p in jax.tree_util.tree_leaves_with_path(own)}
    extra = jnp.zeros(delta.shape[:-1], total.dtype)
    leaves = jax.tree_util.tree_leaves_with_path(response, is_leaf=lambda x: isinstance(x, Gated))
    for path, leaf in leaves:
        p = paths[path]
        if isinstance(leaf, Gated):
            inputs = tuple(i for i in range(p.ndim) if leaf.gate.shape[i + 1] == 1)
            cross = jnp.sum(p * leaf.weight, axis=inputs).reshape(-1)
            square = jnp.sum(jnp.square(leaf.weight), axis=inputs).reshape(-1)
            gate = delta @ leaf.gate.reshape(leaf.gate.shape[0], -1)
            extra = extra + 2 * gate @ cross + jnp.square(gate) @ square
        else:
            step = delta @ leaf.reshape(leaf.shape[0], -1)
            extra = extra + 2 * step @ p.reshape(-1) + jnp.sum(jnp.square(step), axis=-1)
    return total + extra


def input_noise(key: jax.Array, x: jax.Array, scale: Any) -> jax.Array:
    r"""Additive noise, :math:`x + s\,\xi` with :math:`\xi` standard normal.

    Args:
        key: a PRNG key.
        x: float [B, ...].
        scale: :math:`s \ge 0`, a scalar or [B].

    Returns:
        Float, x's shape and dtype.
    """
    return x + per_example(scale, x) * jax.random.normal(key, x.shape, x.dtype)


def input_scaling(key: jax.Array, x: jax.Array, strength: Any) -> jax.Array:
    r"""Scale every example by a factor of its own, :math:`x\, e^{s\xi}` with :math:`\xi` standard normal.

    Args:
        key: a PRNG key.
        x: float [B, ...].
        strength: :math:`s \ge 0`, a scalar or [B].

    Returns:
        Float, x's shape and dtype.
    """
    draws = jax.random.normal(key, (x.shape[0],) + (1,) * (x.ndim - 1), x.dtype)
    return x * jnp.exp(per_example(strength, x) * draws)


def label_smoothing(labels: jax.Array, amount: Any) -> jax.Array:
    r"""Smooth one-hot labels, :math:`(1 - a)\,y + a / K`.

    Args:
        labels: float [B, ..., K].
        amount: :math:`a \in [0, 1)`, a scalar or [B].

    Returns:
        Float [B, ..., K].

    Reference:
        Szegedy et al., "Rethinking the Inception architecture", 2016.
    """
    amount = per_example(amount, labels)
    return (1 - amount) * labels + amount / labels.shape[-1]


def label_noise(key: jax.Array, labels: jax.Array, rate: Any) -> jax.Array:
    r"""Replace an example's label by one drawn uniformly from the K classes, with probability :math:`r`.

    Args:
        key: a PRNG key.
        labels: float [B, K], one-hot or soft.
        rate: :math:`r \in [0, 1]`, a scalar or [B].

    Returns:
        Float [B, K].

    Reference:
        Xie et al., "DisturbLabel: regularizing CNN on the loss layer", 2016.
    """
    k_which, k_class = jax.random.split(key)
    count, classes = labels.shape
    replaced = _chance(k_which, (count, 1), rate, labels)
    drawn = jax.nn.one_hot(jax.random.randint(k_class, (count,), 0, classes), classes, dtype=labels.dtype)
    return jnp.where(replaced, drawn, labels)


def stochastic_depth(key: jax.Array, branch: jax.Array, rate: Any) -> jax.Array:
    r"""Drop an example's whole residual branch, :math:`f(x) \, m / (1 - r)` with one :math:`m` an example.

    Args:
        key: a PRNG key.
        branch: float [B, ...], what is to be added to the input.
        rate: :math:`r \in [0, 1)`, a scalar or [B].

    Returns:
        Float, the branch's shape and dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.ones((4, 3))
        >>> (x + stochastic_depth(jax.random.key(0), 2 * x, 0.5)).shape
        (4, 3)

    Reference:
        Huang et al., "Deep networks with stochastic depth", 2016.
    """
    return dropout(key, branch, rate, shared_axes=tuple(range(1, branch.ndim)))


def activation_penalty(activations: jax.Array) -> jax.Array:
    r"""The mean square of an example's activations, to be weighted by a hyperparameter (AR).

    Args:
        activations: float [B, ...].

    Returns:
        Float [B].

    Reference:
        Merity et al., "Revisiting activation regularization for language RNNs", 2017.
    """
    return jnp.mean(jnp.square(activations), axis=tuple(range(1, activations.ndim)))


def temporal_penalty(activations: jax.Array, time_axis: int = 1) -> jax.Array:
    """The mean square of the change of an example's activations from one step to the next (TAR).

    Args:
        activations: float [B, T, ...].
        time_axis: the axis of time.

    Returns:
        Float [B].

    Reference:
        Merity et al., "Revisiting activation regularization for language RNNs", 2017.
    """
    return activation_penalty(jnp.diff(activations, axis=time_axis))
