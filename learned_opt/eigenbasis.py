"""Shampoo's eigenbasis as SOAP keeps it: eigenvectors of running means of G G' and G' G, corrected now and then."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

DECAY = 0.95  # of the statistics


class Sides(NamedTuple):
    """Both sides of a matrix; the arrays of a side that is not rotated are ``[1, 1]``.

    Attributes:
        left: running mean of :math:`G G^\\top`, ``[n, n]``.
        right: of :math:`G^\\top G`, ``[m, m]``.
        left_basis: approximate eigenvectors of ``left`` by falling eigenvalue, ``[n, n]``.
        right_basis: of ``right``.
    """

    left: jax.Array
    right: jax.Array
    left_basis: jax.Array
    right_basis: jax.Array


def as_matrix(x: jax.Array) -> jax.Array:
    """A tensor of rank >= 2 as the matrix of its last axis against the others; a vector or a scalar as it is."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.ndim > 2 else x


def rotated(shape: tuple[int, ...], max_dim: int, max_ratio: float) -> tuple[bool, bool]:
    """Which sides of a matrix are rotated: those of at most ``max_dim``, and of ``max_ratio`` times the other one."""
    if len(shape) != 2:
        return False, False
    n, m = shape
    return 1 < n <= min(max_dim, max_ratio * m), 1 < m <= min(max_dim, max_ratio * n)


def turns(side: jax.Array) -> bool:
    """Whether a side, given by its statistic or basis, is rotated."""
    return side.shape[-1] > 1


def start(x: jax.Array, *, max_dim: int, max_ratio: float, dtype) -> Sides:
    """No statistics and no rotation, for a matrix (a vector or scalar is never rotated)."""

    def zeros(axis: int, side: bool) -> jax.Array:
        if not side:
            return jnp.zeros((1, 1), dtype)
        rows = jnp.max(jnp.zeros_like(x, dtype), 1 - axis, initial=0)  # sharded as the side is
        return rows[:, None] + jnp.zeros((1, rows.size), dtype)

    statistics = [zeros(axis, side) for axis, side in enumerate(rotated(x.shape, max_dim, max_ratio))]
    return Sides(*statistics, *(s + jnp.eye(s.shape[0], dtype=dtype) for s in statistics))


def rotate(x: jax.Array, sides: Sides) -> jax.Array:
    r""":math:`Q_L^\top x\, Q_R` on the last two axes."""
    x = sides.left_basis.T @ x if turns(sides.left) else x
    return x @ sides.right_basis if turns(sides.right) else x


def rotate_back(x: jax.Array, sides: Sides) -> jax.Array:
    r""":math:`Q_L\, x\, Q_R^\top`."""
    x = sides.left_basis @ x if turns(sides.left) else x
    return x @ sides.right_basis.T if turns(sides.right) else x


def observe(sides: Sides, g: jax.Array, decay: float = DECAY) -> Sides:
    r"""Take in a gradient: :math:`L \leftarrow \beta L + (1 - \beta) G G^\top`, and :math:`R` with :math:`G^\top G`."""
    b = jnp.asarray(decay, g.dtype)
    left = b * sides.left + (1 - b) * (g @ g.T) if turns(sides.left) else sides.left
    right = b * sides.right + (1 - b) * (g.T @ g) if turns(sides.right) else sides.right
    return sides._replace(left=left, right=right)


def correct(step: jax.Array, sides: Sides, turning: Any, squares: Any, *, every: int) -> tuple[Sides, Any, Any]:
    """Correct the bases of some of a stack of matrices, each once in ``every`` steps, in turns.

    A basis is the identity until its first turn, an eigendecomposition then, and after that one step of the power
    method and a QR decomposition. It is a constant to derivatives: those of eigenvectors of close eigenvalues have no
    bound. Directions that no gradient has had yet are arbitrary.

    Args:
        step: int32, updates done before this one.
        sides: of the stack, ``[k, n, n]``.
        turning: what is kept in the bases' coordinates, a tree of ``[k, n, m]``: turned to the new ones.
        squares: what belongs to single directions, a tree of ``[k, ..., n or 1, m or 1]``: moved to those that go on
            with them; at the first turn their mean.
        every: steps between two corrections of a basis.

    Returns:
        ``(sides, turning, squares)`` after it.

    Reference:
        Vyas et al., "SOAP: Improving and stabilizing Shampoo using Adam", 2024, arXiv:2409.11321.
    """
    if not turns(sides.left) and not turns(sides.right):
        return sides, turning, squares
    k = sides.left.shape[0]
    some = -(-k // every)
    places = step % every * some + jnp.arange(some)
    due, first = places < k, jnp.broadcast_to(step < every, places.shape)
    whole = (sides, turning, squares)
    old, turning, squares = jax.tree.map(lambda x: x.at[places].get(mode="clip"), whole)
    bases, orders = [], []
    for statistic, basis in ((old.left, old.left_basis), (old.right, old.right_basis)):
        constants = jax.lax.stop_gradient((first, due, statistic, basis))
        new, order = _correct(*constants) if turns(statistic) else (basis, None)
        bases.append(new)
        orders.append(order)
    new_sides = old._replace(left_basis=bases[0], right_basis=bases[1])

    def move(turning, squares):
        return (
            jax.tree.map(lambda x: jax.vmap(_turn)(x, old, new_sides), turning),
            jax.tree.map(lambda x: jnp.where(_over(first, x), _mean(x), _permute(x, *orders)), squares),
        )

    # lanes of other ages compute it at every step, which costs what rotating anew would
    turning, squares = jax.lax.cond(jnp.any(due), move, lambda *same: same, turning, squares)
    new = (new_sides, turning, squares)
    return jax.tree.map(lambda x, y: x.at[places].set(y, mode="drop"), whole, new)


def _turn(x: jax.Array, old: Sides, new: Sides) -> jax.Array:
    """What :func:`rotate` by the old bases gave, by the new ones."""
    x = (new.left_basis.T @ old.left_basis) @ x if turns(old.left) else x
    return x @ (old.right_basis.T @ new.right_basis) if turns(old.right) else x


def _permute(x: jax.Array, left: jax.Array | None, right: jax.Array | None) -> jax.Array:
    for axis, order in ((-2, left), (-1, right)):
        if order is not None and x.shape[axis] > 1:
            shape = [1] * x.ndim
            shape[0], shape[axis] = order.shape
            x = jnp.take_along_axis(x, order.reshape(shape), axis=axis)
    return x


def _mean(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.mean(x, (-2, -1), keepdims=True), x.shape)


def _over(flags: jax.Array, x: jax.Array) -> jax.Array:
    return flags.reshape(-1, *(1,) * (x.ndim - 1))


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
        now = due & first
        return jnp.where(now[:, None, None], found, corrected), jnp.where(now[:, None], same, order)

    def keep():
        return basis + jnp.zeros_like(statistic), same

    def change():
        found = jax.lax.cond(jnp.any(due & ~first), iterate, keep)
        return jax.lax.cond(jnp.any(due & first), decompose, lambda *found: found, *found)

    # one condition at most steps: an accelerator waits for the host at each
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
