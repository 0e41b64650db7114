"""Features against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learned_opt import features as ft
from learned_opt.kernels import mean_of_each


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
    row, col = ft.factored_zeros(jnp.zeros(shape), 2)
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
        assert C == []
    else:
        mean = v_row.mean(ft.factored_axes(shape)[0] + 1, keepdims=True)
        np.testing.assert_allclose(R, 1 / np.sqrt(v_row / (mean + 1e-9)), rtol=2e-6)
        np.testing.assert_allclose(C, 1 / np.sqrt(v_col), rtol=2e-6)


def test_means_over_odd_numbers_of_rows_and_columns():
    g = jnp.asarray(np.random.default_rng(1).normal(size=(331, 211)), jnp.float32)
    row, col = ft.factored_zeros(g, 1)
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


@pytest.mark.parametrize("shape", [(700,), (1, 4096), (4, 1000), (16, 784), (9, 96), (2, 3, 192), (48, 300), (7, 11)])
def test_sums_in_pieces_are_the_sums(shape):
    """Rows of eight, seven, six, five and no pieces; 21 sums, more than one pass takes."""
    xs = np.random.default_rng(0).normal(size=(21, *shape))
    size = xs[0].size
    sums = size * jax.jit(lambda xs: mean_of_each(list(xs)))(jnp.asarray(xs, jnp.float32))
    # of float32's roundings; a term missed or counted twice would be hundreds of times as much
    bound = 20 * 2**-24 * np.abs(xs).reshape(21, -1).sum(1)
    np.testing.assert_array_less(np.abs(sums - xs.reshape(21, -1).sum(1)), bound)
