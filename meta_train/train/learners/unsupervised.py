"""Meta-training of unsupervised rules: how good features are, and the learner that the estimators unroll."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from learned_opt.base import Theta
from learned_opt.unsupervised.network import ACTIVATIONS, Network
from learned_opt.unsupervised.rule import UnsupervisedRule
from tasks.base import Cfg
from tasks.families.batches import cross_entropy
from tasks.families.representation import FeatureEntry, FeatureFamily

from .base import Learner, drawn_length

Objective = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]


class FeatureState(NamedTuple):
    """The state of :func:`feature_learner`: one network in training without labels."""

    phi: Network
    cfg: Cfg
    taken: jax.Array  # int32, steps taken
    num_steps: jax.Array  # int32, steps of this episode


def feature_learner(
    rule: UnsupervisedRule,
    family: FeatureFamily,
    entry: FeatureEntry,
    *,
    objective: Objective | None = None,
    shots: int = 10,
    lengths: tuple[int, int] = (100, 1000),
    multiple_of: int = 1,
) -> Learner:
    """The learner that trains a network by an unsupervised rule; its meta-loss judges the features after every step.

    An episode draws a task, an activation, its length (log-uniform in ``lengths``) and random weights. A step draws
    an unlabelled batch, updates the weights by the rule, and then judges the top layer's features of a few-shot
    problem of fresh rows, all normalised by their own moments.

    Args:
        rule: the rule.
        family: the tasks; its ``data`` may be traced.
        entry: the network's units, activations and batch size.
        objective: one of :data:`OBJECTIVES`; by default ridge regression with the entry's penalty.
        shots: rows of a class in either half of the few-shot problem.
        lengths: the shortest and the longest episode.
        multiple_of: lengths are rounded to multiples of it.

    Returns:
        A :class:`~meta_train.train.learners.Learner` whose state is a :class:`FeatureState`.
    """
    objective = objective or functools.partial(ridge, penalty=entry.penalty)
    activations = jnp.asarray([ACTIVATIONS.index(name) for name in entry.activations], jnp.int32)

    def init(theta: Theta, key: jax.Array) -> FeatureState:
        del theta
        k_cfg, k_phi, k_activation, k_length = jax.random.split(key, 4)
        activation = activations[jax.random.randint(k_activation, (), 0, len(activations))]
        return FeatureState(
            phi=rule.init(k_phi, (family.inputs, *entry.units), activation),
            cfg=family.sample(k_cfg),
            taken=jnp.zeros((), jnp.int32),
            num_steps=drawn_length(k_length, lengths, multiple_of),
        )

    def step(theta: Theta, state: FeatureState, key: jax.Array) -> tuple[FeatureState, jax.Array]:
        k_batch, k_problem = jax.random.split(key)
        phi = rule.update(theta, state.phi, family.batch(family.data, state.cfg, k_batch, entry.batch_size))
        problem = family.few_shot(family.data, state.cfg, k_problem, shots)
        features = rule.features(phi, jnp.concatenate([problem.support, problem.query]))
        support, query = jnp.split(features, 2)
        loss = objective(support, query, problem.labels, family.classes)
        return state._replace(phi=phi, taken=state.taken + 1), loss

    return Learner(init, step, remaining=lambda state: state.num_steps - state.taken)


# --- meta-objectives: (support [n, units], query [n, units], labels [n] of either, classes) -> loss


def ridge(support: jax.Array, query: jax.Array, labels: jax.Array, classes: int, penalty: float = 0.1) -> jax.Array:
    r"""Few-shot ridge regression: the squared distance of predictions and targets of the query, both of unit length.

    .. math:: P = (\Phi^\top \Phi + \lambda I)^{-1} \Phi^\top Y, \qquad
        L = \mathrm{mean}_q \| \hat y_q / \|\hat y_q\| - y_q \|^2

    with centred features and targets, which is a bias without penalty. Solved by Cholesky, in the smaller of the
    numbers of features and of rows.

    Args:
        support: features that the regression is fitted to.
        query: features that it is judged on.
        labels: the classes of either.
        classes: how many there are.
        penalty: :math:`\lambda`.

    Returns:
        Scalar in [0, 4]; 2 for predictions that have nothing to do with the targets.

    Reference: Metz et al. 2019, the meta-objective.
    """
    targets = jax.nn.one_hot(labels, classes, dtype=support.dtype)
    targets = targets - jnp.mean(targets, axis=0, keepdims=True)
    targets = targets / jnp.sqrt(1 - 1 / classes)  # of unit length where classes are balanced
    mean = jnp.mean(support, axis=0, keepdims=True)
    f, q = support - mean, query - mean
    rows, units = f.shape
    if units <= rows:
        eye = jnp.eye(units, dtype=f.dtype)
        predicted = q @ jax.scipy.linalg.solve(f.T @ f + penalty * eye, f.T @ targets, assume_a="pos")
    else:
        eye = jnp.eye(rows, dtype=f.dtype)
        predicted = (q @ f.T) @ jax.scipy.linalg.solve(f @ f.T + penalty * eye, targets, assume_a="pos")
    predicted = predicted * jax.lax.rsqrt(jnp.sum(predicted**2, axis=1, keepdims=True) + 1e-8)
    return jnp.mean(jnp.sum((predicted - targets) ** 2, axis=1))


def linear_probe(
    support: jax.Array, query: jax.Array, labels: jax.Array, classes: int, steps: int = 30, rate: float = 0.5
) -> jax.Array:
    """The query's cross-entropy under a softmax regression that a few steps of gradient descent fit to the support.

    Args:
        support: as in :func:`ridge`; features are standardised by the support's moments.
        query: as in :func:`ridge`, standardised by the same moments.
        labels: as in :func:`ridge`.
        classes: as in :func:`ridge`.
        steps: of gradient descent, from zero weights.
        rate: its step size.

    Returns:
        Scalar; ``log(classes)`` for features without information.
    """
    f, q = _standardised(support, query)
    targets = jax.nn.one_hot(labels, classes, dtype=f.dtype)

    def step(weights, _):
        w, b = weights
        error = (jax.nn.softmax(f @ w + b[None]) - targets) / f.shape[0]
        return (w - rate * f.T @ error, b - rate * jnp.sum(error, axis=0)), None

    zeros = (jnp.zeros((f.shape[1], classes), f.dtype), jnp.zeros(classes, f.dtype))
    (w, b), _ = jax.lax.scan(step, zeros, None, length=steps)
    return cross_entropy(q @ w + b[None], labels)


def nearest_centroid(support: jax.Array, query: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
    """The query's cross-entropy where a class's logit is minus the mean squared distance from its centroid.

    Args:
        support: as in :func:`ridge`; features are standardised by the support's moments.
        query: as in :func:`ridge`, standardised by the same moments.
        labels: as in :func:`ridge`.
        classes: as in :func:`ridge`.

    Returns:
        Scalar; ``log(classes)`` where all centroids coincide.

    Reference: Snell, Swersky and Zemel, Prototypical Networks for Few-shot Learning, 2017.
    """
    f, q = _standardised(support, query)
    members = jax.nn.one_hot(labels, classes, dtype=f.dtype)
    centroids = (members.T @ f) / jnp.sum(members, axis=0)[:, None]
    return cross_entropy(-jnp.mean((q[:, None] - centroids[None]) ** 2, axis=-1), labels)


def _standardised(support: jax.Array, query: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean = jnp.mean(support, axis=0, keepdims=True)
    scale = jax.lax.rsqrt(jnp.var(support, axis=0, keepdims=True) + 1e-6)
    return (support - mean) * scale, (query - mean) * scale


OBJECTIVES: dict[str, Objective] = {
    "linear_probe": linear_probe,
    "nearest_centroid": nearest_centroid,
    "ridge": ridge,
}
