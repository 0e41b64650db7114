"""Families of language models over characters: a recurrent net and a tiny transformer."""

from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp

from ..base import Batch, Cfg, Data, Task, TaskFamily
from ..data import VOCABULARY, load
from ..data.sources import DataError
from .batches import cross_entropy, draw, take
from .networks import log_uniform, scaled_normal, transform

_CORES = ("gru", "lstm")


def char_rnn(
    dataset: str = "sotu_small",
    *,
    core: str = "gru",
    width: int = 32,
    embedding: int = 16,
    length: int = 16,
    init_scale: float | tuple[float, float] = 1.0,
    batch_size: int = 32,
) -> TaskFamily:
    """Predict each next character with a recurrent net: an embedding, one recurrent layer, a linear read-out.

    Args:
        dataset: a data set with ``text``, see :mod:`tasks.data`.
        core: ``"gru"`` or ``"lstm"``.
        width: units of the recurrent layer.
        embedding: size of the characters' embedding.
        length: characters predicted an example, from a state of zeros.
        init_scale: factor of all initial parameters, or ``(low, high)``, drawn log-uniformly.
        batch_size: examples a batch.

    Returns:
        The family. The loss is in nats a character; a uniform guess has ``log(96) = 4.56``.

    Raises:
        DataError: the data set is missing or has no text.
        ValueError: an unknown core, or an impossible size or scale.

    Example:
        >>> family = char_rnn(width=8, length=4)
        >>> task = family.task(family.data, {})
        >>> task.batch(jax.random.key(0), "train")["x"].shape
        (32, 4)
    """
    if core not in _CORES:
        raise ValueError(f"unknown core {core!r}; known: {', '.join(_CORES)}")
    _check_sizes(width=width, embedding=embedding, length=length)

    def net(codes: jax.Array) -> jax.Array:
        layer = _core(core, width, embedding)
        inputs = _embed(codes, embedding, "embed").swapaxes(0, 1)  # time first
        states, _ = hk.dynamic_unroll(layer, inputs, layer.initial_state(codes.shape[0]))
        return hk.Linear(VOCABULARY, name="output")(states).swapaxes(0, 1)

    return _language_model(dataset, net, length, init_scale, batch_size)


def char_transformer(
    dataset: str = "sotu_small",
    *,
    layers: int = 1,
    heads: int = 2,
    width: int = 32,
    length: int = 16,
    init_scale: float | tuple[float, float] = 1.0,
    batch_size: int = 32,
) -> TaskFamily:
    """Predict each next character with a causal transformer, normalisation first, learned positions.

    Args:
        dataset: a data set with ``text``, see :mod:`tasks.data`.
        layers: blocks of attention and a perceptron of four times the width.
        heads: attention heads; they divide ``width``.
        width: the model's width.
        length: characters predicted an example.
        init_scale: factor of all initial parameters, or ``(low, high)``, drawn log-uniformly.
        batch_size: examples a batch.

    Returns:
        The family. The loss is in nats a character; a uniform guess has ``log(96) = 4.56``.

    Raises:
        DataError: the data set is missing or has no text.
        ValueError: an impossible size or scale.

    Example:
        >>> family = char_transformer(width=8, length=4)
        >>> task = family.task(family.data, {})
        >>> task.batch(jax.random.key(0), "train")["x"].shape
        (32, 4)

    Reference: Vaswani et al., "Attention is all you need", 2017.
    """
    _check_sizes(layers=layers, heads=heads, width=width, length=length)
    if width % heads:
        raise ValueError(f"width {width} and heads {heads}: the heads must divide the width")

    def normalise(x: jax.Array, name: str) -> jax.Array:
        return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True, name=name)(x)

    def net(codes: jax.Array) -> jax.Array:
        small = hk.initializers.TruncatedNormal(0.02)
        positions = hk.get_parameter("positions", (length, width), jnp.result_type(float), small)
        x = _embed(codes, width, "embed")
        x = x + jnp.broadcast_to(positions, x.shape)
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (1, 1, length, length))
        for block in range(layers):
            y = normalise(x, f"norm_attention_{block}")
            attention = hk.MultiHeadAttention(
                heads, width // heads, w_init=scaled_normal(1.0, width), name=f"attention_{block}"
            )
            x = x + attention(y, y, y, causal)
            y = hk.Linear(4 * width, name=f"expand_{block}")(normalise(x, f"norm_mlp_{block}"))
            x = x + hk.Linear(width, name=f"contract_{block}")(jax.nn.gelu(y))
        return hk.Linear(VOCABULARY, name="output")(normalise(x, "norm_output"))

    return _language_model(dataset, net, length, init_scale, batch_size)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} {size}: at least 1")


def _core(core: str, width: int, inputs: int) -> hk.RNNCore:
    if core == "gru":
        return hk.GRU(width, w_i_init=scaled_normal(1.0, inputs), w_h_init=scaled_normal(1.0, width))
    return hk.LSTM(width)


def _embed(codes: jax.Array, size: int, name: str) -> jax.Array:
    """Embed characters by a matrix product: the gradient of a look-up would be a scatter, slow on CPUs."""
    table = hk.get_parameter(name, (VOCABULARY, size), jnp.result_type(float), hk.initializers.TruncatedNormal())
    return jax.nn.one_hot(codes, VOCABULARY, dtype=table.dtype) @ table


def _language_model(
    dataset: str,
    net: Callable[[jax.Array], jax.Array],
    length: int,
    init_scale: float | tuple[float, float],
    batch_size: int,
) -> TaskFamily:
    """A family from a network ``codes int32 [batch, length] -> logits [batch, length, 96]``."""
    splits = load(dataset)
    if "text" not in splits["train"]:
        raise DataError(f"the data set {dataset!r} has no text")
    for split, arrays in splits.items():
        if len(arrays["text"]) <= length:
            raise DataError(f"the data set {dataset!r}, {split}: shorter than {length + 1} characters")
    low, high = init_scale if isinstance(init_scale, tuple) else (init_scale, init_scale)
    if not 0 < low <= high:
        raise ValueError(f"init_scale {init_scale}: one positive number, or (low, high)")
    data = {split: {"text": jnp.asarray(arrays["text"])} for split, arrays in splits.items()}
    net_init, net_apply = transform(net)

    def sample(key: jax.Array) -> Cfg:
        return {"init_scale": log_uniform(key, low, high)} if low < high else {}

    def task(data: Data, cfg: Cfg) -> Task:
        def init(key):
            params = net_init(key, jnp.zeros((1, length), jnp.int32))
            scale = cfg.get("init_scale", low)
            return jax.tree.map(lambda p: p * jnp.asarray(scale, p.dtype), params)

        def batch(key, split) -> Batch:
            text = data[split]["text"]
            starts = draw(key, text.shape[0] - length, batch_size)
            window = jax.lax.broadcasted_iota(jnp.int32, (batch_size, length + 1), 1)
            codes = take(text, jnp.broadcast_to(starts[:, None], window.shape) + window).astype(jnp.int32)
            return {"x": codes[:, :-1], "y": codes[:, 1:]}

        def loss(params, key, batch):
            del key
            return cross_entropy(net_apply(params, batch["x"]), batch["y"]), {}

        return Task(init, batch, loss)

    return TaskFamily(data, sample, task)
