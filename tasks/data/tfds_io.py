"""tensorflow-datasets: builders of the embedded sets, and the way from any builder to arrays.

None of it needs TensorFlow: the builders prepare ``array_record`` files, read back through ``tfds.data_source``. (Most
of the *other* builders of tensorflow-datasets need TensorFlow to download and prepare: the extra ``tfds``.)
"""

import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from . import files
from .registry import SETS
from .sources import DataError, Splits, ascii_text, decode_text, encode_text
from .tables import standardise

try:
    import tensorflow_datasets as tfds
    from PIL import Image
except ImportError as error:
    raise DataError(f"tensorflow-datasets is not installed ({error.name}): pip install 'learned-opt[train]'") from None

_SPLITS = {"train": "train", "valid": "validation"}  # our names and theirs


class _EmbeddedBuilder(tfds.core.GeneratorBasedBuilder):
    """A builder whose name is that of an embedded set."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012 (tfds reads a plain dict)

    def _describe(self, features: dict, keys: tuple[str, str] | None = None, ordered: bool = False):
        known = SETS[self.name]
        features = tfds.features.FeaturesDict(features)
        return self.dataset_info_from_configs(
            description=known.description,
            features=features,
            supervised_keys=keys,
            license=known.licence,
            disable_shuffling=ordered,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        splits = files.read_embedded(self.name)
        return {theirs: self._generate_examples(splits[ours]) for ours, theirs in _SPLITS.items()}


class FashionMnistSmall(_EmbeddedBuilder):
    """The embedded part of Fashion-MNIST."""

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(28, 28, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return self._describe(features, ("image", "label"))

    def _generate_examples(self, arrays) -> Iterator[tuple[int, dict]]:
        for index, (image, label) in enumerate(zip(arrays["image"], arrays["label"], strict=True)):
            yield index, {"image": Image.fromarray(image), "label": int(label)}


class _TextBuilder(_EmbeddedBuilder):
    """One example a document, in the order of the text."""

    def _info(self):
        return self._describe({"text": tfds.features.Text()}, ordered=True)

    def _generate_examples(self, arrays) -> Iterator[tuple[int, dict]]:
        for index, document in enumerate(decode_text(arrays["text"]).split("\n")):
            yield index, {"text": document}


class SotuSmall(_TextBuilder):
    """The embedded part of the State of the Union addresses."""


class MobyDickSmall(_TextBuilder):
    """The embedded part of Moby Dick."""


class KjvSmall(_TextBuilder):
    """The embedded part of the King James Bible."""


BUILDERS = {
    "fashion_mnist_small": FashionMnistSmall,
    "sotu_small": SotuSmall,
    "moby_dick_small": MobyDickSmall,
    "kjv_small": KjvSmall,
}


def builder(name: str, folder: Path):
    """Make the tensorflow-datasets builder of a name, its files in ``array_record`` format under ``folder``.

    Args:
        name: a key of :data:`BUILDERS`, or any name of tensorflow-datasets, such as ``"imdb_reviews/plain_text"``.
        folder: the data folder; the builder works in ``folder / "tensorflow_datasets"``.

    Returns:
        A ``tfds.core.DatasetBuilder``.

    Raises:
        DataError: tensorflow-datasets knows no such name.
    """
    place = str(folder / "tensorflow_datasets")
    if name in BUILDERS:
        return BUILDERS[name](data_dir=place, file_format="array_record")
    try:
        return tfds.builder(name, data_dir=place, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError):
        known = ", ".join(SETS)
        raise DataError(f"tensorflow-datasets has no data set {name!r}; the names known here: {known}") from None


def load_prepared(name: str, folder: Path) -> Splits:
    """Read a data set that tensorflow-datasets prepared before.

    Args:
        name: a name of tensorflow-datasets.
        folder: the data folder.

    Returns:
        Arrays as :mod:`tasks.data` describes.

    Raises:
        DataError: the name is unknown, the set not prepared, or its examples no images, tables or texts of one shape.
    """
    made = builder(name, folder)
    if not made.is_prepared():
        raise DataError(f"the data set {name!r} is not here yet: run `learned-opt data fetch {shlex.quote(name)}`")
    return _stack(name, _read(name, made))


def download(name: str, folder: Path) -> Splits:
    """Download and prepare a data set through tensorflow-datasets, and read it.

    Args:
        name: a name of tensorflow-datasets.
        folder: the data folder.

    Returns:
        Arrays as :mod:`tasks.data` describes.

    Raises:
        DataError: the name is unknown, the download fails, or TensorFlow is missing where the builder needs it.
    """
    made = builder(name, folder)
    try:
        made.download_and_prepare()
    except Exception as error:  # whatever a builder's own code raises
        raise DataError(
            f"tfds could not prepare {name!r}: {_reason(error)}; see the extra 'learned-opt[tfds]'"
        ) from None
    return _stack(name, _read(name, made))


def _read(name: str, made) -> dict:
    try:
        return made.as_data_source()
    except Exception as error:  # NotImplementedError for other file formats, and what readers raise
        raise DataError(f"tfds could not read {name!r}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _stack(name: str, found: dict) -> Splits:
    """Choose the splits; without one for validation, the last tenth of the training split. Standardise numbers."""
    if "train" not in found:
        raise DataError(f"the data set {name!r} has no split 'train'")
    valid = next((split for split in ("validation", "valid", "test") if split in found), None)
    train = _arrays(name, found["train"])
    if valid is not None:
        splits = {"train": train, "valid": _arrays(name, found[valid])}
    else:
        cut = {field: len(array) - max(1, len(array) // 10) for field, array in train.items()}
        splits = {
            "train": {field: array[: cut[field]] for field, array in train.items()},
            "valid": {field: array[cut[field] :] for field, array in train.items()},
        }
    labels = {split: arrays["label"] for split, arrays in splits.items() if "label" in arrays}
    if any(of.dtype.kind != "f" and (of.min() < 0 or of.max() > labels["train"].max()) for of in labels.values()):
        raise DataError(f"the data set {name!r} has labels below 0, or beyond those of its training split")
    for field, array in splits["train"].items():
        if array.dtype.kind == "f":
            splits["train"][field], splits["valid"][field] = standardise(array, splits["valid"][field])
    return splits


def _arrays(name: str, examples) -> dict[str, np.ndarray]:
    examples = [examples[index] for index in range(len(examples))]
    fields = set(examples[0]) if examples else set()
    try:
        if "image" in fields:
            image = np.stack([example["image"] for example in examples])
            image = image[..., 0] if image.shape[-1] == 1 else image
            if image.dtype != np.uint8:
                raise DataError(f"the data set {name!r} has images of {image.dtype}; images of uint8 are read")
            arrays = {"image": image}
        elif "features" in fields:
            arrays = {"features": np.stack([example["features"] for example in examples]).astype(np.float64)}
        elif "text" in fields:
            texts = (example["text"] for example in examples)
            plain = [ascii_text(text.decode("utf-8", "replace") if isinstance(text, bytes) else text) for text in texts]
            return {"text": encode_text("\n".join(plain))}
        else:
            raise DataError(f"the data set {name!r} has neither image, features nor text")
        if "label" in fields:
            label = np.asarray([example["label"] for example in examples])
            small = label.dtype.kind != "f" and label.min() >= 0 and label.max() < 256
            arrays["label"] = label if label.dtype.kind == "f" else label.astype(np.uint8 if small else np.int32)
    except (TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the data set {name!r}: examples of different shapes cannot be stacked ({error})") from None
    return arrays
