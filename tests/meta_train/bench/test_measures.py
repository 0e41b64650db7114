"""The benchmark's measures against closed forms and their defining properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from meta_train.bench import measures

LOSSES = arrays.arrays(float, st.tuples(st.integers(1, 4), st.integers(1, 120)), elements=st.floats(1e-3, 1e3))


def test_smooth_is_a_trailing_mean():
    curve = np.arange(200.0)
    smoothed = measures.smooth(curve)
    assert smoothed[0] == 0
    np.testing.assert_allclose(smoothed[10], (7 + 8 + 9 + 10) / 4)  # a fiftieth of 200
    np.testing.assert_allclose(smoothed[2], 1.0)


@settings(deadline=None)
@given(LOSSES)
def test_smoothing_rows_is_smoothing_each(curves):
    np.testing.assert_allclose(measures.smooth(curves), [measures.smooth(curve) for curve in curves])


def test_what_is_not_finite_spoils_no_step_before_it():
    curve = np.ones(200)
    curve[120] = np.inf
    smoothed = measures.smooth(curve)
    np.testing.assert_array_equal(smoothed[:120], 1)
    assert np.isinf(smoothed[120])


@settings(deadline=None)
@given(LOSSES)
def test_envelopes_fall_and_stay_below(curves):
    below = measures.envelope(curves)
    assert np.all(np.diff(below, axis=-1) <= 0)
    assert np.all(below <= curves)
    np.testing.assert_array_equal(below[..., -1], curves.min(axis=-1))


@settings(deadline=None)
@given(LOSSES)
def test_everybody_is_as_fast_as_himself(curves):
    np.testing.assert_array_equal(measures.speed_ups(curves, curves), 1.0)


def test_speed_ups():
    reference = np.linspace(1.0, 0.0, 101)
    twice = np.maximum(1 - 2 * np.linspace(0.0, 1.0, 101), -1)
    curves = np.stack([reference, twice, reference + 0.01, np.full(101, np.nan)])
    found = measures.speed_ups(curves, np.stack([reference] * 4))
    np.testing.assert_allclose(found, [1.0, 101 / 51, 0.0, 0.0])


def test_a_reference_that_diverged_at_once_is_never_reached():
    assert measures.speed_ups(np.ones((1, 5)), np.full((1, 5), np.nan)) == 0.0


def test_normalised():
    initial, reference = np.full(4, 2.0), np.array([1.0, 1.0, 1.0, 3.0])
    found = measures.normalised(initial, np.array([1.0, 0.5, np.nan, 1.0]), reference)
    np.testing.assert_array_equal(found, [1.0, 1.5, np.nan, np.nan])


@settings(deadline=None)
@given(arrays.arrays(float, st.integers(1, 40), elements=st.floats(-1e3, 1e3)))
def test_the_interquartile_mean_lies_between_the_quartiles(values):
    found = measures.interquartile_mean(values)
    cut = len(values) // 4
    inside = np.sort(values)[cut : len(values) - cut]
    assert inside[0] - 1e-9 <= found <= inside[-1] + 1e-9
    if len(values) % 4 == 0:  # what is beyond the quartiles does not count
        wild = np.sort(values)
        wild[:cut] -= 1e6
        wild[len(wild) - cut :] += 1e6
        assert measures.interquartile_mean(wild) == pytest.approx(found, abs=1e-9)


def test_intervals_cover_as_often_as_they_say():
    """Runs are normal about their task's mean, which is normal about 3: 95% of the intervals should hold 3.

    300 trials, so the share has a standard error of 1.3%; a bootstrap over twelve tasks falls a little short.
    """
    random = np.random.default_rng(0)
    held = 0
    for trial in range(300):
        values = 3 + random.normal(size=(12, 1)) + 0.5 * random.normal(size=(12, 5))
        _, low, high = measures.bootstrap(values, resamples=300, seed=trial)
        held += low <= 3 <= high
    assert 0.86 < held / 300 < 0.98


def test_without_spread_the_interval_is_a_point():
    assert measures.bootstrap(np.full((4, 3), 2.5), resamples=10) == (2.5, 2.5, 2.5)


def test_profiles():
    times = np.array([[1.0, 4.0, np.inf, np.inf], [2.0, 2.0, 5.0, np.inf]])
    ratios = measures.profile(times)
    np.testing.assert_array_equal(ratios, [[1.0, 2.0, np.inf, np.inf], [1.0, 1.0, 2.0, np.inf]])
    np.testing.assert_allclose(measures.profile_scores(ratios), [(1 + 2 / 3) / 4, (2 + 2 / 3) / 4])


@settings(deadline=None)
@given(arrays.arrays(float, (3, 6), elements=st.floats(1.0, 100.0)))
def test_the_score_is_the_area_under_the_profile(times):
    ratios = measures.profile(times)
    tau = np.linspace(1, 4, 30_001)
    area = [np.mean(np.searchsorted(row, tau, side="right") / len(row)) for row in ratios]
    np.testing.assert_allclose(measures.profile_scores(ratios), area, atol=1e-3)
