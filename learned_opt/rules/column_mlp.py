"""The one piece of arithmetic that every per-parameter MLP rule shares.

Each parameter's feature columns, normalised by their RMS over the tensor, go through a small ReLU network. No
``[parameters, features]`` array is ever built: a column is an array of the tensor's shape, a hidden unit is a sum of
scalar x array, and the RMS is folded into the first layer's weights. Columns that are constant along an axis (row and
column statistics) keep that axis at size one and enter as a bias per row or column.

Written so that XLA's CPU compiler emits one fused loop for the whole network and few for all the statistics:

- several sums in one :func:`jax.lax.reduce` share their inputs, where separate sums would each read them again;
  reducing an axis of eight lets the compiler unroll it and use vector instructions across the others;
- :func:`once` ends what must be computed once and stored.

Accelerators take whole tensors, and the network as :func:`_network_of_units` writes it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..base import Theta
from ..features import fenced, on_cpu, scan_blocks, zero_of

_UNROLL = 8  # the longest axis that a fused sum reduces
_FEW_SUMS = 512  # elements that are added up in one loop
_TERMS = 64  # in one fused reduction: with more, the compiler does not unroll it
_BLOCK = 131072  # elements of one block of rows: its arrays stay in the caches, and it is long enough for two cores
_BLOCK_OF_PRODUCTS = 12288  # the same where every element has a column of hidden units: less does not feed two cores
_WIDE = 800  # multiply-adds of a network from which on matrix products are used: sums of more compile slowly, those of
# some 1,300 and more may run slowly too
_FEW = 8  # columns that may be computed anew for every hidden unit; units of which sums are better than products
_LITTLE = 4096  # elements of a tensor for which the weights may be spelt out as arrays
_LANES = 8  # a loop over rows of another length wastes much of the vector unit; one over so many is unrolled

_HIGHEST = jax.lax.Precision.HIGHEST

Features = Callable[..., list[jax.Array]]
Finish = Callable[[list[jax.Array]], list[jax.Array]]


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


def once(x: jax.Array, zero: jax.Array) -> jax.Array:
    """``x``, computed once and stored; ``zero`` is a 0 that only the run knows.

    The compiler repeats cheap producers (the whole network) in every consumer, but never a division. And weights that
    depend on data in this way are not hoisted out of an enclosing loop as hundreds of scalars.
    """
    return x / (1 + zero * x)


def settle(theta: Theta, gradients: list[jax.Array]) -> Theta:
    """``theta``, tied to this update's data (see :func:`once`); to be done before the rule's loop over tensors."""
    if not gradients:
        return theta
    tree: Any
    leaves, tree = jax.tree.flatten(theta)
    zero = zero_of(gradients[0]).astype(jnp.result_type(*leaves))
    flat = once(jnp.concatenate([x.reshape(-1) for x in leaves]), zero)
    cuts = np.cumsum([x.size for x in leaves])[:-1]
    return tree.unflatten([x.reshape(y.shape) for x, y in zip(jnp.split(flat, cuts), leaves, strict=True)])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _fused_sums(xs: list[jax.Array], axis: int) -> list[jax.Array]:
    """Sums over an axis of arrays of one shape, in one pass over whatever they are computed from."""
    zeros = [np.zeros((), x.dtype) for x in xs]
    return list(jax.lax.reduce(xs, zeros, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (axis,)))


@_fused_sums.defjvp
def _fused_sums_jvp(axis, primals, tangents):
    return _fused_sums(*primals, axis), [jnp.sum(t, axis) for t in tangents[0]]


def _sum_parts(xs: list[jax.Array]) -> list[jax.Array]:
    """Sums over the last axis but one, which is short; so many in one pass that the compiler unrolls it."""
    passes = -(-len(xs) * xs[0].shape[-2] // _TERMS)
    together = -(-len(xs) // passes)
    axis = xs[0].ndim - 2
    return [y for i in range(0, len(xs), together) for y in _fused_sums(xs[i : i + together], axis)]


def _shrink(xs: list[jax.Array]) -> list[jax.Array]:
    """Sums over groups of pieces of rows, or of whole rows, as often as those can be formed."""
    *lead, rows, cols = xs[0].shape
    pieces = next((n for n in range(_UNROLL, _UNROLL // 2, -1) if cols % (n * _LANES) == 0), 0)
    if pieces and xs[0].size > _FEW_SUMS and on_cpu():
        return _shrink(_sum_parts([x.reshape(*lead, -1, pieces, _LANES) for x in xs]))
    divisors = [n for n in range(2, _UNROLL + 1) if rows % n == 0]
    if not divisors or xs[0].size < 64:
        return xs
    # two loops over eight rows beat one over four, and one over few rows beats two over a few more
    parts = max(divisors, key=lambda n: (n == _UNROLL, n * len(xs) <= _TERMS, n))
    return _shrink(_sum_parts([x.reshape(*lead, rows // parts, parts, cols) for x in xs]))


def _sums(xs: list[jax.Array]) -> jax.Array:
    """``[k]`` sums of ``k`` arrays of one shape."""
    xs = _shrink(xs) if xs[0].ndim >= 2 else xs
    if xs[0].size <= _FEW_SUMS:
        return jnp.stack(_fused_sums([x.reshape(-1) for x in xs], 0))
    return jnp.sum(jnp.stack(xs).reshape(len(xs), -1), 1)


def _rows(x: jax.Array, start, count: int) -> jax.Array:
    """``count`` rows of a matrix, or the one row that it has."""
    return x if x.shape[-2] == 1 else jax.lax.dynamic_slice_in_dim(x, start, count, x.ndim - 2)


def _block_rows(shape: tuple[int, ...]) -> int:
    """Rows of a block, or 0 for a tensor that is taken whole."""
    if len(shape) != 2 or not on_cpu():
        return 0
    rows = max(_UNROLL, _BLOCK // max(shape[1], 1) // _UNROLL * _UNROLL)
    return rows if shape[0] >= 2 * rows else 0


def is_short(shape: tuple[int, ...]) -> bool:
    """Whether a matrix has rows that make poor loops; it is then taken as one vector. Only on a CPU."""
    return on_cpu() and not _block_rows(shape) and (shape[-1] % _LANES != 0 or shape[-1] < 2 * _LANES)


def spread(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``[k, A, 1]`` or ``[k, 1, B]`` repeated to ``[k, A, B]``, fast for any ``B``.

    Several short rows at a time, as a product with zeros and ones: loops over short rows waste the vector unit.
    """
    A, B = shape
    if x.shape[1:] == (1, 1) or x.shape[1:] == shape:
        return jnp.broadcast_to(x, (x.shape[0], A, B))
    together = min(A, _LANES) if B < 8 * _LANES else 1
    groups = -(-A // together)
    by_row = x.shape[-1] == 1
    if by_row:
        x = jnp.pad(x, ((0, 0), (0, groups * together - A), (0, 0)))
    index = jnp.arange(together * B) // B if by_row else jnp.arange(together * B) % B
    one_hot = jnp.arange(together if by_row else B)[:, None] == index[None]
    rows = jnp.matmul(x.reshape(x.shape[0], -1, one_hot.shape[0]), one_hot.astype(x.dtype), precision=_HIGHEST)
    return jnp.broadcast_to(rows, (x.shape[0], groups, together * B)).reshape(x.shape[0], -1, B)[:, :A]


def _mean_squares(squares: Callable[..., list[jax.Array]], inputs: tuple, shape: tuple[int, ...]) -> jax.Array:
    """``[k]`` mean squares of ``k`` columns of full shape; large matrices by blocks of rows.

    Args:
        squares: ``(*inputs) -> k arrays``.
        inputs: as of :func:`column_mlp`.
        shape: of the tensor.
    """
    rows = _block_rows(shape)
    if not rows:
        return _sums(squares(*inputs)) / math.prod(shape)

    def sums(start, count):
        return _sums(squares(*jax.tree.map(lambda x: _rows(x, start, count), inputs)))

    count, rest = divmod(shape[0], rows)
    like = jax.eval_shape(lambda: sums(0, rows))
    starts = rows * jnp.arange(count)
    total, _ = scan_blocks(lambda total, start: (total + sums(start, rows), None), jnp.zeros_like(like), starts)
    if rest:
        total += sums(count * rows, rest)
    return total / math.prod(shape)


def _layer(w: jax.Array, xs: list[jax.Array], units: list[jax.Array]) -> list[jax.Array]:
    """``x W + units`` as sums of scalar x array."""
    weights = _spelt_out(w, xs[0].shape)
    for i, x in enumerate(xs):
        rows = weights[i * len(units) : (i + 1) * len(units)]
        units = [jax.lax.add(unit, jax.lax.mul(weight, x)) for unit, weight in zip(units, rows, strict=True)]
    return units


def _spelt_out(w: jax.Array, shape: tuple[int, ...]) -> list[jax.Array]:
    """The entries of ``w`` in turn, each as an array of ``shape``: in few operations, there are hundreds of entries."""
    if shape[0] == 1 and math.prod(shape) <= _LITTLE:  # a quarter fewer operations to compile
        return list(jax.lax.split(jax.lax.broadcast_in_dim(w.reshape(-1), (w.size, *shape[1:]), (0,)), (1,) * w.size))
    entries = jax.lax.split(w.reshape(-1), (1,) * w.size)
    return [jax.lax.broadcast_in_dim(x, shape, (len(shape) - 1,)) for x in entries]


def _network_of_products(columns: list[jax.Array], extra: list[jax.Array], layers: Layers) -> list[jax.Array]:
    """The network as matrix products over stacked columns."""
    tail = (1,) * columns[0].ndim
    w, b = layers.first
    h = _product(w, jnp.stack(columns)) + functools.reduce(jnp.add, extra, b.reshape(-1, *tail))
    for w, b in (*layers.hidden, layers.last):
        h = _product(w, jax.nn.relu(h)) + b.reshape(-1, *tail)
    return list(h)


def _product(w: jax.Array, x: jax.Array) -> jax.Array:
    """``[i, o]`` and ``[i, *shape]`` multiplied: ``[o, *shape]``."""
    return jnp.tensordot(w, x, (0, 0), precision=_HIGHEST)


def _network_of_units(columns: list[jax.Array], extra: list[jax.Array], layers: Layers) -> list[jax.Array]:
    """The network for accelerators: hidden units along the last axis, so that those of an element share what they read.

    The first layer, with all that its columns are made of, is one kernel. So are the others if they are narrow, as
    sums. One kernel for everything would move half the bytes, but takes a quarter of a minute a shape to compile.
    """
    one = (1,) * columns[0].ndim
    w, b = layers.first
    h = functools.reduce(jnp.add, [jnp.moveaxis(x, 0, -1) for x in extra], b.reshape(*one, -1))
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


def _relu(x: jax.Array) -> jax.Array:
    """``max(x, 0)`` in one instruction, where a maximum takes three to keep NaN."""
    return jax.lax.select(x < 0, jnp.zeros_like(x), x)


def _by_rows(function: Callable[..., list[jax.Array]], inputs: tuple, shape: tuple[int, ...]) -> list[jax.Array]:
    """``function(*inputs)``, arrays of a matrix's shape, by blocks of rows small enough for their layers.

    The last block begins where it ends with the matrix: some of its rows are computed twice.
    """
    rows = max(1, _BLOCK_OF_PRODUCTS // shape[1])
    rows = min(shape[0], 3 if rows == 2 else rows)  # loops over two rows do not become vector instructions

    def add(wholes, start):
        block = function(*jax.tree.map(lambda x: _rows(x, start, rows), inputs))
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return [update(whole, x) for whole, x in zip(wholes, block, strict=True)], None

    made = jax.eval_shape(function, *inputs)
    starts = jnp.minimum(rows * jnp.arange(-(-shape[0] // rows)), shape[0] - rows)
    return scan_blocks(add, [jnp.zeros_like(inputs[0], x.dtype) for x in made], starts)[0]


def _jvp_of_products(finish, primals, tangents):
    """Derivatives of either network below: those of its sums would be a reduction for every single weight."""
    return jax.jvp(lambda *primals: finish(_network_of_products(*primals)), primals[:3], tangents[:3])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _network_of_sums(
    finish: Finish, columns: list[jax.Array], extra: list[jax.Array], layers: Layers, zero: jax.Array
) -> list[jax.Array]:
    """The network as sums of scalar x array: one fused loop."""
    extra = [once(x, zero) for x in extra]
    layers = layers._replace(first=(once(layers.first[0], zero), layers.first[1]))
    shape = columns[0].shape
    w, b = layers.first
    units = _spelt_out(b, shape)
    for bias in extra:
        units = [unit + x for unit, x in zip(units, bias, strict=True)]
    h = _layer(w, columns, units)
    for w, b in (*layers.hidden, layers.last):
        h = _layer(w, [_relu(x) for x in h], _spelt_out(b, shape))
    return [once(x, zero) for x in finish(h)]


_network_of_sums.defjvp(_jvp_of_products)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _wide_network(
    finish: Finish, columns: list[jax.Array], extra: list[jax.Array], layers: Layers, zero: jax.Array
) -> list[jax.Array]:
    """The network as matrix products, but for the last layer and a first one of few columns.

    Those are sums of scalar x array, fused with the ReLUs: a product of a few rows is slow, and the ReLU before or
    after it would be one more pass over all units.
    """
    tail = (1,) * columns[0].ndim
    w, b = layers.first
    h = functools.reduce(jnp.add, extra, b.reshape(-1, *tail))
    if len(columns) > _FEW:
        h = h + _product(w, jnp.stack(columns))
    else:
        for weights, x in zip(w, columns, strict=True):
            h = h + weights.reshape(-1, *tail) * x[None]
    for w, b in layers.hidden:
        # apart from the product's view of it as a matrix: writing that is slow from JAX 0.12 on
        h = _product(w, jax.lax.optimization_barrier(_relu(h))) + b.reshape(-1, *tail)
    w, b = layers.last
    # few units at a time: their rows are at strides of a power of two, and the cache holds few such lines
    parts = max(n for n in range(1, _UNROLL + 1) if h.shape[0] % n == 0)
    terms = [(_relu(h) * weights.reshape(-1, *tail)).reshape(-1, parts, *h.shape[1:]) for weights in w.T]
    sums = [functools.reduce(jnp.add, x, bias) for x, bias in zip(_fused_sums(terms, 1), b, strict=True)]
    return [once(x, zero) for x in finish(sums)]


_wide_network.defjvp(_jvp_of_products)


def column_mlp(
    features: Features,
    inputs: tuple,
    layers: Layers,
    *,
    eps: float,
    outputs: int = 1,
    finish: Finish = list,
    order: Sequence[int] | None = None,
    squares: Features | None = None,
) -> list[jax.Array]:
    """Apply a ReLU network to every parameter of a tensor.

    ``x_i = c_i rsqrt(eps + mean(c_i^2))`` for each column, the mean over the whole tensor; then the network.

    Args:
        features: ``(*inputs) -> columns``, element-wise; each column of the tensor's shape, or with axes of size one
            along which it is constant.
        inputs: arrays (or lists of arrays) of the tensor's rank >= 2, the first of its full shape.
        layers: the network, one row of ``first`` per column; of meta-parameters that went through :func:`settle`.
        eps: see above.
        outputs: how many of the last layer's outputs to compute.
        finish: what is made of them, element by element: where they are made, so that they need not be stored.
        order: the columns in an order that puts those with costly common parts (a root) next to each other.
        squares: ``(*inputs) -> the columns' squares``, where they are cheaper than the columns are.

    Returns:
        ``finish`` of ``outputs`` arrays, each of the tensor's shape.
    """
    made = jax.eval_shape(features, *inputs)
    shape, shapes, dtype = inputs[0].shape, [c.shape for c in made], made[0].dtype
    full = [i for i in order or range(len(shapes)) if i < len(shapes) and shapes[i] == shape]

    def full_squares(*block):
        xs = [c * c for c in features(*block)] if squares is None else squares(*block)
        return [xs[i] for i in full]

    means = _mean_squares(full_squares, inputs, shape)
    layers = jax.tree.map(lambda w: w.astype(dtype), layers)
    scales = jax.lax.rsqrt(eps + fenced(means))
    zero = jax.lax.stop_gradient(0 * scales[0])
    w, b = layers.first
    # not the very arrays that the statistics were taken of, unless those saw blocks: the compiler would store every
    # column for both to share
    apart = inputs if _block_rows(shape) else jax.tree.map(lambda x: x + zero, inputs)
    columns = features(*apart)
    extra = []
    # what is constant along a row first: it is added to the network's bias once a row
    for s in sorted({s for s in shapes if s != shape}, reverse=True):
        where = [i for i, other in enumerate(shapes) if other == s]
        xs = [columns[i].reshape(1, -1) for i in where]
        mean = fenced(_sums([x * x for x in xs]) / xs[0].size)
        rows = w[np.array(where)] * jax.lax.rsqrt(eps + mean)[:, None]
        parts = [row[:, None] * x for row, x in zip(rows, xs, strict=True)]
        extra.append(functools.reduce(jax.lax.add, parts).reshape(-1, *s))
    folded = w[np.array(full)] * scales[:, None]
    w, c = layers.last
    layers = Layers((folded, b), layers.hidden, (w[:, :outputs], c[:outputs]))
    columns = [columns[i] for i in full]
    if not on_cpu():
        return finish(_network_of_units(columns, extra, layers))
    if sum(w.size for w, _ in (layers.first, *layers.hidden, layers.last)) > _WIDE:
        if len(shape) != 2 or math.prod(shape) < 2 * _BLOCK_OF_PRODUCTS:
            return finish(_network_of_products(columns, extra, layers))
        return _by_rows(
            lambda *block: _wide_network(finish, [features(*block[:-1])[i] for i in full], block[-1], layers, zero),
            (*inputs, extra),
            shape,
        )
    if is_short(shape):
        columns = [c.reshape(-1) for c in columns]
        extra = [spread(x, shape).reshape(b.size, -1) for x in extra]
    if math.prod(shape) <= _LITTLE:  # an axis for the weights
        columns, extra = [c[None] for c in columns], [x[:, None] for x in extra]
    return [x.reshape(shape) for x in _network_of_sums(finish, columns, extra, layers, zero)]
