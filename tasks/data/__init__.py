"""Data sets by name: what ships with the package, what scikit-learn brings, what is fetched once, what tfds knows.

``load(name)`` gives ``{"train": {...}, "valid": {...}}``, dicts of NumPy arrays that fit in memory:

- images: ``image`` uint8 ``[n, side, side]`` or ``[n, side, side, 3]`` and ``label`` uint8 ``[n]``
- tables: ``features`` float32 ``[n, d]`` (zero mean and unit variance over the training split) and ``label``, uint8
  classes or float32 targets (standardised too)
- texts: ``text`` uint8 ``[n]``, numbered by :func:`tasks.data.sources.encode_text` (96 characters)

Fetched sets lie as ``NAME.npz`` in the data folder: ``$LEARNED_OPT_DATA``, else the user's cache folder.
"""

from .files import read_npz, write_npz
from .library import available, fetch, load, require
from .registry import SETS, VOCABULARY, DataSet, data_dir
from .sources import DataError

__all__ = [
    "SETS",
    "VOCABULARY",
    "DataError",
    "DataSet",
    "available",
    "data_dir",
    "fetch",
    "load",
    "read_npz",
    "require",
    "write_npz",
]
