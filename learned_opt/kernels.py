"""The per-parameter network of the learned rules: one door, behind it a form for each platform.

Each parameter's columns, normalised by their RMS over the tensor, go through a small ReLU network. No
``[parameters, columns]`` array is built: a column is an array of the tensor's shape, and its RMS is taken into the
first layer's weights. A column that is constant along an axis (row and column statistics) keeps that axis at size one
and enters as a bias per row or column.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Columns = Callable[..., list[jax.Array]]

_WIDE = 800  # multiply-adds of a network from which on matrix products beat sums, and compile far sooner
_BLOCK = 8192  # elements of a large tensor whose hidden units are in memory at once
_FEW = 8  # units of which sums are better than products on an accelerator
_LANES = 8  # of a vector register
_WIDEST = 16  # of any
_SHORT = 512  # terms of a sum that may be added one by one: beyond them a float32 loses digits
_HIGHEST = jax.lax.Precision.HIGHEST
_PALLAS = os.environ.get("LEARNED_OPT_PALLAS") == "1"  # read before anything is compiled, so that nothing gets stale
_PALLAS_UNITS = 32  # of a layer at most: more do not fit into registers


class Layers(NamedTuple):
    """A ReLU network.

    Attributes:
        first: ``(w [columns, h], b [h])``.
        hidden: pairs ``(w [h, h'], b [h'])``.
        last: ``(w [h', outputs], b [outputs])``.
    """

    first: tuple[jax.Array, jax.Array]
    hidden: tuple[tuple[jax.Array, jax.Array], ...]
    last: tuple[jax.Array, jax.Array]


def on_cpu() -> bool:
    """Whether JAX runs on CPUs by default: what is fast there compiles forever on accelerators."""
    return jax.default_backend() == "cpu"


def in_pallas(x: jax.Array, layers: Layers) -> bool:
    """Whether a network goes through the kernels of :mod:`learned_opt.pallas_kernels`: decided here and nowhere else.

    It does in processes that are started with ``LEARNED_OPT_PALLAS=1``, on GPUs and, interpreted, on CPUs; not inside
    ``shard_map``, nor for networks with layers of more than 32 units.

    Args:
        x: the tensor.
        layers: the network.
    """
    if not _PALLAS or jax.default_backend() not in ("gpu", "cpu"):
        return False
    return max(b.size for _, b in (layers.first, *layers.hidden)) <= _PALLAS_UNITS and not _varies(x)


def _varies(x: jax.Array) -> bool:
    """Whether ``x`` is a device's own, inside ``shard_map``."""
    return bool(jax.typeof(x).manual_axis_type.varying)


def column_mlp(
    columns_of: Columns,
    inputs: tuple,
    layers: Layers,
    *,
    eps: float,
    outputs: int = 1,
    finish: Callable[[list[jax.Array]], list[jax.Array]] = list,
    squares_of: Columns | None = None,
) -> list[jax.Array]:
    r"""Apply a ReLU network to every parameter of a tensor.

    Its inputs are :math:`x_i = c_i (\epsilon + \mathrm{mean}(c_i^2))^{-1/2}` for each column :math:`c_i`, the mean over
    the whole tensor.

    Args:
        columns_of: ``(*inputs) -> columns``, element by element; each of the tensor's shape, or with axes of size one
            along which it is constant.
        inputs: arrays (or lists of arrays) of the tensor's rank, the first of its full shape.
        layers: the network, one row of ``first`` per column.
        eps: see above.
        outputs: how many of the last layer's outputs to compute.
        finish: what is made of them, element by element.
        squares_of: ``(*inputs) -> the columns' squares``, where those are cheaper than the columns are.

    Returns:
        ``finish`` of ``outputs`` arrays, each of the tensor's shape.

    Example:
        >>> w, b = jnp.eye(2), jnp.zeros(2)
        >>> layers = Layers((w, b), (), (jnp.ones((2, 1)), jnp.zeros(1)))
        >>> (y,) = column_mlp(lambda x: [x, -x], (jnp.array([3.0, -3.0]),), layers, eps=0.0)
        >>> print(y)
        [1. 1.]
    """
    form = plain_column_mlp
    if in_pallas(inputs[0], layers):
        from . import pallas_kernels  # Pallas is experimental: only who asks for it imports it

        form = pallas_kernels.column_mlp
    return form(columns_of, inputs, layers, eps=eps, outputs=outputs, finish=finish, squares_of=squares_of)


def plain_column_mlp(
    columns_of: Columns,
    inputs: tuple,
    layers: Layers,
    *,
    eps: float,
    outputs: int = 1,
    finish: Callable[[list[jax.Array]], list[jax.Array]] = list,
    squares_of: Columns | None = None,
) -> list[jax.Array]:
    """:func:`column_mlp` as XLA compiles it: what the other forms are measured by, and differentiated as."""
    shape = inputs[0].shape
    if on_cpu() and len(shape) == 2 and shape[1] < _WIDEST <= shape[0]:
        # Rows too short for vector instructions: a sixth of meta-training's throughput (benchmarks/meta_training.py).
        again = functools.partial(plain_column_mlp, eps=eps, outputs=outputs, finish=finish, squares_of=squares_of)
        return [y.T for y in again(columns_of, jax.tree.map(jnp.transpose, inputs), layers)]
    columns = columns_of(*inputs)
    squares = [c * c for c in columns] if squares_of is None else squares_of(*inputs)
    layers = jax.tree.map(lambda w: w.astype(columns[0].dtype), layers)
    w, bias = layers.first
    by_shape = same_shapes(columns)
    whole = by_shape.pop(shape)
    scaled = scaled_rows(w, whole, mean_of_each([squares[i] for i in whole]), eps)
    extra = [constant_part(w, columns, squares, where, eps) for where in by_shape.values()]
    w, b = layers.last
    layers = Layers((scaled, bias), layers.hidden, (w[:, :outputs], b[:outputs]))

    def network(columns: list[jax.Array], extra: list[jax.Array]) -> list[jax.Array]:
        if not on_cpu():
            return _of_units(columns, extra, layers)
        size = sum(w.size for w, _ in (layers.first, *layers.hidden, layers.last))
        if size <= _WIDE:
            return _of_sums(columns, extra, layers)
        return _by_rows(lambda columns, extra: _of_products(columns, extra, layers), columns, extra)

    return finish(network([columns[i] for i in whole], extra))


def same_shapes(columns: list[jax.Array]) -> dict[tuple[int, ...], list[int]]:
    """Which columns there are of each shape."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, c in enumerate(columns):
        by_shape.setdefault(c.shape, []).append(i)
    return by_shape


def scaled_rows(w: jax.Array, where: list[int], means: jax.Array, eps: float) -> jax.Array:
    """``[k, h]``: the first layer's rows for ``k`` columns, times those columns' inverse RMS."""
    return w[np.array(where)] * jax.lax.rsqrt(eps + means)[:, None]


def constant_part(
    w: jax.Array, columns: list[jax.Array], squares: list[jax.Array], where: list[int], eps: float
) -> jax.Array:
    """``[h, *shape]``: what columns of one shape, constant along an axis, add to the first layer's units."""
    weights = scaled_rows(w, where, mean_of_each([squares[i] for i in where]), eps)
    return _product(weights, jnp.stack([columns[i] for i in where]))


def _product(w: jax.Array, x: jax.Array) -> jax.Array:
    """``[i, o]`` and ``[i, *shape]`` multiplied: ``[o, *shape]``."""
    return jnp.tensordot(w, x, (0, 0), precision=_HIGHEST)


@jax.custom_jvp
def _of_sums(columns: list[jax.Array], extra: list[jax.Array], layers: Layers) -> list[jax.Array]:
    """The network as sums of scalar x array, which a CPU's compiler makes one loop of."""
    h = columns
    for i, (w, b) in enumerate((layers.first, *layers.hidden, layers.last)):
        h = [jax.nn.relu(x) for x in h] if i else h
        units = [b[j] + sum(x[j] for x in extra) if not i else b[j] for j in range(b.size)]
        for weights, x in zip(w, h, strict=True):
            units = [unit + weight * x for unit, weight in zip(units, weights, strict=True)]
        h = units
    return h


@_of_sums.defjvp
def _of_sums_jvp(primals, tangents):
    """Derivatives of the products, which are the same: those of the sums would be a reduction for every weight."""
    return jax.jvp(_of_products, primals, tangents)


def _of_products(columns: list[jax.Array], extra: list[jax.Array], layers: Layers) -> list[jax.Array]:
    """The network as matrix products over stacked columns."""
    h, tail = jnp.stack(columns), (1,) * columns[0].ndim
    for i, (w, b) in enumerate((layers.first, *layers.hidden, layers.last)):
        h = _product(w, jax.nn.relu(h) if i else h) + b.reshape(-1, *tail)
        h = h + sum(extra) if extra and not i else h
    return list(h)


def _by_rows(network: Callable, columns: list[jax.Array], extra: list[jax.Array]) -> list[jax.Array]:
    """``network(columns, extra)``, some rows of a large matrix at a time: its hidden units are never stored whole."""
    shape = columns[0].shape
    if len(shape) != 2 or math.prod(shape) <= 2 * _BLOCK:
        return network(columns, extra)
    rows = max(1, _BLOCK // shape[1])
    along = [jnp.moveaxis(x, 1, 0) for x in extra if x.shape[1] == shape[0]]  # [A, h, 1]
    across = [x for x in extra if x.shape[1] != shape[0]]

    def one_row(row):
        columns, along = row
        return [x[0] for x in network([c[None] for c in columns], [x[:, None] for x in along] + across)]

    return jax.lax.map(one_row, (columns, along), batch_size=rows)


def _of_units(columns: list[jax.Array], extra: list[jax.Array], layers: Layers) -> list[jax.Array]:
    """The network for accelerators: hidden units along the last axis, so that those of an element share what they read.

    The first layer, with all that its columns are made of, is one kernel. So are the others if they are narrow, as
    sums. One kernel for everything would move half the bytes, but takes a quarter of a minute a shape to compile.
    """
    one = (1,) * columns[0].ndim
    w, b = layers.first
    h = sum((jnp.moveaxis(x, 0, -1) for x in extra), b.reshape(*one, -1))
    for weights, x in zip(w, columns, strict=True):
        h = h + weights.reshape(*one, -1) * x[..., None]
    for w, b in layers.hidden:
        h = jax.nn.relu(h)
        narrow = w.shape[0] <= _FEW
        y = jnp.sum(h[..., None] * w.reshape(*one, *w.shape), -2) if narrow else jnp.matmul(h, w, precision=_HIGHEST)
        h = y + b.reshape(*one, -1)
    w, b = layers.last
    h = jax.nn.relu(h)
    return [jnp.sum(h * weights.reshape(*one, -1), -1) + bias for weights, bias in zip(w.T, b, strict=True)]


# --- means


def fenced(x: jax.Array) -> jax.Array:
    """``x``, past which an accelerator's compiler does not look.

    For means by which the very numbers are scaled that they were taken of: XLA sees a softmax in those, and tries to
    put all that is computed from the result into one kernel with it, for minutes.
    """
    return x if on_cpu() else jax.lax.optimization_barrier(x)


def mean_of_each(xs: list[jax.Array]) -> jax.Array:
    """``[k]`` means of ``k`` arrays of one shape.

    On a CPU in few passes over whatever the arrays are computed from, and in vector instructions: means taken one by
    one cost a third of meta-training's throughput (``benchmarks/meta_training.py``).
    """
    size = xs[0].size
    xs = _shrink(xs) if on_cpu() and xs[0].ndim >= 2 else xs
    if on_cpu() and xs[0].size <= _SHORT:  # a loop for each sum would compile for long
        return jnp.concatenate(_one_pass([x.reshape(-1, 1) for x in xs])) / size
    return fenced(jnp.stack([jnp.sum(x) for x in xs])) / size


def _shrink(xs: list[jax.Array]) -> list[jax.Array]:
    """Sums over eight pieces of rows, or over eight or fewer rows, for as long as there are such."""
    *lead, rows, cols = xs[0].shape
    if cols % (8 * _LANES) == 0 and xs[0].size > 512:
        return _shrink(_sums([x.reshape(*lead, -1, 8, _LANES) for x in xs]))
    parts = next((n for n in range(8, 1, -1) if rows % n == 0), 0)
    if not parts or xs[0].size < 64:
        return xs
    return _shrink(_sums([x.reshape(*lead, rows // parts, parts, cols) for x in xs]))


def _sums(xs: list[jax.Array]) -> list[jax.Array]:
    """Sums over the last axis but one, as many in a pass (32 terms) as become vector instructions."""
    together = max(1, 32 // xs[0].shape[-2])
    return [y for i in range(0, len(xs), together) for y in _one_pass(xs[i : i + together])]


@jax.custom_jvp
def _one_pass(xs: list[jax.Array]) -> list[jax.Array]:
    zeros: list[Any] = [np.zeros((), x.dtype) for x in xs]
    axis = xs[0].ndim - 2
    return list(jax.lax.reduce(xs, zeros, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (axis,)))


@_one_pass.defjvp
def _one_pass_jvp(primals, tangents):
    return _one_pass(*primals), [jnp.sum(t, -2) for t in tangents[0]]
