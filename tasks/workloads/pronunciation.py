"""Sequence to sequence: from how a word is spelt to how it is said."""

import haiku as hk
import jax
import jax.numpy as jnp

from ..base import TaskFamily
from ..data import load
from ..data.sources import DataError
from ..families.batches import draw, take
from .base import attend, layer_norm, network_task, one_hot_product, single, split_heads, table


def seq2seq(
    dataset: str = "cmudict", *, layers: int = 3, heads: int = 4, width: int = 128, batch_size: int = 256
) -> TaskFamily:
    """An encoder and a decoder with attention to it, layer normalisation first, ReLU, one table of positions each.

    Args:
        dataset: a data set with ``spelling`` and ``sounds``.
        layers: blocks of either half.
        heads: attention heads; they divide ``width``.
        width: of the model.
        batch_size: words a batch.

    Returns:
        The family. The loss is in nats a sound, the end of the word being one; the decoder is given the true sounds.

    Raises:
        DataError: the data set is missing or has no pronunciations.

    Reference: Vaswani et al., "Attention is all you need", 2017.
    """
    splits = load(dataset)
    if not {"spelling", "sounds"} <= set(splits["train"]):
        raise DataError(f"the data set {dataset!r} has no spellings and sounds")
    letters = int(max(arrays["spelling"].max() for arrays in splits.values())) + 1
    sounds = int(max(arrays["sounds"].max() for arrays in splits.values())) + 1
    data = {split: {field: jnp.asarray(array) for field, array in arrays.items()} for split, arrays in splits.items()}

    def attention(x, memory, mask, name):
        q = hk.Linear(width, name=f"{name}_q")(x)
        k, v = jnp.split(hk.Linear(2 * width, name=f"{name}_kv")(memory), 2, axis=-1)
        mixed = attend(split_heads(q, heads), split_heads(k, heads), split_heads(v, heads), mask)
        return hk.Linear(width, name=f"{name}_mix")(mixed)

    def perceptron(x, name):
        y = jax.nn.relu(hk.Linear(4 * width, name=f"{name}_expand")(layer_norm(f"{name}_norm")(x)))
        return x + hk.Linear(width, name=f"{name}_contract")(y)

    def net(spelling: jax.Array, said: jax.Array) -> jax.Array:
        real = (spelling > 0)[:, None, None]
        x = one_hot_product(spelling, table("letters", letters, width, 0.5))
        x = x + table("letter_positions", spelling.shape[1], width, 0.5)[None]
        for block in range(layers):
            y = layer_norm(f"encoder_norm_{block}")(x)
            x = perceptron(x + attention(y, y, real, f"encoder_attention_{block}"), f"encoder_{block}")
        memory = layer_norm("encoder_norm_output")(x)
        x = one_hot_product(said, table("sounds", sounds, width, 0.5))
        x = x + table("sound_positions", said.shape[1], width, 0.5)[None]
        causal = jnp.tril(jnp.ones((said.shape[1], said.shape[1]), bool))[None, None]
        for block in range(layers):
            y = layer_norm(f"decoder_norm_{block}")(x)
            x = x + attention(y, y, causal, f"decoder_attention_{block}")
            y = layer_norm(f"cross_norm_{block}")(x)
            x = perceptron(x + attention(y, memory, real, f"cross_attention_{block}"), f"decoder_{block}")
        return hk.Linear(sounds, name="output")(layer_norm("decoder_norm_output")(x))

    def loss(network, batch):
        logits = jax.nn.log_softmax(network(batch["spelling"], batch["said"]))
        picked = jnp.sum(jax.nn.one_hot(batch["sounds"], sounds, dtype=logits.dtype) * logits, axis=-1)
        counted = jnp.cumsum(batch["sounds"] == 0, axis=1) <= 1  # the end of the word and all before it
        return -jnp.sum(picked * counted) / jnp.sum(counted)

    def build(data):
        def batch(key, split):
            part = data[split]
            rows = draw(key, part["sounds"].shape[0], batch_size)
            spelling, said = (take(part[field], rows).astype(jnp.int32) for field in ("spelling", "sounds"))
            return {"spelling": spelling, "sounds": said, "said": jnp.pad(said[:, :-1], ((0, 0), (1, 0)))}

        longest = data["train"]["spelling"].shape[1], data["train"]["sounds"].shape[1]
        return network_task(net, lambda: tuple(jnp.zeros((1, n), jnp.int32) for n in longest), batch, loss)

    return single(data, build)
