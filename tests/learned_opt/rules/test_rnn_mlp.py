"""What rnn_mlp's reference trajectory does not reach: the clipping, odd losses, tensors at rest, ranks above 4."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learned_opt.rules import rnn_mlp

RULE = rnn_mlp.rnn_mlp(lstm_size=5, hidden_size=4)


def noisy_rule(size=0.3):
    rng = np.random.default_rng(0)
    theta = jax.tree.map(lambda x: x + size * rng.normal(size=x.shape).astype(np.float32), RULE.init(jax.random.key(0)))
    return RULE.build(theta)


def test_loss_features_are_deviations_from_the_running_mean():
    state = rnn_mlp.LossMean(jnp.float32(0), jnp.float32(0), jnp.int32(0))
    features = jax.jit(rnn_mlp.loss_features)
    mean = variance = 0.0
    n = 0
    for loss in (2.3, 2.1, -0.5, np.nan, 100.0, 1.7, np.inf):
        if np.isfinite(loss):
            mean = 0.9 * mean + 0.1 * loss
            variance = 0.9 * variance + 0.1 * (mean - loss) ** 2
            n += 1
        correct = 1 / (1 - 0.9**n)
        shown = loss if np.isfinite(loss) else mean * correct
        expected = (np.array([shown, 0.0]) - mean * correct) / np.sqrt(variance * correct + 1e-8)
        got, state = features(state, jnp.float32(loss))
        np.testing.assert_allclose(got, np.clip(expected, -5, 5), atol=2e-5)
    got, state = features(state, jnp.float32(1e30))
    assert np.all(np.isfinite(got))
    assert np.all(np.isfinite(state))


def test_gradients_are_clipped_to_ten_times_their_running_size():
    tx = noisy_rule()
    params = {"a": jnp.ones((2, 3)), "b": jnp.float32(2.0)}
    state, update = tx.init(params), jax.jit(lambda g, state: tx.update(g, state, params, value=1.0)[1])
    size, m, limits = 0.01, {k: np.zeros(p.shape) for k, p in params.items()}, []
    for k, scale in enumerate((1e-3, 1e-2, 1e6, 1e6, 1e-3), start=1):
        limits.append(10 * size / (1 - 0.99**k))
        g = {"a": scale * np.linspace(-1, 1, 6).reshape(2, 3), "b": np.array(scale)}
        clipped = {name: np.clip(x, -limits[-1], limits[-1]) for name, x in g.items()}
        size = 0.99 * size + 0.01 * np.sqrt(1e-8 + np.mean([np.mean(x**2) for x in clipped.values()]))
        m = {name: 0.5 * x + 0.5 * clipped[name] for name, x in m.items()}
        state = update(jax.tree.map(jnp.float32, g), state)
        np.testing.assert_allclose(state.shared.clipper.size, size, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9),
            jax.tree.map(lambda x: x[0], state.tensors.m),
            m,
        )
    assert limits[0] == pytest.approx(10)
    assert min(limits) < 5 < max(limits) < 100  # it did clip, and came to clip elsewhere


def test_tensors_without_a_gradient_or_elements_count_for_nothing():
    tx = noisy_rule()
    a = jnp.linspace(-1, 1, 6).reshape(2, 3)
    params = {"a": a, "b": jnp.ones(4), "c": jnp.zeros((0, 2)), "d": None}
    state, alone = tx.init(params), tx.init({"a": a})
    update = jax.jit(tx.update)
    for t in range(3):
        g = jnp.cos(a + t)
        u, alone = update({"a": g}, alone, {"a": a}, value=1.0 + t)
        updates, new = update({"a": g, "b": None, "c": params["c"], "d": None}, state, params, value=1.0 + t)
        np.testing.assert_allclose(updates["a"], u["a"], rtol=1e-5)
        np.testing.assert_allclose(new.shared.from_lstm, alone.shared.from_lstm, rtol=1e-5)
        np.testing.assert_array_equal(new.tensors.memory.hidden["b"], state.tensors.memory.hidden["b"])
        np.testing.assert_array_equal(new.tensors.m["b"], state.tensors.m["b"])
        state = new


def test_tensors_and_network_tell_each_other():
    """What one tensor sees reaches another through the LSTM, one update later and not before."""
    tx = noisy_rule()
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    update = jax.jit(lambda g, state: tx.update(g, state, params, value=1.0))
    histories = []
    for size in (0.1, 1.0):
        state, updates = tx.init(params), []
        for _ in range(2):
            u, state = update({"a": jnp.full((2, 3), 0.1), "b": jnp.full(4, size)}, state)
            updates.append(u["a"])
        histories.append(updates)
    np.testing.assert_array_equal(histories[0][0], histories[1][0])
    assert float(jnp.max(jnp.abs(histories[0][1] - histories[1][1]))) > 1e-7


def test_fifth_axis_counts_with_the_fourth():
    shapes = [(2, 3, 4, 10), (2, 3, 4, 2, 5)]
    g = np.random.default_rng(0).normal(size=240).astype(np.float32)
    seen = [
        rnn_mlp.statistics(*(g.reshape(s),) * 2, [g.reshape(s)] * 5, [g.reshape(s)] * 5, jnp.zeros(2)) for s in shapes
    ]
    np.testing.assert_allclose(*seen, rtol=1e-4)
    np.testing.assert_allclose(seen[0][9:13], np.log([2, 3, 4, 10]) - 1, rtol=1e-6)


def test_fresh_rule_goes_downhill_at_unit_rms():
    p = jax.random.normal(jax.random.key(0), (16, 8))
    g = 1e-2 * jax.random.normal(jax.random.key(1), (16, 8))
    rule = rnn_mlp.rnn_mlp()

    @jax.jit
    def first_update(key):
        tx = rule.build(rule.init(key))
        return tx.update(g, tx.init(p), p, value=1.0)[0]

    for seed in range(3):
        u = first_update(jax.random.key(seed))
        assert float(jnp.sum(u * g) / jnp.linalg.norm(u) / jnp.linalg.norm(g)) < -0.6
        assert 0.3e-3 < float(jnp.sqrt(jnp.mean(u * u))) < 3e-3


def test_size_and_its_check():
    theta = jax.eval_shape(rnn_mlp.rnn_mlp().init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(theta)) == 35799
    for sizes in ({"lstm_size": 0}, {"hidden_size": 1}):
        with pytest.raises(ValueError, match="rnn_mlp needs"):
            rnn_mlp.rnn_mlp(**sizes)


def test_extreme_gradients_cost_no_more_than_float32_rounds():
    """1e-12 to 1e6 within a tensor, and a tensor of zeros, against the same in float64.

    The bound is in units of a tensor's largest update: where the network's terms cancel to almost nothing, a single
    element's relative error is that of any float32 sum (2e-4 is seen).
    """
    rng = np.random.default_rng(1)
    shapes = [(20, 30), (30,), (4, 5)]
    params = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    theta = rnn_mlp.rnn_mlp().init(jax.random.key(0))
    theta = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), theta)
    gradients = [
        [*(rng.choice([-1, 1], s) * 10.0 ** rng.uniform(-12, 6, s) for s in shapes[:2]), np.zeros(shapes[2])]
        for _ in range(4)
    ]

    def run(dtype):
        own, p = jax.tree.map(lambda x: jnp.asarray(x, dtype), (theta, params))
        tx = rnn_mlp.rnn_mlp(published=True).build(own)
        update, state, found = jax.jit(tx.update), tx.init(p), []
        for g in gradients:
            g = [jnp.asarray(x.astype(np.float32), dtype) for x in g]
            updates, state = update(g, state, p, value=jnp.asarray(1.5, dtype))
            found.append([np.asarray(u, np.float64) for u in updates])
        return found

    single = run(np.float32)
    with jax.enable_x64(True):
        double = run(np.float64)
    for step, exact in zip(single, double, strict=True):
        for u, v in zip(step, exact, strict=True):
            np.testing.assert_allclose(u, v, atol=1e-5 * np.abs(v).max(), rtol=0)
