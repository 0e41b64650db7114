"""Shampoo's eigenbasis as SOAP keeps it: eigenvectors of running means of G G' and G' G, corrected now and then."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Side(NamedTuple):
    """One side of a matrix.

    Attributes:
        statistic: the running mean of G G', ``[n, n]``; a scalar for a side that is not rotated.
        basis: its eigenvectors by falling eigenvalue, approximately, ``[n, n]``; likewise.
    """

    statistic: jax.Array
    basis: jax.Array


def side_zeros(x: jax.Array, axis: int, max_dim: int, dtype) -> Side:
    """The start for an axis of a matrix: no statistic, no rotation; scalars if it is longer than ``max_dim``."""
    n = x.shape[axis]
    shape = (n, n) if n <= max_dim else ()
    none = jnp.zeros_like(x, dtype, shape)
    return Side(none, none + jnp.eye(n, dtype=dtype) if shape else jnp.zeros_like(none))


def is_rotated(side: Side) -> bool:
    """Whether the side has a basis."""
    return side.basis.ndim > 0


def follow(side: Side, g: jax.Array, step: jax.Array, *, decay: float, every: int) -> tuple[Side, jax.Array]:
    r"""Take in a gradient: :math:`L \leftarrow \beta L + (1 - \beta) G G^\top`, and correct the basis when it is due.

    The basis is an eigendecomposition of L at the first step, and after that, every few steps, one step of the power
    method and a QR decomposition. It is a constant to derivatives: those of eigenvectors of close eigenvalues have no
    bound.

    Args:
        side: a rotated side.
        g: the gradient with this side first, ``[n, m]``.
        step: int32, 1 at the first.
        decay: :math:`\beta`.
        every: steps between two corrections.

    Returns:
        The side, and which of the old directions each of its directions goes on, int32 ``[n]``: what is accumulated
        for directions moves with them.

    Reference:
        Vyas et al., "SOAP: Improving and stabilizing Shampoo using Adam", 2024, arXiv:2409.11321.
    """
    beta = jnp.asarray(decay, g.dtype)
    statistic = beta * side.statistic + (1 - beta) * (g @ g.T)
    one = (step == 1, step % every == 1 % every, statistic, side.basis)
    basis, order = _correct(*(jax.lax.stop_gradient(x)[None] for x in one))
    return Side(statistic, basis[0]), order[0]


def rotate(x: jax.Array, left: Side, right: Side) -> jax.Array:
    """``Q_L' x Q_R`` on the last two axes."""
    x = jnp.swapaxes(left.basis, -1, -2) @ x if is_rotated(left) else x
    return x @ right.basis if is_rotated(right) else x


def rotate_back(x: jax.Array, left: Side, right: Side) -> jax.Array:
    """``Q_L x Q_R'``."""
    x = left.basis @ x if is_rotated(left) else x
    return x @ right.basis.T if is_rotated(right) else x


@jax.custom_batching.custom_vmap
def _correct(first, due, statistic, basis):
    """The bases and the orders of a stack of sides, ``[k, n, n]`` and ``[k, n]``.

    All lanes of all ``vmap`` come here as one stack, so that a decomposition is computed only when one of them is due:
    `cond` under `vmap` would compute it at every step.
    """
    # made of its arguments, so that inside shard_map it varies over the devices that they vary over
    same = jnp.arange(basis.shape[-1], dtype=jnp.int32)[None] + jnp.zeros_like((statistic + basis)[..., 0], jnp.int32)

    def iterate():
        turned = statistic @ basis
        # The power method pulls the first columns towards the largest eigenvalues: they must be there already, or
        # directions of little curvature would inherit the steps of those of much.
        order = jnp.argsort(-jnp.sum(basis * turned, axis=-2), axis=-1).astype(jnp.int32)
        found, r = jnp.linalg.qr(jnp.take_along_axis(turned, order[:, None], axis=-1))
        found = found * _sign(jnp.diagonal(r, axis1=-2, axis2=-1))[:, None]  # the same way round as before
        return jnp.where(due[:, None, None], found, basis), jnp.where(due[:, None], order, same)

    def decompose():
        found = jnp.linalg.eigh(statistic)[1][..., ::-1]
        largest = jnp.argmax(jnp.abs(found), axis=-2, keepdims=True)
        found = found * _sign(jnp.take_along_axis(found, largest, axis=-2))  # LAPACK's sign hangs on rounding
        return jnp.where(first[:, None, None], found, corrected), jnp.where(first[:, None], same, order)

    corrected, order = jax.lax.cond(jnp.any(due & ~first), iterate, lambda: (basis + jnp.zeros_like(statistic), same))
    return jax.lax.cond(jnp.any(first), decompose, lambda: (corrected, order))


@_correct.def_vmap
def _correct_lanes(size, batched, *arguments):
    lanes = [
        x if has_lanes else jnp.broadcast_to(x, (size, *x.shape))
        for x, has_lanes in zip(arguments, batched, strict=True)
    ]
    found = _correct(*(x.reshape(-1, *x.shape[2:]) for x in lanes))
    return tuple(x.reshape(size, -1, *x.shape[1:]) for x in found), (True, True)


def _sign(x: jax.Array) -> jax.Array:
    return jnp.where(x < 0, -1, 1).astype(x.dtype)
