"""Data of the workloads' kinds, a few rows of random numbers, as files of the data folder."""

from pathlib import Path

import numpy as np

from tasks.data import write_npz


def write_tiny_sets(folder: Path, rows: int = 400) -> None:
    """Writes every data set of the workloads and both MNISTs under its name, with so many rows to train."""
    random = np.random.default_rng(0)

    def split(make):
        return {"train": make(rows), "valid": make(rows // 2)}

    def text(low, high, field):
        # a short period, so that there is something to learn
        return split(lambda n: {field: np.resize(random.integers(low, high, 7), n).astype(np.uint8)})

    def images(*shape):
        return split(
            lambda n: {
                "image": random.integers(0, 256, (n, *shape)).astype(np.uint8),
                "label": np.arange(n).astype(np.uint8) % 10,
            }
        )

    sets = {
        "moby_dick": text(0, 96, "text"),
        "kjv": text(0, 96, "text"),
        "sqlite": text(0, 256, "bytes"),
        "cifar10": images(32, 32, 3),
        "cmudict": split(
            lambda n: {
                "spelling": random.integers(0, 27, (n, 16)).astype(np.uint8),
                "sounds": np.sort(random.integers(0, 70, (n, 18)), axis=1)[:, ::-1].astype(np.uint8),
            }
        ),
        "qm9": split(
            lambda n: {
                "elements": np.sort(random.integers(0, 6, (n, 29)), axis=1)[:, ::-1].astype(np.uint8),
                "positions": random.normal(size=(n, 29, 3)).astype(np.float16),
                "label": random.normal(size=n).astype(np.float32),
            }
        ),
        "speech": split(lambda n: {"frames": random.integers(0, 256, (n, 64)).astype(np.uint8)}),
        "mail": split(lambda n: {"words": np.resize(random.integers(0, 50, 9), n).astype(np.uint16)}),
        "mnist": images(28, 28),
        "fashion_mnist": images(28, 28),
    }
    for name, splits in sets.items():
        write_npz(folder / f"{name}.npz", splits)
