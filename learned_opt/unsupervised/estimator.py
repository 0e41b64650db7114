"""The scikit-learn transformer of an unsupervised rule."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from ..store import load_unsupervised
from . import network
from .rule import UnsupervisedRule, unsupervised

_MIN_ROWS = 2  # a batch of one row has no spread to normalise by
_CHUNK = 50  # steps between two lines of progress


class LearnedFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Features that a learned rule finds without labels, as a scikit-learn transformer.

    ``fit`` trains a small network on batches of rows by a meta-trained rule, with no loss and no gradient.
    ``transform`` gives the activations of its top layer, each row by itself, normalised by the moments of the training
    rows. Inputs are shifted and scaled as a whole to zero mean and unit variance.

    Args:
        rule: a name in ``learned_opt.unsupervised.available()``, the folder of a saved rule, or meta-parameters of
            ``learned_opt.unsupervised.unsupervised()``.
        sizes: units of each layer; the last is the number of features.
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
        StoreError: in ``fit``, for an unknown or damaged rule.
        ValueError: in ``fit`` and ``transform``, for NaN or infinite entries, another number of columns than in
            ``fit``, fewer than two rows in ``fit``, or a bad parameter.

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
        X = validate_data(self, X, dtype=[np.float32, np.float64], ensure_min_samples=_MIN_ROWS)
        for name, least in (("steps", 0), ("batch_size", _MIN_ROWS)):
            if not isinstance(value := getattr(self, name), int | np.integer) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
        self.shift_ = float(np.mean(X, dtype=np.float64))
        self.scale_ = float(np.std(X, dtype=np.float64)) or 1.0
        x = self._scaled(X)
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        k_init, k_steps = jax.random.split(jax.random.key(seed))
        phi = rule.init(k_init, (X.shape[1], *self.sizes), self.activation)
        size = min(self.batch_size, len(X))
        for start in range(0, self.steps, _CHUNK):
            count = min(_CHUNK, self.steps - start)
            phi = _learn(rule.update, size, theta, phi, x, k_steps, jnp.arange(start, start + count))
            if self.verbose:
                print(f"LearnedFeatures: step {start + count} of {self.steps}", flush=True)
        self.network_ = phi
        self.moments_ = jax.jit(network.statistics)(phi, x)
        self.n_iter_ = self.steps
        self._n_features_out = self.sizes[-1]
        return self

    def transform(self, X):
        """The features of each row.

        Args:
            X: ``[rows, columns]``, the columns of ``fit``.

        Returns:
            ``[rows, sizes[-1]]``, computed in float32, of the dtype of ``X`` where that is floating.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        return np.asarray(_features(self.network_, self.moments_, self._scaled(X))).astype(X.dtype)

    def _scaled(self, X: np.ndarray) -> np.ndarray:
        return ((X - self.shift_) / self.scale_).astype(np.float32)

    def _rule(self) -> tuple[UnsupervisedRule, Any]:
        if isinstance(self.rule, Mapping):
            return unsupervised(), self.rule
        return load_unsupervised(self.rule)


@partial(jax.jit, static_argnums=(0, 1))
def _learn(update, size, theta, phi, x, key, steps):
    def step(phi, i):
        rows = jax.random.choice(jax.random.fold_in(key, i), x.shape[0], (size,), replace=False)
        return update(theta, phi, x[rows]), None

    return jax.lax.scan(step, phi, steps)[0]


_features = jax.jit(lambda phi, moments, x: network.features(phi, x, moments))
