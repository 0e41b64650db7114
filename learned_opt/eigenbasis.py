"""Shampoo's eigenbasis as SOAP keeps it: eigenvectors of running means of G G' and G' G, corrected now and then."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from .features import ema

DECAY = 0.95  # of the statistics


class Sides(NamedTuple):
    r"""Both sides of a matrix; the array of a side that is not rotated is ``[2, 1, 1]``.

    Attributes:
        left: ``[2, n, n]``, a running mean of :math:`G G^\top` and its approximate eigenvectors.
        right: ``[2, m, m]``, the same of :math:`G^\top G`.
    """

    left: jax.Array
    right: jax.Array


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
    """Whether a side is rotated."""
    return side.shape[-1] > 1


def start(x: jax.Array, *, max_dim: int, max_ratio: float, dtype) -> Sides:
    """No statistics and no rotation, for a matrix (a vector or scalar is never rotated)."""

    def side(axis: int, rotate: bool) -> jax.Array:
        if not rotate:
            return jnp.zeros((2, 1, 1), dtype)
        rows = jnp.max(jnp.zeros_like(x, dtype), 1 - axis, initial=0)  # sharded as the side is
        zeros = rows[:, None] + jnp.zeros((1, rows.size), dtype)
        return jnp.stack([zeros, zeros + jnp.eye(rows.size, dtype=dtype)])

    return Sides(*(side(axis, rotate) for axis, rotate in enumerate(rotated(x.shape, max_dim, max_ratio))))


def rotate(x: jax.Array, sides: Sides) -> jax.Array:
    r""":math:`Q_L^\top x\, Q_R` on the last two axes."""
    x = sides.left[1].T @ x if turns(sides.left) else x
    return x @ sides.right[1] if turns(sides.right) else x


def rotate_back(x: jax.Array, sides: Sides) -> jax.Array:
    r""":math:`Q_L\, x\, Q_R^\top`."""
    x = sides.left[1] @ x if turns(sides.left) else x
    return x @ sides.right[1].T if turns(sides.right) else x


def observe(sides: Sides, g: jax.Array, decay: float = DECAY) -> Sides:
    r"""Take in a gradient: :math:`L \leftarrow \beta L + (1 - \beta) G G^\top`, and :math:`R` with :math:`G^\top G`."""

    def after(side, square):
        return jnp.stack([ema(side[0], square(), decay), side[1]]) if turns(side) else side

    return Sides(after(sides.left, lambda: g @ g.T), after(sides.right, lambda: g.T @ g))


class Stack(NamedTuple):
    """What is corrected of a stack of matrices of one shape.

    Attributes:
        sides: their sides, ``[k, 2, n, n]`` and ``[k, 2, m, m]``.
        turning: what is kept in the bases' coordinates, a tree of ``[k, ..., n, m]``: turned to the new ones.
        squares: what belongs to single directions, a tree of ``[k, ..., n or 1, m or 1]``: it stays, since a direction
            goes on at its place; at a matrix's first turn, which has no directions before it, all become their mean.
    """

    sides: Sides
    turning: Any
    squares: Any


def correct(step: jax.Array, stacks: list[Stack], *, every: int) -> list[Stack]:
    """Correct the bases of some of each stack's matrices, each once in ``every`` steps, in turns.

    A basis is the identity until its first turn, an eigendecomposition then, and after that one step of the power
    method and a QR decomposition. It is a constant to derivatives: those of eigenvectors of close eigenvalues have no
    bound. Directions that no gradient has had yet are arbitrary.

    Args:
        step: int32, updates done before this one.
        stacks: all matrices; vectors pass through.
        every: steps between two corrections of a basis.

    Returns:
        The stacks after it.

    Reference:
        Vyas et al., "SOAP: Improving and stabilizing Shampoo using Adam", 2024, arXiv:2409.11321.
    """
    counts = [jax.tree.leaves(stack)[0].shape[0] for stack in stacks]
    some = [-(-count // every) for count in counts]
    # the last ones of a stack are taken where fewer are left: those before whose turn it is are not due
    turns_at = [step % every * n for n in some]
    places = [jnp.minimum(at, count - n) for at, count, n in zip(turns_at, counts, some, strict=True)]
    due = [place + jnp.arange(n) >= at for place, at, n in zip(places, turns_at, some, strict=True)]
    old = [
        jax.tree.map(lambda x, place=place, n=n: jax.lax.dynamic_slice_in_dim(x, place, n), stack)
        for stack, place, n in zip(stacks, places, some, strict=True)
    ]
    # sides of one size together, whatever stack they are of
    by_size: dict[Any, list[tuple[int, int]]] = {}
    for i, stack in enumerate(old):
        for j, side in enumerate(stack.sides):
            if turns(side):
                by_size.setdefault((side.shape[2:], side.dtype), []).append((i, j))
    found: dict[tuple[int, int], jax.Array] = {}
    for members in by_size.values():
        sides = jax.lax.stop_gradient(jnp.concatenate([old[i].sides[j] for i, j in members]))
        now = jnp.concatenate([due[i] for i, _ in members])
        bases = _divided(_correct, jnp.broadcast_to(step < every, now.shape), now, sides[:, 0], sides[:, 1])
        found |= dict(zip(members, jnp.split(bases, np.cumsum([some[i] for i, _ in members])[:-1]), strict=True))
    new = []
    for i, (stack, part) in enumerate(zip(stacks, old, strict=True)):
        if not any(turns(side) for side in stack.sides):
            new.append(stack)
            continue
        moved = _moved(part, [found.get((i, j)) for j in range(2)], step < every, jnp.any(due[i]))
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=places[i], axis=0)
        new.append(jax.tree.map(put, stack, moved))
    return new


def _moved(part: Stack, found: list, first: jax.Array, due: jax.Array) -> Stack:
    """Matrices in their new bases: ``found`` holds those of both sides, ``None`` where none turns."""
    sides = Sides(
        *(side if new is None else jnp.stack([side[:, 0], new], 1) for side, new in zip(part.sides, found, strict=True))
    )

    def move(turning, squares):
        turned = jax.tree.map(lambda x: jax.vmap(_turn)(x, part.sides, sides), turning)
        return turned, jax.tree.map(lambda x: jnp.where(first, _mean(x), x), squares)

    # lanes of other ages compute it at every step, which costs what rotating anew would
    return Stack(sides, *jax.lax.cond(due, move, lambda *same: same, part.turning, part.squares))


def _turn(x: jax.Array, old: Sides, new: Sides) -> jax.Array:
    """What :func:`rotate` by the old bases gave, by the new ones."""
    x = (new.left[1].T @ old.left[1]) @ x if turns(old.left) else x
    return x @ (old.right[1].T @ new.right[1]) if turns(old.right) else x


def _mean(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.mean(x, (-2, -1), keepdims=True), x.shape)


def _divided(function: Callable, *stacks: jax.Array) -> Any:
    """``function(*stacks)``, its rows divided over the devices of the mesh that ``jax.set_mesh`` names.

    Without a mesh every device that holds the stacks decomposes all of them: XLA divides products, but no
    decompositions.
    """
    axes = _dividing()
    if not axes:
        return function(*stacks)
    count = stacks[0].shape[0]
    more = -count % math.prod(axes.values())
    over_devices = functools.partial(jax.lax.with_sharding_constraint, shardings=PartitionSpec(tuple(axes)))
    padded = [jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)) for x in stacks]
    return jax.tree.map(lambda x: over_devices(x)[:count], function(*map(over_devices, padded)))


def _dividing() -> dict[str, int]:
    """The axes of the mesh over which stacks are divided, and their sizes; none without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == jax.sharding.AxisType.Auto}


def _one_by_one(decompose: Callable, matrices: jax.Array) -> Any:
    """``decompose`` of a stack ``[k, n, n]``; on CPUs of one matrix a device after another.

    A stack takes jaxlib before 0.11.2 several tasks of XLA's thread pool, for which another task of that pool waits: as
    many decompositions at once as the pool has threads, of one program or on several devices, and all wait for ever.
    """
    devices = math.prod(_dividing().values())

    def loop(matrices):
        rows = matrices.reshape(devices, -1, *matrices.shape[1:])
        found = jax.lax.map(decompose, rows.swapaxes(0, 1))
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), found)

    return jax.lax.platform_dependent(matrices, cpu=loop, default=decompose)


@jax.custom_batching.custom_vmap
def _correct(first, due, statistic, basis):
    """The bases of a stack of sides, ``[k, n, n]``.

    All lanes of all ``vmap`` come here as one stack, so that a decomposition is computed only when one of them is due:
    `cond` under `vmap` would compute it at every step.
    """

    def iterate():
        turned = statistic @ basis
        # The power method pulls the first columns towards the largest eigenvalues: they must be there already, or
        # directions of little curvature would inherit the steps of those of much.
        order = jnp.argsort(-jnp.sum(basis * turned, axis=-2), axis=-1)
        found, r = _one_by_one(jnp.linalg.qr, jnp.take_along_axis(turned, order[:, None], axis=-1))
        found = found * _sign(jnp.diagonal(r, axis1=-2, axis2=-1))[:, None]  # the same way round as before
        found = jnp.take_along_axis(found, jnp.argsort(order)[:, None], axis=-1)  # and at the same place
        return jnp.where(due[:, None, None], found, basis)

    def decompose(corrected):
        found = _one_by_one(jnp.linalg.eigh, statistic)[1][..., ::-1]
        largest = jnp.argmax(jnp.abs(found), axis=-2, keepdims=True)
        found = found * _sign(jnp.take_along_axis(found, largest, axis=-2))  # LAPACK's sign hangs on rounding
        return jnp.where((due & first)[:, None, None], found, corrected)

    def keep():
        return basis + jnp.zeros_like(statistic)  # inside shard_map it varies over the devices that both vary over

    def change():
        found = jax.lax.cond(jnp.any(due & ~first), iterate, keep)
        return jax.lax.cond(jnp.any(due & first), decompose, lambda found: found, found)

    # one condition at most steps: an accelerator waits for the host at each
    return jax.lax.cond(jnp.any(due), change, keep)


@_correct.def_vmap
def _correct_lanes(size, batched, *arguments):
    lanes = [
        x if has_lanes else jnp.broadcast_to(x, (size, *x.shape))
        for x, has_lanes in zip(arguments, batched, strict=True)
    ]
    found = _correct(*(x.reshape(-1, *x.shape[2:]) for x in lanes))
    return found.reshape(size, -1, *found.shape[1:]), True


def _sign(x: jax.Array) -> jax.Array:
    return jnp.where(x < 0, -1, 1).astype(x.dtype)
