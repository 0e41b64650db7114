"""The search: the same trials for everybody, within the space, and more beyond an edge."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meta_train.bench.workloads import search
from meta_train.bench.workloads.baselines import baselines
from meta_train.bench.workloads.optimizers import Optimizer, Range
from meta_train.bench.workloads.search import Trial

SPACE = {"learning_rate": Range(1e-3, 1e-1), "share": Range(0.0, 1.0, linear=True)}
OPTIMIZER = Optimizer("mine", lambda s, n: None, {"learning_rate": 1e-2, "share": 0.5}, SPACE, "")


@pytest.mark.parametrize("optimizer", baselines(), ids=lambda optimizer: optimizer.name)
def test_twelve_trials_inside_the_space_the_first_its_own(optimizer):
    trials = search.settings(optimizer)
    assert len(trials) == 12
    assert trials == search.settings(optimizer)
    assert trials[0] == dict(optimizer.setting)
    for trial in trials:
        for name, (low, high, _) in optimizer.space.items():
            assert low * 0.999 <= trial[name] <= high * 1.001


def test_trials_spread_over_the_logarithm():
    rates = np.log10([trial["learning_rate"] for trial in search.settings(OPTIMIZER, 101)[1:]])
    counts, _ = np.histogram(rates, bins=4, range=(-3, -1))
    assert (np.abs(counts - 25) <= 2).all()


def test_nothing_to_set_is_one_trial():
    assert search.settings(OPTIMIZER._replace(setting={}, space={})) == [{}]


def trials_at(rates, scores):
    return [Trial({"learning_rate": r, "share": 0.5}, s) for r, s in zip(rates, scores, strict=True)]


def test_an_inner_best_calls_for_nothing():
    trials = trials_at([1e-3, 1e-2, 1e-1], [2.0, 1.0, 3.0])
    assert search.edges(SPACE, trials) == {}
    assert search.more_settings(OPTIMIZER, trials, 0) == []


@pytest.mark.parametrize(("best", "side"), [(1e-1, 1), (1e-3, -1)])
def test_an_edge_calls_for_more_beyond_it_until_the_best_is_inside(best, side):
    trials = trials_at([1e-3, 1e-2, 1e-1], [1.0 if rate == best else 2.0 for rate in (1e-3, 1e-2, 1e-1)])
    assert search.edges(SPACE, trials) == {"learning_rate": side}
    more = [setting["learning_rate"] for setting in search.more_settings(OPTIMIZER, trials, 0)]
    assert len(more) == search.EXTENSION
    assert all((rate > 0.1) if side > 0 else (rate < 1e-3) for rate in more)
    np.testing.assert_allclose(more[-1], best * 10**side, rtol=1e-3)
    inside = trials + trials_at(more, [0.5, 0.6, 0.7, 0.8])
    assert search.edges(SPACE, inside) == {}
    still = trials + trials_at(more, [0.8, 0.7, 0.6, 0.5])
    further = [setting["learning_rate"] for setting in search.more_settings(OPTIMIZER, still, 1)]
    assert (min(further) > max(more)) if side > 0 else (max(further) < min(more))
    assert search.more_settings(OPTIMIZER, still, search.EXTENSIONS) == []


@given(st.lists(st.floats(0.1, 10, allow_nan=False), min_size=1, max_size=6))
def test_the_best_is_the_first_of_the_lowest(scores):
    trials = trials_at(np.geomspace(1e-3, 1e-1, len(scores)), scores)
    assert search.best(trials) == scores.index(min(scores))


def test_no_decay_lies_on_the_edge_of_a_logarithmic_range():
    trials = [Trial({"learning_rate": 0.01, "weight_decay": 0.0}, 1.0)]
    assert search.edges({"weight_decay": Range(1e-3, 1.0)}, trials) == {"weight_decay": -1}


@given(st.integers(-4, 5))
def test_a_climb_ends_at_a_best_with_worse_neighbours(octaves):
    best = 0.003 * 2.0**octaves
    tried = search.climb(lambda rate: abs(np.log2(rate / best)), 0.003, most=12)
    assert min(tried, key=tried.get) == best
    assert {best / 2, best * 2} <= set(tried)
    assert len(tried) <= abs(octaves) + 3


def test_a_climb_gives_up():
    assert sorted(search.climb(lambda rate: -rate, 1.0, most=5)) == [0.5, 1, 2, 4, 8]
