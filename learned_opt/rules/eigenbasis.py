"""Shampoo's eigenbasis as SOAP keeps it: eigenvectors of running means of G G' and G' G, corrected now and then."""

from collections.abc import Callable
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


Sides = tuple[Side, ...]  # (left, right) of a matrix, () of a vector, which is never rotated


def as_matrix(x: jax.Array) -> jax.Array:
    """A tensor of rank >= 2 as the matrix of its last axis against the others; a vector or a scalar as it is."""
    return x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x


def start(x: jax.Array, max_dim: int, dtype) -> Sides:
    """No statistic and no rotation; a side of more than ``max_dim`` rows never has one.

    Args:
        x: a matrix, vector or scalar; only its shape matters, and inside ``shard_map`` what devices it varies over.
        max_dim: the longest side that is rotated.
        dtype: of the statistics and the bases.

    Returns:
        The sides.
    """

    def side(n: int) -> Side:
        statistic = jnp.zeros_like(x, dtype, (n, n) if n <= max_dim else ())
        return Side(statistic, statistic + jnp.eye(n, dtype=dtype) if statistic.ndim else jnp.zeros_like(statistic))

    return tuple(side(n) for n in x.shape) if x.ndim == 2 else ()


Move = Callable[[jax.Array], jax.Array]


def follow(sides: Sides, g: jax.Array, step: jax.Array, *, decay: float, every: int) -> tuple[Sides, Move, Move]:
    r"""Take in a gradient: :math:`L \leftarrow \beta L + (1 - \beta) G G^\top`, likewise R, and correct bases when due.

    A basis is an eigendecomposition at the first step, and after that, every few steps, one step of the power method
    and a QR decomposition. It is a constant to derivatives: those of eigenvectors of close eigenvalues have no bound.
    Directions that no gradient has had yet are arbitrary.

    Args:
        sides: of the matrix.
        g: its gradient, ``[n, m]``.
        step: int32, 1 at the first.
        decay: :math:`\beta`.
        every: steps between two corrections.

    Returns:
        The sides, and two functions of what has been accumulated in the old bases, ``[..., n, m]``. The first moves
        what belongs to a direction, such as a square, to the one that goes on with it; an axis of size one holds
        something of all directions and stays. The second turns coordinates: ``rotate(x, old)`` to ``rotate(x, new)``.

    Reference:
        Vyas et al., "SOAP: Improving and stabilizing Shampoo using Adam", 2024, arXiv:2409.11321.
    """
    new, orders, turns = [], [], []
    due = step % every == 1 % every
    for side, rows in zip(sides, (g, g.T), strict=False):
        order = turn = None
        if side.basis.ndim:
            beta = jnp.asarray(decay, g.dtype)
            statistic = beta * side.statistic + (1 - beta) * (rows @ rows.T)
            one = [jax.lax.stop_gradient(x) for x in (step == 1, due, statistic, side.basis)]
            (basis,), (order,) = _correct(*(x[None] for x in one))
            side, turn = Side(statistic, basis), (one[-1], basis)
        new.append(side)
        orders.append(order)
        turns.append(turn)

    def moved(x: jax.Array) -> jax.Array:
        for axis, order in zip((-2, -1), orders, strict=False):
            x = x if order is None or x.shape[axis] == 1 else jnp.take(x, order, axis=axis)
        return x

    def turn_all(x: jax.Array) -> jax.Array:
        left, right = (None if turn is None else turn[0].T @ turn[1] for turn in turns)
        x = x if left is None else left.T @ x
        return x if right is None else x @ right

    def turned(x: jax.Array) -> jax.Array:
        changes = [turn for turn in turns if turn is not None]
        # lanes of other ages compute it at every step, which costs what rotating anew would
        return jax.lax.cond((step == 1) | due, turn_all, lambda x: x, x) if changes else x

    return tuple(new), moved, turned


def rotate(x: jax.Array, sides: Sides) -> jax.Array:
    """``Q_L' x Q_R`` on the last two axes."""
    if not sides:
        return x
    left, right = (side.basis for side in sides)
    x = left.T @ x if left.ndim else x
    return x @ right if right.ndim else x


def rotate_back(x: jax.Array, sides: Sides) -> jax.Array:
    """``Q_L x Q_R'``."""
    if not sides:
        return x
    left, right = (side.basis for side in sides)
    x = left @ x if left.ndim else x
    return x @ right.T if right.ndim else x


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

    def decompose(corrected, order):
        found = jnp.linalg.eigh(statistic)[1][..., ::-1]
        largest = jnp.argmax(jnp.abs(found), axis=-2, keepdims=True)
        found = found * _sign(jnp.take_along_axis(found, largest, axis=-2))  # LAPACK's sign hangs on rounding
        return jnp.where(first[:, None, None], found, corrected), jnp.where(first[:, None], same, order)

    def keep():
        return basis + jnp.zeros_like(statistic), same

    def change():
        found = jax.lax.cond(jnp.any(due & ~first), iterate, keep)
        return jax.lax.cond(jnp.any(first), decompose, lambda *found: found, *found)

    # one condition at most steps: an accelerator waits for the host at each; the first step is due too
    return jax.lax.cond(jnp.any(due), change, keep)


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
