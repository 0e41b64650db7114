"""Language models over characters and bytes: two kinds of transformer and an LSTM."""

import haiku as hk
import jax
import jax.numpy as jnp

from ..base import TaskFamily
from ..data import VOCABULARY, load
from ..data.sources import DataError
from ..families.batches import cross_entropy, draw, take
from .base import attend, layer_norm, network_task, normal, one_hot_product, single, split_heads, table


def gpt(
    dataset: str, *, layers: int = 4, heads: int = 4, width: int = 128, length: int = 128, batch_size: int = 32
) -> TaskFamily:
    """A decoder-only transformer: layer normalisation first, learned positions, GELU, a head of its own.

    Args:
        dataset: a data set with ``text`` or ``bytes``.
        layers: blocks of attention and a perceptron of four times the width.
        heads: attention heads; they divide ``width``.
        width: of the model.
        length: characters predicted an example.
        batch_size: examples a batch.

    Returns:
        The family. The loss is in nats a character.

    Raises:
        DataError: the data set is missing or has no text.

    Reference: Radford et al., "Language models are unsupervised multitask learners", 2019.
    """
    into, out = normal(0.02), normal(0.02 / (2 * layers) ** 0.5)

    def net(codes: jax.Array, vocabulary: int) -> jax.Array:
        positions = table("positions", length, width, 0.02)
        x = one_hot_product(codes, table("embed", vocabulary, width, 0.02)) + positions[None]
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        for block in range(layers):
            y = layer_norm(f"norm_attention_{block}")(x)
            q, k, v = jnp.split(hk.Linear(3 * width, w_init=into, name=f"qkv_{block}")(y), 3, axis=-1)
            mixed = attend(split_heads(q, heads), split_heads(k, heads), split_heads(v, heads), causal)
            x = x + hk.Linear(width, w_init=out, name=f"mix_{block}")(mixed)
            y = hk.Linear(4 * width, w_init=into, name=f"expand_{block}")(layer_norm(f"norm_mlp_{block}")(x))
            x = x + hk.Linear(width, w_init=out, name=f"contract_{block}")(jax.nn.gelu(y))
        return hk.Linear(vocabulary, w_init=into, name="output")(layer_norm("norm_output")(x))

    return _language_model(dataset, net, length, batch_size)


def llama(
    dataset: str, *, layers: int = 4, heads: int = 4, width: int = 192, length: int = 128, batch_size: int = 32
) -> TaskFamily:
    """A decoder-only transformer of the later kind: RMS normalisation, rotary positions, SwiGLU, tied embeddings.

    Args:
        dataset: as :func:`gpt`.
        layers: blocks of attention and a gated perceptron of eight thirds the width.
        heads: as :func:`gpt`; ``width / heads`` is even.
        width: as :func:`gpt`.
        length: as :func:`gpt`.
        batch_size: as :func:`gpt`.

    Returns:
        The family. The loss is in nats a byte or character.

    Raises:
        DataError: the data set is missing or has no text.

    Reference: Touvron et al., "LLaMA: open and efficient foundation language models", 2023.
    """
    into, out = normal(0.02), normal(0.02 / (2 * layers) ** 0.5)
    inner = 8 * width // 3 // 8 * 8

    def rms(name: str, x: jax.Array) -> jax.Array:
        return hk.RMSNorm(axis=-1, name=name)(x)

    def linear(size: int, name: str, w_init) -> hk.Linear:
        return hk.Linear(size, with_bias=False, w_init=w_init, name=name)

    def net(codes: jax.Array, vocabulary: int) -> jax.Array:
        embeddings = table("embed", vocabulary, width, 0.02)
        x = one_hot_product(codes, embeddings)
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        for block in range(layers):
            y = rms(f"norm_attention_{block}", x)
            q, k, v = (split_heads(linear(width, f"{part}_{block}", into)(y), heads) for part in "qkv")
            x = x + linear(width, f"mix_{block}", out)(attend(rotary(q), rotary(k), v, causal))
            y = rms(f"norm_mlp_{block}", x)
            gated = jax.nn.silu(linear(inner, f"gate_{block}", into)(y)) * linear(inner, f"expand_{block}", into)(y)
            x = x + linear(width, f"contract_{block}", out)(gated)
        return rms("norm_output", x) @ embeddings.T

    return _language_model(dataset, net, length, batch_size)


def rotary(x: jax.Array) -> jax.Array:
    """Turns pairs of coordinates by angles that grow with the position, ``[batch, length, heads, size]``.

    Reference: Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.
    """
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * (10_000.0 ** (-jnp.arange(half) / half))[None]
    cos, sin = (f(angles).astype(x.dtype)[None, :, None] for f in (jnp.cos, jnp.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def lstm(
    dataset: str, *, layers: int = 2, width: int = 256, embedding: int = 64, length: int = 128, batch_size: int = 32
) -> TaskFamily:
    """A language model of stacked LSTMs, from a state of zeros, with layer normalisation before the read-out.

    Args:
        dataset: as :func:`gpt`.
        layers: recurrent layers, each with a residual connection but the first.
        width: units of each.
        embedding: size of the characters' embedding.
        length: characters predicted an example.
        batch_size: examples a batch.

    Returns:
        The family. The loss is in nats a character.

    Raises:
        DataError: the data set is missing or has no text.

    Reference: Zaremba et al., "Recurrent neural network regularization", 2014.
    """

    def net(codes: jax.Array, vocabulary: int) -> jax.Array:
        x = one_hot_product(codes, table("embed", vocabulary, embedding, 1.0)).swapaxes(0, 1)  # time first
        for layer in range(layers):
            core = hk.LSTM(width, name=f"lstm_{layer}")
            states, _ = hk.dynamic_unroll(core, x, core.initial_state(codes.shape[0]))
            x = states + x if layer else states
        return hk.Linear(vocabulary, name="output")(layer_norm("norm_output")(x)).swapaxes(0, 1)

    return _language_model(dataset, net, length, batch_size)


def _language_model(dataset: str, net, length: int, batch_size: int) -> TaskFamily:
    """A family from a network ``(codes int32 [batch, length], vocabulary) -> logits [batch, length, vocabulary]``."""
    splits = load(dataset)
    field = "bytes" if "bytes" in splits["train"] else "text"
    if field not in splits["train"]:
        raise DataError(f"the data set {dataset!r} has no text")
    if min(len(arrays[field]) for arrays in splits.values()) <= length:
        raise DataError(f"the data set {dataset!r} is shorter than {length + 1} characters")
    vocabulary = 256 if field == "bytes" else VOCABULARY
    data = {split: {"text": jnp.asarray(arrays[field])} for split, arrays in splits.items()}

    def build(data):
        def batch(key, split):
            text = data[split]["text"]
            starts = draw(key, text.shape[0] - length, batch_size)
            codes = take(text, starts[:, None] + jnp.arange(length + 1)[None]).astype(jnp.int32)
            return {"x": codes[:, :-1], "y": codes[:, 1:]}

        return network_task(
            lambda codes: net(codes, vocabulary),
            lambda: (jnp.zeros((1, length), jnp.int32),),
            batch,
            lambda network, batch: cross_entropy(network(batch["x"]), batch["y"]),
        )

    return single(data, build)
