"""The data sets that come with scikit-learn."""

import numpy as np

from .sources import DataError, Splits
from .tables import standardise


def read(name: str) -> Splits:
    """Read one of scikit-learn's sets; a fifth of its rows, always the same, validates.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets  # a second's import, and only these sets need it
    except ImportError:
        raise DataError(f"the data set {name!r} comes with scikit-learn: pip install 'learned-opt[train]'") from None
    if name == "photos":
        image, label = _tiles(datasets.load_sample_images().images, side=14, strips=5)
        return {s: {"image": image[r], "label": label[r]} for s, r in _split(len(label)).items()}
    table = getattr(datasets, f"load_{name}")()
    rows = _split(len(table.target))
    if name == "digits":
        image = np.round(table.images * (255 / 16)).astype(np.uint8)
        return {s: {"image": image[r], "label": table.target[r].astype(np.uint8)} for s, r in rows.items()}
    features = standardise(*(table.data[r] for r in rows.values()))
    targets = [table.target[r] for r in rows.values()]
    labels = standardise(*targets) if name == "diabetes" else [part.astype(np.uint8) for part in targets]
    return {s: {"features": x, "label": y} for s, x, y in zip(rows, features, labels, strict=True)}


def _split(num: int) -> dict[str, np.ndarray]:
    order = np.random.default_rng(0).permutation(num)  # one split for ever
    cut = num - num // 5
    return {"train": order[:cut], "valid": order[cut:]}


def _tiles(pictures: list[np.ndarray], side: int, strips: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut pictures into square tiles; a tile's label is which picture it is from and which vertical strip of it."""
    images, labels = [], []
    for number, picture in enumerate(pictures):
        rows, columns = picture.shape[0] // side, picture.shape[1] // side
        grid = picture[: rows * side, : columns * side].reshape(rows, side, columns, side, 3).swapaxes(1, 2)
        images.append(grid.reshape(-1, side, side, 3))
        labels.append(np.tile(number * strips + np.arange(columns) * strips // columns, rows))
    return np.concatenate(images), np.concatenate(labels).astype(np.uint8)
