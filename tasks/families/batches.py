"""Random batches from arrays, and the losses of supervised tasks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ..base import Batch, Cfg, Data, Task, TaskFamily
from ..data.sources import DataError, Splits


def draw(key: jax.Array, num: int, batch_size: int) -> jax.Array:
    """Draw ``batch_size`` indices below ``num``, uniformly with replacement.

    The remainder of a 32-bit word: off from uniform by at most ``num / 2**32``, and a third of ``randint``'s cost.

    Args:
        key: PRNG key.
        num: how many there are to choose from.
        batch_size: how many to draw.

    Returns:
        int32 ``[batch_size]``.

    Raises:
        ValueError: either is below 1.
    """
    if num < 1 or batch_size < 1:
        raise ValueError(f"a batch of {batch_size} cannot be drawn from {num}")
    return (jax.random.bits(key, (batch_size,), jnp.uint32) % np.uint32(num)).astype(jnp.int32)


def take(array: jax.Array, rows: jax.Array) -> jax.Array:
    """Gather rows known to exist."""
    return array.at[rows].get(mode="promise_in_bounds")


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy, ``mean(logsumexp(z) - z[label])``.

    The label's logit is picked by a comparison: the gradient of a gather would be a scatter, slow on CPUs.

    Args:
        logits: float ``[..., classes]``.
        labels: integer ``[...]``.

    Returns:
        Scalar.
    """
    shifted = logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    classes = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    picked = jnp.sum(jnp.where(labels[..., None] == classes, shifted, 0), axis=-1)
    return jnp.mean(jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)) - picked)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The share of examples whose largest logit is the label's."""
    return jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(logits.dtype))


def mean_squared_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over all entries of the squared difference."""
    return jnp.mean(jnp.square(predictions - targets))


def on_device(splits: Splits, field: str, flat: bool = True) -> Data:
    """Put ``{"train": {"x", "y"}, "valid": {"x", "y"}}`` of a labelled data set on the device, with its input scale.

    Args:
        splits: a data set as :func:`tasks.data.load` gives it.
        field: the field that becomes ``x``.
        flat: whether an example becomes one row.

    Returns:
        A pytree of arrays: inputs in their own dtype (uint8 images stay uint8), labels, and the scalars ``shift`` and
        ``scale`` that standardise images (0 and 1 for tables, which are standardised already).
    """
    inputs = splits["train"][field]
    shift, scale = (inputs.mean(), 1 / inputs.std()) if inputs.dtype == np.uint8 else (0.0, 1.0)
    data: dict = {"shift": jnp.asarray(shift, jnp.float32), "scale": jnp.asarray(scale, jnp.float32)}
    for split, arrays in splits.items():
        x = arrays[field]
        data[split] = {"x": jnp.asarray(x.reshape(len(x), -1) if flat else x), "y": jnp.asarray(arrays["label"])}
    return data


def supervised_batch(data: Data, key: jax.Array, split: str, batch_size: int) -> Batch:
    """Draw ``{"x": float [batch_size, ...], "y": [batch_size]}``, inputs standardised, from a split."""
    part = data[split]
    rows = draw(key, part["x"].shape[0], batch_size)
    x = take(part["x"], rows).astype(jnp.result_type(float))
    return {"x": (x - data["shift"]) * data["scale"], "y": take(part["y"], rows)}


def num_outputs(splits: Splits, name: str) -> int:
    """How many outputs a labelled data set wants: its classes, or 0 for regression."""
    label = splits["train"].get("label")
    if label is None:
        raise DataError(f"the data set {name!r} has no labels")
    return 0 if label.dtype.kind == "f" else int(label.max()) + 1


def supervised(
    data: Data,
    sample: Callable[[jax.Array], Cfg],
    network: Callable[[Cfg], tuple[Callable, Callable]],
    batch_size: int,
    classes: int,
) -> TaskFamily:
    """Make a family of classification or regression tasks from a network.

    Args:
        data: as :func:`on_device`.
        sample: ``key -> cfg``.
        network: ``cfg -> (init, apply)``, ``init: (key, x) -> params``, ``apply: (params, x) -> outputs [batch, k]``.
        batch_size: examples a batch.
        classes: the number of classes, cross-entropy loss; 0 is regression of one target, squared error.

    Returns:
        The family; ``aux`` holds ``accuracy`` for classification.
    """

    def task(data: Data, cfg: Cfg) -> Task:
        net_init, net_apply = network(cfg)

        def init(key):
            return net_init(key, jnp.zeros((1, *data["train"]["x"].shape[1:]), jnp.result_type(float)))

        def batch(key, split):
            return supervised_batch(data, key, split, batch_size)

        def loss(params, key, batch):
            del key
            outputs = net_apply(params, batch["x"])
            if not classes:
                return mean_squared_error(outputs[:, 0], batch["y"].astype(outputs.dtype)), {}
            return cross_entropy(outputs, batch["y"]), {"accuracy": accuracy(outputs, batch["y"])}

        return Task(init, batch, loss)

    return TaskFamily(data, sample, task)
