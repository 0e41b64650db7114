"""Meta-parameters as the field publishes them: pytrees of arrays that flax wrote as msgpack.

Flax's format: nested maps with text keys; an array is the extension type 1, a scalar the type 3, and the bytes of
either are a msgpack list of shape, name of the dtype and contents in C order.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

import learned_opt
from learned_opt.reference import check_known, read_reference

from .errors import UserError

_MAX_BYTES = 1 << 26  # the largest published rule has a seventh of it
_MAX_RANK = 8
_ARRAY, _SCALAR = 1, 3
_README = """# {name}

A learned update rule of the kind `{rule}`, imported from the published checkpoint `{file}` (sha256 {sha256}).

Its authors' terms apply to the weights. `learned-opt info` tells what it needs. Its worth has not been measured here;
`learned-opt bench` does that.
"""
_DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64", "int32", "int64", "uint32")}


class PublishedError(UserError):
    """A published checkpoint is missing or damaged, or holds something else."""


def import_rule(rule: str, path: Path, folder: Path, /, **kwargs: Any) -> Path:
    """Saves a published checkpoint as a rule that :func:`learned_opt.load` reads.

    Args:
        rule: a name in :data:`learned_opt.RULES` that has a reference implementation.
        path: the checkpoint, see :func:`read_flax`.
        folder: where to write it.
        **kwargs: arguments of the rule's factory that the arrays do not tell.

    Returns:
        The folder.

    Raises:
        PublishedError: the checkpoint is missing or damaged, or not that rule's.
        StoreError: the folder cannot be written.
    """
    try:
        check_known(rule)
    except ValueError as error:
        raise PublishedError(str(error)) from None
    leaves = read_flax(path)
    try:
        kwargs, theta = read_reference(rule, leaves, **kwargs)
    except ValueError as error:
        raise PublishedError(f"{path}: {error}") from None
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    readme = _README.format(name=folder.name, rule=rule, file=path.name, sha256=sha256)
    card = {"config": {"imported_from": path.name, "sha256": sha256}, "readme": readme}
    return learned_opt.save(folder, rule, theta, kwargs=kwargs, card=card)


def read_flax(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a flax-serialised pytree.

    Args:
        path: the file, at most 64 MiB.

    Returns:
        ``{"path/to/leaf": array}``, floating arrays as float32. What is no array is left out.

    Raises:
        PublishedError: the file is missing, too large, damaged, or no map of arrays.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise PublishedError(f"{path} is larger than {_MAX_BYTES >> 20} MiB: not a rule's meta-parameters")
        contents = path.read_bytes()
    except OSError as error:
        raise PublishedError(f"cannot read {path}: {error.strerror}") from None
    leaves: dict[str, np.ndarray] = {}
    try:
        _flatten(msgpack.unpackb(contents, raw=False, ext_hook=_array), "", leaves)
    except PublishedError as error:
        raise PublishedError(f"{path} is no flax checkpoint, or damaged: {error}") from None
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise PublishedError(f"{path} is no flax checkpoint, or damaged: {error or type(error).__name__}") from None
    if not leaves:
        raise PublishedError(f"{path} holds no arrays: not a rule's meta-parameters")
    return leaves


def _array(code: int, data: bytes) -> np.ndarray:
    """An extension type's array, every part of it checked before memory is taken for it."""
    if code not in (_ARRAY, _SCALAR):
        raise PublishedError(f"extension type {code} is no array")
    parts = msgpack.unpackb(data)
    if not isinstance(parts, list) or len(parts) != 3:
        raise PublishedError("an array without shape, dtype and contents")
    shape, name, contents = parts
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(type(n) is int and n > 0 for n in shape):
        raise PublishedError("an array of impossible shape")
    if not isinstance(name, str) or name not in _DTYPES:
        raise PublishedError(f"an array of dtype {str(name)[:20]!r}; known: {', '.join(_DTYPES)}")
    dtype = _DTYPES[name]
    if not isinstance(contents, bytes) or len(contents) != math.prod(shape) * dtype.itemsize:
        raise PublishedError("an array whose contents do not fill its shape")
    array = np.frombuffer(contents, dtype).reshape(shape)
    if not np.issubdtype(dtype, np.floating):
        return array
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.all(np.isfinite(array)):
        raise PublishedError("an array with numbers that are not finite")
    return array


def _flatten(tree: Any, path: str, leaves: dict[str, np.ndarray]) -> None:
    if isinstance(tree, dict):
        for name, value in tree.items():
            _flatten(value, f"{path}/{name}" if path else str(name), leaves)
    elif isinstance(tree, np.ndarray):
        leaves[path] = tree
