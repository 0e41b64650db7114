"""Meta-training: one pure step of theta, over particles on a mesh of devices."""

import contextlib
import functools
import gc
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from learned_opt.base import Theta
from tasks.base import Data

from .estimators import GradientEstimator

AXIS = "tasks"
_REPLICATED, _SHARDED = PartitionSpec(), PartitionSpec(AXIS)
_FIGURES = 3  # sums over particles that the log wants: losses, how many are finite, restarts
_CACHED = 16  # particles of the usual small tasks whose inner state fits a CPU core's cache


class TrainState(NamedTuple):
    """Everything a meta-training run is: saving it makes resuming exact."""

    theta: Theta
    outer_state: optax.OptState
    particles: tuple[Any, ...]  # per estimator, the estimators' states, [particles, ...]
    step: jax.Array  # int32, meta-steps taken
    key: jax.Array  # the run's key, uint32 [2]; step i uses fold_in(key, i)


class TrainInfo(NamedTuple):
    """What a meta-step says."""

    loss: jax.Array  # mean meta-loss
    losses: jax.Array  # [estimators], the mean meta-loss of each
    gradient_norm: jax.Array  # of the meta-gradient, before the outer optimizer
    dropped: jax.Array  # fraction of particles whose loss or gradient was not finite: they count as gradient 0
    restarts: jax.Array  # fraction of particles that began an episode


class Trainer(NamedTuple):
    """Meta-training as two pure functions.

    Attributes:
        init: ``(key, data) -> state``.
        meta_step: ``(state, data) -> (state, info)``, a ``jax.jit``; ``state`` is donated.
        state_sharding: a :class:`TrainState` prefix of shardings, to place a restored state.
    """

    init: Callable[[jax.Array, Data], TrainState]
    meta_step: Any
    state_sharding: TrainState


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that meta-training runs on: one axis, ``"tasks"``.

    Args:
        devices: by default all devices of all processes.

    Returns:
        A mesh of automatic axes.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def make_trainer(
    init_theta: Callable[[jax.Array], Theta],
    estimators: Callable[[Data], Sequence[GradientEstimator]],
    outer: optax.GradientTransformation,
    *,
    particles: int,
    mesh: Mesh,
    particle_clip: float = math.inf,
) -> Trainer:
    r"""Builds a meta-training run.

    Each meta-step runs ``particles`` particles of every estimator, averages their gradients and steps theta,
    :math:`\theta \leftarrow \theta + \mathrm{outer}(\tfrac{1}{EP}\sum_{e,i} g_{e,i})`. Particles are split over
    devices and vmapped on each (on a CPU by cachefuls); theta is replicated. A particle's keys derive from its global
    index, so any number of devices computes the same trajectory, and the devices exchange one vector of theta's size a
    step, whatever the number of particles and the unroll's length.

    Args:
        init_theta: ``key -> theta``, or a constant function to go on from given meta-parameters.
        estimators: ``data -> gradient estimators``; called while tracing, so that data sets are arguments of the
            compiled step and not constants in it.
        outer: any Optax transform, the outer optimizer.
        particles: per estimator; a multiple of the number of devices.
        mesh: from :func:`make_mesh`.
        particle_clip: the most that the norm of one particle's gradient counts for: backpropagation through a chaotic
            stretch gives a gradient that would drown all others.

    Returns:
        A :class:`Trainer`.

    Raises:
        ValueError: the devices do not divide the particles.
    """
    if particles % mesh.size:
        raise ValueError(f"particles ({particles}) must be a multiple of the number of devices ({mesh.size})")
    local = particles // mesh.size
    # side by side on a device; on a CPU, a cacheful after the other
    together = math.gcd(local, _CACHED) if mesh.devices.flat[0].platform == "cpu" else local

    def keys_of(key: jax.Array, estimator: int) -> jax.Array:
        first = estimator * particles + jax.lax.axis_index(AXIS) * local
        return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(local))

    def init_particles(theta: Theta, key: jax.Array, data: Data):
        built = enumerate(estimators(data))
        return tuple(jax.vmap(estimator.init, (None, 0))(theta, keys_of(key, i)) for i, estimator in built)

    def estimate(estimator: GradientEstimator, theta: Theta, state: Any, keys: jax.Array):
        """Sums over particles, of their gradients and behind those of what the log wants; their new states."""

        def some(carry, start):  # of the particles, their states in place: stacking new ones compiles slower
            total, state = carry
            held = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, together), (state, keys))
            grads, new, info = jax.vmap(functools.partial(estimator.estimate, theta))(*held)
            flat = jax.vmap(lambda g: ravel_pytree(g)[0])(grads)
            norms = jnp.linalg.norm(flat, axis=1)  # that of a gradient with one NaN in it is NaN
            finite = jnp.isfinite(norms) & jnp.isfinite(info.loss)
            shares = jnp.minimum(1, particle_clip / jnp.maximum(norms, 1e-30))
            gradient = jnp.sum(jnp.where(finite[:, None], shares[:, None] * flat, 0), axis=0)
            loss = jnp.sum(jnp.where(finite, info.loss, 0))
            figures = jnp.stack([loss, jnp.sum(finite), jnp.sum(info.restarts)]).astype(total.dtype)
            state = jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0), state, new)
            return (total + jnp.concatenate([gradient, figures]), state), None

        zeros = jnp.zeros_like(jnp.pad(ravel_pytree(theta)[0], (0, _FIGURES)))
        return jax.lax.scan(some, (zeros, state), together * jnp.arange(local // together))[0]

    def gradient(theta: Theta, states: tuple, key: jax.Array, data: Data):
        _, unravel = ravel_pytree(theta)
        built = enumerate(zip(estimators(data), states, strict=True))
        totals, states = zip(*(estimate(e, theta, state, keys_of(key, i)) for i, (e, state) in built), strict=True)
        # One vector, one all-reduce: the gradient and, behind it, what the log wants.
        sums = jnp.stack(totals)
        total, told = jnp.sum(sums[:, :-_FIGURES], axis=0), sums[:, -_FIGURES:]
        vector = jax.lax.psum(jnp.concatenate([total, told.reshape(-1)]), AXIS) / particles
        loss, finite, restarts = vector[total.size :].reshape(told.shape).T
        dropped = jnp.maximum(1 - jnp.mean(finite), 0)  # the mean of ones may round to more
        grad = vector[: total.size] / len(states)
        shown = (loss / finite, jnp.linalg.norm(grad), dropped, jnp.mean(restarts))  # NaN where none is finite
        return unravel(grad), states, shown

    def on_mesh(function, in_specs, out_specs):
        # The replication of the outputs follows from the psum; the checker would want every constant marked.
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    replicated, sharded = NamedSharding(mesh, _REPLICATED), NamedSharding(mesh, _SHARDED)
    shardings: dict[str, Any] = dict.fromkeys(TrainState._fields, replicated) | {"particles": sharded}
    state_sharding = TrainState(**shardings)

    def init(key: jax.Array, data: Data) -> TrainState:
        k_theta, k_particles, k_run = jax.random.split(key, 3)
        theta = init_theta(k_theta)
        states = on_mesh(init_particles, _REPLICATED, _SHARDED)(theta, k_particles, data)
        return TrainState(theta, outer.init(theta), states, jnp.zeros((), jnp.int32), jax.random.key_data(k_run))

    def meta_step(state: TrainState, data: Data) -> tuple[TrainState, TrainInfo]:
        key = jax.random.fold_in(state.key, state.step)
        everywhere = on_mesh(
            gradient, (_REPLICATED, _SHARDED, _REPLICATED, _REPLICATED), (_REPLICATED, _SHARDED, _REPLICATED)
        )
        grad, particles, (losses, norm, dropped, restarts) = everywhere(state.theta, state.particles, key, data)
        updates, outer_state = outer.update(grad, state.outer_state, state.theta)
        theta = optax.apply_updates(state.theta, updates)
        info = TrainInfo(jnp.mean(losses), losses, norm, dropped, restarts)
        return TrainState(theta, outer_state, particles, state.step + 1, state.key), info

    return Trainer(
        init=jax.jit(init, out_shardings=state_sharding),
        meta_step=jax.jit(meta_step, donate_argnums=0, out_shardings=(state_sharding, replicated)),
        state_sharding=state_sharding,
    )


def abstract_state(trainer: Trainer, key: jax.Array, data: Data) -> TrainState:
    """The shapes, dtypes and shardings of a run's state."""
    shapes = jax.eval_shape(trainer.init, key, data)
    parts = zip(shapes, trainer.state_sharding, strict=True)
    return TrainState(
        *(
            jax.tree.map(lambda x, s=sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), part)
            for part, sharding in parts
        )
    )


@contextlib.contextmanager
def _no_garbage_collection():
    """Tracing makes so many lasting objects that a quarter of its time goes to looking through them for garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def begin(
    trainer: Trainer, key: jax.Array, data: Data, start: Callable[[TrainState], TrainState | None] = lambda like: None
) -> tuple[TrainState, Callable[[TrainState, Data], tuple[TrainState, TrainInfo]]]:
    """The state that a run starts from, while its meta-step is compiled at the same time.

    Args:
        trainer: the run's.
        key: of a fresh start.
        data: data sets, on the devices.
        start: ``abstract state -> state`` to go on from, or ``None`` for a fresh start.

    Returns:
        ``(state, meta_step)``.
    """
    with _no_garbage_collection(), ThreadPoolExecutor(1) as beside:
        like = abstract_state(trainer, key, data)
        meta_step = beside.submit(lambda: trainer.meta_step.lower(like, data).compile())
        state = start(like)
        return trainer.init(key, data) if state is None else state, meta_step.result()


def place(data: Data, mesh: Mesh) -> Data:
    """Puts data sets on every device of the mesh, once.

    Args:
        data: a pytree of host arrays, the same on every process.
        mesh: from :func:`make_mesh`.

    Returns:
        The pytree, replicated over the mesh.
    """
    return jax.device_put(data, NamedSharding(mesh, _REPLICATED))
