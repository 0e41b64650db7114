"""Features against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learned_opt import features as ft
from learned_opt.rules.column_mlp import _sums, spread


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4))
@settings(deadline=None, max_examples=60)
def test_factored_axes_are_the_largest_and_ties_keep_their_order(shape):
    d1, d0 = ft.factored_axes(tuple(shape))
    ranked = sorted(range(len(shape)), key=lambda i: (shape[i], i))
    assert (d1, d0) == (ranked[-2], ranked[-1])


@pytest.mark.parametrize("shape", [(), (5,)])
def test_nothing_is_factored_below_rank_two(shape):
    assert ft.factored_axes(shape) is None


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (300, 256), (2, 3, 5, 4), (5, 5, 2, 4), (7,), (), (1, 1)])
def test_factored_moments_match_numpy(shape):
    rng = np.random.default_rng(0)
    decays = np.array([0.5, 0.9], np.float32)
    (row,), (col,) = (jax.tree.leaves(t) for t in ft.factored_zeros(jnp.zeros(shape), 2))
    v_row, v_col = np.array(row), np.array(col)
    update = jax.jit(ft.factored_update)
    for _ in range(3):
        g = rng.normal(size=shape).astype(np.float32)
        row, col = update(row, col, jnp.asarray(g), decays)
        b = decays.reshape(-1, *(1,) * len(shape))
        square = np.asarray(g * g + np.float32(1e-30))
        if len(shape) < 2:
            v_row = b * v_row + (1 - b) * square
        else:
            d1, d0 = ft.factored_axes(shape)
            v_row = b * v_row + (1 - b) * square.mean(d0, keepdims=True)
            v_col = b * v_col + (1 - b) * square.mean(d1, keepdims=True)
    np.testing.assert_allclose(row, v_row, rtol=2e-6)
    np.testing.assert_allclose(col, v_col, rtol=2e-6)
    R, C = ft.factored_scales(row, col, shape)
    if len(shape) < 2:
        np.testing.assert_allclose(R, 1 / np.sqrt(v_row + 1e-9), rtol=2e-6)
    else:
        mean = v_row.mean(ft.factored_axes(shape)[0] + 1, keepdims=True)
        np.testing.assert_allclose(R, 1 / np.sqrt(v_row / (mean + 1e-9)), rtol=2e-6)
        np.testing.assert_allclose(C, 1 / np.sqrt(v_col), rtol=2e-6)


def test_a_mean_over_rows_that_do_not_fill_the_blocks():
    g = jnp.asarray(np.random.default_rng(1).normal(size=(331, 211)), jnp.float32)
    row, col = (jax.tree.leaves(t)[0] for t in ft.factored_zeros(g, 1))
    row, col = ft.factored_update(row, col, g, [0.0])
    np.testing.assert_allclose(row[0, 0], np.mean(np.square(g), 0), rtol=1e-5)
    np.testing.assert_allclose(col[0, :, 0], np.mean(np.square(g), 1), rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5), (5, 1)])
@pytest.mark.parametrize("joined", [False, True])
def test_squares_of_columns_are_the_columns_squared(shape, joined):
    """Whichever of the two factors is a row, and where their products are given."""
    rng = np.random.default_rng(0)

    def positive(*shape):
        return jnp.asarray(rng.uniform(0.1, 2, shape), jnp.float32)

    g, p, *m = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(5))
    axes = [(shape[0], 1), (1, shape[1])] if shape[0] <= shape[1] else [(1, shape[1]), (shape[0], 1)]
    row, col, R, C = ([positive(*axis) for _ in range(3)] for axis in (*axes, *axes))
    if joined:
        R, C = [a * b for a, b in zip(R, C, strict=True)], []
    inputs = (g, p, m, positive(*shape), R, C, row, col)
    columns = ft.factored_columns(*inputs, eps=1e-6)
    squares = ft.factored_squares(*inputs, eps=1e-6)
    for column, square in zip(columns, squares, strict=True):
        np.testing.assert_allclose(square, column * column, rtol=3e-6)


def test_clean_counts_non_finite_entries_as_zero_and_clips_the_rest():
    g = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 5.0, -1e30])
    np.testing.assert_array_equal(ft.clean(g, 1000.0, jnp.float32), [0, 0, 0, 5, -1000])


def test_the_two_weights_of_an_average_add_up_to_one_in_its_own_dtype():
    one = jnp.ones((), jnp.float32)
    assert ft.ema(one, one, 0.9999) == 1
    assert float(ft.ema(jnp.zeros(()), one, 0.9999)) == float(np.float32(1) - np.float32(0.9999))


def test_integers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"params\['table'\] is int32"):
        ft.check_params({"table": jnp.zeros(3, jnp.int32), "w": jnp.zeros(3)})


@pytest.mark.parametrize("size", [1, 3, 4, 12, 4096, 12288])
def test_a_vector_as_a_matrix_keeps_its_order(size):
    x = jnp.arange(size)
    assert ft.as_matrix(x).ndim == 2
    np.testing.assert_array_equal(ft.as_matrix(x).reshape(-1), x)


@given(rows=st.integers(1, 70), cols=st.integers(1, 100), by_row=st.booleans())
@settings(max_examples=20, deadline=None)
def test_spread_repeats_rows_and_columns_exactly(rows, cols, by_row):
    x = np.random.default_rng(rows).standard_normal((2, rows, 1) if by_row else (2, 1, cols)).astype(np.float32)
    np.testing.assert_array_equal(spread(jnp.asarray(x), (rows, cols)), np.broadcast_to(x, (2, rows, cols)))


def test_spread_costs_the_same_for_every_element_of_a_tall_matrix():
    def flops(rows):
        x = jnp.ones((3, rows, 1))
        return jax.jit(lambda x: spread(x, (rows, 10))).lower(x).compile().cost_analysis()["flops"]

    assert flops(4096) <= 1.01 * 16 * flops(256)


@pytest.mark.parametrize("shape", [(700,), (1, 4096), (4, 1000), (16, 784), (9, 96), (2, 3, 192), (48, 300), (7, 11)])
def test_sums_in_pieces_are_the_sums(shape):
    """Rows of eight, seven, six, five and no pieces; 21 sums, more than one pass takes."""
    xs = np.random.default_rng(0).normal(size=(21, *shape))
    sums = jax.jit(lambda xs: _sums(list(xs)))(jnp.asarray(xs, jnp.float32))
    # of float32's roundings; a term missed or counted twice would be hundreds of times as much
    bound = 20 * 2**-24 * np.abs(xs).reshape(21, -1).sum(1)
    np.testing.assert_array_less(np.abs(sums - xs.reshape(21, -1).sum(1)), bound)


def test_loops_over_blocks_are_no_kernels():
    """XLA's CPU compiler makes one kernel of a whole loop, for one core, unless something in it can not be part of one.

    From JAX 0.11.1 on; CI runs this with the newest JAX, too.
    """

    def sums(x, scan):
        def add(total, start):
            block = jax.lax.dynamic_slice_in_dim(x, start, 64)
            zeros = [np.float32(0)] * 2
            parts = jax.lax.reduce([block, block * block], zeros, lambda a, b: [a[0] + b[0], a[1] + b[1]], (0,))
            return total + jnp.stack(parts), None

        return scan(add, jnp.zeros((2, 256)), 64 * jnp.arange(16))[0]

    x = jnp.arange(1024.0 * 256).reshape(1024, 256) / 1e5
    compiled = jax.jit(lambda x: sums(x, ft.scan_blocks)).lower(x).compile()
    np.testing.assert_array_equal(compiled(x), sums(x, jax.lax.scan))
    assert "small_call" not in compiled.as_text()
