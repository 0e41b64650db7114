"""A network of your own that tunes its hyperparameters while it trains.

    learned-opt tune --network examples/my_network.py:make --cycles 200

A Flax Linen MLP on scikit-learn's digits. Five hyperparameters are tuned by the weights' best response, the learning
rate by the hypergradient through the last steps. examples/replay_schedule.py trains with what this found.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from learned_opt import self_tuning as st
from meta_train.train.problems import Problem

SPECS = {
    "dropout": st.logit(0.1),
    "noise": st.interval(0.05, 0.0, 0.5),
    "mixup": st.log(0.1, 1e-2, 4.0),
    "label_smoothing": st.interval(0.02, 0.0, 0.5),
    "l2": st.log(1e-4, 1e-7, 1e-1),
    "learning_rate": st.log(3e-3, 1e-4, 1e-1, by="hypergradient"),
}


class Network(nn.Module):
    width: int = 64

    @nn.compact
    def __call__(self, x, rate):  # rate None: nothing is dropped
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
            if rate is not None:
                x = st.regularisers.dropout(self.make_rng("dropout"), x, rate)
        return nn.Dense(10)(x)


def make():
    images, labels = load_digits(return_X_y=True)
    rows = {"x": (images / 16).astype("float32"), "y": labels.astype("int32")}
    splits = {"train": slice(0, 800), "valid": slice(800, 1200), "test": slice(1200, None)}
    net = st.lift(Network())

    def init(key):
        k_params, k_response = jax.random.split(key)
        example = (jnp.zeros((1, 64)), None)
        return net.init(k_params, *example)["params"], net.init_response(k_response, len(SPECS), *example)

    def logits(params, key, x, rate):
        return net.apply({"params": params}, x, rate, rngs={"dropout": key})

    def train_loss(params, hparams, key, batch):
        k_mix, k_noise, k_net = jax.random.split(key, 3)
        y = st.regularisers.label_smoothing(jax.nn.one_hot(batch["y"], 10), hparams["label_smoothing"])
        x, y = st.augmentations.mixup(k_mix, batch["x"], y, hparams["mixup"])
        x = st.regularisers.input_noise(k_noise, x, hparams["noise"])
        loss = optax.softmax_cross_entropy(logits(params, k_net, x, hparams["dropout"]), y)
        return loss + hparams["l2"] * st.squared_norm(params)  # one loss an example

    def metrics(params, batch):
        out = logits(params, jax.random.key(0), batch["x"], None)
        loss = optax.softmax_cross_entropy_with_integer_labels(out, batch["y"])
        return {"loss": loss, "error": (jnp.argmax(out, -1) != batch["y"]).astype(loss.dtype)}

    return Problem(
        specs=SPECS,
        data={split: {name: x[part] for name, x in rows.items()} for split, part in splits.items()},
        init=init,
        train_loss=train_loss,
        valid_loss=lambda params, batch: metrics(params, batch)["loss"],
        metrics=metrics,
        weights=lambda hparams: optax.adam(hparams["learning_rate"]),
    )
