"""The scikit-learn transformer of an unsupervised rule."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from ..store import StoreError, load_unsupervised
from . import network
from .rule import UnsupervisedRule, unsupervised

_MIN_ROWS = 2  # a batch of one row has no spread to normalise by
_CHUNK = 50  # steps between two lines of progress
_EXACT = 2**53  # float64 holds every integer up to here
_SCALES = (1e-150, 1e150)  # between them squares neither vanish nor overflow in float64
_FAR = 1e18  # its square is within float32


class LearnedFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Features that a learned rule finds without labels, as a scikit-learn transformer.

    ``fit`` trains a small network on batches of rows by a meta-trained rule, with no loss and no gradient.
    ``transform`` gives the activations of its top layer, each row by itself, normalised by the moments of the training
    rows. Inputs are shifted and scaled as a whole to zero mean and unit variance, in float64, before ``fit`` makes them
    float32. Columns of very different size are therefore the user's to scale, and integers beyond 2^53, which float64
    does not hold, are refused. What is compiled for one shape of data serves refits, clones and other rows of that
    shape.

    Args:
        rule: a name in ``learned_opt.unsupervised.available()``, the folder of a saved rule, or meta-parameters of
            ``learned_opt.unsupervised.unsupervised()``.
        sizes: units of each layer, positive integers; the last is the number of features.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"swish"``, ``"sigmoid"`` or ``"step"``.
        steps: how many batches to learn from.
        batch_size: rows of a batch, drawn anew each step; at most the number of rows.
        random_state: a seed or a NumPy ``RandomState``; fits with the same seed are equal.
        verbose: whether to print a line of progress now and then.

    Attributes:
        network_: the trained network.
        moments_: each layer's moments over the training rows.
        n_features_in_: the number of columns.
        n_iter_: steps taken.

    Raises:
        StoreError: in ``fit``, for an unknown or damaged rule, or meta-parameters of another one.
        ValueError: in ``fit`` and ``transform``, for entries that are no numbers, NaN, infinite, or integers beyond
            2^53; another number of columns than in ``fit``; fewer than two rows in ``fit``; a standard deviation
            outside 1e-150 to 1e150 in ``fit``; rows 1e18 of them away in ``transform``; or a bad parameter.

    Example:
        >>> from sklearn.linear_model import LogisticRegression
        >>> from sklearn.pipeline import make_pipeline
        >>> x, y = np.random.default_rng(0).normal(size=(50, 6)), np.arange(50) % 2
        >>> theta = unsupervised().init_theta(jax.random.key(0))
        >>> model = make_pipeline(LearnedFeatures(theta, sizes=(8, 4), steps=5), LogisticRegression()).fit(x, y)
        >>> model.predict(x).shape
        (50,)

    Reference: Metz et al. 2019, arXiv:1804.00222.
    """

    def __init__(
        self,
        rule: str | os.PathLike[str] | Mapping[str, Any] = "letters",
        sizes: Sequence[int] = (64, 32),
        activation: str = "relu",
        *,
        steps: int = 300,
        batch_size: int = 64,
        random_state: int | np.random.RandomState | None = 0,
        verbose: bool = False,
    ):
        self.rule = rule
        self.sizes = sizes
        self.activation = activation
        self.steps = steps
        self.batch_size = batch_size
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X, y=None):
        """Learns from the rows of ``X``.

        Args:
            X: ``[rows, columns]``, numbers.
            y: not used.

        Returns:
            Itself.
        """
        del y
        rule, theta = self._rule()
        sizes = network.check_sizes(self.sizes, 1, "each layer's units")
        for name, least in (("steps", 0), ("batch_size", _MIN_ROWS)):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
        X, _ = self._numbers(X, ensure_min_samples=_MIN_ROWS)
        self.shift_, self.scale_ = _shift_and_scale(X)
        x = self._scaled(X).astype(np.float32)
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        k_init, k_steps = jax.random.split(jax.random.key(seed))
        phi = rule.init(k_init, (X.shape[1], *sizes), self.activation)
        size = min(int(self.batch_size), len(X))
        for start in range(0, int(self.steps), _CHUNK):
            end = min(start + _CHUNK, int(self.steps))
            phi = _learn(rule.update, size, theta, phi, x, k_steps, start, end)
            if self.verbose:
                print(f"LearnedFeatures: step {end} of {self.steps}", flush=True)
        self.network_ = phi
        self.moments_ = _statistics(phi, x)
        self.n_iter_ = self.steps
        self._n_features_out = sizes[-1]
        return self

    def transform(self, X):
        """The features of each row.

        Args:
            X: ``[rows, columns]``, the columns of ``fit``.

        Returns:
            ``[rows, sizes[-1]]``, computed in float64; float32 for rows of float32, else float64.
        """
        check_is_fitted(self)
        X, dtype = self._numbers(X, reset=False)
        with jax.enable_x64(True):  # in float32 a row's last digits would depend on how many rows stand beside it
            return np.asarray(_features(self.network_, self.moments_, self._scaled(X))).astype(dtype)

    def _numbers(self, X, **checks) -> tuple[np.ndarray, type]:
        """The rows in float64, and the dtype of their features."""
        X = validate_data(self, X, dtype="numeric", **checks)
        if X.dtype.kind not in "biuf":
            raise ValueError(f"X must hold numbers, not {X.dtype}")
        if X.dtype.kind in "iu" and (X.max() > _EXACT or X.min() < -_EXACT):
            raise ValueError("X holds integers beyond 2^53, which float64 rounds: subtract an origin from them first")
        return X.astype(np.float64), np.float32 if X.dtype == np.float32 else np.float64

    def _scaled(self, X: np.ndarray) -> np.ndarray:
        scaled = (X - self.shift_) / self.scale_
        if not np.max(np.abs(scaled)) < _FAR:
            raise ValueError(
                f"X lies {_FAR:g} or more of the training rows' standard deviations ({self.scale_:g}) from their mean "
                f"({self.shift_:g}): are these the same columns, in the same units?"
            )
        return scaled

    def _rule(self) -> tuple[UnsupervisedRule, Any]:
        if not isinstance(self.rule, Mapping):
            if not isinstance(self.rule, str | os.PathLike):
                raise StoreError(f"rule must be a name, a folder or meta-parameters, not {self.rule!r}")
            return load_unsupervised(self.rule)[:2]
        rule = unsupervised()
        wanted = jax.eval_shape(rule.init_theta, jax.random.key(0))
        if jax.tree.map(np.shape, wanted) != jax.tree.map(np.shape, dict(self.rule)):
            raise StoreError(
                "rule is no meta-parameters of learned_opt.unsupervised.unsupervised(): other names or shapes"
            )
        return rule, self.rule


def _shift_and_scale(X: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of all entries, float64; the scale of constant data is 1."""
    if np.min(X) == np.max(X):
        return float(X.flat[0]), 1.0
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        shift, scale = float(np.mean(X)), float(np.std(X))
    if not _SCALES[0] < scale < _SCALES[1]:  # NaN included
        raise ValueError(
            f"the standard deviation of X ({scale:g}) is not within {_SCALES[0]:g} to {_SCALES[1]:g}: "
            "give X in other units"
        )
    return shift, scale


# At module level, with the rule's functions as static arguments: one compilation a shape, whichever object asks.


@partial(jax.jit, static_argnums=(0, 1))
def _learn(update, size, theta, phi, x, key, start, end):
    def step(i, phi):
        rows = jax.random.choice(jax.random.fold_in(key, i), x.shape[0], (size,), replace=False)
        return update(theta, phi, x[rows])

    return jax.lax.fori_loop(start, end, step, phi)  # the bounds are data: any number of steps


_statistics = jax.jit(network.statistics)
_features = jax.jit(lambda phi, moments, x: network.features(phi, x, moments))
