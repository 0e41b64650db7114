"""Problems small enough for closed forms."""

import jax
import jax.numpy as jnp
import numpy as np

from learned_opt import self_tuning as st
from meta_train.train.problems import Problem


def ridge(examples=12, dim=4) -> Problem:
    """Ridge regression whose few training rows overfit: the weight decay matters to the validation loss."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=dim)

    def rows(count, noise):
        x = rng.normal(size=(count, dim))
        return {"x": jnp.asarray(x), "t": jnp.asarray(x @ truth + noise * rng.normal(size=count))}

    data = {"train": rows(examples, 1.0), "valid": rows(4 * examples, 0.1), "test": rows(2, 0.1)}
    predict = st.dense_lift(lambda w, x: x @ w)

    def valid_loss(w, batch):
        return 0.5 * (predict(w, batch["x"]) - batch["t"]) ** 2

    def train_loss(w, hparams, key, batch):
        return valid_loss(w, batch) + 0.5 * hparams["l2"] * st.squared_norm(w)

    def init(key):
        w = jax.random.normal(key, (dim,))
        return w, st.dense_response(w, 1)

    return Problem(
        specs={"l2": st.log(0.05, per_example=False)},
        data=data,
        init=init,
        train_loss=train_loss,
        valid_loss=valid_loss,
        metrics=lambda w, batch: {"loss": valid_loss(w, batch)},
        batch=lambda rows, key: rows,
    )
