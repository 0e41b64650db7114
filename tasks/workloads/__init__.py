"""Workloads: networks as people train them, judged by the validation loss.

``SUITES`` maps names to workloads. ``workloads_validation`` is what settings and rules are chosen by;
``workloads_small`` are three of it for two cores. ``workloads_test`` has other data *and* other kinds of networks, is
frozen by ``frozen.json`` (:mod:`tasks.workloads.manifest`), and is run once a release. The split was made before
anything was run on any of them. None of their data is in a training suite.
"""

import functools
from collections.abc import Callable
from typing import Any

from ..base import TaskFamily, Workload
from .base import VALID_BATCHES, valid_keys
from .images import resnet, vit
from .language import gpt, llama, lstm
from .molecules import message_passing
from .pronunciation import seq2seq
from .speech import unet
from .words import embeddings

__all__ = ["SUITES", "VALID_BATCHES", "Workload", "suite", "valid_keys"]


def _on(dataset: str, label: str, factory: Callable[..., TaskFamily], steps: int, **options: Any) -> Workload:
    name = f"{dataset}/{label}"
    make = functools.partial(factory, dataset, **options)
    return Workload(make, steps, name=name, network=factory.__name__, dataset=dataset)


_SMALL = (
    _on("moby_dick", "gpt-4x128", gpt, 500, layers=4, width=128, length=128, batch_size=32),
    _on("kjv", "lstm-2x256", lstm, 500, layers=2, width=256, length=128, batch_size=32),
    _on("cifar10", "resnet-64-128-256", resnet, 500, channels=(64, 128, 256), batch_size=64),
)

SUITES: dict[str, tuple[Workload, ...]] = {
    "workloads_small": _SMALL,
    "workloads_validation": (
        *_SMALL,
        _on("kjv", "gpt-6x256", gpt, 2000, layers=6, width=256, length=256, batch_size=32),
        _on("cifar10", "vit-6x192", vit, 3000, layers=6, width=192, batch_size=128),
    ),
    "workloads_test": (
        _on("sqlite", "llama-4x128", llama, 600, layers=4, width=128, length=128, batch_size=32),
        _on("cmudict", "seq2seq-3x128", seq2seq, 600, layers=3, width=128, batch_size=128),
        _on("qm9", "message-passing-4x160", message_passing, 600, layers=4, width=160, batch_size=16),
        _on("speech", "unet-32-64-128", unet, 600, channels=(32, 64, 128), batch_size=8),
        _on("mail", "embeddings-96-384", embeddings, 600, embedding=96, width=384, batch_size=1024),
    ),
}


def suite(name: str) -> tuple[Workload, ...]:
    """Find a suite of workloads by name.

    Raises:
        ValueError: there is no such suite.

    Example:
        >>> [workload.network for workload in suite("workloads_small")]
        ['gpt', 'lstm', 'resnet']
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite of workloads {name!r}; known: {', '.join(SUITES)}")
    return SUITES[name]
