"""Named suites of families: ``TRAIN`` to meta-train on, ``HELD_OUT`` to judge on.

No data set of a training suite appears in a held-out suite, whole or in part, and no family either, but for those that
``SAME_FAMILY_NEW_DATA`` names; these have other sizes there.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from .base import TaskFamily
from .vision import image_autoencoder, image_conv, image_mlp


class Entry(NamedTuple):
    """One family of a suite.

    Attributes:
        name: what tables call it, unique in its suite.
        family: the kind of network or function, for the rule that keeps suites apart.
        dataset: the data set, or a synthetic family's generator and range.
        make: makes the family; data are read only then.
    """

    name: str
    family: str
    dataset: str
    make: Callable[[], TaskFamily]


def _entry(name: str, factory: Callable[..., TaskFamily], dataset: str, **options: Any) -> Entry:
    return Entry(name, factory.__name__, dataset, functools.partial(factory, dataset, **options))


_FASHION = "fashion_mnist_small"

TRAIN: dict[str, tuple[Entry, ...]] = {
    "quick": (
        _entry("mlp-64-32-10-relu", image_mlp, _FASHION, batch_size=64),
        _entry("mlp-64-16-10-tanh", image_mlp, _FASHION, width=16, activation="tanh", batch_size=64),
    ),
    "small": (_entry("mlp-64-32-10-relu", image_mlp, _FASHION, batch_size=128),),
}

HELD_OUT: dict[str, tuple[Entry, ...]] = {
    "quick": (
        _entry("digits-mlp-64-48-48-10", image_mlp, "digits", width=48, depth=2),
        _entry("digits-conv", image_conv, "digits", side=8),
        _entry("digits-autoencoder", image_autoencoder, "digits"),
    ),
}

SAME_FAMILY_NEW_DATA = ("image_mlp",)


def suite(name: str, held_out: bool = False) -> tuple[Entry, ...]:
    """Find a suite by name."""
    suites = HELD_OUT if held_out else TRAIN
    if name not in suites:
        raise ValueError(f"unknown suite {name!r}; known: {', '.join(suites)}")
    return suites[name]
