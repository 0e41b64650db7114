"""What the workloads share: validation batches, tasks from networks, layers."""

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from ..base import Batch, Data, Task, TaskFamily
from ..families.networks import transform

VALID_BATCHES = 16


def valid_keys(batches: int = VALID_BATCHES) -> jax.Array:
    """The keys of the validation batches: the same for all optimizers and seeds."""
    return jax.random.split(jax.random.key(2026), batches)


def single(data: Data, build: Callable[[Data], Task]) -> TaskFamily:
    """A family of one task, of which nothing is left to draw."""
    return TaskFamily(data, lambda key: {}, lambda data, cfg: build(data))


def network_task(
    net: Callable[..., jax.Array],
    example: Callable[[], tuple[jax.Array, ...]],
    batch: Callable[[jax.Array, str], Batch],
    loss: Callable[[Callable[..., jax.Array], Batch], jax.Array],
) -> Task:
    """A task from a Haiku function.

    Args:
        net: a function of arrays that calls Haiku modules.
        example: gives arguments of ``net``, of any batch size, to make parameters by.
        batch: ``(key, split) -> batch``.
        loss: ``(network, batch) -> scalar``; the network is ``net`` with parameters.

    Returns:
        The task.
    """
    net_init, net_apply = transform(lambda arguments: net(*arguments))

    def task_loss(params, key, batch):
        del key
        return loss(lambda *arguments: net_apply(params, arguments), batch), {}

    return Task(lambda key: net_init(key, example()), batch, task_loss)


def layer_norm(name: str) -> hk.LayerNorm:
    """Layer normalisation with scale and offset."""
    return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True, name=name)


def normal(deviation: float) -> hk.initializers.Initializer:
    """Truncated normal of a standard deviation, cut at twice that."""
    return hk.initializers.TruncatedNormal(deviation)


def table(name: str, rows: int, width: int, deviation: float) -> jax.Array:
    """A matrix of embeddings."""
    return hk.get_parameter(name, (rows, width), jnp.result_type(float), normal(deviation))


def one_hot_product(codes: jax.Array, embeddings: jax.Array) -> jax.Array:
    """Look-up by a product: for small vocabularies, since the gradient of a gather is a scatter, slow on CPUs."""
    return jax.nn.one_hot(codes, embeddings.shape[0], dtype=embeddings.dtype) @ embeddings


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Any) -> jax.Array:
    """Softmax attention.

    Args:
        q: ``[batch, length, heads, size]``.
        k: ``[batch, other length, heads, size]``.
        v: as ``k``.
        mask: bool, broadcast to ``[batch, heads, length, other length]``; or ``None``.

    Returns:
        ``[batch, length, heads * size]``.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5)
    if mask is not None:
        scores = jnp.where(jnp.broadcast_to(mask, scores.shape), scores, jnp.finfo(scores.dtype).min)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
    return mixed.reshape(*mixed.shape[:2], -1)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """``[batch, length, width]`` to ``[batch, length, heads, width / heads]``."""
    if x.shape[-1] % heads:
        raise ValueError(f"width {x.shape[-1]} and heads {heads}: the heads must divide the width")
    return x.reshape(*x.shape[:2], heads, -1)
