"""A workload of one's own: ``learned-opt bench flagship --task my_workload.py:make``. A network draws a picture."""

import jax
import jax.numpy as jnp

from tasks import Task, Workload


def make():
    def init(key):
        sizes = [(2, 64), (64, 64), (64, 1)]
        keys = jax.random.split(key, 3)
        return [jax.random.normal(k, size) * (2 / size[0]) ** 0.5 for k, size in zip(keys, sizes, strict=True)]

    def batch(key, split):  # what is learned from is noisy, what is validated on is not
        places, noise = jax.random.uniform(key, (256, 2)) * 4 - 2, 0.2 * jax.random.normal(key, (256,))
        return places, jnp.sin(3 * places[:, 0]) * jnp.cos(2 * places[:, 1]) + (noise if split == "train" else 0)

    def loss(params, key, batch):
        x, y = batch
        for weights in params[:-1]:
            x = jnp.sin(x @ weights)
        return jnp.mean((x @ params[-1] - y[:, None]) ** 2), {}

    return Workload(lambda: Task(init, batch, loss), steps=300, target=0.002)
