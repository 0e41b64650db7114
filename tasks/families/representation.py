"""Tasks of learning features without labels: unlabelled batches, and few-shot problems to judge the features by."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..base import Cfg, Data
from ..data import load
from ..data.glyphs import glyphs
from ..data.sources import DataError
from .batches import draw
from .vision import shrink


class FewShot(NamedTuple):
    """A labelled problem: the rows of each class lie together, in both halves alike; no row is in both."""

    support: jax.Array  # [classes * shots, inputs]
    query: jax.Array  # [classes * shots, inputs]
    labels: jax.Array  # int32 [classes * shots], of either


class FeatureFamily(NamedTuple):
    """A distribution of unlabelled data sets of one shape.

    Attributes:
        data: a pytree of arrays that every task reads, an argument of the compiled step.
        inputs: numbers a row.
        classes: of a few-shot problem.
        sample: ``key -> cfg``, what tells one task from the next: classes, pixel order, noise, contrast.
        batch: ``(data, cfg, key, size) -> float [size, inputs]``, rows of the task's classes.
        few_shot: ``(data, cfg, key, shots) -> FewShot``.
    """

    data: Data
    inputs: int
    classes: int
    sample: Callable[[jax.Array], Cfg]
    batch: Callable[[Data, Cfg, jax.Array, int], jax.Array]
    few_shot: Callable[[Data, Cfg, jax.Array, int], FewShot]


def letters(side: int = 8, *, classes: int = 10, per_class: int = 200, noise: float = 0.3) -> FeatureFamily:
    """Ten letters out of 79, see :mod:`tasks.data.glyphs`, distorted more or less; pixels in the task's own order.

    Args:
        side: the images' side.
        classes: letters in a task.
        per_class: images of each letter at each of the three distortions.
        noise: a task's pixel noise is uniform in [0, noise], in units of the pixels' standard deviation.

    Returns:
        The family.

    Raises:
        DataError: the fonts are not there.
    """
    images = [glyphs(side, per_class, distortion) for distortion in (0.4, 0.7, 1.0)]
    return _family(np.stack(images).reshape(3, *images[0].shape[:2], -1), classes, noise)


def images(dataset: str, side: int = 8, *, classes: int = 10, noise: float = 0.3) -> FeatureFamily:
    """Images of a labelled data set, grey and shrunk; pixels in an order of the task's own.

    Args:
        dataset: a data set of images, see :mod:`tasks.data`.
        side: the side they are shrunk to.
        classes: classes in a task.
        noise: as in :func:`letters`.

    Returns:
        The family; it draws from the training split.

    Raises:
        DataError: the data set is not there or has no images.
    """
    x, y = labelled_images(dataset, side)["train"]
    return _family(_by_class(x, y)[None], classes, noise)


def table(dataset: str, *, noise: float = 0.3) -> FeatureFamily:
    """Rows of a table with classes; columns in an order of the task's own.

    Args:
        dataset: a data set with ``features`` and classes, see :mod:`tasks.data`.
        noise: as in :func:`letters`.

    Returns:
        The family, of all the table's classes; it draws from the training split.

    Raises:
        DataError: the data set is not there or has no features and classes.
    """
    train = load(dataset)["train"]
    if "features" not in train or train["label"].dtype.kind == "f":
        raise DataError(f"the data set {dataset!r} is no table with classes")
    rows = _by_class(train["features"], train["label"])
    return _family(rows[None], len(rows), noise)


def labelled_images(dataset: str, side: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Grey images as rows: ``{"train": (x uint8 [n, side * side], y [n]), "valid": ...}``.

    Raises:
        DataError: the data set is not there or has no images.
    """
    splits = load(dataset)
    if "image" not in splits["train"]:
        raise DataError(f"the data set {dataset!r} has no images")
    out = {}
    for split, arrays in splits.items():
        image = arrays["image"]
        if image.ndim == 4:  # the luminance of ITU-R BT.601
            image = np.round(image @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
        out[split] = (shrink(image, side).reshape(len(image), -1), arrays["label"])
    return out


def _by_class(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``[classes, rows, inputs]``, as many rows of each as the largest class has: the others' repeat, in each half."""
    half = (np.bincount(y).max() + 1) // 2
    parts = [np.array_split(x[y == label], 2) for label in range(int(y.max()) + 1)]
    if not all(len(second) for _, second in parts):
        raise DataError("every class needs two rows: one to fit a classifier to and one to judge it by")
    return np.stack([np.concatenate([np.resize(p, (half, x.shape[1])) for p in both]) for both in parts])


def _family(rows: np.ndarray, classes: int, noise: float) -> FeatureFamily:
    """``rows``: ``[variants, all classes, rows of each, inputs]``; a task is of one variant."""
    variants, total, per_class, inputs = rows.shape
    if classes > total:
        raise ValueError(f"classes {classes}: there are {total}")
    kept = jnp.asarray(rows)  # uint8 stays uint8
    data = {"rows": kept, "mean": jnp.asarray(rows.mean(), jnp.float32), "std": jnp.asarray(rows.std(), jnp.float32)}

    def sample(key: jax.Array) -> Cfg:
        k_variant, k_classes, k_order, k_noise, k_sign = jax.random.split(key, 5)
        return {
            "variant": jax.random.randint(k_variant, (), 0, variants),
            "classes": jax.random.permutation(k_classes, total)[:classes],
            "order": jax.random.permutation(k_order, inputs),
            "noise": noise * jax.random.uniform(k_noise),
            "sign": jnp.where(jax.random.bernoulli(k_sign), 1.0, -1.0),  # bright on dark, or dark on bright
        }

    def look_up(data: Data, cfg: Cfg, key: jax.Array, label: jax.Array, first: int, end: int) -> jax.Array:
        k_row, k_noise = jax.random.split(key)
        row = first + draw(k_row, end - first, label.shape[0])
        x = data["rows"][cfg["variant"], cfg["classes"][label], row].astype(jnp.result_type(float))
        x = (x - data["mean"]) / data["std"] * cfg["sign"]
        return jnp.take(x, cfg["order"], axis=1) + cfg["noise"] * jax.random.normal(k_noise, x.shape, x.dtype)

    def batch(data: Data, cfg: Cfg, key: jax.Array, size: int) -> jax.Array:
        k_label, k_rows = jax.random.split(key)
        return look_up(data, cfg, k_rows, draw(k_label, classes, size), 0, per_class)

    def few_shot(data: Data, cfg: Cfg, key: jax.Array, shots: int) -> FewShot:
        labels, half = jnp.repeat(jnp.arange(classes), shots), per_class // 2
        k_support, k_query = jax.random.split(key)
        support = look_up(data, cfg, k_support, labels, 0, half)
        return FewShot(support, look_up(data, cfg, k_query, labels, half, per_class), labels)

    return FeatureFamily(data, inputs, classes, sample, batch, few_shot)


class FeatureEntry(NamedTuple):
    """One row of a suite.

    Attributes:
        name: what the log calls it.
        make: makes the family; data are read only then.
        units: of each layer.
        activations: a task draws one.
        batch_size: unlabelled rows a step.
        penalty: of the ridge regression that judges the features. Metz et al. have 0.1, which is next to none, so
            that a rule learns to keep few directions; who uses the features will regularise.
    """

    name: str
    make: Callable[[], FeatureFamily]
    units: tuple[int, ...]
    activations: tuple[str, ...] = ("relu", "relu", "leaky_relu", "tanh", "swish")
    batch_size: int = 64
    penalty: float = 3.0


_SMALL = FeatureEntry("letters-8x8-32-32", letters, (32, 32))
_DEEP = FeatureEntry("letters-8x8-32-32-32", letters, (32, 32, 32))
_LARGE = FeatureEntry("letters-14x14-48-32", lambda: letters(14), (48, 32))
_TABLE = FeatureEntry("breast_cancer-24-24", lambda: table("breast_cancer"), (24, 24))
_CLOTHES = FeatureEntry("fashion_mnist_small-8x8-32-32", lambda: images("fashion_mnist_small"), (32, 32))

# Digits, MNIST and CIFAR-10 are in none of them; Fashion-MNIST only in the last.
SUITES: dict[str, tuple[FeatureEntry, ...]] = {
    "letters_small": (_SMALL,),
    "letters_two_sizes": (_SMALL, _LARGE),
    "letters": (_SMALL, _DEEP, _LARGE, _TABLE),
    "letters_and_clothes": (_SMALL, _DEEP, _LARGE, _TABLE, _CLOTHES),
}


def suite(name: str) -> Sequence[FeatureEntry]:
    """Find a suite by name.

    Raises:
        ValueError: there is none.

    Example:
        >>> [entry.units for entry in suite("letters_small")]
        [(32, 32)]
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r} of feature tasks; known: {', '.join(SUITES)}")
    return SUITES[name]
