r"""Estimators of the meta-gradient: how the loss of a learning process changes with theta.

Each estimates :math:`\nabla_\theta\, \mathbb{E}\,[\frac1T\sum_t L_t]`, the mean loss of the steps it unrolls. Each is
written for *one* particle (one learning process, or one antithetic pair of them) and knows nothing of the learner;
the trainer runs particles side by side with ``vmap``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from learned_opt.base import Theta
from learned_opt.kernels import on_cpu

from .learners import Learner, LearnerState


class Info(NamedTuple):
    """What an estimate says besides the gradient."""

    loss: jax.Array  # mean loss over the window
    restarts: jax.Array  # 1.0 if an episode began, else 0.0


class GradientEstimator(NamedTuple):
    """An estimator of the meta-gradient, for one particle.

    Attributes:
        init: ``(theta, key) -> state``.
        estimate: ``(theta, state, key) -> (grad, state, info)``; ``grad`` is a pytree like ``theta``.
    """

    init: Callable[[Theta, jax.Array], Any]
    estimate: Callable[[Theta, Any, jax.Array], tuple[Theta, Any, Info]]


class WindowState(NamedTuple):
    """The state of the estimators that go on with an episode from window to window."""

    learner: LearnerState  # for antithetic pairs stacked, [2, ...]
    noise: Any  # the perturbations' carry, a vector of theta's size; () for backpropagation
    done: jax.Array  # bool: the next window starts an episode
    until: jax.Array  # int32: the episode ends when it has this many steps left
    phase: jax.Array  # float: `until` of the first episode as a fraction of its length, to stagger the particles


def _begin(init: Callable[[], LearnerState], noise: Any, key: jax.Array) -> WindowState:
    """Before the first window, which starts an episode of its own: zeros of the shapes that ``init`` gives."""
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(init))
    return WindowState(blank, noise, jnp.asarray(True), jnp.zeros((), jnp.int32), jax.random.uniform(key))


def _episode(state: WindowState, fresh: LearnerState, remaining: Callable) -> tuple[LearnerState, jax.Array]:
    """Where the window starts, and its episode's ``until``."""
    start = _select(state.done, fresh, state.learner)
    first = jnp.floor(state.phase * remaining(fresh).astype(jnp.float32)).astype(jnp.int32)
    return start, jnp.where(state.done, first, state.until)


def _end(learner: LearnerState, noise: Any, until: jax.Array, remaining: Callable) -> WindowState:
    return WindowState(learner, noise, remaining(learner) <= until, until, jnp.zeros(()))


def _select(condition: jax.Array, if_true: Any, if_false: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true, if_false)


def _unroll(learner: Learner, steps: int, theta: Theta, state: LearnerState, key: jax.Array, *, remat: bool = False):
    """Takes ``steps`` steps: ``(state, losses [steps])``."""
    step = jax.checkpoint(learner.step) if remat else learner.step
    return jax.lax.scan(lambda s, k: step(theta, s, k), state, jax.random.split(key, steps))


def _normal_like(key: jax.Array, theta: Theta) -> jax.Array:
    """A vector of theta's size: what perturbs is kept flat, an operation a leaf would compile far slower."""
    flat, _ = ravel_pytree(theta)
    return jax.random.normal(key, flat.shape, flat.dtype)


def _pair(theta: Theta, noise: jax.Array, sigma: float) -> Theta:
    """``theta + sigma noise`` and ``theta - sigma noise``, stacked."""
    flat, unravel = ravel_pytree(theta)
    signs = np.array([[sigma], [-sigma]], noise.dtype)
    return jax.vmap(unravel)(flat[None] + signs * noise[None])


def _score(theta: Theta, losses: jax.Array, noise: jax.Array, sigma: float) -> Theta:
    """The antithetic estimate ``(L+ - L-) noise / (2 sigma)``: ``losses [2, steps]``, ``noise`` of unit variance."""
    difference = jnp.mean(losses[0] - losses[1]) / (2 * sigma)  # step by step: the means would round it away
    return ravel_pytree(theta)[1](difference.astype(noise.dtype) * noise)


def bptt(learner: Learner, *, unroll: int) -> GradientEstimator:
    """Backpropagation through a whole unroll from a fresh start, each inner step rematerialised.

    The exact gradient of the drawn episode's mean loss. Memory grows with ``unroll`` by one learner state a step.

    Args:
        learner: what is unrolled.
        unroll: the number of steps.

    Returns:
        A :class:`GradientEstimator` without state.
    """

    def estimate(theta, state, key):
        k_init, k_steps = jax.random.split(key)

        def loss(theta):
            return jnp.mean(_unroll(learner, unroll, theta, learner.init(theta, k_init), k_steps, remat=True)[1])

        value, grad = jax.value_and_grad(loss)(theta)
        return grad, state, Info(value, jnp.ones(()))

    return GradientEstimator(lambda theta, key: (), estimate)


def truncated_bptt(learner: Learner, *, unroll: int) -> GradientEstimator:
    """Backpropagation through windows of an episode; no gradient crosses from one window to the one before.

    Args:
        learner: what is unrolled; a new episode starts at the first window after one ends.
        unroll: the window's length.

    Returns:
        A :class:`GradientEstimator` with a :class:`WindowState`. Biased: it cannot see that an early step helps late.
    """

    def init(theta, key):
        return _begin(lambda: learner.init(theta, key), (), key)

    def estimate(theta, state, key):
        k_init, k_steps = jax.random.split(key)

        def loss(theta):
            start, until = _episode(state, learner.init(theta, k_init), learner.remaining)
            end, losses = _unroll(learner, unroll, theta, start, k_steps, remat=True)
            return jnp.mean(losses), _end(end, (), until, learner.remaining)

        (value, end), grad = jax.value_and_grad(loss, has_aux=True)(theta)
        return grad, end, Info(value, state.done.astype(jnp.float32))

    return GradientEstimator(init, estimate)


def es(learner: Learner, *, unroll: int, sigma: float = 0.01) -> GradientEstimator:
    r"""Full evolution strategies: an antithetic pair over a whole unroll from a fresh start.

    .. math:: g = \frac{L(\theta + \sigma\epsilon) - L(\theta - \sigma\epsilon)}{2\sigma}\,\epsilon

    Args:
        learner: what is unrolled. The two halves share every key.
        unroll: the number of steps.
        sigma: the perturbations' standard deviation.

    Returns:
        A :class:`GradientEstimator` without state; unbiased for the Gaussian-smoothed loss.
    """

    def estimate(theta, state, key):
        k_noise, k_init, k_steps = jax.random.split(key, 3)
        noise = _normal_like(k_noise, theta)

        def loss(theta):
            return _unroll(learner, unroll, theta, learner.init(theta, k_init), k_steps)[1]

        losses = jax.vmap(loss)(_pair(theta, noise, sigma))
        return _score(theta, losses, noise, sigma), state, Info(jnp.mean(losses), jnp.ones(()))

    return GradientEstimator(lambda theta, key: (), estimate)


def _windowed_es(learner: Learner, unroll: int, sigma: float, draw: Callable) -> GradientEstimator:
    """Antithetic windows. ``draw: (carry, fresh, done) -> (carry, perturbation, score's noise)``."""

    def remaining(pair):
        return learner.remaining(jax.tree.map(lambda x: x[0], pair))  # the halves share their episode's length

    def init(theta, key):
        zeros = jnp.zeros_like(ravel_pytree(theta)[0])
        return _begin(lambda: jax.vmap(learner.init, (0, None))(_pair(theta, zeros, sigma), key), zeros, key)

    def estimate(theta, state, key):
        k_noise, k_init, k_steps = jax.random.split(key, 3)
        carry, noise, score_noise = draw(state.noise, _normal_like(k_noise, theta), state.done)
        thetas = _pair(theta, noise, sigma)
        start, until = _episode(state, jax.vmap(learner.init, (0, None))(thetas, k_init), remaining)
        end, losses = jax.vmap(lambda t, s: _unroll(learner, unroll, t, s, k_steps))(thetas, start)
        info = Info(jnp.mean(losses), state.done.astype(jnp.float32))
        return _score(theta, losses, score_noise, sigma), _end(end, carry, until, remaining), info

    return GradientEstimator(init, estimate)


def truncated_es(learner: Learner, *, unroll: int, sigma: float = 0.01) -> GradientEstimator:
    """Evolution strategies by windows, with fresh noise each window.

    Biased as truncated backpropagation is: a window's noise gets no credit for what it does to later windows.

    Args:
        learner: what is unrolled; a new episode starts at the first window after one ends.
        unroll: the window's length.
        sigma: the perturbations' standard deviation.

    Returns:
        A :class:`GradientEstimator` with a :class:`WindowState`.
    """
    return _windowed_es(learner, unroll, sigma, lambda carry, fresh, done: (carry, fresh, fresh))


def pes(learner: Learner, *, unroll: int, sigma: float = 0.01) -> GradientEstimator:
    r"""Persistent evolution strategies: the score sums the noise of all windows of the episode so far.

    .. math:: g = \frac{L_w^+ - L_w^-}{2\sigma}\,\xi_w, \qquad \xi_w = \sum_{v \le w} \epsilon_v

    Args:
        learner: what is unrolled; a new episode starts at the first window after one ends.
        unroll: the window's length.
        sigma: the perturbations' standard deviation.

    Returns:
        A :class:`GradientEstimator` with a :class:`WindowState`; unbiased while theta stands still, its variance grows
        with the windows.

    Reference:
        Vicol, Metz and Sohl-Dickstein, Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent
        Evolution Strategies, 2021.
    """

    def draw(carry, fresh, done):
        total = jnp.where(done, 0, carry) + fresh
        return total, fresh, total

    return _windowed_es(learner, unroll, sigma, draw)


def nres(learner: Learner, *, unroll: int, sigma: float = 0.01) -> GradientEstimator:
    r"""Noise-reuse evolution strategies: one noise for the whole episode.

    .. math:: g = \frac{L_w^+ - L_w^-}{2\sigma}\,\epsilon, \qquad \epsilon \text{ drawn at the episode's start}

    Args:
        learner: what is unrolled; a new episode starts at the first window after one ends.
        unroll: the window's length.
        sigma: the perturbations' standard deviation.

    Returns:
        A :class:`GradientEstimator` with a :class:`WindowState`; of the family's least variance, and unbiased while
        theta stands still.

    Reference:
        Li, Harrison, Sohl-Dickstein, Smith and Metz, Noise-Reuse in Online Evolution Strategies, 2023; Vicol, Kolter
        and Swersky, Low-Variance Gradient Estimation in Unrolled Computation Graphs with ES-Single, 2023.
    """

    def draw(carry, fresh, done):
        noise = jnp.where(done, fresh, carry)
        return noise, noise, noise

    return _windowed_es(learner, unroll, sigma, draw)


def one_by_one(estimator: GradientEstimator) -> GradientEstimator:
    """The estimator, whose particles a CPU runs one after the other: its many small products are faster unbatched."""
    if not on_cpu():
        return estimator
    return estimator._replace(estimate=jax.custom_batching.sequential_vmap(estimator.estimate))


def _exact(make: Callable[..., GradientEstimator]) -> Callable[..., GradientEstimator]:
    """Takes and ignores ``sigma``, so that all rows of ESTIMATORS are called alike."""

    def estimator(learner: Learner, *, unroll: int, sigma: float = 0.0) -> GradientEstimator:
        del sigma
        return make(learner, unroll=unroll)

    return estimator


ESTIMATORS: dict[str, Callable[..., GradientEstimator]] = {
    "bptt": _exact(bptt),
    "es": es,
    "nres": nres,
    "pes": pes,
    "truncated_bptt": _exact(truncated_bptt),
    "truncated_es": truncated_es,
}
