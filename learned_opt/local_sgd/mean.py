"""Weighted means over the workers, whatever maps them: plain, compressed, and counted in bytes."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import communication


class WorkerMean(NamedTuple):
    """Weighted means over the workers; what each one contributes is noted in ``sent``."""

    axes: tuple[str, ...]
    weight: jax.Array | None
    sent: list[int]

    def scalars(self, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the total weight and the weighted means of a vector, in one small all-reduce."""
        if self.weight is None:
            total = jnp.asarray(_axis_size(self.axes), values.dtype)
            return total, self._psum(values) / total
        alive = jnp.where(self.weight > 0, self.weight * values, 0)
        summed = self._psum(jnp.concatenate([self.weight[None], alive]))
        return summed[0], summed[1:] / jnp.where(summed[0] > 0, summed[0], 1)

    def mean(self, tree: Any, total: jax.Array) -> Any:
        """Average floating arrays over the workers; anything else is returned as it is."""

        def one(x: Any) -> Any:
            if not _is_float(x):
                return x
            return (self._psum(self._weigh(x.astype(wide(x)))) / self._divisor(total, wide(x))).astype(x.dtype)

        return jax.tree.map(one, tree)

    def compressed_mean(
        self, deltas: Any, error: Any, code: communication.Compression, total: jax.Array, decay: float = 1.0
    ) -> tuple[Any, Any]:
        """Return the mean of the deltas (and ``decay`` of what was left unsent) as decoded, and what is now left."""
        code = communication.both_parts(code)

        def one(delta: jax.Array, left: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            wanted = delta if left is None else delta + decay * left
            if self.weight is not None:
                wanted = jnp.where(self.weight > 0, wanted, 0)
            like = jax.ShapeDtypeStruct(delta.shape, delta.dtype)
            message = code.encode(self._weigh(wanted))
            mine = code.decode(message, like)
            if code.gather:
                summed = self._gather_sum(message, lambda m: code.decode(m, like))
            else:
                summed = code.decode(jax.tree.map(self._psum, message), like)
            if left is None:
                unsent = delta
            elif self.weight is None:
                unsent = wanted - mine
            else:
                weight = self.weight.astype(delta.dtype)
                unsent = jnp.where(weight > 0, wanted - mine / jnp.where(weight > 0, weight, 1), left)
            return summed / self._divisor(total, delta.dtype), unsent

        treedef: Any = jax.tree.structure(deltas)
        leaves = jax.tree.leaves(deltas)
        lefts = [None] * len(leaves) if error is None else jax.tree.leaves(error)
        pairs = [one(delta, left) for delta, left in zip(leaves, lefts, strict=True)]
        return treedef.unflatten([mean for mean, _ in pairs]), treedef.unflatten([left for _, left in pairs])

    def _weigh(self, x: jax.Array) -> jax.Array:
        if self.weight is None:
            return x
        return jnp.where(self.weight > 0, self.weight.astype(x.dtype) * x, 0)  # a dead worker's NaN stays its own

    def _divisor(self, total: jax.Array, dtype: Any) -> jax.Array:
        return jnp.where(total > 0, total, 1).astype(dtype)

    def _psum(self, x: jax.Array) -> jax.Array:
        self.sent.append(communication.payload_bytes(x))
        return jax.lax.psum(x, self.axes)

    def _gather_sum(self, message: Any, decode: Callable[[Any], jax.Array]) -> jax.Array:
        self.sent.append(communication.payload_bytes(message))
        for name in self.axes:
            kind = "invarying" if tracked_axes((name,)) else "varying"
            message = jax.tree.map(functools.partial(jax.lax.all_gather, axis_name=name, to=kind), message)
            decode = functools.partial(_decode_and_add, decode)
        return decode(message)


def _decode_and_add(decode: Callable[[Any], jax.Array], messages: Any) -> jax.Array:
    # one after the other: XLA on CPU takes 600 times as long to decode all at once and sum (10^7 elements of int8)
    def add(total: jax.Array, message: Any) -> tuple[jax.Array, None]:
        return total + decode(message), None

    first, rest = (jax.tree.map(lambda m, part=part: m[part], messages) for part in (0, slice(1, None)))
    return jax.lax.scan(add, decode(first), rest)[0]


def _is_float(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)


def wide(x: jax.Array) -> Any:
    """Return the dtype in which x is summed: float32 or wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _axis_size(axes: tuple[str, ...]) -> int:
    return math.prod(jax.lax.axis_size(name) for name in axes)


def varying(x: Any) -> frozenset[str]:
    """Return the manual mesh axes along which shard_map takes x to differ."""
    return jax.typeof(x).manual_axis_type.varying


def tracked_axes(axes: tuple[str, ...]) -> frozenset[str]:
    """Return the axes on which shard_map tracks what differs; under vmap or without check_vma, none."""
    try:
        return frozenset(name for name in axes if name in varying(jax.lax.axis_index(name)))
    except NameError:
        raise ValueError(
            f"local_sgd: no axis {' × '.join(axes)!r} here; call update inside jax.vmap(..., axis_name=...) or "
            "jax.shard_map over a mesh with that axis (map_workers does either), or pass the axis_name you use"
        ) from None


def vary(tree: Any, tracked: frozenset[str]) -> Any:
    """Mark every leaf as differing across the workers, so that both branches of a cond agree."""

    def one(x: jax.Array) -> jax.Array:
        missing = tuple(name for name in tracked if name not in varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)
