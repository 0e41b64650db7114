"""Use a rule: train a small classifier with `flagship` and with Adam, and draw both.

Run it as a script, or cell by cell in an editor that knows `# %%`.
"""

# %% [markdown]
# ## The task
# Ten kinds of clothes, every second pixel, from the data that come with the package; a network of 3,322 parameters.

# %%
import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import learned_opt
from tasks.data import load

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--picture", type=Path, default=Path(__file__).with_name("use_a_rule.png"))
options = parser.parse_args()

data = load("fashion_mnist_small")
images = {
    split: jnp.asarray(data[split]["image"][:, ::2, ::2].reshape(-1, 196) / 255.0) for split in ("train", "valid")
}
labels = {split: jnp.asarray(data[split]["label"], jnp.int32) for split in ("train", "valid")}


def init(key):
    """196 pixels, 16 units, 10 classes."""
    k1, k2 = jax.random.split(key)
    return {
        "w1": jax.random.normal(k1, (196, 16)) / 14,
        "b1": jnp.zeros(16),
        "w2": jax.random.normal(k2, (16, 10)) / 4,
        "b2": jnp.zeros(10),
    }


def loss_of(params, x, y):
    """The mean cross-entropy."""
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"][None])
    logits = hidden @ params["w2"] + params["b2"][None]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


# %% [markdown]
# ## Two optimizers
# Adam at the best of five rates, which fall to zero at the last step, and `flagship`, which is told the number of steps
# and nothing else. A rule is a plain Optax transform: only one line changes.

# %%
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
optimizers = {f"Adam, {rate:g}": optax.adam(optax.cosine_decay_schedule(rate, options.steps)) for rate in RATES}
optimizers["flagship"] = learned_opt.load("flagship", num_steps=options.steps)


def train(optimizer):
    """The training losses of all steps, and the validation loss after the last."""

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (64,), 0, len(labels["train"]))
        loss, grads = jax.value_and_grad(loss_of)(params, images["train"][rows], labels["train"][rows])
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    params = init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), options.steps)
    (params, _), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((params, optimizer.init(params)))
    return losses, loss_of(params, images["valid"], labels["valid"])


# %% [markdown]
# ## What came out
# One seed, and Adam's rate chosen by the validation loss itself: a look, no comparison. `learned-opt bench` compares,
# on several tasks and seeds.

# %%
figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
results = {name: train(optimizer) for name, optimizer in optimizers.items()}
best = min((name for name in results if name.startswith("Adam")), key=lambda name: results[name][1])
for name in (best, "flagship"):
    losses, valid = results[name]
    smooth = jnp.convolve(losses, jnp.ones(20) / 20, mode="valid")
    axes.plot(smooth, label=f"{name}: validation loss {valid:.3f}")
    print(f"{name}: validation loss {valid:.3f}")
axes.set(xlabel="step", ylabel="training loss, mean of 20 steps", yscale="log")
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
figure.savefig(options.picture, dpi=120)
