"""Tests of differences, against SciPy and by what they must and must not show."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from meta_train.bench.workloads.statistics import on_workload, over_suite


def test_paired_over_seeds_is_the_paired_t_test():
    random = np.random.default_rng(0)
    own, reference = random.uniform(1, 2, 6), random.uniform(1, 2, 6)
    found = on_workload(own, reference)
    expected = stats.ttest_rel(np.log(own), np.log(reference))
    assert found.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((np.exp(low), np.exp(high)))
    assert found.ratio == pytest.approx(np.exp(np.mean(np.log(own / reference))))


def test_one_seed_shows_nothing():
    found = on_workload(np.array([1.0]), np.array([100.0]))
    assert (found.verdict, found.p) == ("level", 1.0)
    assert found.ratio == pytest.approx(0.01)
    assert (found.low, found.high) == (0.0, np.inf)


def test_a_run_that_diverged_is_worse():
    assert on_workload(np.array([np.inf, 1.0]), np.ones(2)).verdict == "worse"
    assert on_workload(np.ones(2), np.array([np.inf, 1.0])).verdict == "better"
    assert on_workload(np.array([np.inf]), np.array([np.inf])).verdict == "level"


def test_the_reference_is_level_with_itself():
    losses = np.array([1.0, 1.3, 0.9])
    found = on_workload(losses, losses)
    assert (found.verdict, found.ratio, found.p) == ("level", 1.0, 1.0)
    assert over_suite({name: [0.0] for name in "abcdef"}).verdict == "level"


@pytest.mark.parametrize("number", range(1, 9))
def test_fewer_than_six_data_sets_show_nothing(number):
    found = over_suite({str(i): [-1.0 - 0.01 * i] for i in range(number)})
    assert found.p == pytest.approx(min(2 / 2**number, 1.0))
    assert found.verdict == ("better" if number >= 6 else "level")
    worse = over_suite({str(i): [1.0 + 0.01 * i] for i in range(number)})
    assert worse.verdict == ("worse" if number >= 6 else "level")


def test_workloads_on_one_data_set_are_one_observation():
    many = over_suite({"a": [-1.0] * 20})
    assert many.verdict == "level"
    assert over_suite({"a": [-1.0, 1.0], "b": [-0.5]}).ratio == pytest.approx(np.exp(-0.25))


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=8))
def test_p_is_a_share_and_symmetric(means):
    logs = {str(i): [mean] for i, mean in enumerate(means)}
    found, mirrored = over_suite(logs), over_suite({name: [-v for v in values] for name, values in logs.items()})
    assert 2 / 2 ** len(means) <= found.p + 1e-12 <= 1 + 1e-12
    assert found.p == pytest.approx(mirrored.p)


def test_chance_is_called_better_or_worse_one_time_in_twenty():
    random = np.random.default_rng(1)
    verdicts = [on_workload(np.exp(random.normal(size=5)), np.exp(random.normal(size=5))).verdict for _ in range(400)]
    assert 0.02 < np.mean([verdict != "level" for verdict in verdicts]) < 0.09
