"""Methods as published, against their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt import communication
from learned_opt.local_sgd import diloco, map_workers, muloco, post_local, sparseloco, spread_workers, worker_axes

K, D, STEPS, LR = 4, 40, 12, 0.1
GRADS = np.random.default_rng(0).normal(size=(STEPS, K, D)).astype(np.float32)


def run(opt, grads=GRADS):
    """Gradients that ignore the parameters, from 0; returns the anchor after every step."""
    state = opt.init(jnp.zeros(D))
    axes = worker_axes(state)

    def one(w, state, g):
        updates, state = opt.update(g, state, w)
        return optax.apply_updates(w, updates), state

    step = map_workers(one, in_axes=(0, axes, 0), out_axes=(0, axes))

    def body(carry, g):
        carry = step(*carry, g)
        return carry, carry[1].anchor

    start = spread_workers(jnp.zeros(D), K), spread_workers(state, K, axes)
    (_, state), anchors = jax.jit(lambda: jax.lax.scan(body, start, jnp.asarray(grads)))()
    return np.asarray(anchors), state


@pytest.mark.parametrize(
    ("method", "every", "rate", "momentum"), [(diloco, 500, 0.7, 0.9), (muloco, 30, 0.7, 0.6)], ids=["diloco", "muloco"]
)
def test_nesterov_on_the_mean_delta(method, every, rate, momentum):
    anchors, state = run(method(optax.sgd(LR), sync_every=3))
    anchor, buffer = np.zeros(D), np.zeros(D)
    for start in range(0, STEPS, 3):
        delta = LR * GRADS[start : start + 3].sum(axis=0).mean(axis=0)
        buffer = momentum * buffer + delta
        anchor = anchor - rate * (delta + momentum * buffer)
        np.testing.assert_allclose(anchors[start + 2], anchor, atol=1e-5)
    assert int(state.round) == STEPS // 3
    assert int(method(optax.sgd(LR)).init(jnp.zeros(D)).period) == every


def test_sparse_messages_with_feedback_in_place_of_momentum():
    anchors, state = run(sparseloco(optax.sgd(LR), sync_every=3, k=2, chunk=10))
    code = communication.chunked_top_k(2, 10, bits=2)
    anchor, left = np.zeros(D), np.zeros((K, D))
    for start in range(0, STEPS, 3):
        left = 0.95 * left + LR * GRADS[start : start + 3].sum(axis=0)
        sent = np.stack([code.decode(code.encode(jnp.asarray(x, jnp.float32)), jnp.zeros(D)) for x in left])
        left = left - sent
        anchor = anchor - sent.mean(axis=0)
        np.testing.assert_allclose(anchors[start + 2], anchor, atol=1e-5)
    np.testing.assert_allclose(state.error, left, atol=1e-5)
    assert np.count_nonzero(anchors[2]) <= K * 8 < D  # two of every ten, from each worker
    default = sparseloco(optax.sgd(LR)).init(jnp.zeros(D))
    assert int(default.period) == 30


def test_averaging_first_and_local_steps_after():
    anchors, state = run(post_local(optax.sgd(LR), switch_step=4, sync_every=4))
    moved = -LR * np.cumsum(GRADS.mean(axis=1), axis=0)
    for step, last in enumerate([1, 2, 3, 4, 4, 4, 4, 8, 8, 8, 8, 12]):
        np.testing.assert_allclose(anchors[step], moved[last - 1], atol=1e-5)
    assert int(state.round) == 6


def test_adamw_and_muon_inside():
    """The published inner transforms, on a matrix and a vector: workers end on one anchor, which has moved."""
    params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
    for tx in (
        diloco(optax.adamw(1e-2, weight_decay=0.1), sync_every=2),
        muloco(optax.contrib.muon(0.02), sync_every=2),
        sparseloco(optax.adamw(1e-2), sync_every=2),
    ):
        state = tx.init(params)
        axes = worker_axes(state)

        def one(p, s, scale, tx=tx):
            updates, s = tx.update(jax.tree.map(lambda x: scale * (x - 0.5), p), s, p)
            return optax.apply_updates(p, updates), s

        step = jax.jit(map_workers(one, in_axes=(0, axes, 0), out_axes=(0, axes)))
        p, s = spread_workers(params, 2), spread_workers(state, 2, axes)
        for _ in range(2):
            p, s = step(p, s, jnp.array([1.0, 2.0]))
        assert int(s.round) == 1
        for leaf, anchor, start in zip(*map(jax.tree.leaves, (p, s.anchor, params)), strict=True):
            np.testing.assert_allclose(leaf, np.broadcast_to(anchor, leaf.shape), atol=1e-6)
            assert np.abs(anchor - start).max() > 1e-4
