"""Train with a schedule that ``learned-opt tune`` found, without learned-opt: JSON, JAX and Optax are enough.

    learned-opt tune --network examples/my_network.py:make --cycles 200 --out runs/mine
    python examples/replay_schedule.py runs/mine/schedule.json

The network is wider than the tuned one, by a factor of four.
"""

import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

content = json.loads(Path(sys.argv[1]).read_text())


def schedule(values):
    """A function of the training step, as Optax has them."""
    points, values = (jnp.asarray(x, jnp.float32) for x in (content["steps"], values))
    return lambda step: jnp.interp(step, points, values)


schedules = {name: schedule(values) for name, values in content["values"].items()}
steps = content["steps"][-1] + content["steps"][min(1, len(content["steps"]) - 1)]

images, labels = load_digits(return_X_y=True)
x, y = (images / 16).astype("float32"), labels.astype("int32")
sizes = (64, 256, 256, 10)
optimizer = optax.adam(schedules["learning_rate"])


def init(key):
    shapes = list(itertools.pairwise(sizes))
    keys = jax.random.split(key, len(shapes))
    return [
        (jax.random.normal(k, shape) / jnp.sqrt(shape[0]), jnp.zeros(shape[1]))
        for k, shape in zip(keys, shapes, strict=True)
    ]


def logits(params, key, x, rate):
    for i, (w, b) in enumerate(params[:-1]):
        x = jax.nn.relu(x @ w + b)
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, x.shape)
        x = jnp.where(keep, x / (1 - rate), 0)
    w, b = params[-1]
    return x @ w + b


def loss(params, key, step, x, y):
    now = {name: schedule(step) for name, schedule in schedules.items()}
    k_share, k_partner, k_noise, k_net = jax.random.split(key, 4)
    y = (1 - now["label_smoothing"]) * jax.nn.one_hot(y, 10) + now["label_smoothing"] / 10
    share = jax.random.beta(k_share, now["mixup"], now["mixup"], (len(x), 1))
    partner = jax.random.permutation(k_partner, len(x))
    x, y = (share * a + (1 - share) * a[partner] for a in (x, y))
    x = x + now["noise"] * jax.random.normal(k_noise, x.shape)
    penalty = now["l2"] * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    return optax.softmax_cross_entropy(logits(params, k_net, x, now["dropout"]), y).mean() + penalty


@jax.jit
def train(params, key):
    def body(carry, step):
        params, state = carry
        k_rows, k_loss = jax.random.split(jax.random.fold_in(key, step))
        rows = jax.random.randint(k_rows, (64,), 0, 800)
        grads = jax.grad(loss)(params, k_loss, step, jnp.asarray(x)[rows], jnp.asarray(y)[rows])
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(body, (params, optimizer.init(params)), jnp.arange(steps))[0][0]


def error(params):
    found = jnp.argmax(logits(params, jax.random.key(0), x[1200:], 0.0), -1)
    return float(np.mean(found != y[1200:]))


params = init(jax.random.key(0))
print(f"test error before: {error(params):.4f}")
print(f"test error after {steps} steps at the schedule: {error(train(params, jax.random.key(1))):.4f}")
