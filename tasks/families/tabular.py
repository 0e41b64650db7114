"""Families on tables of numbers, and linear models of any labelled data set."""

import jax

from ..base import Cfg, TaskFamily
from ..data import load
from ..data.sources import DataError, Splits
from .batches import num_outputs, on_device, supervised
from .networks import MlpSpec, mlp, mlp_spec, sample_mlp, transform


def tabular_mlp(
    dataset: str = "breast_cancer",
    *,
    width: int | tuple[int, ...] = 32,
    depth: int | tuple[int, ...] = 1,
    activation: str | tuple[str, ...] = "relu",
    init_scale: float | tuple[float, float] = 1.0,
    batch_size: int = 64,
) -> TaskFamily:
    """Classify rows of numbers, or predict a number from them, with a multilayer perceptron.

    Args:
        dataset: a data set with ``features``, see :mod:`tasks.data`. Float labels mean regression by squared error.
        width: hidden width, or the choices a task draws from.
        depth: number of hidden layers, or the choices a task draws from.
        activation: a name, or the choices a task draws from.
        init_scale: factor of the initial weights, or ``(low, high)``, drawn log-uniformly.
        batch_size: examples a batch.

    Returns:
        The family. ``params``: ``{"hidden_0": {"w", "b"}, ..., "output": {"w", "b"}}``.

    Raises:
        DataError: the data set is missing or has no features.
        ValueError: a size, name or scale is impossible.

    Example:
        >>> family = tabular_mlp("wine", width=8)
        >>> family.task(family.data, {}).init(jax.random.key(0))["hidden_0"]["w"].shape
        (13, 8)
    """
    splits = load(dataset)
    if "features" not in splits["train"]:
        raise DataError(f"the data set {dataset!r} has no features")
    return _family(splits, dataset, "features", mlp_spec(width, depth, activation, init_scale), batch_size)


def logistic_regression(
    dataset: str = "breast_cancer",
    *,
    init_scale: float | tuple[float, float] = 1.0,
    batch_size: int = 64,
) -> TaskFamily:
    """Classify with a linear model; where the labels are numbers this is least squares.

    Args:
        dataset: a data set with ``features`` or ``image`` and labels, see :mod:`tasks.data`.
        init_scale: factor of the initial weights, or ``(low, high)``, drawn log-uniformly.
        batch_size: examples a batch.

    Returns:
        The family, convex. ``params``: ``{"output": {"w", "b"}}``.

    Raises:
        DataError: the data set is missing or has neither features nor images.
        ValueError: the scale is not positive.

    Example:
        >>> family = logistic_regression("wine")
        >>> family.task(family.data, {}).init(jax.random.key(0))["output"]["w"].shape
        (13, 3)
    """
    splits = load(dataset)
    field = next((field for field in ("features", "image") if field in splits["train"]), None)
    if field is None:
        raise DataError(f"the data set {dataset!r} has neither features nor images")
    return _family(splits, dataset, field, mlp_spec(1, 0, "relu", init_scale), batch_size)


def _family(splits: Splits, dataset: str, field: str, spec: MlpSpec, batch_size: int) -> TaskFamily:
    classes = num_outputs(splits, dataset)

    def network(cfg: Cfg):
        return transform(lambda x: mlp(spec, cfg, classes or 1, x))

    def sample(key: jax.Array) -> Cfg:
        return sample_mlp(spec, key)

    return supervised(on_device(splits, field), sample, network, batch_size, classes)
