"""The frozen description of the held-out suites: every entry in full, and the hash of it all.

``tasks/held_out.json`` was written before the rules that are judged on it were trained; a test recomputes it. To freeze
anew, which makes results before and after incomparable: ``python -m tasks.manifest``.
"""

import functools
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from . import data
from .base import TaskFamily
from .data.sources import Splits
from .suites import HELD_OUT, Entry

PATH = Path(__file__).parent / "held_out.json"


def compute() -> dict[str, Any]:
    """Describe all held-out suites as they are now.

    Returns:
        ``{"sha256": hash of the rest, "suites": {name: [entry's name, ...]}, "entries": {name: description}}``, JSON
        values.
    """
    suites = {name: [entry.name for entry in entries] for name, entries in HELD_OUT.items()}
    described = {entry.name: record(entry) for entries in HELD_OUT.values() for entry in entries}
    contents = {"suites": suites, "entries": described}
    return {"sha256": digest(contents), **contents}


def frozen() -> dict[str, Any]:
    """The committed description."""
    return json.loads(PATH.read_text())


def digest(contents: Any) -> str:
    """The SHA-256 of JSON values, by sorted names.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def record(entry: Entry) -> dict[str, Any]:
    """Describe an entry in full.

    Args:
        entry: of any suite.

    Returns:
        Its family, data set, arguments with the defaults, number of steps; for data that ship with the package or with
        scikit-learn also the parameters' shapes, their number and the hash of the data, for fetched data the hash of
        the files as published.
    """
    known = data.SETS.get(entry.dataset)
    description: dict[str, Any] = {
        "family": entry.family,
        "dataset": entry.dataset,
        "arguments": arguments(entry.make),
        "steps": entry.steps,
    }
    if known and known.home == "fetched":
        return description | {"data_sha256": known.sha256}
    shapes = _shapes(entry.make())
    return description | {
        "data_sha256": _hash(data.load(entry.dataset)) if known else None,
        "parameters": {name: list(shape) for name, shape in shapes.items()},
        "num_params": sum(int(np.prod(shape)) for shape in shapes.values()),
    }


def arguments(make: Any) -> dict[str, Any]:
    """The factory and its arguments; those that are entries are described in turn."""
    call = make if isinstance(make, functools.partial) else functools.partial(make)
    bound = inspect.signature(call.func).bind(*call.args, **call.keywords)
    bound.apply_defaults()
    values = {
        name: arguments(value.make) if isinstance(value, Entry) else value for name, value in bound.arguments.items()
    }
    return {"factory": call.func.__name__, **json.loads(json.dumps(values))}


def _shapes(family: TaskFamily) -> dict[str, tuple[int, ...]]:
    def init(arrays, key):
        return family.task(arrays, family.sample(key)).init(key)

    leaves, _ = jax.tree.flatten_with_path(jax.eval_shape(init, family.data, jax.random.key(0)))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def _hash(splits: Splits) -> str:
    """The SHA-256 of a data set; numbers to four decimals, so that another machine's last bit does not change it."""
    total = hashlib.sha256()
    for split in sorted(splits):
        for field, array in sorted(splits[split].items()):
            rounded = np.round(array, 4) + np.float32(0) if array.dtype.kind == "f" else array  # no negative zeros
            total.update(f"{split}/{field} {rounded.dtype} {rounded.shape}".encode())
            total.update(np.ascontiguousarray(rounded).data)
    return total.hexdigest()


if __name__ == "__main__":
    PATH.write_text(json.dumps(compute(), indent=1) + "\n")
    print(f"wrote {PATH}")
