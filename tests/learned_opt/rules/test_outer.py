"""The learned outer step: its length, its scale, and that it runs as local SGD's outer transform."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import learned_opt
from learned_opt.layouts import stacked
from learned_opt.local_sgd import map_workers, spread_workers, worker_axes
from learned_opt.rules.outer import limit, outer, statistics

RULE = outer(hidden_size=4)
THETA = jax.tree.map(lambda x: x + 0.03, RULE.init(jax.random.key(0)))
PARAMS = {"w": jnp.linspace(-1, 1, 12).reshape(3, 4), "b": jnp.ones(3)}


def run(deltas, theta=THETA, num_steps=None):
    """The updates for one delta after the other, and the last state."""
    tx = RULE.build(theta, num_steps=num_steps)
    state, out = tx.init(PARAMS), []
    for delta in deltas:
        updates, state = tx.update(delta, state, PARAMS)
        out.append(updates)
    return out, state


def deltas(scale=0.1, count=3):
    """Of full rank: they determine their singular vectors."""
    keys = jax.random.split(jax.random.key(1), count)
    return [jax.tree.map(lambda p, key=key: scale * jax.random.normal(key, p.shape), PARAMS) for key in keys]


def with_offset(theta, offset):
    """No network, only the offset of the length."""
    last = jax.tree.map(jnp.zeros_like, theta["length"]["last"])
    return theta | {"length": theta["length"] | {"last": last, "offset": jnp.asarray(offset)}}


def rms(x):
    return float(jnp.sqrt(jnp.mean(x * x)))


def test_without_its_network_the_length_is_the_offset_s_and_falls_by_a_cosine_where_the_rounds_are_known():
    theta = with_offset(THETA, jnp.log(0.02))
    for num_steps, factors in ((None, [1, 1, 1]), (0, [1, 1, 1]), (4, [1, 0.5 + 0.5**1.5, 0.5])):
        updates, _ = run(deltas(), theta, num_steps)
        for update, factor in zip(updates, factors, strict=True):
            for name in PARAMS:
                np.testing.assert_allclose(rms(update[name]), 0.02 * factor, rtol=1e-3)


def test_the_network_moves_the_length_within_its_bounds():
    given = deltas()
    plain, _ = run(given, with_offset(THETA, jnp.log(0.01)))
    for push in (-100.0, 100.0):
        theta = with_offset(THETA, jnp.log(0.01))
        theta["length"]["last"] = {"w": theta["length"]["last"]["w"], "b": jnp.array([push])}
        for a, b in zip(run(given, theta)[0], plain, strict=True):
            np.testing.assert_allclose(a["w"], b["w"] * np.exp(np.sign(push) * 3), rtol=1e-4)


def test_the_length_depends_on_how_well_the_deltas_agree_and_on_the_share_of_the_run():
    same = [deltas()[0]] * 4
    turning = [jax.tree.map(lambda x, t=t: x * (-1) ** t, deltas()[0]) for t in range(4)]

    def length(given, num_steps=None):
        (*_, last), _ = run(given, THETA, num_steps)
        return rms(last["w"])

    assert abs(length(same) / length(turning) - 1) > 0.01
    assert length(same, 5) < 0.5 * length(same, 50)
    assert length(same, 0) == length(same)  # 0 is not known


def test_the_statistics_of_deltas_that_agree_are_zero():
    delta = jnp.array([[1.0, -2.0], [0.5, 0.25]])
    t, m = 5, [(1 - b**6) * delta for b in (0.9, 0.99)]
    found = statistics(delta, *m, p=2 * delta, step=jnp.asarray(t))
    np.testing.assert_allclose(found, [0, 0, 0.1 * np.log(0.5), 0.1 * np.log(rms(delta) / 0.04)], atol=1e-5)
    assert np.all(np.isfinite(statistics(0 * delta, 0 * delta, 0 * delta, 0 * delta, jnp.asarray(0))))


def test_a_delta_counts_for_less_the_further_it_is_beyond_twice_the_usual_length():
    usual, seen = jnp.zeros(()), []
    for length in (0.0, 3.0, 0.0, 3.0, 6.0, 4500.0, 1.0):
        factor, usual = limit([jnp.array([0.6, 0.8]) * length], usual)
        seen.append((float(factor), float(usual)))
    wanted = [(1, 0), (1, 3), (1, 3), (1, 3), (1, 4.5), ((9 / 4500) ** 2, 6.75), (1, 3.875)]
    np.testing.assert_allclose(seen, wanted, rtol=1e-5)


def test_one_round_of_workers_that_diverged_moves_nothing_and_long_deltas_are_followed_in_the_end():
    given = deltas(count=2)
    (*_, stray), _ = run([*given, jax.tree.map(lambda x: 1e6 * x, given[0])])
    (*_, calm), _ = run([*given, jax.tree.map(jnp.zeros_like, given[0])])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.2, atol=0.01), stray, calm)
    long = [jax.tree.map(lambda x: 100 * x, given[0])] * 15
    _, state = run([*given, *long])
    np.testing.assert_allclose(state.usual, optax.tree.norm(long[0]), rtol=0.05)


def test_the_fresh_rule_moves_against_the_delta():
    tx = RULE.build(RULE.init(jax.random.key(0)))
    delta = jnp.array([[0.3, -0.1, 0.2, -0.4]])
    updates, _ = tx.update(delta, tx.init(delta), jnp.ones_like(delta))
    assert float(jnp.sum(updates * delta)) < 0


def test_it_runs_as_the_outer_step_and_does_not_depend_on_how_many_workers_agree():
    ends = []
    for workers in (1, 4):
        transform = learned_opt.local_sgd.local_sgd(optax.sgd(0.1), RULE.build(THETA), sync_every=2)
        state = transform.init(PARAMS)
        axes = worker_axes(state)

        def step(params, state, transform=transform):
            grads = jax.tree.map(lambda p: p - 0.3, params)
            updates, state = transform.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(map_workers(step, in_axes=(0, axes), out_axes=(0, axes)))
        params, state = spread_workers(PARAMS, workers), spread_workers(state, workers, axes)
        for _ in range(4):
            params, state = step(params, state)
        ends.append(jax.tree.map(lambda p: p[0], params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *ends)


def test_the_layers_of_a_stack_step_as_separate_tensors():
    whole = RULE.build(THETA, num_steps=9, layout=stacked(lambda path: True))
    apart = RULE.build(THETA, num_steps=9)
    p, keys = jnp.linspace(-1, 1, 24).reshape(2, 3, 4), jax.random.split(jax.random.key(2), 3)
    one, two = whole.init({"w": p}), apart.init({"0": p[0], "1": p[1]})
    for key in keys:  # of different sizes, so that lengths differ
        delta = jnp.array([0.1, 0.01])[:, None, None] * jax.random.normal(key, p.shape)
        ours, one = whole.update({"w": delta}, one, {"w": p})
        theirs, two = apart.update({"0": delta[0], "1": delta[1]}, two, {"0": p[0], "1": p[1]})
    np.testing.assert_allclose(ours["w"], jnp.stack([theirs["0"], theirs["1"]]), rtol=1e-4, atol=1e-6)
    assert rms(ours["w"][0]) != pytest.approx(rms(ours["w"][1]), rel=1e-3)


def test_a_step_is_at_most_a_hundred_usual_deltas():
    given = deltas(scale=1e-6)
    updates, state = run(given, with_offset(THETA, 0.0))
    for name in PARAMS:
        usual = rms(state.direction.tensors.moments.m[name][0]) / (1 - 0.9**3)
        np.testing.assert_allclose(rms(updates[-1][name]), 100 * usual, rtol=1e-3)
