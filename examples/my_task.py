"""A task of your own in the benchmark: `learned-opt bench flagship --task examples/my_task.py:make`."""

import jax
import jax.numpy as jnp

from tasks import Task, TaskFamily


def make() -> TaskFamily:
    """Learn to tell two interleaved spirals apart; each draw is a pair of spirals with another number of turns."""

    def points(key, turns, number=64):
        k_where, k_which = jax.random.split(key)
        along = jnp.sqrt(jax.random.uniform(k_where, (number,)))
        label = jax.random.bernoulli(k_which, shape=(number,))
        angle = 2 * jnp.pi * turns * along + jnp.pi * label
        return {"x": along[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1), "y": label}

    def task(data, turns) -> Task:
        del data  # arrays that all draws read would come here

        def init(key):
            k1, k2 = jax.random.split(key)
            return {
                "hidden": jax.random.normal(k1, (2, 32)),
                "bias": jnp.zeros(32),
                "output": jax.random.normal(k2, (32, 1)) / 6,
            }

        def loss(params, key, batch):
            del key
            hidden = jnp.tanh(batch["x"] @ params["hidden"] + params["bias"][None])
            logit = (hidden @ params["output"])[:, 0]
            return jnp.mean(jnp.logaddexp(0, jnp.where(batch["y"], -logit, logit))), {}

        return Task(init=init, batch=lambda key, split: points(key, turns), loss=loss)

    return TaskFamily(data=(), sample=lambda key: jax.random.uniform(key, minval=0.5, maxval=1.0), task=task)
