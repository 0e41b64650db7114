"""Delay and batch schedules against their closed forms; plans; the input pipeline."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learned_opt import schedules
from learned_opt.schedules import Statistics

NONE = Statistics()


def table(schedule, steps, statistics=NONE):
    return [int(schedule(r, t, statistics)) for r, t in steps]


def test_constant():
    assert table(schedules.constant(7), [(0, 0), (5, 99)]) == [7, 7]
    assert int(jax.jit(lambda h: schedules.constant(h)(0, 0, NONE))(3)) == 3  # a traced delay
    for bad in (0, -1, 1.5, True, "3", np.zeros(2, int)):
        with pytest.raises((ValueError, TypeError)):
            schedules.constant(bad)


def test_post_local():
    assert table(schedules.post_local(10, 16), [(0, 0), (9, 9), (10, 10), (11, 26)]) == [1, 1, 16, 16]


def test_square_root_and_power_growth():
    rounds = [(r, 0) for r in range(200)]
    assert table(schedules.square_root_growth(), rounds) == [math.isqrt(r + 1) for r in range(200)]
    assert table(schedules.square_root_growth(4, rounds=3), [(9, 0)]) == [8]
    assert table(schedules.power_growth(2, power=1.0), rounds[:5]) == [2, 4, 6, 8, 10]
    assert table(schedules.power_growth(5, power=0.0), rounds[:3]) == [5, 5, 5]


@given(total=st.integers(1, 10**7), workers=st.integers(1, 64), batch=st.integers(1, 64))
@settings(max_examples=50, deadline=None)
def test_stich_is_the_largest_delay_within_the_bound(total, workers, batch):
    delay = schedules.stich(total, workers, batch)(0, 0, NONE)
    assert delay >= 1
    assert delay == 1 or delay**2 * workers * batch <= total
    assert (delay + 1) ** 2 * workers * batch > total


def test_stich_learning_rate():
    rate = schedules.stich_learning_rate(mu=0.5, smoothness=2.0, sync_every=8)
    assert rate(0) == pytest.approx(4 / (0.5 * 65))
    assert rate(35) == pytest.approx(4 / (0.5 * 100))
    assert schedules.stich_learning_rate(1.0, 1.0, 100)(0) == pytest.approx(4 / 101)


def test_patel_dieuleveut():
    # 1 / (eta mu P) for eta .5, .1, .02 at eta mu P = 1/1.7, 1/8.6, 1/43: the checked table's knees
    mu = 1 / (0.5 * 1.72 * 16)
    assert [int(schedules.patel_dieuleveut(eta, mu, 16)(0, 0, NONE)) for eta in (0.5, 0.1, 0.02)] == [1, 8, 43]
    decaying = schedules.patel_dieuleveut(lambda t: 1 / (10 + t), mu=0.5, workers=2)
    assert table(decaying, [(0, 0), (1, 10), (2, 90)]) == [10, 20, 100]
    assert table(schedules.patel_dieuleveut(1e-9, 1.0, 1, maximum=500), [(0, 0)]) == [500]
    assert table(schedules.patel_dieuleveut(0.5, 1.0, 64), [(0, 0)]) == [1]


def test_distance_aware():
    eta, mu, workers, noise = 0.1, 0.5, 4, 2.0
    rule = schedules.distance_aware(eta, mu, workers, noise, scale=0.5, maximum=500)
    near = eta * noise / (mu * workers)
    for squared in (0.0, near / 3, near):  # close in, it is patel_dieuleveut's rule
        assert table(rule, [(0, 0)], Statistics(custom=jnp.float32(squared))) == [2]
    for squared, delay in ((3.0, 75), (1000.0, 500)):  # 0.5 · 3 / (0.01 · 2)
        assert table(rule, [(0, 0)], Statistics(custom=jnp.float32(squared))) == [delay]
    other = schedules.distance_aware(lambda t: eta / (1 + t), mu, workers, noise, distance=lambda s: s.value)
    for step, most in ((0, 20), (3, 80)):  # 1 / (eta mu)
        assert table(other, [(0, step)], Statistics(value=jnp.float32(8.0))) == [most]


def test_quadratic():
    rule = schedules.quadratic(lambda t: 1.0 / (1 + t), alpha=0.5, minimum=2)
    assert table(rule, [(0, 0), (1, 3), (2, 9)]) == [2, 4, 25]


def test_adacomm():
    rule = schedules.adacomm(16, maximum=20)
    for value, tau in ((1.0, 16), (0.25, 8), (0.26, 9), (1e-9, 1), (4.0, 20), (math.nan, 16), (-1.0, 1)):
        assert table(rule, [(3, 30)], Statistics(value=value, first_value=1.0)) == [tau]
    assert table(schedules.adacomm(16), [(1, 1)], Statistics(value=9.0, first_value=1.0)) == [16]
    assert table(rule, [(0, 0)]) == [16]  # before any loss is known


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.constant(3),
        schedules.post_local(4, 8),
        schedules.square_root_growth(2),
        schedules.stich(1000, 4, 4),
        schedules.patel_dieuleveut(lambda t: 1 / (5 + t), 0.3, 2),
        schedules.distance_aware(0.1, 0.5, 4, 2.0, distance=lambda s: s.worker_sq),
        schedules.quadratic(0.1, 0.3),
        schedules.adacomm(6),
        schedules.plan_delays(schedules.make_plan(30, 4, 2)),
    ],
)
def test_schedules_trace_as_they_run(schedule):
    """Under vmap of jit with traced round, step and statistics: the answers of plain numbers, as one scalar."""
    rounds, steps = jnp.arange(6), jnp.arange(6) * 7
    many = Statistics(*(jnp.linspace(0.5, 3.0, 6) for _ in range(4)))
    traced = jax.jit(jax.vmap(schedule))(rounds, steps, many)
    assert traced.shape == (6,)
    one = [int(schedule(r, 7 * r, jax.tree.map(lambda x, r=r: x[r], many))) for r in range(6)]
    assert traced.tolist() == one


def test_batch_schedules():
    steps = [(t, NONE) for t in (0, 9, 10, 20, 21, 10**6)]
    assert [int(schedules.constant_batch(5)(*s)) for s in steps] == [5] * 6
    geometric = schedules.geometric_batch(3, factor=1.5, every=10, maximum=100)
    assert [int(geometric(*s)) for s in steps] == [3, 3, 4, 6, 6, 100]
    stepwise = schedules.stepwise_batch([4, 8, 2], [10, 21])
    assert [int(stepwise(*s)) for s in steps] == [4, 4, 8, 8, 2, 2]
    assert int(jax.jit(stepwise)(jnp.int32(21), NONE)) == 2
    noise = schedules.noise_scale_batch(4, 64, scale=0.5)
    scales = {1.0: 4, 20.0: 10, 21.0: 11, 1e9: 64, math.nan: 4, math.inf: 64}
    assert {b: int(noise(0, Statistics(custom=jnp.float32(b)))) for b in scales if not math.isnan(b)} == {
        b: size for b, size in scales.items() if not math.isnan(b)
    }
    assert int(noise(0, Statistics(custom=jnp.float32(math.nan)))) == 4


def test_gradient_noise_is_unbiased():
    """Gaussian gradients of known mean and covariance, 20,000 draws; within 4 standard errors of the truth."""
    rng = np.random.default_rng(0)
    mean, deviation, small, big, n = np.array([0.3, -0.2]), np.array([1.0, 2.0]), 2, 8, 20_000
    workers = mean + deviation / math.sqrt(small) * rng.normal(size=(n, big // small, 2))
    small_sq = np.mean(np.sum(workers**2, axis=-1), axis=1)
    big_sq = np.sum(workers.mean(axis=1) ** 2, axis=-1)
    estimate = schedules.gradient_noise(small_sq, big_sq, small, big)
    for values, truth in ((estimate.signal, np.sum(mean**2)), (estimate.noise, np.sum(deviation**2))):
        error = values.std() / math.sqrt(n)
        assert error < 0.03
        assert abs(values.mean() - truth) < 4 * error
    traced = jax.jit(lambda batch: schedules.gradient_noise(small_sq, big_sq, batch, 4 * batch))(small)
    np.testing.assert_allclose(traced.noise.mean(), estimate.noise.mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="big_batch > small_batch"):
        schedules.gradient_noise(1.0, 1.0, 4, 4)


def test_learning_rates_for_batches():
    rate = schedules.learning_rate_for_batch
    assert rate(0.1, 8, 32) == pytest.approx(0.4)
    assert rate(0.1, 8, 32, rule="sqrt") == pytest.approx(0.2)
    assert rate(0.1, 8, 32, rule="noise", noise_scale=1e9) == pytest.approx(0.4)  # far below the noise scale: linear
    assert rate(0.1, 8, 32, rule="noise", noise_scale=1e-9) == pytest.approx(0.1)  # far above: constant
    assert rate(0.1, 8, 8, rule="noise", noise_scale=5.0) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="needs noise_scale"):
        rate(0.1, 8, 32, rule="noise")
    with pytest.raises(ValueError, match="rule must be"):
        rate(0.1, 8, 32, rule="cubic")


@given(total=st.integers(1, 400), delay=st.integers(1, 9), first=st.integers(1, 7), every=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_plans_take_exactly_the_samples(total, delay, first, every):
    batch = schedules.geometric_batch(first, factor=2.0, every=every, maximum=32)
    plan = schedules.make_plan(total, delay, batch)
    assert plan.batches.sum() == total
    assert plan.delays.sum() == len(plan.batches)
    assert set(plan.delays[:-1].tolist()) <= {delay}
    assert 1 <= plan.delays[-1] <= delay
    for t, size in enumerate(plan.batches[:-1]):
        assert size == int(batch(t, NONE))


def test_plans_refuse_bad_schedules():
    with pytest.raises(ValueError, match="gave 0 for round 0"):
        schedules.make_plan(10, lambda r, t, s: 0, 2)
    with pytest.raises(ValueError, match="gave 0 for step 0"):
        schedules.make_plan(10, 2, lambda t, s: 0)
    for bad in (([4], [3]), ([4, 8, 2], [5, 5]), ([4, 0], [5])):
        with pytest.raises(ValueError, match="stepwise_batch"):
            schedules.stepwise_batch(*bad)
    for call in (
        lambda: schedules.post_local(3, 0),
        lambda: schedules.stich(0, 1, 1),
        lambda: schedules.patel_dieuleveut(0.1, 0.0, 4),
        lambda: schedules.distance_aware(0.1, 0.1, 4, -1.0),
        lambda: schedules.adacomm(0),
        lambda: schedules.noise_scale_batch(8, 4),
        lambda: schedules.power_growth(1, power=1.0, rounds=0.0),
    ):
        with pytest.raises(ValueError, match=r"must be|is below"):
            call()


def test_pipeline_deals_every_example_once_an_epoch():
    plan = schedules.make_plan(60, 3, schedules.geometric_batch(2, factor=2.0, every=4, maximum=8))
    batches = list(schedules.plan_batches(plan, num_examples=92, workers=3, seed=1, buckets=[4, 16]))
    assert [b.mask.sum() for b in batches] == [3 * size for size in plan.batches]
    assert {b.indices.shape for b in batches} == {(3, 4), (3, 16)}  # two shapes, so two compilations
    for k in range(3):
        drawn = np.concatenate([b.indices[k][b.mask[k]] for b in batches])
        assert len(drawn) == 60
        assert len(set(drawn[:30].tolist())) == len(set(drawn[30:].tolist())) == 30  # a share is 92 // 3 = 30
    first = [set(np.concatenate([b.indices[k][b.mask[k]] for b in batches])[:30].tolist()) for k in range(3)]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(first, 2))
    again = list(schedules.plan_batches(plan, num_examples=92, workers=3, seed=1, buckets=[4, 16]))
    np.testing.assert_array_equal(batches[7].indices, again[7].indices)
    with pytest.raises(ValueError, match="fit in none"):
        next(schedules.plan_batches(plan, 92, 3, seed=1, buckets=[1]))
    with pytest.raises(ValueError, match="cannot be dealt"):
        next(schedules.plan_batches(plan, 2, 3, seed=1))


def test_growing_batches_compile_once():
    """A plan drives a padded pipeline: one shape, one compilation, and the loss of the true batch."""
    plan = schedules.make_plan(24, 2, schedules.stepwise_batch([2, 4, 8], [2, 4]))
    data = np.random.default_rng(0).normal(size=50).astype(np.float32)
    traces = []

    @jax.jit
    def loss(indices, mask):
        traces.append(None)
        return schedules.masked_mean(jnp.asarray(data)[indices] ** 2, mask)

    for batch in schedules.plan_batches(plan, 50, 1, seed=0):
        expected = np.mean(data[batch.indices[0][batch.mask[0]]] ** 2)
        np.testing.assert_allclose(loss(batch.indices[0], batch.mask[0]), expected, rtol=1e-6)
    assert len(traces) == 1
    assert float(schedules.masked_mean(jnp.array([jnp.nan, 2.0]), jnp.array([False, True]))) == 2.0
    assert float(schedules.masked_mean(jnp.array([jnp.nan]), jnp.array([False]))) == 0.0


def test_what_is_not_known_yet_gives_the_least():
    nothing = schedules.Statistics()
    assert int(schedules.noise_scale_batch(4, 64)(0, nothing)) == 4
    assert int(schedules.distance_aware(0.1, 0.5, 4, 2.0)(0, 0, nothing)) == 1
    unknown = schedules.distance_aware(0.1, 0.5, 4, 2.0, distance=lambda statistics: jnp.nan)
    assert int(unknown(0, 0, nothing)) == 1
