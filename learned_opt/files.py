"""Files and folders written whole or not at all: beside their place, synced to disk, then renamed."""

import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], contents: bytes | str) -> None:
    """Writes a file; whoever reads it finds the old contents or the new ones, after a power cut too.

    Args:
        path: of the file; missing folders are made.
        contents: bytes, or text that is written as UTF-8.

    Raises:
        OSError: it cannot be written; what was there before is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        _write_synced(beside, contents)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_folder_atomically(path: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Writes a folder of files; an earlier folder of that name is replaced.

    Args:
        path: of the folder; missing folders above it are made.
        files: name -> contents.

    Raises:
        OSError: it cannot be written; what was there before is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new, old = beside / "new", beside / "old"
        new.mkdir()
        for name, contents in files.items():
            _write_synced(new / name, contents)
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        except BaseException:  # Ctrl-C too
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_synced(path: Path, contents: bytes | str) -> None:
    with path.open("wb") as file:
        file.write(contents.encode() if isinstance(contents, str) else contents)
        file.flush()
        os.fsync(file.fileno())
