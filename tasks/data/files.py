"""Data sets as files: the one ``.npz`` of a fetched set, and what ships with this package."""

import io
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from . import sources
from .sources import DataError, Splits

_EMBEDDED = Path(__file__).parent / "embedded"


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
    """Write ``{"train": arrays, "valid": arrays}`` as one .npz: beside its place, synced, then renamed.

    Raises:
        DataError: the folder cannot be written to or the disk is full.
    """
    arrays = {f"{split}/{field}": array for split, fields in splits.items() for field, array in fields.items()}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            np.savez_compressed(file, **dict[str, Any](arrays))  # older NumPy would store `allow_pickle=`
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); see $LEARNED_OPT_DATA") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def file_name(name: str) -> str:
    """A data set's name as that of a file, without suffix."""
    return name.replace("/", "-").replace(":", "-")


def embedded_path(name: str) -> Path:
    """The file of a set that ships with this package."""
    return next(path for path in (_EMBEDDED / f"{name}.npz", _EMBEDDED / f"{name}.txt") if path.exists())


def read_embedded(name: str) -> Splits:
    """Read a set that ships with this package."""
    path = embedded_path(name)
    if path.suffix == ".npz":
        return read_npz(path)
    return sources.split_text(path.read_text(encoding="ascii").split("\n"))
