"""The next word from those before it: most weights are embeddings, of which a step meets few rows."""

import haiku as hk
import jax
import jax.numpy as jnp

from ..base import TaskFamily
from ..data import load
from ..data.sources import DataError
from ..families.batches import cross_entropy, draw, take
from .base import layer_norm, network_task, single, table


def embeddings(
    dataset: str = "mail", *, context: int = 8, embedding: int = 96, width: int = 384, batch_size: int = 1024
) -> TaskFamily:
    """A perceptron over the embeddings of the last words, and a softmax over the whole vocabulary.

    Args:
        dataset: a data set with ``words``.
        context: words that are seen.
        embedding: numbers a word.
        width: of the two hidden layers.
        batch_size: words predicted a batch.

    Returns:
        The family. The loss is in nats a word.

    Raises:
        DataError: the data set is missing or has no words.

    Reference: Bengio et al., "A neural probabilistic language model", 2003.
    """
    splits = load(dataset)
    if "words" not in splits["train"]:
        raise DataError(f"the data set {dataset!r} has no words")
    vocabulary = int(max(arrays["words"].max() for arrays in splits.values())) + 1
    data = {split: {"words": jnp.asarray(arrays["words"])} for split, arrays in splits.items()}

    def net(words: jax.Array) -> jax.Array:
        known = table("words", vocabulary, embedding, 1.0)
        x = known[words].reshape(words.shape[0], -1)
        for layer in range(2):
            x = jax.nn.relu(layer_norm(f"norm_{layer}")(hk.Linear(width, name=f"hidden_{layer}")(x)))
        return hk.Linear(vocabulary, name="output")(hk.Linear(embedding, name="narrow")(x))

    def build(data):
        def batch(key, split):
            text = data[split]["words"]
            starts = draw(key, text.shape[0] - context, batch_size)
            seen = take(text, starts[:, None] + jnp.arange(context + 1)[None]).astype(jnp.int32)
            return {"x": seen[:, :-1], "y": seen[:, -1]}

        return network_task(
            net,
            lambda: (jnp.zeros((1, context), jnp.int32),),
            batch,
            lambda network, batch: cross_entropy(network(batch["x"]), batch["y"]),
        )

    return single(data, build)
