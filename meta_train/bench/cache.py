"""Results on disk under the hash of what they are the result of: a run that was cut off goes on where it was."""

import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from learned_opt.files import write_atomically
from tasks.manifest import digest


def key(**about: Any) -> str:
    """The SHA-256 of JSON values, by sorted names.

    Example:
        >>> key(steps=10, task="a") == key(task="a", steps=10)
        True
    """
    return digest(about)


def program(function: Callable, *arguments: Any) -> str:
    """The SHA-256 of a function's compiled program: what it computes, with the arrays that it holds.

    Args:
        function: of arrays.
        arguments: example arguments; only their shapes and dtypes matter.

    Returns:
        The hash. Other names, comments or files do not change it; other arithmetic does, and so may another version of
        JAX.
    """
    return hashlib.sha256(jax.jit(function).lower(*arguments).as_text().encode()).hexdigest()


def contents(tree: Any) -> str:
    """The SHA-256 of a pytree of arrays: structure, shapes, dtypes and bytes."""
    leaves, structure = jax.tree.flatten(tree)
    total = hashlib.sha256(str(structure).encode())
    for leaf in map(np.asarray, leaves):
        total.update(f"{leaf.dtype} {leaf.shape}".encode())
        total.update(np.ascontiguousarray(leaf).data)
    return total.hexdigest()


def load(folder: Path | None, key: str) -> dict[str, np.ndarray] | None:
    """The arrays kept under a key, or ``None``: nothing there, or a damaged file."""
    if folder is None:
        return None
    try:
        with (folder / f"{key}.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception:  # whatever zipfile and NumPy raise on damaged bytes: it is computed anew
        return None


def store(folder: Path | None, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Keeps arrays under a key, written beside and renamed.

    Raises:
        OSError: the folder cannot be written to.
    """
    if folder is None:
        return
    contents = io.BytesIO()
    np.savez(contents, **dict[str, Any](arrays))  # numbers, of which nothing is pickled
    write_atomically(folder / f"{key}.npz", contents.getvalue())


def text_hash(text: str) -> str:
    """The SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
