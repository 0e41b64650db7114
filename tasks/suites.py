"""Named suites of families: ``TRAIN`` to meta-train on, ``VALIDATION`` to choose by, ``HELD_OUT`` to judge on.

No data set of a training suite appears in a held-out suite, whole or in part, nor one range of a synthetic generator in
another. No kind of family does either, but for those of ``SAME_FAMILY_NEW_DATA``: these are judged on new data *and* at
other sizes. Checkpoints, settings and ablations are compared on ``VALIDATION`` alone, which shares no data with the
other two. A test holds the suites to it. The rule ``flagship`` was chosen elsewhere, on :mod:`tasks.workloads`, which
has Moby Dick and CIFAR-10 too: judge it there, and not on ``held_out`` or ``fetched``.

The held-out suites are frozen: ``tasks/held_out.json`` describes every entry (:mod:`tasks.manifest`), and a test
recomputes it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from .base import TaskFamily
from .families.sequence import char_rnn, char_transformer
from .families.synthetic import quadratic, reparametrise, rosenbrock
from .families.tabular import logistic_regression, tabular_mlp
from .families.vision import image_autoencoder, image_conv, image_mlp


class Entry(NamedTuple):
    """One family of a suite.

    Attributes:
        name: what tables call it, unique in its suite.
        family: the factory's name, the kind of network or function.
        dataset: the data set; for a synthetic family, its generator and range.
        make: makes the family; data are read only then.
        steps: how many optimization steps the benchmark takes on it, whatever is asked for; ``None`` as asked.
    """

    name: str
    family: str
    dataset: str
    make: Callable[[], TaskFamily]
    steps: int | None = None


def _on(
    dataset: str, name: str, factory: Callable[..., TaskFamily], *, steps: int | None = None, **options: Any
) -> Entry:
    return Entry(f"{dataset}/{name}", factory.__name__, dataset, functools.partial(factory, dataset, **options), steps)


def _synthetic(factory: Callable[..., TaskFamily], dim: int, **options: Any) -> Entry:
    """``options`` holds one range, the parameter that tells the tasks of the generator apart."""
    (parameter, (low, high)), *rest = options.items()
    dataset = f"{factory.__name__}({parameter} {low:g} to {high:g})"
    make = functools.partial(factory, dim=dim, **{parameter: (low, high)}, **dict(rest))
    return Entry(f"{dataset}/{dim}", factory.__name__, dataset, make)


def _rescaled(entry: Entry, low: float = 1e-3, high: float = 1e3, per_tensor: bool = False) -> Entry:
    """The entry with the scale of its parameters drawn anew for every task."""
    make = functools.partial(_make_rescaled, entry, low, high, per_tensor)
    return entry._replace(name=f"{entry.name}-rescaled", make=make)


def _make_rescaled(entry: Entry, low: float, high: float, per_tensor: bool) -> TaskFamily:
    return reparametrise(entry.make(), low, high, per_tensor)


_FASHION, _SOTU, _MOBY_DICK, _KJV = "fashion_mnist_small", "sotu_small", "moby_dick_small", "kjv_small"

_MLP = _on(_FASHION, "mlp-64-32-10-relu", image_mlp, side=8, width=32)
_DEEP = _on(_FASHION, "mlp-64-16-16-16-10-swish", image_mlp, side=8, width=16, depth=3, activation="swish")
_TABULAR = _on("breast_cancer", "mlp-30-24-24-2-tanh", tabular_mlp, width=24, depth=2, activation="tanh", batch_size=32)

_GRU = _on(_SOTU, "gru-16", char_rnn, core="gru", width=16, embedding=8, length=8, batch_size=16)
_QUADRATIC = _synthetic(quadratic, 32, condition=(1.0, 100.0), noise=0.01)
_STANDARD = (
    _MLP,
    _on(
        _FASHION,
        "mlp-8x8-drawn-32",
        image_mlp,
        side=8,
        width=32,
        depth=(1, 2),
        activation=("relu", "tanh", "gelu"),
        init_scale=(0.5, 2.0),
        batch_size=32,
    ),
    _DEEP,
    _on(_FASHION, "mlp-196-32-10-relu-batch-32", image_mlp, side=14, width=32, batch_size=32),
    _TABULAR,
)
_KINDS = (
    _on(_FASHION, "mlp-64-32-10-relu-batch-4", image_mlp, side=8, width=32, batch_size=4),
    _on(
        _FASHION,
        "mlp-196-64-64-10-gelu",
        image_mlp,
        side=14,
        width=64,
        depth=2,
        activation="gelu",
        init_scale=(0.5, 2.0),
        batch_size=32,
    ),
    _on(_FASHION, "conv-6-12-relu", image_conv, side=14, channels=(6, 12), batch_size=16),
    _on(_FASHION, "autoencoder-64-40-10", image_autoencoder, side=8, width=40, code=10),
    _on(_SOTU, "transformer-1x32", char_transformer, width=32, length=16, init_scale=(0.5, 2.0), batch_size=8),
    _on(_SOTU, "transformer-2x64", char_transformer, layers=2, width=64, length=32, batch_size=4),
    _GRU,
)

TRAIN: dict[str, tuple[Entry, ...]] = {
    # two shapes, quick to compile, with different activations and widths
    "quick": (_MLP, _on(_FASHION, "mlp-64-16-10-tanh", image_mlp, side=8, width=16, activation="tanh")),
    # the reference task of the literature
    "small": (_MLP,),
    # image classifiers of several shapes and a tabular one
    "standard": _STANDARD,
    # for outer steps of local SGD, whose local step size means the same on all of them
    "local_sgd": (*_STANDARD, _GRU),
    # every kind of network, batches from 4 up, for rules with few meta-parameters
    "kinds": _KINDS,
    # and a deep one and a tabular one
    "networks": (*_KINDS, _DEEP, _TABULAR),
    # the widest mix that two cores carry
    "mixed": (*_STANDARD, _GRU, _QUADRATIC),
    "broad": (
        _MLP,
        _on(
            _FASHION,
            "mlp-8x8-drawn",
            image_mlp,
            side=8,
            width=(16, 24, 32),
            depth=(1, 2),
            activation=("relu", "tanh", "gelu"),
            init_scale=(0.5, 2.0),
        ),
        _DEEP,
        _on(_FASHION, "mlp-196-32-10-relu", image_mlp, side=14, width=32),
        _rescaled(_MLP),
        _TABULAR,
        _rescaled(_TABULAR),
        _GRU,
        _QUADRATIC,
    ),
}

VALIDATION: dict[str, tuple[Entry, ...]] = {
    "validation": (
        _on("photos", "mlp-192-64-64-10-gelu", image_mlp, side=8, width=64, depth=2, activation="gelu", batch_size=32),
        _on("photos", "conv-8-16-relu", image_conv, side=8, channels=(8, 16), batch_size=32),
        _on("photos", "autoencoder-192-48-12", image_autoencoder, side=8, width=48, code=12, batch_size=32),
        _on(_KJV, "transformer-1x24", char_transformer, layers=1, width=24, length=12, batch_size=8),
        _synthetic(quadratic, 48, condition=(150.0, 900.0), noise=0.01),
    ),
}

_QUICK = (
    _on("digits", "mlp-64-48-48-10-relu", image_mlp, side=8, width=48, depth=2),
    _on("digits", "conv-4-8-relu", image_conv, side=8, channels=(4, 8)),
    _on("digits", "autoencoder-64-32-8", image_autoencoder, side=8, width=32, code=8),
    _on("digits", "logistic", logistic_regression),
    _on("wine", "mlp-13-32-3-gelu", tabular_mlp, width=32, activation="gelu", batch_size=32),
)

HELD_OUT: dict[str, tuple[Entry, ...]] = {
    "quick": _QUICK,
    "held_out": (
        *_QUICK,
        # eight times as wide and three times as deep as what rules are trained on
        _on("digits", "mlp-64-256-10-relu", image_mlp, side=8, width=256),
        _on("digits", "mlp-64-9x32-10-tanh", image_mlp, side=8, width=32, depth=9, activation="tanh"),
        # thirty times the parameters, batches of 8 and 1,024, five times the horizon
        _on(
            "digits",
            "mlp-64-2688-10-gelu-500-steps",
            image_mlp,
            side=8,
            width=2688,
            activation="gelu",
            batch_size=16,
            steps=500,
        ),
        _on("digits", "mlp-64-24-10-relu-batch-8", image_mlp, side=8, width=24, batch_size=8),
        _on("digits", "mlp-64-20-10-tanh-batch-1024", image_mlp, side=8, width=20, activation="tanh", batch_size=1024),
        _on("digits", "autoencoder-64-24-6-10000-steps", image_autoencoder, side=8, width=24, code=6, steps=10_000),
        # tensors of one network differ in scale by up to a hundred
        _rescaled(_QUICK[0], 0.1, 10.0, per_tensor=True),
        _on("digits", "conv-8-16-32-gelu", image_conv, side=8, channels=(8, 16, 32), activation="gelu"),
        _on("diabetes", "mlp-10-32-32-1-relu", tabular_mlp, width=32, depth=2, batch_size=32),
        _on(_MOBY_DICK, "lstm-24", char_rnn, core="lstm", width=24, embedding=8, length=8, batch_size=16),
        _on(_MOBY_DICK, "transformer-1x16", char_transformer, layers=1, width=16, length=8, batch_size=16),
        _synthetic(quadratic, 64, condition=(1e3, 1e4)),
        _synthetic(rosenbrock, 8, steepness=(1.0, 100.0)),
    ),
    # whole sets, after `learned-opt data fetch mnist` and `learned-opt data fetch cifar10`
    "fetched": (
        _on("mnist", "mlp-784-128-128-10-relu", image_mlp, side=28, width=128, depth=2, batch_size=128),
        _on("mnist", "conv-16-32-relu", image_conv, side=28, channels=(16, 32), batch_size=128),
        _on("mnist", "autoencoder-196-64-16", image_autoencoder, side=14, width=64, code=16, batch_size=128),
        _on("mnist", "logistic", logistic_regression, batch_size=128),
        _on("cifar10", "mlp-768-128-10-relu", image_mlp, side=16, width=128, batch_size=128),
        _on("cifar10", "conv-16-32-64-relu", image_conv, side=32, channels=(16, 32, 64), batch_size=128),
    ),
    # the same data for two cores: smaller images and batches
    "fetched_small": (
        _on("mnist", "mlp-196-64-10-relu", image_mlp, side=14, width=64, batch_size=64),
        _on("mnist", "conv-8-16-relu", image_conv, side=14, channels=(8, 16), batch_size=32),
        _on("mnist", "autoencoder-196-48-12", image_autoencoder, side=14, width=48, code=12, batch_size=64),
        _on("mnist", "logistic-batch-32", logistic_regression, batch_size=32),
        _on("cifar10", "mlp-768-64-10-gelu", image_mlp, side=16, width=64, activation="gelu", batch_size=64),
        _on("cifar10", "conv-8-16-32-relu", image_conv, side=16, channels=(8, 16, 32), batch_size=32),
    ),
}

SAME_FAMILY_NEW_DATA = (
    "char_rnn",
    "char_transformer",
    "image_autoencoder",
    "image_conv",
    "image_mlp",
    "quadratic",
    "tabular_mlp",
)


def suite(name: str, held_out: bool = False) -> tuple[Entry, ...]:
    """Find a suite by name.

    Args:
        name: a key of :data:`TRAIN`, or of :data:`HELD_OUT` or :data:`VALIDATION`.
        held_out: whether to look in the last two.

    Returns:
        Its entries.

    Raises:
        ValueError: no suite of that kind has the name.

    Example:
        >>> [entry.name for entry in suite("small")]
        ['fashion_mnist_small/mlp-64-32-10-relu']
    """
    suites = {**HELD_OUT, **VALIDATION} if held_out else TRAIN
    if name not in suites:
        kind = "held-out" if held_out else "training"
        raise ValueError(f"unknown {kind} suite {name!r}; known: {', '.join(suites)}")
    return suites[name]
