"""A learned outer step where a trainer has its own DiLoCo, as MaxText has: by an Optax transform's call signature.

    python examples/local_sgd_maxtext.py

MaxText's DiLoCo trainer builds ``outer_optimizer`` once (``optax.sgd(lr, momentum=..., nesterov=True)``), and calls

    outer_state = outer_optimizer.init(outer_params)
    updates, outer_state = outer_optimizer.update(mean_delta, outer_state, outer_params)

with the mean of ``outer_params - inner_params`` over the replicas in a gradient's place, and ``optax.apply_updates``
after it. Whatever is an Optax transform of three arguments fits there: put :func:`outer_optimizer` in its place. No
loss is passed, so a rule that needs ``value`` does not fit; the number of rounds is given when it is loaded.

Below, that loop on digits, with vmapped replicas.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import learned_opt

REPLICAS, SYNC_PERIOD, ROUNDS, BATCH = 4, 10, 20, 32


def outer_optimizer(rounds):
    """What takes the place of ``optax.sgd(0.7, momentum=0.9, nesterov=True)``."""
    return learned_opt.load("outer", num_steps=rounds)


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["hidden"] + params["bias"][None])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["output"], y).mean()


def train(outer, params, x, y):
    inner = optax.sgd(0.1)
    rows = np.random.default_rng(1).integers(0, len(x), (ROUNDS, SYNC_PERIOD, REPLICAS, BATCH))

    def inner_step(params, state, rows):
        updates, state = inner.update(jax.grad(loss_fn)(params, x[rows], y[rows]), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def round_of(outer_params, outer_state, inner_state, rows):
        start = jax.tree.map(lambda p: jnp.broadcast_to(p, (REPLICAS, *p.shape)), outer_params)
        step = jax.vmap(inner_step)
        replicas, inner_state = jax.lax.fori_loop(
            0, SYNC_PERIOD, lambda i, carry: step(*carry, rows[i]), (start, inner_state)
        )
        mean_delta = jax.tree.map(lambda p, r: jnp.mean(p[None] - r, axis=0), outer_params, replicas)
        updates, outer_state = outer.update(mean_delta, outer_state, outer_params)
        return optax.apply_updates(outer_params, updates), outer_state, inner_state

    state, inner_state = outer.init(params), jax.vmap(lambda _: inner.init(params))(jnp.arange(REPLICAS))
    for round_rows in rows:
        params, state, inner_state = round_of(params, state, inner_state, round_rows)
    return loss_fn(params, x, y)


def main():
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y, jnp.int32)
    rng = np.random.default_rng(0)
    params = {
        "hidden": jnp.asarray(rng.normal(size=(64, 32)) / 8, jnp.float32),
        "bias": jnp.zeros(32),
        "output": jnp.asarray(rng.normal(size=(32, 10)) / 6, jnp.float32),
    }
    print(f"loss before: {loss_fn(params, x, y):.3f}")
    print(f"loss after {ROUNDS} rounds: {train(outer_optimizer(ROUNDS), params, x, y):.3f}")


if __name__ == "__main__":
    main()
