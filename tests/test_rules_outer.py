"""The learned outer step: its length, its scale, and that it runs as local SGD's outer transform."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import learned_opt
from learned_opt.local_sgd import map_workers, spread_workers, worker_axes
from learned_opt.rules.outer import outer

RULE = outer(hidden_size=4)
THETA = jax.tree.map(lambda x: x + 0.03, RULE.init(jax.random.key(0)))
PARAMS = {"w": jnp.linspace(-1, 1, 12).reshape(3, 4), "b": jnp.ones(3)}


def steps(scale, count=3):
    """Updates for deltas of a size, the same but for it."""
    tx, out = RULE.build(THETA), []
    state = tx.init(PARAMS)
    for t in range(count):
        delta = jax.tree.map(lambda p, t=t: scale * jnp.cos(3 * p + t), PARAMS)
        updates, state = tx.update(delta, state, PARAMS)
        out.append((delta, updates))
    return out


def test_the_step_is_as_long_as_the_delta_times_the_gain():
    for delta, update in steps(0.1):
        for name in PARAMS:
            ratio = np.linalg.norm(update[name]) / np.linalg.norm(delta[name])
            np.testing.assert_allclose(ratio, np.exp(THETA["gain"]), rtol=1e-4)


def test_the_fresh_rule_moves_against_the_delta():
    tx = RULE.build(RULE.init(jax.random.key(0)))
    delta = jnp.array([[0.3, -0.1, 0.2, -0.4]])
    updates, _ = tx.update(delta, tx.init(delta), jnp.ones_like(delta))
    assert float(jnp.sum(updates * delta)) < 0


def test_it_runs_as_the_outer_step_and_does_not_depend_on_how_many_workers_agree():
    ends = []
    for workers in (1, 4):
        transform = learned_opt.local_sgd(optax.sgd(0.1), RULE.build(THETA), sync_every=2)
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
