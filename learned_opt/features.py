"""What learned rules see of a tensor: accumulators, factored second moments, clean gradients.

All of it is per tensor and element-wise or a reduction over axes; nothing is ever concatenated into an
``[elements, features]`` array. A feature that is constant along an axis keeps that axis with size one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Saved rules record it. Raise it when a change here makes trained weights mean something else.
VERSION = 1

Tree = Any

_ALONE = 1 << 14  # elements from which on a tensor waits for the one before it
_LARGE = 1 << 16  # elements from which on a matrix is summed by blocks of rows
_BLOCK = 1 << 15  # elements of a block


def on_cpu() -> bool:
    """Whether JAX runs on CPUs by default: what makes fast loops there makes accelerators wait, or compile forever."""
    return jax.default_backend() == "cpu"


def fenced(x: jax.Array) -> jax.Array:
    """``x``, past which an accelerator's compiler does not look.

    For means by which the very numbers are scaled that they were taken of: XLA sees a softmax in those, and tries to
    put all that is computed from the result into one kernel with it, for minutes.
    """
    return x if on_cpu() else jax.lax.optimization_barrier(x)


def compute_dtype(dtype) -> jnp.dtype:
    """The dtype that a rule computes in: that of the parameters, and float32 at least.

    >>> compute_dtype(jnp.bfloat16)
    dtype('float32')
    """
    return jnp.promote_types(dtype, jnp.float32)


def common_dtype(params: Tree) -> jnp.dtype:
    """The dtype for what concerns all tensors: the widest that any is computed in."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(params))


def check_params(params: Tree) -> None:
    """Refuse parameters that no gradient descent can move.

    Raises:
        ValueError: naming the first leaf that is not of a real floating dtype.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"learned rules update real floating-point parameters, but params{name} is {dtype}: "
                "leave it out with optax.masked or optax.multi_transform"
            )


def required_params(params: Tree | None, rule: str) -> Tree:
    """``params``, or a ``ValueError`` that tells how to pass them."""
    if params is None:
        raise ValueError(f"{rule} reads the parameters: call update(gradients, state, params)")
    return params


def zeros(params: Tree) -> Tree:
    """Zeros of the parameters' shapes, in the dtype that rules compute in."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=compute_dtype(jnp.result_type(x))), params)


def map_tensors(update: Callable[..., Sequence[jax.Array]], updates: Tree, *trees: Tree) -> list[Tree]:
    """Run ``update`` on every tensor and sort what it returns back into trees.

    ``None`` in place of a gradient, and tensors without elements, pass through unchanged. On a CPU large tensors take
    turns: left to itself the compiler runs the first loop of all of them, then the second of all, each time over memory
    that no cache holds, and keeps the temporaries of all. Not elsewhere: with parameters sharded over accelerators a
    turn would wait for the reductions of the one before.

    Args:
        update: ``(gradient, parameter, *accumulators) -> (update, *new accumulators)``.
        updates: the gradients.
        *trees: the parameters, then one tree an accumulator, all with the gradients' structure.

    Returns:
        One tree for every value that ``update`` returns.
    """
    structure: Any
    gradients, structure = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
    columns = [structure.flatten_up_to(tree) for tree in trees]
    results: list[list] = [[] for _ in trees]
    zero: Any = 0.0  # of the large tensor before
    for gradient, param, *accumulators in zip(gradients, *columns, strict=True):
        idle = gradient is None or gradient.size == 0
        in_turn = not idle and gradient.size >= _ALONE and on_cpu()
        if in_turn:
            gradient = gradient + jnp.asarray(zero, gradient.dtype)
        new = (gradient, *accumulators) if idle else update(gradient, param, *accumulators)
        if in_turn:
            zero = zero_of(new[0])
        for result, value in zip(results, new, strict=True):
            result.append(value)
    return [structure.unflatten(result) for result in results]


def scan_blocks(body: Callable, init: Any, starts: jax.Array) -> tuple:
    """:func:`jax.lax.scan` of ``body`` over where blocks start, each of whose operations may use all cores.

    From JAX 0.11.1 on, XLA's CPU compiler makes a whole loop one kernel, and that runs on one core, unless something
    in the loop can not be part of a kernel. Sorting is: here a pair.
    """

    def turn(carry, start):
        return body(carry, jax.lax.sort(jnp.stack([start, start]))[0])

    return jax.lax.scan(turn, init, starts)


def zero_of(x: jax.Array) -> jax.Array:
    """A scalar 0 that is known only once ``x`` is."""
    first = x.reshape(-1)[:1]
    return jax.lax.stop_gradient(0 * jnp.sum(jnp.where(jnp.isfinite(first), first, jnp.zeros_like(first))))


def clean(gradient: jax.Array, limit: float | jax.Array, dtype) -> jax.Array:
    """The gradient as ``dtype``, non-finite entries counted as 0, the others clipped to ``[-limit, limit]``."""
    g = gradient.astype(dtype)
    return jnp.where(jnp.isfinite(g), jnp.clip(g, -limit, limit), jnp.zeros((), dtype))


def ema(old: jax.Array, new: jax.Array, decay) -> jax.Array:
    """Exponential moving average ``b old + (1 - b) new``, in the dtype of ``new``; no bias correction.

    ``1 - b`` is taken in that dtype: from the rounded decay, so that the two weights add up to one.
    """
    b = jnp.asarray(decay, new.dtype)
    return b * old.astype(new.dtype) + (1 - b) * new


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The two axes ``(d1, d0)`` of a factored second moment: the second largest and the largest.

    Equal sizes keep their order, the later axis being ``d0``. ``None`` below rank 2, where nothing is factored.

    >>> factored_axes((3, 3, 64, 32))
    (3, 2)
    """
    if len(shape) < 2:
        return None
    order = np.argsort(np.asarray(shape), kind="stable")
    return int(order[-2]), int(order[-1])


def factored_zeros(params: Tree, count: int) -> tuple[Tree, Tree]:
    """Zero factored second moments for ``count`` decays.

    Returns:
        Trees ``(row, col)``. For rank >= 2 their leaves are ``[count, *shape]`` with axis ``d0`` (``d1`` in ``col``)
        of size one; below, ``row`` is the whole second moment ``[count, *shape]`` and ``col`` an unused ``[1]``.
    """

    def make(x, by_row):
        shape, dtype = list(jnp.shape(x)), compute_dtype(jnp.result_type(x))
        axes = factored_axes(tuple(shape))
        if axes is None:
            return jnp.zeros_like(x, dtype, (count, *shape) if by_row else (1,))
        shape[axes[1] if by_row else axes[0]] = 1
        return jnp.zeros_like(x, dtype, (count, *shape))

    return jax.tree.map(lambda x: make(x, True), params), jax.tree.map(lambda x: make(x, False), params)


def per_decay(decays, rank: int, dtype) -> jax.Array:
    """Decays ``[k]`` shaped ``[k, 1, ..., 1]`` to go with a stack of ``k`` tensors of ``rank``."""
    return jnp.reshape(jnp.asarray(decays, dtype), (-1, *(1,) * rank))


def factored_update(row: jax.Array, col: jax.Array, g: jax.Array, decays) -> tuple[jax.Array, jax.Array]:
    """Factored second moments after the gradient ``g`` (Shazeer & Stern 2018, arXiv:1804.04235).

    ``vrow <- c vrow + (1 - c) mean_d0(g^2 + 1e-30)``, likewise ``vcol`` over ``d1``; below rank 2 the whole
    ``v <- c v + (1 - c) (g^2 + 1e-30)``.

    Args:
        row: as :func:`factored_zeros` made it, any float dtype.
        col: likewise.
        g: the gradient ``[*shape]``; its dtype is that of the result.
        decays: ``[k]`` in ``[0, 1]``.
    """
    square, least = g * g, jnp.asarray(1e-30, g.dtype)
    axes = factored_axes(g.shape)
    b = per_decay(decays, g.ndim, g.dtype)
    if axes is None:
        return b * row.astype(g.dtype) + (1 - b) * (square + least)[None], col.astype(g.dtype)
    if g.ndim == 2 and g.size >= _LARGE and on_cpu():
        mean_d0, mean_d1 = _means(g, axes)
    else:
        mean_d1, mean_d0 = (jnp.mean(square, axis, keepdims=True) for axis in axes)
    mean_d0, mean_d1 = mean_d0 + least, mean_d1 + least  # of the means, so that sums of squares need no storage
    row = b * row.astype(g.dtype) + (1 - b) * mean_d0[None]
    col = b * col.astype(g.dtype) + (1 - b) * mean_d1[None]
    return row, col


def _means(g: jax.Array, axes: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Means of ``g^2`` of a large matrix over ``d0`` and over ``d1``, by blocks: ``g^2`` is never stored."""
    rows = max(1, _BLOCK // g.shape[1])

    def add(total, start, rows=rows):
        block = jax.lax.dynamic_slice_in_dim(g, start, rows)
        square = block * block
        return total + jnp.sum(square, 0, keepdims=True), jnp.mean(square, 1, keepdims=True)

    count, rest = divmod(g.shape[0], rows)
    total, means = scan_blocks(add, jnp.zeros_like(g[:1]), rows * jnp.arange(count))
    means = means.reshape(-1, 1)
    if rest:
        total, tail = add(total, count * rows, rest)
        means = jnp.concatenate([means, tail])
    along_rows, along_columns = means, total / g.shape[0]
    return (along_rows, along_columns) if axes == (0, 1) else (along_columns, along_rows)


def factored_scales(row: jax.Array, col: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """``(R, C)`` such that ``g R_k C_k`` is the gradient preconditioned by the k-th factored second moment.

    ``R = rsqrt(max(vrow / (mean_d1(vrow) + 1e-9), 1e-9))``, ``C = rsqrt(max(vcol, 1e-9))``. Below rank 2
    ``R = rsqrt(max(v + 1e-9, 1e-9))`` alone, and ``C`` is meaningless.
    """
    axes = factored_axes(shape)
    if axes is None:
        return jax.lax.rsqrt(jnp.maximum(row + 1e-9, 1e-9)), col
    mean = fenced(jnp.mean(row, axes[0] + 1, keepdims=True))
    R = jax.lax.rsqrt(jnp.maximum(row / (mean + 1e-9), 1e-9))
    return R, jax.lax.rsqrt(jnp.maximum(col, 1e-9))


# An order of the columns below in which those that need the root of the second moment are next to each other.
FACTORED_COLUMNS_ORDER = (*range(7), 11, 12, 13, 27, 28, 29, 7, 8, 9, 10, 14, *range(15, 27))


def roots(moments: list[jax.Array], size: int) -> list[jax.Array]:
    """``rsqrt(x + 1e-8)`` of factored moments of a tensor of ``size`` elements.

    At once where they are smaller than it: a kernel for each would compile slower.
    """
    if not moments or moments[0].size == size:
        return [jax.lax.rsqrt(x + 1e-8) for x in moments]
    return list(jax.lax.rsqrt(jnp.stack(moments) + 1e-8))


def factored_columns(g, p, m, r, R, C, row, col, *, eps: float) -> list[jax.Array]:
    """Columns of the Celo and VeLO rules, with three momenta, one second moment and three factored ones.

    ``g, clip(g, +-.1), p, m (3), r, m s (3), s, g R C (3), g s`` with ``s = rsqrt(r + eps)``; given rows and columns,
    also ``row (3), col (3), rsqrt(row + 1e-8) (3), rsqrt(col + 1e-8) (3), m R C (3)``.

    Args:
        g: the gradient, of the tensor's shape.
        p: the parameters, likewise.
        m: the momenta, a list of such.
        r: the second moment.
        R: list as :func:`factored_scales` gives it, or of the products ``R C``.
        C: the other list, or empty.
        row: list, the factored second moments by row; possibly empty.
        col: the same by column.
        eps: under the root.
    """
    scales = [a * b for a, b in zip(R, C, strict=True)] if C else R
    columns, last = _factored_products(g, jnp.clip(g, -0.1, 0.1), p, m, r, jax.lax.rsqrt(r + eps), scales)
    if row:
        columns += [*row, *col, *roots(row, g.size), *roots(col, g.size), *last]
    return columns


def factored_squares(g, p, m, r, R, C, row, col, *, eps: float) -> list[jax.Array]:
    """Squares of :func:`factored_columns`, without roots. The arguments are the same."""
    R, C, m = ([x * x for x in xs] for xs in (R, C, m))
    g, p, scales = g * g, p * p, [a * b for a, b in zip(R, C, strict=True)] if C else R
    columns, last = _factored_products(g, jnp.minimum(g, 0.01), p, m, r * r, 1 / (r + eps), scales)
    if row:
        both = [*row, *col]
        columns += [*(x * x for x in both), *(1 / (x + 1e-8) for x in both), *last]
    return columns


def _factored_products(g, clipped, p, m, r, s, scales) -> tuple[list[jax.Array], list[jax.Array]]:
    """The columns that are products, the last three apart."""
    columns = [g, clipped, p, *m, r, *(x * s for x in m), s, *(g * x for x in scales), g * s]
    return columns, [x * y for x, y in zip(m, scales, strict=True)]


def as_matrix(x: jax.Array) -> jax.Array:
    """A scalar or vector viewed as a matrix, in a shape that is fast to sum over."""
    for rows in (x.size // 1024 if x.size % 4096 == 0 else 0, 4 if x.size % 4 == 0 else 0, 1):
        if rows:
            return x.reshape(rows, x.size // rows)
    return x.reshape(1, 0)


def stack_of_matrices(x: jax.Array, shape: tuple[int, ...] | None) -> jax.Array:
    """``[..., A, B]`` as ``[L, A, B]``, broadcast to ``shape`` first if one is given."""
    x = x if shape is None else jnp.broadcast_to(x, shape)
    return x.reshape(-1, *x.shape[-2:])


def unit_rms(x: jax.Array, eps: float, axes: tuple[int, ...]) -> jax.Array:
    """``x rsqrt(eps + mean(x^2))`` over ``axes``."""
    return x * jax.lax.rsqrt(eps + fenced(jnp.mean(x * x, axes, keepdims=True)))


def truncated_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Initial weights of a linear layer: truncated normal, standard deviation ``1 / sqrt(fan_in)``."""
    return jax.random.truncated_normal(key, -2.0, 2.0, shape) / math.sqrt(fan_in)
