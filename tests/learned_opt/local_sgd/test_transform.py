"""Local SGD as a transform: exact against stacked NumPy references, policies, accounting, errors, files."""

import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt import communication, schedules
from learned_opt.local_sgd import (
    Watchdog,
    load_anchor,
    load_tree,
    local_sgd,
    map_workers,
    rescue,
    save_anchor,
    save_tree,
    spread_workers,
    worker_axes,
    worker_specs,
)
from learned_opt.local_sgd.mean import _decode_and_add

K, D, STEPS, LR = 4, 5, 16, 0.1
RNG = np.random.default_rng(0)
X = RNG.normal(size=(STEPS, K, 8, D))
Y = RNG.normal(size=(STEPS, K, 8))
W0 = RNG.normal(size=D)


def gradient(w, x, y):
    """Of 1/2 mean (x w - y)^2, in NumPy and JAX alike."""
    return x.T @ (x @ w - y) / len(y)


def stacked_reference(sync_every, outer):
    """K workers as rows of a float64 matrix; ``outer(delta) -> update of the anchor``."""
    anchor, workers = W0.copy(), np.tile(W0, (K, 1))
    for t in range(STEPS):
        workers = np.stack([w - LR * gradient(w, X[t, k], Y[t, k]) for k, w in enumerate(workers)])
        if (t + 1) % sync_every == 0:
            anchor = anchor + outer(anchor - workers.mean(axis=0))
            workers = np.tile(anchor, (K, 1))
    return anchor, workers


def momentum_reference(learning_rate, beta, nesterov):
    buffer = np.zeros(D)

    def outer(delta):
        nonlocal buffer
        buffer = beta * buffer + delta
        return -learning_rate * (beta * buffer + delta if nesterov else buffer)

    return outer


def run(opt, grads_of, params, data, steps, workers=K, state=None, **extra):
    """Simulate the workers with vmap, the whole run in one program; ``grads_of(params, datum) -> grads``."""
    axes = worker_axes(jax.eval_shape(opt.init, params))

    def one(params, state, datum, extra):
        updates, state = opt.update(grads_of(params, datum), state, params, **extra)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def whole(params, state, data, extra):
        step = map_workers(one, in_axes=(0, axes, 0, 0), out_axes=(0, axes))
        state = opt.init(params) if state is None else state
        start = spread_workers(params, workers), spread_workers(state, workers, axes)
        return jax.lax.scan(lambda carry, datum: (step(*carry, datum, extra), None), start, data)[0]

    return whole(params, state, jax.tree.map(lambda d: d[:steps], data), extra)


OUTERS = {
    "plain": (None, lambda: lambda delta: -delta),
    "nesterov": (
        optax.sgd(0.7, momentum=0.9, nesterov=True),
        lambda: momentum_reference(0.7, 0.9, nesterov=True),
    ),
    "slow momentum": (optax.sgd(0.8, momentum=0.6), lambda: momentum_reference(0.8, 0.6, nesterov=False)),
}


@functools.cache
def compiled_run(name):
    """Run over all the data with H as an argument: one compilation for every H."""

    def whole(w, x, y, sync_every):
        opt = local_sgd(optax.sgd(LR), OUTERS[name][0], sync_every=sync_every)
        state = opt.init(w)
        axes = worker_axes(state)

        def one(w, state, x, y):
            updates, state = opt.update(gradient(w, x, y), state, w)
            return optax.apply_updates(w, updates), state

        step = map_workers(one, in_axes=(0, axes, 0, 0), out_axes=(0, axes))
        start = spread_workers(w, K), spread_workers(state, K, axes)
        return jax.lax.scan(lambda carry, xy: (step(*carry, *xy), None), start, (x, y))[0]

    return jax.jit(whole)


@pytest.mark.parametrize("name", OUTERS)
@pytest.mark.parametrize("sync_every", [1, 4, 8])
def test_equals_the_stacked_reference(name, sync_every):
    anchor, workers = stacked_reference(sync_every, OUTERS[name][1]())
    with jax.enable_x64(True):
        w, state = compiled_run(name)(W0, X, Y, sync_every)
        np.testing.assert_allclose(state.anchor, anchor, rtol=0, atol=1e-13)
        np.testing.assert_allclose(w, workers, rtol=0, atol=1e-13)
        assert int(state.round) == STEPS // sync_every


def test_one_step_a_round_is_large_batch_sgd():
    large = W0.copy()
    for t in range(STEPS):
        large = large - LR * gradient(large, X[t].reshape(-1, D), Y[t].reshape(-1))
    w, _ = compiled_run("plain")(*(a.astype(np.float32) for a in (W0, X, Y)), jnp.int32(1))
    np.testing.assert_allclose(w, np.tile(large, (K, 1)), rtol=0, atol=1e-6)


# ---- schedules, accounting, what is compiled ----


def test_a_whole_schedule_compiles_once_and_counts():
    opt = local_sgd(optax.sgd(0.1), sync_every=schedules.post_local(3, 4))
    state = opt.init(jnp.zeros(3))
    axes = worker_axes(state)
    step = jax.jit(map_workers(lambda w, s: opt.update(w, s, w), in_axes=(0, axes), out_axes=(0, axes)))
    w, state = jnp.ones((K, 3)), spread_workers(state, K, axes)
    for _ in range(10):
        updates, state = step(w, state)
        w = w + updates
    assert step._cache_size() == 1
    # steps 1, 2, 3 alone, then rounds of 4: at 7; 3 steps since
    assert [int(state.step), int(state.round), int(state.since_sync), int(state.period)] == [10, 4, 3, 4]
    # 4 rounds of 4-byte numbers: 3 parameters, 2 statistics, and the agreement on the next delay
    assert communication.total_bytes(state.bytes) == 4 * 4 * (3 + 2 + 1)


def test_the_simulation_skips_what_is_not_due():
    """With the axes of worker_axes the predicate stays unbatched and the vmapped cond a cond."""
    opt = local_sgd(optax.sgd(0.1), sync_every=4)
    state = opt.init(jnp.zeros(3))
    axes = worker_axes(state)

    def one(w, state):
        return opt.update(w, state, w)

    args = spread_workers(jnp.zeros(3), K), spread_workers(state, K, axes)
    skipping = jax.make_jaxpr(map_workers(one, in_axes=(0, axes), out_axes=(0, axes)))(*args)
    assert "cond" in {eqn.primitive.name for eqn in skipping.eqns}
    batched = jax.make_jaxpr(map_workers(one, in_axes=(0, 0), out_axes=(0, 0)))(args[0], spread_workers(state, K))
    assert "cond" not in {eqn.primitive.name for eqn in batched.eqns}  # correct too, but it synchronises in vain


def test_statistics_are_those_of_the_round():
    targets = np.arange(K * 2, dtype=np.float32).reshape(1, K, 2).repeat(2, axis=0)
    values = jnp.array([1.0, 2.0, 3.0, 6.0])
    opt = local_sgd(optax.sgd(0.5), sync_every=2, statistic=lambda anchor: {"square": jnp.sum(anchor**2)})
    assert float(opt.init(jnp.ones(2)).statistics.custom["square"]) == 2.0
    _, state = run(opt, lambda w, c: w - c, jnp.zeros(2), targets, 2, value=values)
    deltas = -0.75 * targets[0]  # two halvings of the distance
    np.testing.assert_allclose(state.statistics.value, 3.0)
    np.testing.assert_allclose(state.statistics.first_value, 3.0)
    np.testing.assert_allclose(state.statistics.delta_sq, np.sum(deltas.mean(0) ** 2), rtol=1e-6)
    np.testing.assert_allclose(state.statistics.worker_sq, np.mean(np.sum(deltas**2, -1)), rtol=1e-6)
    np.testing.assert_allclose(state.statistics.custom["square"], np.sum(deltas.mean(0) ** 2), rtol=1e-6)


def test_no_loss_is_none_and_many_are_an_error():
    opt = local_sgd(optax.sgd(0.5), sync_every=1)
    _, without = run(opt, lambda w, c: w, jnp.ones(2), np.zeros((1, K, 1)), 1)
    opt = opt._replace(update=functools.partial(opt.update, value=None))
    _, none = run(opt, lambda w, c: w, jnp.ones(2), np.zeros((1, K, 1)), 1)
    assert bool(jnp.isnan(none.statistics.value))
    jax.tree.map(np.testing.assert_array_equal, none, without)
    opt = local_sgd(optax.sgd(0.5), sync_every=1)
    with pytest.raises(ValueError, match=r"a scalar, not of shape \(8,\)"):
        run(opt, lambda w, c: w, jnp.ones(2), np.zeros((1, K, 1)), 1, value=jnp.ones((K, 8)))


def test_the_loss_drives_adacomm():
    """The loss of round j is 4^-j, so tau halves every round: 8, 8 (loss of round 0 is F_0), 4, 2, 1."""
    opt = local_sgd(optax.sgd(0.1), sync_every=schedules.adacomm(8))
    state = opt.init(jnp.zeros(1))
    axes = worker_axes(state)

    def one(w, state):
        value = 4.0 ** -state.round.astype(jnp.float32)
        updates, state = opt.update(w, state, w, value=value)
        return optax.apply_updates(w, updates), state

    step = jax.jit(map_workers(one, in_axes=(0, axes), out_axes=(0, axes)))
    w, state = spread_workers(jnp.zeros(1), K), spread_workers(state, K, axes)
    ends = []
    for t in range(24):
        before = int(state.round)
        w, state = step(w, state)
        ends += [t + 1] if int(state.round) > before else []
    assert ends == [8, 16, 20, 22, 23, 24]


# ---- inner state, outer arguments ----


def counting_inner():
    """A transform whose state has what must never be averaged: a counter, a key and a flag, and one float."""

    def init(params):
        return {"count": jnp.int32(0), "key": jax.random.key(0), "flag": jnp.bool_(False), "mean": jnp.zeros(())}

    def update(grads, state, params=None, *, bump, **extra):
        new = {
            "count": state["count"] + bump,
            "key": jax.random.fold_in(state["key"], bump),
            "flag": bump > 2,
            "mean": state["mean"] + bump,
        }
        return jax.tree.map(lambda g: -0.1 * g, grads), new

    return optax.GradientTransformationExtraArgs(init, update)


@pytest.mark.parametrize(
    ("policy", "count", "mean"),
    [
        ("keep", [2, 4, 6, 8], [2.0, 4.0, 6.0, 8.0]),
        ("average", [2, 4, 6, 8], [5.0] * 4),
        ("reset", [0] * 4, [0.0] * 4),
        (lambda state, mean, anchor: state | {"mean": mean(state["mean"]) + anchor[0]}, [2, 4, 6, 8], [6.0] * 4),
    ],
    ids=["keep", "average", "reset", "function"],
)
def test_inner_state_policies(policy, count, mean):
    opt = local_sgd(counting_inner(), sync_every=2, inner_state=policy)
    bump = jnp.arange(1, K + 1)
    _, state = run(opt, lambda w, c: 0 * w, jnp.ones(2), np.zeros((2, K, 1)), 2, bump=bump)
    assert state.inner["count"].tolist() == count
    assert state.inner["mean"].tolist() == mean
    assert state.inner["flag"].tolist() == ([False] * 4 if policy == "reset" else [False, False, True, True])
    fresh = jax.random.key_data(jax.random.key(0))
    kept = jax.random.key_data(state.inner["key"])
    assert bool(jnp.all(kept == jnp.tile(fresh, (K, 1)))) == (policy == "reset")


def test_adam_kept_equals_adams_apart():
    """Rounds of 3 with kept moments: K separate optax.adam runs, put on their mean after every third step."""
    adam = optax.adam(0.05)
    w, state = run(local_sgd(adam, sync_every=3), lambda w, xy: gradient(w, *xy), jnp.asarray(W0, jnp.float32),
                   (np.float32(X), np.float32(Y)), 9)  # fmt: skip
    step = jax.jit(jax.vmap(lambda w, s, x, y: adam.update(gradient(w, x, y), s, w)))
    apart = jnp.tile(jnp.asarray(W0, jnp.float32), (K, 1))
    moments = jax.vmap(adam.init)(apart)
    for t in range(9):
        updates, moments = step(apart, moments, np.float32(X[t]), np.float32(Y[t]))
        apart = apart + updates
        if t % 3 == 2:
            apart = jnp.broadcast_to(jnp.mean(apart, axis=0), apart.shape)
    np.testing.assert_allclose(w, apart, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.inner, moments)


def test_outer_gets_the_mean_of_the_arguments():
    def outer_update(delta, state, params=None, *, value, gain, mode, **extra):
        assert mode == "fast"  # what is no float array passes as it is
        return jax.tree.map(lambda d: -gain * d, delta), {"value": value, "gain": gain}

    outer = optax.GradientTransformationExtraArgs(lambda params: {"value": 0.0, "gain": 0.0}, outer_update)
    opt = local_sgd(optax.sgd(1.0), outer, sync_every=1)
    opt = opt._replace(update=functools.partial(opt.update, mode="fast"))
    value, gain = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([0.0, 0.0, 0.0, 2.0])
    w, state = run(opt, lambda w, c: jnp.ones_like(w), jnp.zeros(2), np.zeros((1, K, 1)), 1, value=value, gain=gain)
    assert float(state.outer["value"]) == 2.5
    np.testing.assert_allclose(w, -0.5)


def test_polyak_outer_needs_value():
    """An outer transform from Optax that reads value=: Polyak's step on the mean delta."""
    opt = local_sgd(optax.sgd(1.0), optax.polyak_sgd(max_learning_rate=10.0), sync_every=1)
    value = jnp.array([1.0, 1.0, 2.0, 4.0])
    w, _ = run(opt, lambda w, c: jnp.full_like(w, 2.0), jnp.zeros(2), np.zeros((1, K, 1)), 1, value=value)
    np.testing.assert_allclose(w, -2.0 * 2.0 / 8.0)  # mean value 2, delta 2 each, |delta|^2 = 8


# ---- compression, fragments, lost workers ----


@pytest.mark.parametrize("code", ["bf16", "int8", communication.top_k(0.25)], ids=["bf16", "int8", "top-k"])
def test_error_feedback_loses_nothing(code):
    """With gradients that ignore the parameters: what arrived and what is left add up to what was to be sent."""
    grads = RNG.normal(size=(6, K, 3, 7)).astype(np.float32)
    opt = local_sgd(optax.sgd(0.1), sync_every=2, compression=code)
    w, state = run(opt, lambda w, g: g, jnp.zeros((3, 7)), grads, 6)
    wanted = 0.1 * grads.sum(axis=0).mean(axis=0)
    left = np.asarray(state.error).mean(axis=0)
    assert np.abs(left).max() > 1e-5  # the code is lossy
    np.testing.assert_allclose(-np.asarray(state.anchor) + left, wanted, atol=2e-6 if code != "bf16" else 5e-3)
    np.testing.assert_allclose(w, np.tile(state.anchor, (K, 1, 1)), atol=1e-6)


def test_messages_are_decoded_one_by_one():
    """10^7 elements from two workers: 0.04 s, where decoding both before adding took 25 s on CPU."""
    code, x = communication.int8(), jnp.full(10**7, 0.5)
    messages = jax.tree.map(lambda m: jnp.stack([m, m]), code.encode(x))
    add = jax.jit(lambda messages: _decode_and_add(lambda m: code.decode(m, x), messages)).lower(messages).compile()
    began = time.perf_counter()
    total = jax.block_until_ready(add(messages))
    assert time.perf_counter() - began < 10
    np.testing.assert_allclose(total[:3], 1.0, rtol=1e-6)


def test_compression_without_feedback_forgets():
    opt = local_sgd(optax.sgd(1.0), sync_every=1, compression=communication.top_k(0.5), error_feedback=False)
    grads = np.tile(np.float32([1.0, 3.0]), (4, K, 1))
    _, state = run(opt, lambda w, g: g, jnp.zeros(2), grads, 4)
    assert state.error == ()
    np.testing.assert_allclose(state.anchor, [0.0, -12.0])  # the small entry never gets its turn
    _, state = run(local_sgd(optax.sgd(1.0), sync_every=1, compression=communication.top_k(0.5)), lambda w, g: g,
                   jnp.zeros(2), grads, 4)  # fmt: skip
    np.testing.assert_allclose(state.anchor + -state.error[0], [-4.0, -12.0])


def test_fragments_meet_in_turn():
    """Gradients that ignore the parameters: a leaf of fragment f lands on its mean in rounds f, f + n, ..."""
    params = {"a": jnp.zeros(4), "b": jnp.zeros(3), "c": jnp.zeros(())}
    labels = {"a": 0, "b": 1, "c": 1}
    grads = {name: RNG.normal(size=(8, K, *p.shape)).astype(np.float32) for name, p in params.items()}
    outer = optax.sgd(0.5, momentum=0.5)
    opt = local_sgd(optax.sgd(1.0), outer, sync_every=2, fragments=labels)
    _, state = run(opt, lambda w, g: g, params, grads, 8)
    for name, part in labels.items():
        anchor, buffer, start = 0.0, 0.0, 0
        for round_ in range(4):  # rounds end at steps 2, 4, 6, 8
            if round_ % 2 == part:
                delta = grads[name][start : 2 * round_ + 2].sum(axis=0).mean(axis=0)
                buffer, start = 0.5 * buffer + delta, 2 * round_ + 2
                anchor = anchor - 0.5 * buffer
        np.testing.assert_allclose(state.anchor[name], anchor, atol=1e-6)
    assert communication.total_bytes(state.bytes) == 4 * (2 * (4 + 2) + 2 * (4 + 2))
    even = local_sgd(optax.sgd(1.0), outer, sync_every=2, fragments=2)
    assert len(even.init(params).outer) == 2


def test_a_lost_worker_counts_for_nothing():
    grads = RNG.normal(size=(3, K, 2)).astype(np.float32)
    grads[:, 1] = np.nan
    weight = jnp.array([1.0, 0.0, 2.0, 1.0])
    for code, tolerance in ((None, 1e-6), ("int8", 0.05)):
        opt = local_sgd(optax.sgd(1.0), optax.sgd(1.0, momentum=0.5), sync_every=3, compression=code)
        value = jnp.array([1.0, jnp.nan, 2.0, 3.0])
        w, state = run(opt, lambda w, g: g, jnp.zeros(2), grads, 3, worker_weight=weight, value=value)
        alive = np.average(grads.sum(axis=0)[[0, 2, 3]], axis=0, weights=[1, 2, 1])
        np.testing.assert_allclose(state.anchor, -alive, atol=tolerance)
        assert float(state.statistics.value) == 2.0
        assert bool(jnp.all(jnp.isfinite(w[0])))
        # its own update is from NaN to the anchor, which no addition reaches: it restarts from state.anchor
        assert bool(jnp.all(jnp.isfinite(state.error[1]))) if code else True


def test_a_slow_worker_weighs_by_the_samples_it_has_done():
    """Worker 0 takes 2 of 4 steps, worker 1 half batches; the steps that worker 0 skips leave its Adam as it was."""
    samples = np.full((8, K), 8.0, np.float32)
    samples[[1, 3, 4, 5], 0] = 0
    samples[:, 1] = 4
    grads = np.random.default_rng(3).normal(size=(8, K, D)).astype(np.float32)
    values = np.where(samples > 0, np.arange(8 * K, dtype=np.float32).reshape(8, K), np.nan)
    adam = optax.adam(0.1)
    opt = local_sgd(adam, sync_every=4)
    state = opt.init(jnp.zeros(D))
    axes = worker_axes(state)

    def one(w, state, datum):
        g, count, value = datum
        updates, state = opt.update(g, state, w, samples=count, value=value)
        return optax.apply_updates(w, updates), state

    step = map_workers(one, in_axes=(0, axes, 0), out_axes=(0, axes))
    start = spread_workers(jnp.zeros(D), K), spread_workers(state, K, axes)
    data = jax.tree.map(jnp.asarray, (np.where(samples[..., None] > 0, grads, np.nan), samples, values))
    (w, state), _ = jax.jit(lambda: jax.lax.scan(lambda carry, x: (step(*carry, x), None), start, data))()

    apart, moments = [np.zeros(D, np.float32)] * K, [adam.init(jnp.zeros(D)) for _ in range(K)]
    for t in range(8):
        for k in range(K):
            if samples[t, k]:
                updates, moments[k] = adam.update(jnp.asarray(grads[t, k]), moments[k])
                apart[k] = apart[k] + updates
        if t % 4 == 3:
            weight = samples[t - 3 : t + 1].sum(axis=0)
            apart = [np.average(apart, axis=0, weights=weight)] * K
    np.testing.assert_allclose(w, np.stack(apart), atol=1e-5)
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, np.stack(b), atol=1e-5), state.inner, *moments)
    last = np.where(samples > 0, values * samples, 0)[4:].sum(axis=0)
    np.testing.assert_allclose(state.statistics.value, last.sum() / samples[4:].sum(), rtol=1e-5)


def test_a_round_of_nobody_leaves_averaged_inner_states():
    opt = local_sgd(optax.adam(0.1), sync_every=1, inner_state="average")
    state = opt.init(jnp.zeros(D))
    axes = worker_axes(state)

    def one(w, state, g, weight):
        updates, state = opt.update(g, state, w, worker_weight=weight)
        return optax.apply_updates(w, updates), state

    step = jax.jit(map_workers(one, in_axes=(0, axes, 0, 0), out_axes=(0, axes)))
    g = jnp.arange(1.0, 2 * D + 1).reshape(2, D)
    w, s = step(spread_workers(jnp.zeros(D), 2), spread_workers(state, 2, axes), g, jnp.ones(2))
    _, after = step(w, s, g, jnp.zeros(2))
    alone = optax.adam(0.1).update(g[0], jax.tree.map(lambda x: x[0], s.inner))[1]
    np.testing.assert_allclose(after.inner[0].nu[0], alone[0].nu, rtol=1e-6)


def test_what_a_worker_tells_at_a_step_that_it_skips_is_not_heard():
    """Its weight in the round stands; an outer step by the loss of that step is by the others'."""
    opt = local_sgd(optax.sgd(0.1), optax.polyak_sgd(), sync_every=2)
    state = opt.init(jnp.zeros(D))
    axes = worker_axes(state)

    def one(w, state, g, count, value):
        updates, state = opt.update(g, state, w, samples=count, value=value)
        return optax.apply_updates(w, updates), state

    step = map_workers(one, in_axes=(0, axes, 0, 0, 0), out_axes=(0, axes))
    ends = []
    for other in (jnp.nan, 7.0):
        w, s = spread_workers(jnp.zeros(D), 2), spread_workers(state, 2, axes)
        w, s = step(w, s, jnp.ones((2, D)), jnp.array([4.0, 4.0]), jnp.array([1.0, 3.0]))
        w, s = step(w, s, jnp.ones((2, D)), jnp.array([4.0, 0.0]), jnp.array([0.5, other]))
        ends.append(s.anchor)
    assert np.all(np.isfinite(ends[0]))
    np.testing.assert_array_equal(ends[0], ends[1])
    assert np.any(ends[0] != 0)


@pytest.mark.parametrize("code", [None, "int8"])
def test_a_worker_that_turns_nan_is_dropped_and_rescued(code):
    """Worker 1 meets NaN at the second of the first round's two steps; from then on it is as if it had begun there."""
    grads = np.random.default_rng(4).normal(size=(6, K, D)).astype(np.float32)
    grads[1, 1, 0] = np.nan
    inner = optax.sgd(0.1, momentum=0.9)
    opt = local_sgd(inner, sync_every=2, compression=code, drop_nonfinite=True)
    state = opt.init(jnp.zeros(D))
    axes = worker_axes(state)

    def one(w, state, g):
        updates, state = opt.update(g, state, w, value=jnp.sum(g))
        return rescue(optax.apply_updates(w, updates), state, inner)

    step = jax.jit(map_workers(one, in_axes=(0, axes, 0), out_axes=(0, axes)))
    w, state = spread_workers(jnp.zeros(D), K), spread_workers(state, K, axes)
    apart, trace = np.zeros((K, D)), np.zeros((K, D))
    for t in range(6):
        w, state = step(w, state, jnp.asarray(grads[t]))
        trace = 0.9 * trace + grads[t]
        apart = apart - 0.1 * trace
        if t % 2:
            alive = np.isfinite(apart).all(axis=1)
            apart, trace = np.tile(apart[alive].mean(axis=0), (K, 1)), np.where(alive[:, None], trace, 0)
        np.testing.assert_allclose(w, apart, atol=1e-5 if code is None else 0.05)
    np.testing.assert_allclose(state.anchor, apart[0], atol=1e-5 if code is None else 0.05)
    assert np.isfinite(float(state.statistics.value))
    jax.tree.map(lambda x: np.testing.assert_array_equal(np.isfinite(x), True), (state.inner, state.error))


def test_without_dropping_a_nan_reaches_all():
    grads = np.ones((1, K, D), np.float32)
    grads[0, 1, 0] = np.nan
    _, state = run(local_sgd(optax.sgd(0.1), sync_every=1), lambda w, g: g, jnp.zeros(D), grads, 1)
    assert np.isnan(state.anchor[0])


def test_with_no_worker_left_the_anchor_stays():
    grads = np.ones((4, K, 2), np.float32)
    opt = local_sgd(optax.sgd(1.0), optax.sgd(1.0, momentum=0.5), sync_every=1)
    one, _ = run(opt, lambda w, g: g, jnp.zeros(2), grads, 1)
    state = opt.init(jnp.zeros(2))
    axes = worker_axes(state)
    step = jax.jit(
        map_workers(
            lambda w, s, g, a: opt.update(g, s, w, worker_weight=a), in_axes=(0, axes, 0, 0), out_axes=(0, axes)
        )
    )
    state = spread_workers(state, K, axes)
    _, state = step(jnp.zeros((K, 2)), state, grads[0], jnp.ones(K))
    _, state = step(one, state, grads[1], jnp.zeros(K))
    np.testing.assert_allclose(state.anchor, -1.0)
    np.testing.assert_allclose(state.outer[0].trace, 1.0)


def test_a_round_of_nobody_tells_schedules_nothing():
    schedule = lambda r, t, s: 8 * s.value / s.first_value  # noqa: E731  # NaN before any round
    opt = local_sgd(optax.sgd(0.1), sync_every=schedule, axis_name=())
    state, told = opt.init(jnp.zeros(2)), []
    for weight, value in ((0.0, 3.0), (1.0, 2.0), (0.0, 3.0)):
        assert int(state.period) == (1 if len(told) < 2 else 8)
        for _ in range(int(state.period)):
            _, state = opt.update(jnp.ones(2), state, jnp.zeros(2), worker_weight=jnp.asarray(weight), value=value)
        told.append((float(state.statistics.value), float(state.statistics.first_value)))
    np.testing.assert_array_equal(told, [(np.nan, np.nan), (2.0, 2.0), (2.0, 2.0)])


# ---- dtypes, trees, chains ----


def test_bfloat16_parameters_land_on_the_anchor():
    params = {"w": jnp.asarray(RNG.normal(size=(3, 4)), jnp.bfloat16), "empty": {}, "scalar": jnp.float32(1.0)}
    data = RNG.normal(size=(6, K, 1)).astype(np.float32)
    opt = local_sgd(optax.sgd(0.1), optax.sgd(0.7), sync_every=3, compression="int8")
    w, state = run(opt, lambda p, c: jax.tree.map(lambda x: (x * c[0] + c[0]).astype(x.dtype), p), params, data, 6)
    assert w["w"].dtype == state.anchor["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(*np.broadcast_arrays(np.float32(w["w"]), np.float32(state.anchor["w"])))
    assert not np.array_equal(np.float32(state.anchor["w"]), np.float32(params["w"]))


def test_no_parameters_at_all():
    w, state = run(local_sgd(optax.adam(0.1), sync_every=2), lambda w, c: w, {}, np.zeros((2, K, 1), np.float32), 2)
    assert w == {}
    assert int(state.round) == 1


def test_last_in_a_chain():
    clipped = optax.chain(optax.clip(0.5), local_sgd(optax.sgd(1.0), sync_every=1))
    w, state = run(clipped, lambda w, g: g, jnp.zeros(2), np.float32([[[9.0, 0.1]] * K]), 1)
    np.testing.assert_allclose(w, np.tile([-0.5, -0.1], (K, 1)), rtol=1e-6)
    assert worker_axes(state)[0] == 0


@pytest.mark.parametrize(
    "code", [None, "bf16", "int8", communication.top_k(0.5)], ids=["none", "bf16", "int8", "top-k"]
)
def test_both_parts_of_complex_parameters_are_sent(code):
    """A complex vector moves as the real vector of its parts does."""
    rng = np.random.default_rng(1)
    grads = (rng.normal(size=(4, K, 6)) + 1j * rng.normal(size=(4, K, 6))).astype(np.complex64)
    opt = local_sgd(optax.sgd(0.1), optax.sgd(0.7, momentum=0.5), sync_every=2, compression=code)
    w, state = run(opt, lambda w, g: g, jnp.zeros(6, jnp.complex64), grads, 4)
    parts = np.stack([grads.real, grads.imag], axis=2)
    real, expected = run(opt, lambda w, g: g, jnp.zeros((2, 6)), parts, 4)
    assert w.dtype == state.anchor.dtype == jnp.complex64
    assert np.abs(state.anchor.imag).max() > 0.01
    np.testing.assert_allclose(np.stack([state.anchor.real, state.anchor.imag]), expected.anchor, atol=1e-6)
    np.testing.assert_allclose(np.stack([w.real, w.imag], 1), real, atol=1e-6)
    assert communication.total_bytes(state.bytes) == communication.total_bytes(expected.bytes)


@pytest.mark.parametrize("options", [{}, {"compression": "int8"}, {"fragments": 2}], ids=str)
def test_what_is_no_parameter_stays(options):
    params = {"w": jnp.ones(3), "v": jnp.ones(2), "count": jnp.int32(16_777_217), "flag": jnp.array([True, False])}
    opt = local_sgd(optax.sgd(0.1), optax.sgd(0.7, momentum=0.9), sync_every=1, **options)
    grads_of = lambda p, g: jax.tree.map(lambda x: x * g[0].astype(x.dtype), p)  # noqa: E731
    w, state = run(opt, grads_of, params, np.ones((2, K, 1), np.float32), 2)
    for tree in (jax.tree.map(lambda x: x[0], w), state.anchor):
        assert tree["count"] == 16_777_217
        assert tree["count"].dtype == jnp.int32
        assert tree["flag"].tolist() == [True, False]
        assert np.abs(tree["w"] - 1).min() > 0.01


def test_keys_among_the_parameters_are_refused():
    with pytest.raises(ValueError, match=r"\['key'\] is key<fry>"):
        local_sgd(optax.sgd(0.1), sync_every=1).init({"key": jax.random.key(0)})


def test_gradients_accumulated_inside():
    """2 rounds of 3 steps of 2 micro-steps are 2 rounds of 3 steps on the mean gradients, the inner state reset."""
    grads = np.random.default_rng(2).normal(size=(12, K, 5)).astype(np.float32)
    options = {"outer": optax.sgd(0.7, momentum=0.5), "inner_state": "reset"}
    multi = optax.MultiSteps(optax.adam(0.1), 2)
    for inner in (multi, multi.gradient_transformation()):
        opt = local_sgd(inner, sync_every=schedules.micro_steps(3, 2), **options)
        w, state = run(opt, lambda w, g: g, jnp.zeros(5), grads, 12)
        plain = local_sgd(optax.adam(0.1), sync_every=3, **options)
        expected, _ = run(plain, lambda w, g: g, jnp.zeros(5), grads.reshape(6, 2, K, 5).mean(axis=1), 6)
        assert int(state.round) == 2
        np.testing.assert_allclose(w, expected, atol=1e-5)


def test_extra_arguments_reach_what_accumulates():
    tx = optax.MultiSteps(counting_inner(), 2)
    opt = local_sgd(tx, sync_every=2)
    _, state = run(opt, lambda w, c: 0 * w, jnp.ones(2), np.zeros((2, K, 1)), 2, bump=jnp.arange(1, K + 1))
    assert state.inner.inner_opt_state["mean"].tolist() == [1.0, 2.0, 3.0, 4.0]


# ---- mistakes ----


def test_bad_delays():
    for bad, message in (
        (0, "at least 1, got 0"),
        (-3, "got -3"),
        (True, "int or a schedule"),
        (2.0, "int or a schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            local_sgd(optax.sgd(0.1), sync_every=bad)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        local_sgd(optax.sgd(0.1), sync_every=lambda r, t, s: 0).init(jnp.zeros(2))
    with pytest.raises(ValueError, match="must return one number"):
        local_sgd(optax.sgd(0.1), sync_every=lambda r, t, s: jnp.ones(2)).init(jnp.zeros(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis_name": (1,)}, "axis_name must be"),
        ({"compression": "int4"}, "compression must be"),
        ({"inner_state": "mean"}, "inner_state must be one of"),
        ({"inner_state": "average", "fragments": 2}, "with fragments use 'keep'"),
        ({"fragments": 0}, "at least 1"),
        ({"compression": "int8", "error_feedback": 1.5}, "error_feedback must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        local_sgd(optax.sgd(0.1), sync_every=2, **options)


def test_bad_fragments():
    for bad, message in ((3, "have 2 leaves"), ({"a": 0}, "one int 0..n-1"), ({"a": 0, "b": 2}, "all used")):
        with pytest.raises(ValueError, match=message):
            local_sgd(optax.sgd(0.1), sync_every=2, fragments=bad).init({"a": jnp.zeros(2), "b": jnp.zeros(2)})


def test_no_such_axis_and_no_params():
    opt = local_sgd(optax.sgd(0.1), sync_every=2, axis_name="wrokers")
    state = opt.init(jnp.zeros(2))
    with pytest.raises(ValueError, match="no axis 'wrokers'"):
        opt.update(jnp.zeros(2), state, jnp.zeros(2))
    with pytest.raises(ValueError, match="no axis 'wrokers'"):
        jax.vmap(lambda w: opt.update(w, state, w), axis_name="workers")(jnp.zeros((K, 2)))
    with pytest.raises(ValueError, match="needs params"):
        opt.update(jnp.zeros(2), state)


def test_not_outermost():
    sync = local_sgd(optax.sgd(0.1), sync_every=2)
    for bad in (
        optax.chain(sync, optax.scale(0.5)),
        optax.masked(sync, {"w": True}),
        optax.chain(optax.clip(1.0), optax.chain(sync, optax.scale(1.0))),
    ):
        with pytest.raises(ValueError, match="must be outermost"):
            worker_axes(bad.init({"w": jnp.zeros(2)}))
    with pytest.raises(ValueError, match=r"accumulate gradients inside it, local_sgd\(optax.MultiSteps"):
        worker_axes(optax.MultiSteps(sync, 2).init({"w": jnp.zeros(2)}))
    with pytest.raises(ValueError, match="no local_sgd state"):
        worker_specs(optax.adam(0.1).init(jnp.zeros(2)))


# ---- files, watchdog ----


def test_anchor_restores_on_any_number_of_workers(tmp_path):
    """A run of plain local SGD cut after a round, and continued from the file, equals the uncut one."""
    opt = local_sgd(optax.sgd(0.1), optax.adam(0.3), sync_every=2)
    data = RNG.normal(size=(8, K, 3)).astype(np.float32)
    grads_of = lambda w, c: w - c  # noqa: E731
    whole, _ = run(opt, grads_of, jnp.zeros(3), data, 8)
    _, state = run(opt, grads_of, jnp.zeros(3), data, 5)  # one step into its third round
    path = tmp_path / "runs" / "anchor.safetensors"
    save_anchor(path, state, {"seed": 3})
    restored, metadata = load_anchor(path, opt.init(jnp.zeros(3)))
    assert metadata == {"seed": 3}
    assert [int(restored.step), int(restored.round), int(restored.since_sync)] == [4, 2, 0]
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing half-written beside it
    for workers, same in ((K, True), (2, False)):  # two workers see other data
        w, state = run(opt, grads_of, restored.anchor, data[4:, :workers], 4, workers, restored)
        assert int(state.round) == 4
        assert np.allclose(w, whole[:workers], atol=1e-6) == same


def test_files_hold_every_kind_of_leaf(tmp_path):
    tree = {
        "half": jnp.asarray([1.5, -2.0], jnp.bfloat16), "key": jax.random.key(7), "empty": jnp.zeros((0, 3)),
        "count": jnp.int32(4), "flag": jnp.bool_(True), "none": None, "nested": (jnp.ones(()), [jnp.arange(3)]),
    }  # fmt: skip
    save_tree(tmp_path / "t.safetensors", tree)
    back, metadata = load_tree(tmp_path / "t.safetensors", jax.tree.map(lambda x: x, tree))
    assert metadata == {}
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    raw = lambda x: np.asarray(jax.random.key_data(x) if x.dtype == jax.random.key(0).dtype else x)  # noqa: E731
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(raw(a), raw(b))


SMALL = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e8m0fnu", "float4_e2m1fn", "int4", "uint2")


@pytest.mark.parametrize("name", [*SMALL, "bool", "int8", "uint16", "float16", "bfloat16", "float32", "complex64"])
def test_anchors_of_every_dtype_come_back(tmp_path, name):
    dtype = jnp.dtype(name)
    values = np.array([[0, 1, 1], [1, 0, 1]]) * (1j if name == "complex64" else 1)
    params = {"x": jnp.asarray(values.astype(dtype)), "scalar": jnp.asarray(np.ones((), dtype))}
    state = local_sgd(optax.sgd(0.1), sync_every=2).init(params)
    save_anchor(tmp_path / "anchor.safetensors", state)
    blank = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, dtype)), state.anchor)
    back, _ = load_anchor(tmp_path / "anchor.safetensors", state._replace(anchor=blank))
    for found, kept in zip(jax.tree.leaves(back.anchor), jax.tree.leaves(params), strict=True):
        assert (found.dtype, found.shape) == (dtype, kept.shape)
        np.testing.assert_array_equal(np.asarray(found).astype(np.complex64), np.asarray(kept).astype(np.complex64))
    wider = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.uint32), state.anchor)
    with pytest.raises(ValueError, match=f"is {name}.*wanted uint32"):
        load_anchor(tmp_path / "anchor.safetensors", state._replace(anchor=wider))


def test_what_no_file_can_hold_is_refused_before_it_is_written(tmp_path):
    for tree, metadata, message in (
        ({"x": np.array(["a"])}, None, "no array of numbers"),
        ({"x": object()}, None, "no array of numbers"),
        ({"x": np.array(["2020"], "M8[D]")}, None, "no array of numbers"),
        ({"x": jnp.ones(2)}, {"when": object()}, "no JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            save_tree(tmp_path / "t.safetensors", tree, metadata)
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_fit_are_refused(tmp_path):
    opt = local_sgd(optax.sgd(0.1), optax.adam(0.3), sync_every=2)
    path = tmp_path / "anchor.safetensors"
    save_anchor(path, opt.init({"w": jnp.zeros(3)}))
    with pytest.raises(ValueError, match="wanted float32"):
        load_anchor(path, opt.init({"w": jnp.zeros(4)}))
    with pytest.raises(ValueError, match="another tree"):
        load_anchor(path, opt.init({"v": jnp.zeros(3)}))
    with pytest.raises(ValueError, match="another tree"):
        load_anchor(path, local_sgd(optax.sgd(0.1), sync_every=2).init({"w": jnp.zeros(3)}))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="damaged"):
        load_anchor(path, opt.init({"w": jnp.zeros(3)}))
    with pytest.raises(FileNotFoundError):
        load_anchor(tmp_path / "none", opt.init({"w": jnp.zeros(3)}))
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file({"x": np.zeros(1)}, str(path))
    with pytest.raises(ValueError, match="format None"):
        load_anchor(path, opt.init({"w": jnp.zeros(3)}))


def test_watchdog_barks_once_and_only_when_stuck():
    barked, messages = threading.Event(), []

    def bark(message):
        messages.append(message)
        barked.set()

    with Watchdog(0.2, first=60.0, on_stuck=bark) as watchdog:
        assert not barked.wait(0.3)  # the first round may take longer
        watchdog.beat()
        assert barked.wait(60.0)
    assert "no round finished within 0.2 s (rounds so far: 1)" in messages[0]
    with Watchdog(60.0, on_stuck=bark):
        pass
    assert len(messages) == 1
    with pytest.raises(ValueError, match="positive"):
        Watchdog(0.0)


def test_a_watchdog_is_for_one_with():
    watchdog = Watchdog(60.0)
    with watchdog, pytest.raises(RuntimeError, match="make a new one"):
        watchdog.__enter__()
    with pytest.raises(RuntimeError, match="make a new one"), watchdog:
        pass
