"""Networks with hyperparameters worth tuning: what ``learned-opt tune`` runs."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from learned_opt import self_tuning as st
from learned_opt.self_tuning.objectives import leading_size
from tasks.base import Data
from tasks.data import VOCABULARY, load
from tasks.data.sources import DataError
from tasks.families.batches import draw, take
from tasks.families.networks import residual
from tasks.families.vision import patches3x3, shrink

_EVALUATED = 256  # examples of a batch of the whole-set evaluation


def _rows(batch_size: int) -> Callable[[Data, jax.Array], Data]:
    def batch(rows: Data, key: jax.Array) -> Data:
        chosen = draw(key, len(jax.tree.leaves(rows)[0]), batch_size)
        return jax.tree.map(lambda x: take(x, chosen), rows)

    return batch


class Problem(NamedTuple):
    """A network, its hyperparameters, its data and losses.

    Attributes:
        specs: the hyperparameters.
        data: ``{"train", "valid", "test"}``, each a dict of arrays with one example a row.
        init: ``key -> (params, response)``.
        train_loss: ``(params, hparams, key, batch) -> [B]``, for :func:`learned_opt.self_tuning.tuner`.
        valid_loss: ``(params, batch) -> [B]``, unregularised.
        metrics: ``(params, batch) -> {name: [B]}``, what is reported of the validation and the test set; has ``loss``.
        batch: ``(rows of a split, key) -> batch``; by default 64 random rows.
        weights: ``hparams -> Optax transform`` of the weights, where hyperparameters are tuned by hypergradient.
    """

    specs: st.hyperparameters.Specs
    data: Data
    init: Callable[[jax.Array], tuple[Any, Any]]
    train_loss: Callable[..., jax.Array]
    valid_loss: Callable[..., jax.Array]
    metrics: Callable[..., dict[str, jax.Array]]
    batch: Callable[[Data, jax.Array], Data] = _rows(64)
    weights: Callable[[Any], optax.GradientTransformation] | None = None


def first_half(batch: Data) -> Data:
    """The first half of a batch's examples, at least one."""
    return jax.tree.map(lambda x: x[: (len(x) + 1) // 2], batch)


def make_tuner(problem: Problem, **options: Any) -> st.Tuner:
    """The tuner of a problem; ``options`` as of :func:`learned_opt.self_tuning.tuner`.

    Delta-STN's response is trained on half of a batch: a step costs less, and in the same time more are taken.
    """
    if options.get("method", "delta_stn") == "delta_stn":
        options = {"response_batch": first_half} | options
    return st.tuner(
        problem.specs,
        problem.train_loss,
        problem.valid_loss,
        lambda data, key: problem.batch(data["train"], key),
        lambda data, key: problem.batch(data["valid"], key),
        **options,
    )


def standing(method: str, state: st.TunerState | st.Best) -> Any:
    """The plain weights of a run, or of its best, at the hyperparameters it stands at.

    Args:
        method: of :func:`learned_opt.self_tuning.tuner`. The original form's elementary weights alone are no network.
        state: the run's state, or its ``best``.

    Returns:
        Parameters without a response.
    """
    if method == "delta_stn":
        return state.params
    return st.materialise(st.BestResponse(state.params, state.response, state.hyper.mean))


def metrics_of(problem: Problem, params: Any, batch: Data) -> dict[str, jax.Array]:
    """A batch's :attr:`Problem.metrics`.

    Raises:
        ValueError: one is no number a row.
    """
    found = problem.metrics(params, batch)
    for name, values in found.items():
        if jnp.shape(values) != (leading_size(batch),):
            raise ValueError(f"the metric {name!r} has shape {jnp.shape(values)}: it wants one number a row, no mean")
    return found


def evaluate(problem: Problem, params: Any, rows: Data) -> dict[str, float]:
    """The means of :attr:`Problem.metrics` over a whole split.

    Args:
        problem: the problem.
        params: plain parameters.
        rows: the split, ``problem.data["valid"]`` or ``["test"]``.

    Returns:
        ``{metric: mean}``.

    Raises:
        ValueError: a metric is no number a row.
    """
    count = leading_size(rows)
    metrics = jax.jit(functools.partial(metrics_of, problem))
    sums: dict[str, float] = {}
    for start in range(0, count, _EVALUATED):
        batch = jax.tree.map(lambda x, start=start: x[start : start + _EVALUATED], rows)
        for name, values in metrics(params, batch).items():
            sums[name] = sums.get(name, 0.0) + float(jnp.sum(values))
    return {name: total / count for name, total in sums.items()}


def _split(arrays: dict[str, np.ndarray], share: float = 0.2) -> tuple[dict, dict]:
    """Training and validation rows: every fifth example validates."""
    every = round(1 / share)
    rows = np.arange(len(next(iter(arrays.values()))))
    held = rows % every == 0
    return {k: v[~held] for k, v in arrays.items()}, {k: v[held] for k, v in arrays.items()}


def _images(dataset: str, times: int = 1, colours: int = 1, multiple: int = 4) -> Data:
    """Images, made so many times smaller; of so many colours, and sides that are such a multiple then."""

    def smaller(images):
        return shrink(images, images.shape[1] // times)

    loaded = load(dataset)
    shape = loaded["train"]["image"].shape[1:] if "image" in loaded["train"] else ()
    if (*shape, 1)[2:3] != (colours,) or shape[0] // times % multiple:
        kind = "colour" if colours == 3 else "grey"
        raise DataError(f"the network wants {kind} images of sides a multiple of {multiple}; {dataset!r} has none")
    splits = {split: rows | {"image": smaller(rows["image"])} for split, rows in loaded.items()}
    train, valid = _split({name: splits["train"][name] for name in ("image", "label")})
    data = {"train": train, "valid": valid, "test": {name: splits["valid"][name] for name in ("image", "label")}}
    return {
        split: {"x": rows["image"].reshape(*rows["image"].shape[:3], -1), "y": rows["label"].astype(np.int32)}
        for split, rows in data.items()
    }


def _pixels(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) / 255


def _classifier(network: Callable, augment: Callable, penalty: Callable, specs, data, batch_size: int) -> Problem:
    """An image classifier; ``network(x, hparams or None, classes)``, None where nothing is to be dropped."""
    classes = int(max(data["train"]["y"].max(), data["test"]["y"].max())) + 1
    net = st.lift(hk.transform(lambda x, hparams: network(x, hparams, classes)))

    def init(key):
        k_params, k_response = jax.random.split(key)
        example = (_pixels(data["train"]["x"][:1]), None)
        return net.init(k_params, *example), net.init_response(k_response, len(st.names(specs)), *example)

    def train_loss(params, hparams, key, batch):
        k_augment, k_net = jax.random.split(key)
        logits = net.apply(params, k_net, augment(k_augment, _pixels(batch["x"]), hparams), hparams)
        labels = st.regularisers.label_smoothing(jax.nn.one_hot(batch["y"], classes), hparams["label_smoothing"])
        return optax.softmax_cross_entropy(logits, labels) + penalty(params, hparams)

    def metrics(params, batch):
        logits = net.apply(params, jax.random.key(0), _pixels(batch["x"]), None)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return {"loss": loss, "error": (jnp.argmax(logits, -1) != batch["y"]).astype(loss.dtype)}

    def valid_loss(params, batch):
        return metrics(params, batch)["loss"]

    return Problem(specs, data, init, train_loss, valid_loss, metrics, _rows(batch_size))


def _dropped(x: jax.Array, hparams: dict[str, jax.Array] | None, name: str) -> jax.Array:
    return x if hparams is None else st.regularisers.dropout(hk.next_rng_key(), x, hparams[name])


def _pooled(x: jax.Array, channels: int, name: str) -> jax.Array:
    """ReLU of a 3 x 3 convolution's 2 x 2 maxima: even sides only, and faster to differentiate than a window."""
    batch, height, width, _ = x.shape
    x = hk.Linear(channels, name=name)(patches3x3(x))
    return jax.nn.relu(x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4)))


GREY = {
    "input_noise": st.interval(0.05, 0.0, 0.5),
    "brightness": st.interval(0.05, 0.0, 0.8),
    "contrast": st.interval(0.05, 0.0, 0.8),
    "translation": st.interval(0.3, 0.0, 5.0),
    "cutout_length": st.interval(1.0, 0.0, 14.0),
    "label_smoothing": st.interval(0.02, 0.0, 0.5),
    "weight_decay": st.log(1e-4, 1e-7, 1e-1),
}  # of a classifier of grey images


def _augmented_grey(key: jax.Array, x: jax.Array, hparams: dict[str, jax.Array]) -> jax.Array:
    k = jax.random.split(key, 5)
    x = st.augmentations.brightness(k[0], x, hparams["brightness"])
    x = st.augmentations.contrast(k[1], x, hparams["contrast"])
    x = st.augmentations.translation(k[2], x, hparams["translation"])
    x = st.augmentations.cutout(k[3], x, hparams["cutout_length"])
    return st.regularisers.input_noise(k[4], x, hparams["input_noise"])


def _decay(params: Any, hparams: dict[str, jax.Array]) -> jax.Array:
    return hparams["weight_decay"] * st.squared_norm(params)


def fashion_cnn(dataset: str = "fashion_mnist_small", *, width: int = 8, batch_size: int = 64) -> Problem:
    """A small convolutional net on Fashion-MNIST with ten hyperparameters.

    Dropout of either convolution and of the dense layer, input noise, brightness, contrast, translation, cutout's
    length, label smoothing and weight decay.

    Args:
        dataset: ``fashion_mnist_small``, which is embedded, or the fetched ``fashion_mnist``.
        width: channels of the first convolution.
        batch_size: examples a batch.

    Returns:
        A :class:`Problem`; the data set's own test images are the test split.

    Raises:
        DataError: the data set is missing.
    """
    specs = {
        "dropout_conv1": st.logit(0.05),
        "dropout_conv2": st.logit(0.05),
        "dropout_dense": st.logit(0.1),
        **GREY,
    }

    def network(x, hparams, classes):
        x = _dropped(_pooled(x, width, "conv1"), hparams, "dropout_conv1")
        x = _dropped(_pooled(x, 2 * width, "conv2"), hparams, "dropout_conv2")
        x = jax.nn.relu(hk.Linear(4 * width, name="dense")(x.reshape(len(x), -1)))
        return hk.Linear(classes, name="logits")(_dropped(x, hparams, "dropout_dense"))

    return _classifier(network, _augmented_grey, _decay, specs, _images(dataset), batch_size)


def fashion_resnet(
    dataset: str = "fashion_mnist", *, channels: Sequence[int] = (16, 32, 64), blocks: int = 1, batch_size: int = 64
) -> Problem:
    """A residual network on Fashion-MNIST with ten hyperparameters, of three stages.

    Dropout inside the blocks of each stage, input noise, brightness, contrast, translation, cutout's length, label
    smoothing and weight decay.

    Args:
        dataset: a data set of grey images; ``fashion_mnist`` has to be fetched.
        channels: of each stage; a stage has a rate of dropout of its own.
        blocks: a stage.
        batch_size: examples a batch.

    Returns:
        A :class:`Problem`; the data set's own test images are the test split.

    Raises:
        DataError: the data set is missing.

    Reference: Zagoruyko & Komodakis, "Wide residual networks", 2016, whose dropout lies between a block's convolutions.
    """
    specs = {f"dropout_stage{stage}": st.logit(0.05) for stage in range(len(channels))} | GREY

    def network(x, hparams, classes):
        def conv(x, size, stride, kernel, name):
            if kernel == 1:
                return hk.Linear(size, False, name=name)(x[:, ::stride, ::stride])
            if name.startswith("conv") and name.endswith("_1"):  # a block's second
                x = _dropped(x, hparams, f"dropout_stage{name.split('_')[1]}")
            return hk.Linear(size, False, name=name)(patches3x3(x, stride))

        return residual(x, classes, channels, blocks, conv)

    return _classifier(network, _augmented_grey, _decay, specs, _images(dataset), batch_size)


def cifar_cnn(dataset: str = "cifar10", *, width: int = 16, batch_size: int = 64, shrink: int = 1) -> Problem:
    """A convolutional net on CIFAR-10 with fifteen hyperparameters, as many as MacKay et al. tune.

    Dropout of the three convolutions and the two dense layers, input noise and scaling, hue, contrast, saturation,
    brightness, translation, cutout's length and count, label smoothing.

    Args:
        dataset: a data set of colour images; ``cifar10`` has to be fetched.
        width: channels of the first convolution.
        batch_size: examples a batch.
        shrink: how many times smaller images are made, on each side.

    Returns:
        A :class:`Problem`.

    Raises:
        DataError: the data set is missing.
    """
    layers = ("conv1", "conv2", "conv3", "dense1", "dense2")
    specs = {f"dropout_{layer}": st.logit(0.05) for layer in layers} | {
        "input_noise": st.interval(0.02, 0.0, 0.3),
        "input_scaling": st.interval(0.02, 0.0, 0.5),
        "hue": st.interval(0.02, 0.0, 0.5),
        "contrast": st.interval(0.05, 0.0, 0.8),
        "saturation": st.interval(0.05, 0.0, 0.8),
        "brightness": st.interval(0.05, 0.0, 0.8),
        "translation": st.interval(0.3, 0.0, 6.0),
        "cutout_length": st.interval(2.0, 0.0, 16.0),
        "cutout_count": st.interval(0.6, 0.0, 4.0),
        "label_smoothing": st.interval(0.02, 0.0, 0.5),
    }

    def network(x, hparams, classes):
        for i, layer in enumerate(layers[:3]):
            x = _dropped(_pooled(x, width * 2**i, layer), hparams, f"dropout_{layer}")
        x = x.reshape(len(x), -1)
        for layer in layers[3:]:
            x = _dropped(jax.nn.relu(hk.Linear(4 * width, name=layer)(x)), hparams, f"dropout_{layer}")
        return hk.Linear(classes, name="logits")(x)

    def augment(key, x, hparams):
        k = jax.random.split(key, 8)
        x = st.augmentations.hue(k[0], x, hparams["hue"])
        x = st.augmentations.contrast(k[1], x, hparams["contrast"])
        x = st.augmentations.saturation(k[2], x, hparams["saturation"])
        x = st.augmentations.brightness(k[3], x, hparams["brightness"])
        x = st.augmentations.translation(k[4], x, hparams["translation"])
        x = st.augmentations.cutout(k[5], x, hparams["cutout_length"], hparams["cutout_count"])
        x = st.regularisers.input_scaling(k[6], x, hparams["input_scaling"])
        return st.regularisers.input_noise(k[7], x, hparams["input_noise"])

    return _classifier(network, augment, lambda params, hparams: 0.0, specs, _images(dataset, shrink, 3, 8), batch_size)


def char_lstm(
    dataset: str = "sotu_small",
    *,
    width: int = 96,
    layers: int = 1,
    embedding: int = 32,
    length: int = 32,
    batch_size: int = 32,
    tuned: Collection[str] | None = None,
) -> Problem:
    """A character LSTM with the seven hyperparameters of MacKay et al.'s language model.

    Variational dropout of the embedded inputs and of the outputs, dropout of whole characters, dropped recurrent
    weights, the activation and temporal penalties, and weight decay.

    Args:
        dataset: a data set of text.
        width: units of an LSTM.
        layers: LSTMs, one on top of the other; the penalties are on the last one's activations.
        embedding: size of a character's embedding.
        length: characters an example.
        batch_size: examples a batch.
        tuned: names of the hyperparameters to tune, the others being held at their start; all by default.

    Returns:
        A :class:`Problem`. Losses are nats a character. A tenth of the text validates, and the data set's own
        validation text is the test split.

    Raises:
        DataError: the data set is missing.
    """
    specs = {
        "dropout_input": st.logit(0.05),
        "dropout_output": st.logit(0.05),
        "dropout_characters": st.logit(0.02),
        "weight_drop": st.logit(0.05, per_example=False),
        "activation": st.log(1e-3, 1e-6, 10.0),
        "temporal": st.log(1e-3, 1e-6, 10.0),
        "weight_decay": st.log(1e-6, 1e-9, 1e-2),
    }
    if tuned is not None:
        specs = {name: dataclasses.replace(spec, tuned=name in tuned) for name, spec in specs.items()}
    cores = ["lstm", *(f"lstm_{i}" for i in range(1, layers))]

    def network(codes, hparams):
        x = hk.Embed(VOCABULARY, embedding, name="embed")(codes.T)  # [T, B, D]
        if hparams is not None:
            x = _masked_rows(x, hparams["dropout_characters"])
            x = _shared_mask(x, hparams["dropout_input"])
        for name in cores:
            core = hk.LSTM(width, name=name)
            x, _ = hk.dynamic_unroll(core, x, core.initial_state(codes.shape[0]))
        dropped = x if hparams is None else _shared_mask(x, hparams["dropout_output"])
        return hk.Linear(VOCABULARY, name="output")(dropped).swapaxes(0, 1), x.swapaxes(0, 1)

    def drop(key, params, hparams):
        return st.regularisers.weight_drop(key, params, hparams["weight_drop"], [f"{name}/linear" for name in cores])

    def penalty(hparams, states):
        activation = hparams["activation"] * st.regularisers.activation_penalty(states)
        return activation + hparams["temporal"] * st.regularisers.temporal_penalty(states)

    return _language_model(network, specs, dataset, length, batch_size, drop=drop, penalty=penalty)


def char_transformer(
    dataset: str = "sotu_small",
    *,
    width: int = 48,
    layers: int = 2,
    heads: int = 4,
    length: int = 32,
    batch_size: int = 32,
) -> Problem:
    """A character transformer with six hyperparameters.

    Dropout of the embedded inputs, of attention's and of the dense layers' outputs, of the last layer's outputs, of
    whole characters, and weight decay.

    Args:
        dataset: a data set of text.
        width: of the embedding.
        layers: blocks of attention and two dense layers, normalised before each.
        heads: of attention.
        length: characters an example.
        batch_size: examples a batch.

    Returns:
        A :class:`Problem`, with losses and splits as :func:`char_lstm`'s.

    Raises:
        DataError: the data set is missing.
    """
    specs = {
        "dropout_input": st.logit(0.05),
        "dropout_attention": st.logit(0.05),
        "dropout_dense": st.logit(0.05),
        "dropout_output": st.logit(0.05),
        "dropout_characters": st.logit(0.02),
        "weight_decay": st.log(1e-6, 1e-9, 1e-2),
    }
    normalised = functools.partial(hk.LayerNorm, axis=-1, create_scale=True, create_offset=True)
    small = hk.initializers.VarianceScaling(1.0 / layers)

    def network(codes, hparams):
        x = hk.Embed(VOCABULARY, width, name="embed")(codes)
        if hparams is not None:
            x = _masked_rows(x.swapaxes(0, 1), hparams["dropout_characters"]).swapaxes(0, 1)
        x = x + hk.Embed(length, width, name="position")(jnp.arange(length)[None])
        x = _dropped(x, hparams, "dropout_input")
        before = jnp.tril(jnp.ones((1, 1, length, length), bool))
        for i in range(layers):
            attention = hk.MultiHeadAttention(heads, width // heads, w_init=small, name=f"attention_{i}")
            h = normalised(name=f"norm_{i}_attention")(x)
            x = x + _dropped(attention(h, h, h, before), hparams, "dropout_attention")
            h = jax.nn.gelu(hk.Linear(4 * width, name=f"dense_{i}_in")(normalised(name=f"norm_{i}_dense")(x)))
            h = hk.Linear(width, w_init=small, name=f"dense_{i}_out")(h)
            x = x + _dropped(h, hparams, "dropout_dense")
        x = _dropped(normalised(name="norm")(x), hparams, "dropout_output")
        return hk.Linear(VOCABULARY, name="output")(x), x

    return _language_model(network, specs, dataset, length, batch_size)


def _language_model(
    network: Callable,
    specs: st.hyperparameters.Specs,
    dataset: str,
    length: int,
    batch_size: int,
    *,
    drop: Callable = lambda key, params, hparams: params,
    penalty: Callable = lambda hparams, states: 0.0,
) -> Problem:
    """A model of characters; ``network(codes, hparams or None)`` gives logits and states, [B, T, ...]."""
    splits = load(dataset)
    if "text" not in splits["train"]:
        raise DataError(f"the network reads text; {dataset!r} has none")
    text, test = (np.asarray(splits[name]["text"]).reshape(-1) for name in ("train", "valid"))
    cut = len(text) * 9 // 10
    parts = {"train": text[:cut], "valid": text[cut:], "test": test}
    data = {split: {"text": _windows(part, length)} for split, part in parts.items()}
    net = st.lift(hk.transform(network))

    def init(key):
        k_params, k_response = jax.random.split(key)
        example = (jnp.zeros((1, length), jnp.int32), None)
        return net.init(k_params, *example), net.init_response(k_response, len(st.names(specs)), *example)

    def nats(logits, codes):
        return optax.softmax_cross_entropy_with_integer_labels(logits, codes[:, 1:]).mean(-1)

    def train_loss(params, hparams, key, batch):
        codes = batch["text"]
        k_drop, k_net = jax.random.split(key)
        params = drop(k_drop, params, hparams)
        logits, states = net.apply(params, k_net, codes[:, :-1], hparams)
        return nats(logits, codes) + penalty(hparams, states) + hparams["weight_decay"] * st.squared_norm(params)

    def metrics(params, batch):
        codes = batch["text"]
        loss = nats(net.apply(params, jax.random.key(0), codes[:, :-1], None)[0], codes)
        return {"loss": loss}

    def valid_loss(params, batch):
        return metrics(params, batch)["loss"]

    return Problem(specs, data, init, train_loss, valid_loss, metrics, _rows(batch_size))


def _windows(text: np.ndarray, length: int) -> np.ndarray:
    """Consecutive windows, ``[n, length + 1]``, of which each predicts its last ``length`` characters."""
    count = (len(text) - 1) // length
    return text[length * np.arange(count)[:, None] + np.arange(length + 1)].astype(np.int32)


def _shared_mask(x: jax.Array, rate: jax.Array) -> jax.Array:
    """Variational dropout of [T, B, D] at a rate [B] or []: one mask for all times."""
    by_example = st.regularisers.variational_dropout(hk.next_rng_key(), x.swapaxes(0, 1), rate)
    return by_example.swapaxes(0, 1)


def _masked_rows(x: jax.Array, rate: jax.Array) -> jax.Array:
    """Dropout of whole characters of [T, B, D]."""
    by_example = st.regularisers.dropout(hk.next_rng_key(), x.swapaxes(0, 1), rate, shared_axes=(2,))
    return by_example.swapaxes(0, 1)


class ProblemEntry(NamedTuple):
    """A problem of a suite.

    Attributes:
        name: unique in its suite.
        make: makes the problem; data are read only then.
    """

    name: str
    make: Callable[[], Problem]


# To meta-train on: small enough for many particles.
SUITES: dict[str, tuple[ProblemEntry, ...]] = {
    "self_tuned": (
        ProblemEntry("fashion_mnist_small/cnn-4-8", functools.partial(fashion_cnn, width=4, batch_size=32)),
        ProblemEntry(
            "sotu_small/lstm-24", functools.partial(char_lstm, width=24, embedding=12, length=16, batch_size=16)
        ),
    ),
}


def suite(name: str) -> tuple[ProblemEntry, ...]:
    """Find a suite of problems by name.

    Raises:
        ValueError: there is none.

    Example:
        >>> [entry.name for entry in suite("self_tuned")]
        ['fashion_mnist_small/cnn-4-8', 'sotu_small/lstm-24']
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r} of self-tuned networks; known: {', '.join(SUITES)}")
    return SUITES[name]


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "char-lstm": char_lstm,
    "cifar-cnn": cifar_cnn,
    "fashion-cnn": fashion_cnn,
    "fashion-resnet": fashion_resnet,
}
