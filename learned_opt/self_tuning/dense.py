r"""The dense best response of any pure function: one tangent a hyperparameter.

It costs H times the parameters' memory and, for examples with hyperparameters of their own, H forward passes: a
reference, and the exact thing for small models.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .response import BestResponse, Params, Response, add_tangents, materialise, to_dense


def dense_response(params: Params, num_hyperparameters: int) -> Response:
    r"""The start of a dense response, :math:`\Phi = 0`.

    Args:
        params: the parameters.
        num_hyperparameters: H.

    Returns:
        A pytree like ``params`` of zeros ``[H, *p.shape]``.
    """
    return jax.tree.map(lambda p: jnp.zeros((num_hyperparameters, *p.shape), p.dtype), params)


def dense_lift(function: Callable[..., Any], *, batch_axis: int = 0) -> Callable[..., Any]:
    r"""Let a function of parameters take a :class:`BestResponse`.

    .. math:: f(p + \sum_h \delta_h \Phi_h, x), \quad\text{or linearised}\quad
              f(p, x) + \sum_h \delta_h \, J_f(p, x) \Phi_h

    Args:
        function: ``(params, *args) -> outputs``, a pytree whose arrays have the examples on ``batch_axis``.
        batch_axis: see above; read only where examples have deltas of their own.

    Returns:
        ``function`` that takes plain parameters or a :class:`BestResponse` with a dense (or structured) response. Not
        linearised, with deltas of the examples' own, it runs the function once an example and keeps that example's
        output: a reference, not a method.

    Example:
        >>> import jax.numpy as jnp
        >>> f = dense_lift(lambda w, x: x @ w)
        >>> w, x = jnp.array([1.0, 2.0]), jnp.eye(2)
        >>> f(BestResponse(w, jnp.ones((1, 2)), delta=jnp.array([[1.0], [2.0]]), linear=True), x)
        Array([2., 4.], dtype=float32)
    """

    def along(own: jax.Array, tangents: jax.Array) -> jax.Array:  # own [B, H], tangents [H, ...]
        if tangents.dtype == jax.dtypes.float0:  # of integers
            return tangents
        moved = jnp.moveaxis(tangents, batch_axis + 1, 0)  # [B, H, ...]
        return jnp.moveaxis(jax.vmap(lambda d, t: jnp.tensordot(d, t, 1))(own, moved), 0, batch_axis)

    def apply(params: Params | BestResponse, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(params, BestResponse):
            return function(params, *args, **kwargs)
        run = lambda p: function(p, *args, **kwargs)  # noqa: E731
        phi = to_dense(params.params, params.response)
        delta = params.delta
        if not params.linear and delta.ndim == 1:
            return run(materialise(params))
        if not params.linear:
            outputs = jax.vmap(lambda d: run(materialise(BestResponse(params.params, phi, d))))(delta)
            own = lambda x: jnp.moveaxis(jnp.diagonal(x, 0, 0, batch_axis + 1), -1, batch_axis)  # noqa: E731
            return jax.tree.map(own, outputs)
        if delta.ndim == 1:
            step = jax.tree.map(lambda d: jnp.tensordot(delta, d, 1).astype(d.dtype), phi)
            return add_tangents(*jax.jvp(run, (params.params,), (step,)))
        out, jvp = jax.linearize(run, params.params)
        return add_tangents(out, jax.tree.map(lambda t: along(delta, t), jax.vmap(jvp)(phi)))

    return apply
