"""Tables of numbers, standardised."""

import numpy as np


def standardise(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Columns with zero mean and unit variance over the training rows, the others moved and scaled alike.

    In float64 before they become float32, so that large numbers of small spread (years, timestamps) keep it.

    Args:
        train: ``[n, ...]``, any real dtype.
        *others: of the same columns.

    Returns:
        float32 arrays, the training rows first. Constant columns are 0 there.
    """
    train = np.asarray(train, np.float64)
    mean, scale = train.mean(axis=0), train.std(axis=0)
    scale = np.where(train.min(axis=0) < train.max(axis=0), scale, 1.0)
    return [((np.asarray(table, np.float64) - mean) / scale).astype(np.float32) for table in (train, *others)]
