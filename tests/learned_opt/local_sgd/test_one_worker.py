"""The outer step and the smoothed Nesterov step around one optimizer: closed forms, NumPy, Optax's own tools."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt import schedules
from learned_opt.local_sgd import (
    LocalSGDState,
    ema_nesterov,
    local_sgd,
    lookahead,
    map_workers,
    spread_workers,
    worker_axes,
)

RATE, CURVATURE = 0.1, np.array([1.0, 3.0, 0.2])
START = np.array([1.0, -2.0, 0.5])


def descend(opt, steps, start=START, gradient=lambda x: CURVATURE * x):
    """All in one scan, in double precision; returns every iterate and the last state."""
    with jax.enable_x64(True):

        @jax.jit
        def whole(x):
            def body(carry, _):
                x, state = carry
                updates, state = opt.update(gradient(x), state, x)
                x = optax.apply_updates(x, updates)
                return (x, state), x

            (_, state), path = jax.lax.scan(body, (x, opt.init(x)), length=steps)
            return path, state

        return jax.device_get(whole(jnp.asarray(start)))


def test_nesterov_outside_on_a_quadratic_is_a_power_of_a_matrix():
    """H steps multiply x by r: with the buffer v an outer step is linear in (x, v)."""
    every, rounds = 4, 5
    path, state = descend(lookahead(optax.sgd(RATE), every=every), every * rounds)
    for i, curvature in enumerate(CURVATURE):
        gone = 1 - (1 - RATE * curvature) ** every
        outer = np.array([[1 - 0.7 * gone * (1 + 0.6), -0.7 * 0.36], [gone, 0.6]])
        for done in range(1, rounds + 1):
            x, v = np.linalg.matrix_power(outer, done) @ [START[i], 0.0]
            np.testing.assert_allclose(path[done * every - 1, i], x, rtol=1e-12)
        np.testing.assert_allclose(state.outer[0].trace[i], v, rtol=1e-12)
    assert int(state.round) == rounds


def test_looking_ahead_on_a_quadratic_is_a_power_of_a_matrix():
    share, decay, steps = 0.6, 0.9, 25
    path, state = descend(ema_nesterov(optax.sgd(RATE), share=share, decay=decay), steps)
    for i, curvature in enumerate(CURVATURE):
        down = 1 - RATE * curvature
        motion = np.array([[down, down * share], [(1 - decay) * (down - 1), decay + (1 - decay) * down * share]])
        theta, m = np.linalg.matrix_power(motion, steps) @ [START[i], 0.0]
        np.testing.assert_allclose(state.mean[i], m, rtol=1e-11)
        np.testing.assert_allclose(path[-1, i], theta + share * m, rtol=1e-11)
        np.testing.assert_allclose(path[-1, i] - state.share * state.mean[i], theta, rtol=1e-11)


def test_a_steady_motion_is_faster_by_the_share():
    path, _ = descend(ema_nesterov(optax.sgd(1.0), share=0.5, decay=0.9), 400, gradient=lambda x: jnp.ones_like(x))
    np.testing.assert_allclose(path[-1] - path[-2], -1 / (1 - 0.5), rtol=1e-6)


def adamw(rate=0.05, b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2):
    """AdamW in NumPy: ``step(x, gradient) -> update``."""
    m, v, t = 0.0, 0.0, 0

    def step(x, g):
        nonlocal m, v, t
        m, v, t = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g, t + 1
        return -rate * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + weight_decay * x)

    return step


def test_adamw_inside_in_numpy():
    """The moments are kept at an outer step; the gradient is taken at the point looked ahead to."""
    gradient = lambda x: CURVATURE * x + 0.3 * x**3  # noqa: E731
    inner = optax.adamw(0.05, weight_decay=1e-2)
    path, _ = descend(lookahead(inner, optax.sgd(0.8, momentum=0.5, nesterov=True), every=3), 14, gradient=gradient)
    step, x, anchor, buffer = adamw(), START, START, 0.0
    for t in range(14):
        x = x + step(x, gradient(x))
        if t % 3 == 2:
            buffer = 0.5 * buffer + (anchor - x)
            anchor = anchor - 0.8 * (anchor - x + 0.5 * buffer)
            x = anchor
        np.testing.assert_allclose(path[t], x, rtol=1e-12)

    share = lambda t: 0.7 * (t < 8)  # noqa: E731
    path, state = descend(ema_nesterov(inner, share=share, decay=0.95), 14, gradient=gradient)
    step, theta, m = adamw(), START, 0.0
    for t in range(14):
        y = theta + share(t) * m
        after = y + step(y, gradient(y))
        m = 0.95 * m + 0.05 * (after - theta)
        theta = after
        np.testing.assert_allclose(path[t], theta + share(t + 1) * m, rtol=1e-12)
    assert float(state.share) == 0.0
    np.testing.assert_allclose(path[-1], theta, rtol=1e-12)


def test_lookahead_as_published_is_optaxs():
    path, _ = descend(lookahead(optax.adam(0.05), optax.sgd(0.5), every=5), 13)
    theirs = optax.lookahead(optax.adam(0.05), sync_period=5, slow_step_size=0.5)
    with jax.enable_x64(True):
        pair = optax.LookaheadParams.init_synced(jnp.asarray(START))
        state = theirs.init(pair)
        for x in path:
            updates, state = theirs.update(CURVATURE * pair.fast, state, pair)
            pair = optax.apply_updates(pair, updates)
            np.testing.assert_allclose(x, pair.fast, rtol=1e-12)


def test_no_share_and_no_outer_step_change_nothing():
    plain, _ = descend(optax.adam(0.05), 7)
    for opt in (ema_nesterov(optax.adam(0.05), share=0.0), lookahead(optax.adam(0.05), optax.sgd(1.0), every=3)):
        np.testing.assert_allclose(descend(opt, 7)[0], plain, rtol=1e-13)


def test_one_worker_is_a_map_over_one():
    """The same as ``local_sgd`` over an axis of one, and without a map; a loss, a schedule, compression."""
    options = {"compression": "int8"}
    outer, every = optax.sgd(0.7, momentum=0.6, nesterov=True), schedules.adacomm(4)
    bare = lookahead(optax.adam(0.05), every=every, **options)
    mapped = local_sgd(optax.adam(0.05), outer, sync_every=every, **options)
    x = jnp.asarray(START, jnp.float32)
    state, other = bare.init(x), mapped.init(x)
    axes = worker_axes(other)
    y, other = spread_workers(x, 1), spread_workers(other, 1, axes)

    def one(opt, x, state):
        value, grads = jax.value_and_grad(lambda x: jnp.sum(CURVATURE.astype(np.float32) * x**2))(x)
        updates, state = opt.update(grads, state, x, value=value)
        return optax.apply_updates(x, updates), state

    many = jax.jit(map_workers(lambda x, s: one(mapped, x, s), in_axes=(0, axes), out_axes=(0, axes)))
    alone = jax.jit(lambda x, s: one(bare, x, s))
    for _ in range(12):
        (x, state), (y, other) = alone(x, state), many(y, other)
        np.testing.assert_allclose(x, y[0], atol=1e-6)
    assert int(state.round) == int(other.round) > 2


PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3, jnp.bfloat16), "count": jnp.int32(4), "none": {}}


@pytest.mark.parametrize(
    "opt",
    [lookahead(optax.adam(0.1), every=2), lookahead(optax.sgd(0.1), fragments=2), ema_nesterov(optax.adam(0.1))],
    ids=["lookahead", "in fragments", "ema_nesterov"],
)
def test_optaxs_tools_see_the_state(opt):
    """States mirror the parameters: they map, mask, inject and donate as those of Optax's transforms."""
    params = {"w": PARAMS["w"], "b": PARAMS["b"], "v": jnp.ones(4)}
    state = opt.init(params)
    seen = []
    doubled = optax.tree_utils.tree_map_params(opt, lambda s: seen.append(s.shape) or s + 1, state)
    assert seen.count((2, 3)) == seen.count((3,)) > 0
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    name, tree = ("anchor", state.anchor) if isinstance(state, LocalSGDState) else ("mean", state.mean)
    assert jax.tree.structure(tree) == jax.tree.structure(params)
    assert optax.tree_utils.tree_get(state, name) is tree
    assert int(optax.tree_utils.tree_get(state, "step")) == 0
    step = jax.jit(
        lambda p, s: (lambda u, s: (optax.apply_updates(p, u), s))(*opt.update(p, s, p)), donate_argnums=(0, 1)
    )
    after = step(*jax.tree.map(jnp.copy, (params, state)))
    for _ in range(3):
        after = step(*after)
    assert jax.tree.map(lambda x: x.dtype, after[0]) == jax.tree.map(lambda x: x.dtype, params)
    assert bool(jnp.all(after[0]["w"] < 1))
    frozen = optax.masked(opt, {"w": True, "b": False, "v": True})
    updates, _ = frozen.update(params, frozen.init(params), params)
    np.testing.assert_array_equal(updates["b"], params["b"])


@pytest.mark.parametrize("wrap", [lambda tx: lookahead(tx, every=1), ema_nesterov], ids=["lookahead", "ema_nesterov"])
def test_what_is_no_parameter_stays_and_the_rest_keeps_its_type(wrap):
    opt = wrap(optax.sgd(0.1, momentum=0.9))
    params, state = PARAMS, opt.init(PARAMS)
    for _ in range(3):
        grads = jax.tree.map(lambda x: jnp.ones_like(x), params)
        updates, state = opt.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert int(params["count"]) == 4
    assert jax.tree.map(lambda x: x.dtype, params) == jax.tree.map(lambda x: x.dtype, PARAMS)
    assert float(params["b"][0]) < -0.2


def test_extra_arguments_pass_through():
    opt = ema_nesterov(optax.MultiSteps(optax.polyak_sgd(max_learning_rate=10.0), 1), share=0.0)
    x = jnp.ones(2)
    updates, _ = opt.update(2 * x, opt.init(x), x, value=jnp.float32(2.0))
    np.testing.assert_allclose(updates, -2 * 2 / 8)


@pytest.mark.parametrize(
    ("options", "message"), [({"share": 1.0}, "share must be"), ({"decay": -0.1}, "decay must be")]
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ema_nesterov(optax.sgd(0.1), **options)
    with pytest.raises(ValueError, match="needs params"):
        ema_nesterov(optax.sgd(0.1)).update(jnp.ones(1), ema_nesterov(optax.sgd(0.1)).init(jnp.ones(1)))
