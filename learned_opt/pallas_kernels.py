"""The per-parameter network as two Pallas kernels for GPUs, lowered by Triton: off unless asked for.

A first kernel sums the columns' squares, block by block. A second computes the columns of a block anew and all that is
made of them, in registers: an update reads its inputs twice, writes its results, and stores nothing between.
:func:`learned_opt.kernels.in_pallas` says when.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from .kernels import Columns, Layers, constant_part, on_cpu, plain_column_mlp, same_shapes, scaled_rows

_BLOCK = 1024  # elements of a block at most
_WARPS = 8  # with which Triton keeps 32 units of such a block in registers; with 4 it spills


def column_mlp(columns_of: Columns, inputs: tuple, layers: Layers, **options: Any) -> list[jax.Array]:
    r"""Apply a ReLU network to every parameter of a tensor: :func:`learned_opt.kernels.column_mlp` in two kernels.

    The first computes :math:`q_{iB} = \sum_B c_i^2` of every column :math:`c_i` of the tensor's shape and every block
    :math:`B` of the tensor. Outside of the kernels, :math:`(\epsilon + \frac{1}{n} \sum_B q_{iB})^{-1/2}` scales the
    first layer's rows, and what the columns that are constant along an axis add to its units is computed by row or
    column. The second computes columns, network and ``finish``.

    Derivatives are those of the plain form. On a CPU the kernels are interpreted, which is slow and for tests.

    Args:
        columns_of: as there; like ``finish`` and ``squares_of`` it may hold numbers, but no arrays.
        inputs: as there, as all others are.
        layers: see there.
        **options: ``eps``, ``outputs``, ``finish``, ``squares_of``.

    Returns:
        What the plain form returns.

    Example:
        >>> w, b = jnp.eye(2), jnp.zeros(2)
        >>> layers = Layers((w, b), (), (jnp.ones((2, 1)), jnp.zeros(1)))
        >>> (y,) = column_mlp(lambda x: [x, -x], (jnp.array([3.0, -3.0]),), layers, eps=0.0)
        >>> print(y)
        [1. 1.]
    """

    @jax.custom_jvp
    def in_two_passes(inputs, layers):
        return _in_two_passes(columns_of, inputs, layers, **options)

    @in_two_passes.defjvp
    def _(primals, tangents):
        return jax.jvp(functools.partial(plain_column_mlp, columns_of, **options), primals, tangents)

    return in_two_passes(inputs, layers)


def _in_two_passes(columns_of, inputs, layers, *, eps, outputs=1, finish=list, squares_of=None) -> list:
    shape = inputs[0].shape
    inputs = jax.tree.map(jnp.atleast_1d, inputs)  # a block has an axis
    squares_of = squares_of or (lambda *inputs: [c * c for c in columns_of(*inputs)])
    columns, squares = columns_of(*inputs), squares_of(*inputs)  # of which jit leaves only those constant along an axis
    layers = jax.tree.map(lambda w: w.astype(columns[0].dtype), layers)
    w, bias = layers.first
    by_shape = same_shapes(columns)
    whole = by_shape.pop(inputs[0].shape)

    def only_whole(f):
        def of_block(*inputs):
            values = f(*inputs)
            return [values[i] for i in whole]

        return of_block

    scaled = scaled_rows(w, whole, _means(only_whole(squares_of), len(whole), inputs), eps)
    extra = [constant_part(w, columns, squares, where, eps) for where in by_shape.values()]
    w, b = layers.last
    layers = Layers((scaled, bias), layers.hidden, (w[:, :outputs], b[:outputs]))
    return [y.reshape(shape) for y in _network(only_whole(columns_of), finish, inputs, layers, extra)]


def _means(squares_of: Columns, count: int, inputs: tuple) -> jax.Array:
    """``[count]``: the means over the tensor of so many squares; the first kernel."""
    tensor, avals = jax.typeof(inputs[0]), jax.tree.map(jax.typeof, inputs)
    block, grid = _blocks(tensor.shape)

    def sums_of_squares(inputs, sums):
        inside = _inside(block, tensor.shape)
        for i, square in enumerate(squares_of(*jax.tree.map(_load, inputs, avals))):
            # Beyond the edges the inputs are zeros, of which a square need not be zero.
            sums[(*(0,) * tensor.ndim, i)] = jnp.sum(square if inside is None else jnp.where(inside, square, 0))

    sums = pl.pallas_call(
        sums_of_squares,
        jax.ShapeDtypeStruct((*grid, count), tensor.dtype),
        grid=grid,
        in_specs=[jax.tree.map(lambda x: _spec(x, block), avals)],
        out_specs=pl.BlockSpec((*(1,) * tensor.ndim, count), lambda *at: (*at, 0)),
        **_compilation(),
    )(inputs)
    return jnp.sum(sums, tuple(range(tensor.ndim))) / tensor.size


def _network(columns_of: Columns, finish: Callable, inputs: tuple, layers: Layers, extra: list) -> list[jax.Array]:
    """``finish`` of the network's outputs; the second kernel.

    Args:
        columns_of: ``(*inputs) -> columns``, those of the tensor's shape.
        finish: what is made of the outputs.
        inputs: see :func:`column_mlp`.
        layers: the first one's rows scaled.
        extra: arrays ``[h, ...]``, constant along an axis, that are added to the first layer's units.
    """
    tensor, avals = jax.typeof(inputs[0]), jax.tree.map(jax.typeof, (inputs, extra))
    block, grid = _blocks(tensor.shape)

    def network(inputs, layers, extra, *results):
        h = _units(columns_of(*jax.tree.map(_load, inputs, avals[0])), *layers.first)
        for x, aval in zip(extra, avals[1], strict=True):
            of_unit = jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype)
            # NumPy's integers, as loads with Python's cannot be interpreted
            h = [y + _load(x.at[np.int32(j)], of_unit) for j, y in enumerate(h)]
        for w, b in layers.hidden[:-1]:
            h = _units(_relu(h), w, b)
        h, (w_last, b_last) = _relu(h), layers.last
        if layers.hidden:
            w, b = layers.hidden[-1]

            def add_unit(j, outs):  # spelt out, 32 units would take Triton a minute and more registers than there are
                y = jnp.maximum(_unit(h, w, b, j), 0)
                return [out + w_last[j, k] * y for k, out in enumerate(outs)]

            outs = jax.lax.fori_loop(0, b.size, add_unit, [jnp.full(block, b_last[k]) for k in range(b_last.size)])
        else:
            outs = _units(h, w_last, b_last)
        for result, y in zip(results, finish(outs), strict=True):
            triton.store(result, y, mask=_inside(block, tensor.shape))

    shapes = jax.eval_shape(finish, [tensor] * layers.last[1].size)
    return pl.pallas_call(
        network,
        shapes,
        grid=grid,
        in_specs=[
            jax.tree.map(lambda x: _spec(x, block), avals[0]),
            jax.tree.map(lambda w: pl.BlockSpec(w.shape, lambda *at: (0,) * w.ndim), layers),
            [_spec(x, block) for x in avals[1]],
        ],
        out_specs=[_spec(y, block) for y in shapes],
        **_compilation(),
    )(inputs, layers, extra)


def _units(xs: list[jax.Array], w, b) -> list[jax.Array]:
    """A layer of the blocks ``xs``; its weights are references, read number by number."""
    return [_unit(xs, w, b, j) for j in range(b.size)]


def _unit(xs: list[jax.Array], w, b, j) -> jax.Array:
    return sum((w[i, j] * x for i, x in enumerate(xs)), b[j])


def _relu(xs: list[jax.Array]) -> list[jax.Array]:
    return [jnp.maximum(x, 0) for x in xs]


# --- blocks


def _blocks(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A block's sides, powers of two as Triton asks, and how many blocks there are along each axis."""
    left, block = _BLOCK, []
    for n in reversed(shape):
        block.append(min(pl.next_power_of_2(n), left))
        left //= block[-1]
    block.reverse()
    return tuple(block), tuple(pl.cdiv(n, side) for n, side in zip(shape, block, strict=True))


def _spec(x, block: tuple[int, ...]) -> pl.BlockSpec:
    """Blocks of an array whose last axes are the tensor's, or of size one; axes before them stay whole."""
    lead, shape = x.shape[: x.ndim - len(block)], x.shape[x.ndim - len(block) :]
    sides = [1 if n == 1 else side for n, side in zip(shape, block, strict=True)]

    def place(*at):
        return (*(0 for _ in lead), *(0 if n == 1 else i for n, i in zip(shape, at, strict=True)))

    return pl.BlockSpec((*lead, *sides), place)


def _load(ref, array) -> jax.Array:
    """The block at hand of an array, zeros beyond the array's edges."""
    inside = _inside(ref.shape, array.shape)
    return triton.load(ref, mask=inside, other=None if inside is None else 0)


def _inside(block: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array | None:
    """Which entries of the block at hand lie within the array; ``None`` where no block crosses its edges."""
    inside = None
    for axis, (side, n) in enumerate(zip(block, shape, strict=True)):
        if n % side:
            here = pl.program_id(axis) * side + jax.lax.broadcasted_iota(jnp.int32, block, axis) < n
            inside = here if inside is None else inside & here
    return inside


def _compilation() -> dict[str, Any]:
    """On CPUs the kernels are interpreted. Without parameters a GPU's would be lowered by Mosaic GPU."""
    return {"interpret": True} if on_cpu() else {"compiler_params": triton.CompilerParams(num_warps=_WARPS)}
