"""Regression on molecules: a network of continuous convolutions over the graph of all pairs of atoms."""

import haiku as hk
import jax
import jax.numpy as jnp

from ..base import TaskFamily
from ..data import load
from ..data.sources import DataError
from ..families.batches import draw, mean_squared_error, take
from .base import layer_norm, network_task, one_hot_product, single, table

_CENTRES, _FARTHEST = 32, 8.0  # of the radial functions; angstrom


def message_passing(dataset: str = "qm9", *, layers: int = 4, width: int = 160, batch_size: int = 32) -> TaskFamily:
    """Atoms send messages through filters of their distance; the atoms' read-outs are averaged.

    Args:
        dataset: a data set with ``elements``, ``positions`` and ``label``.
        layers: rounds of messages, each with a residual connection.
        width: numbers an atom.
        batch_size: molecules a batch.

    Returns:
        The family. The loss is the squared error of the standardised property.

    Raises:
        DataError: the data set is missing or has no molecules.

    Reference: Schütt et al., "SchNet: a continuous-filter convolutional neural network", 2017.
    """
    splits = load(dataset)
    if not {"elements", "positions", "label"} <= set(splits["train"]):
        raise DataError(f"the data set {dataset!r} has no molecules")
    kinds = int(max(arrays["elements"].max() for arrays in splits.values())) + 1
    data = {split: {field: jnp.asarray(array) for field, array in arrays.items()} for split, arrays in splits.items()}

    def net(elements: jax.Array, positions: jax.Array) -> jax.Array:
        atoms = (elements > 0).astype(positions.dtype)
        squares = jnp.sum(jnp.square(positions[:, :, None] - positions[:, None]), axis=-1)
        distance = jnp.sqrt(squares + 1e-6)[..., None]
        centres = jnp.linspace(0, _FARTHEST, _CENTRES, dtype=positions.dtype)
        radial = jnp.exp(-jnp.square((distance - centres[None, None, None]) * (_CENTRES / _FARTHEST)))
        linked = (atoms[:, :, None] * atoms[:, None] * (1 - jnp.eye(atoms.shape[1], dtype=atoms.dtype))[None])[
            ..., None
        ]
        x = one_hot_product(elements, table("elements", kinds, width, 1.0))
        for layer in range(layers):
            y = layer_norm(f"norm_message_{layer}")(x)
            filters = hk.Linear(width, name=f"filter_{layer}_0")(radial)
            filters = hk.Linear(width, name=f"filter_{layer}_1")(jax.nn.silu(filters)) * linked
            sent = jnp.einsum("bijw,bjw->biw", filters, hk.Linear(width, name=f"send_{layer}")(y))
            x = x + hk.Linear(width, name=f"receive_{layer}")(sent / 3)
            y = jax.nn.silu(hk.Linear(2 * width, name=f"expand_{layer}")(layer_norm(f"norm_atom_{layer}")(x)))
            x = x + hk.Linear(width, name=f"contract_{layer}")(y)
        x = jax.nn.silu(hk.Linear(width, name="read")(layer_norm("norm_output")(x)))
        per_atom = hk.Linear(1, name="output")(x)[..., 0]
        return jnp.sum(per_atom * atoms, axis=1) / jnp.maximum(jnp.sum(atoms, axis=1), 1)

    def build(data):
        def batch(key, split):
            part = data[split]
            rows = draw(key, part["label"].shape[0], batch_size)
            dtype = jnp.result_type(float)
            return {
                "elements": take(part["elements"], rows).astype(jnp.int32),
                "positions": take(part["positions"], rows).astype(dtype),
                "y": take(part["label"], rows).astype(dtype),
            }

        atoms = data["train"]["elements"].shape[1]
        return network_task(
            net,
            lambda: (jnp.zeros((1, atoms), jnp.int32), jnp.zeros((1, atoms, 3))),
            batch,
            lambda network, batch: mean_squared_error(network(batch["elements"], batch["positions"]), batch["y"]),
        )

    return single(data, build)
