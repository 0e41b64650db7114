r"""The schedule of hyperparameters that a run has found: as arrays, JSON, Optax schedules, a plot; and its replay."""

import functools
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .hyperparameters import Specs, by_name, from_json, names, to_json, values
from .objectives import Batch, NetState, Weights, leading_size, make_objectives, transform_at
from .response import Params
from .tuner import CycleInfo, copied

FORMAT = 1


class Schedule(NamedTuple):
    """The hyperparameters over a run's training steps.

    Attributes:
        specs: the hyperparameters, H of them tuned.
        steps: NumPy int [T], increasing: training steps taken when a point starts to hold.
        mean: NumPy float [T, H], l on the whole line.
        sigma: NumPy float [T, H], the perturbations' standard deviations.
    """

    specs: Specs
    steps: np.ndarray
    mean: np.ndarray
    sigma: np.ndarray

    def values(self) -> dict[str, np.ndarray]:
        """The tuned hyperparameters' values by name, floats [T]."""
        found = by_name(jax.vmap(lambda point: values(self.specs, point))(jnp.asarray(self.mean)))
        return {name: np.asarray(found[name]) for name in names(self.specs)}


def from_run(specs: Specs, info: CycleInfo | Iterable[CycleInfo], train_steps: int) -> Schedule:
    """The schedule of a run.

    Args:
        specs: the run's hyperparameters.
        info: what :attr:`Tuner.run` returned, stacked, or those of consecutive runs.
        train_steps: training steps a cycle.

    Returns:
        A :class:`Schedule` with a point a cycle.

    Raises:
        ValueError: if the run has no cycle or is not of these specs.
    """
    parts = [info] if isinstance(info, CycleInfo) else list(info)
    if not parts:
        raise ValueError("from_run: the run has no cycles")
    mean, sigma = (np.concatenate([np.asarray(getattr(part, name)) for part in parts]) for name in ("mean", "sigma"))
    return _checked(Schedule(specs, train_steps * np.arange(len(mean)), mean, sigma))


def _checked(schedule: Schedule) -> Schedule:
    count = len(names(schedule.specs))
    shape = (len(schedule.steps), count)
    if not len(schedule.steps) or schedule.mean.shape != shape or schedule.sigma.shape != shape:
        raise ValueError(
            f"a schedule of {count} tuned hyperparameters at {len(schedule.steps)} steps needs mean and sigma of shape "
            f"{shape}, got {schedule.mean.shape} and {schedule.sigma.shape}"
        )
    if np.any(np.diff(schedule.steps) <= 0):
        raise ValueError("a schedule's steps must increase")
    return schedule


def schedule_to_json(schedule: Schedule) -> str:
    """A schedule as JSON; :func:`schedule_from_json` gives it back to the last bit.

    Args:
        schedule: a :class:`Schedule`.

    Returns:
        A JSON text, with the values by name beside l for other programs to read.
    """
    content = {
        "format": FORMAT,
        "specs": json.loads(to_json(schedule.specs)),
        "steps": schedule.steps.tolist(),
        "dtype": str(schedule.mean.dtype),
        "mean": schedule.mean.tolist(),
        "sigma": schedule.sigma.tolist(),
        "values": {name: value.tolist() for name, value in schedule.values().items()},
    }
    return json.dumps(content)


def schedule_from_json(text: str) -> Schedule:
    """The schedule of :func:`schedule_to_json`'s text.

    Args:
        text: JSON.

    Returns:
        A :class:`Schedule`.

    Raises:
        ValueError: if the text is no such JSON.
    """
    content = json.loads(text)
    fields = {"specs", "steps", "dtype", "mean", "sigma"}
    if not isinstance(content, dict) or content.get("format") != FORMAT or not fields <= set(content):
        raise ValueError(f"schedule_from_json: this is no text of schedule_to_json, format {FORMAT}")
    specs = from_json(json.dumps(content["specs"]))
    mean, sigma = (np.asarray(content[name], content["dtype"]) for name in ("mean", "sigma"))
    return _checked(Schedule(specs, np.asarray(content["steps"]), mean, sigma))


def constant(specs: Specs, mean: Any, sigma: Any = None) -> Schedule:
    """A schedule that stands still, such as at a run's last hyperparameters.

    Args:
        specs: the hyperparameters, H of them tuned.
        mean: float [H], l.
        sigma: float [H], the perturbations' standard deviations; 0 by default.

    Returns:
        A :class:`Schedule` of one point.
    """
    mean = np.asarray(mean).reshape(1, -1)
    sigma = np.zeros_like(mean) if sigma is None else np.asarray(sigma).reshape(1, -1)
    return _checked(Schedule(specs, np.zeros(1, int), mean, sigma))


def interpolate(schedule: Schedule, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return l and sigma [H] at a training step (traceable), linear between points and constant beyond them."""
    at = jnp.asarray(schedule.steps, jnp.result_type(float))
    along = jax.vmap(lambda column: jnp.interp(step, at, column), in_axes=1)
    return along(jnp.asarray(schedule.mean)), along(jnp.asarray(schedule.sigma))


def optax_schedules(schedule: Schedule) -> dict[str, optax.Schedule]:
    """The tuned hyperparameters as Optax schedules.

    Args:
        schedule: a :class:`Schedule`.

    Returns:
        For each name, a function of the training step to the value: l is linear between points.

    Example:
        >>> import numpy as np
        >>> from learned_opt import self_tuning as st
        >>> made = st.Schedule({"l2": st.log(1.0)}, np.array([0, 10]), np.array([[0.0], [2.0]]), np.zeros((2, 1)))
        >>> round(float(optax_schedules(made)["l2"](5)), 4)
        2.7183
    """

    def value(name: str, step: jax.Array) -> jax.Array:
        return by_name(values(schedule.specs, interpolate(schedule, step)[0]))[name]

    return {name: functools.partial(value, name) for name in names(schedule.specs)}


class ReplayState(NamedTuple):
    """A replay's state: arrays only.

    Attributes:
        params: the parameters.
        net_state: the network's state; ``()`` without one.
        opt_state: the optimizer's.
        step: int32, training steps taken.
    """

    params: Params
    net_state: NetState
    opt_state: optax.OptState
    step: jax.Array


class Replay(NamedTuple):
    """Training at a schedule of hyperparameters.

    Attributes:
        init: ``(params, net_state=()) -> ReplayState``.
        run: ``(state, key, data, num_steps) -> (state, losses [num_steps])``, one compiled scan.
    """

    init: Callable[..., ReplayState]
    run: Callable[..., tuple[ReplayState, jax.Array]]


def replay(
    schedule: Schedule,
    train_loss: Callable[..., Any],
    train_batch: Callable[[Any, jax.Array], Batch],
    weights: Weights,
    *,
    perturb: bool = False,
    stateful: bool = False,
    batch_size: Callable[[Batch], int] = leading_size,
) -> Replay:
    r"""Train a network, the tuned one or another, at a schedule of hyperparameters, without tuning any.

    Args:
        schedule: a :class:`Schedule`, its steps the training steps of this run.
        train_loss: as :func:`~learned_opt.self_tuning.tuner`'s; its ``params`` are always plain.
        train_batch: ``(data, key) -> batch``.
        weights: the parameters' Optax transform, or a function of the hyperparameters to it; it is given ``value=``.
        perturb: whether hyperparameters are perturbed by the schedule's sigma, as they were in the original form's run.
        stateful: as :func:`~learned_opt.self_tuning.tuner`'s.
        batch_size: as :func:`~learned_opt.self_tuning.tuner`'s.

    Returns:
        A :class:`Replay`. The key of a step is ``fold_in(key, state.step)``.

    Reference:
        MacKay et al., "Self-Tuning Networks", 2019, section 4.
    """
    training = functools.partial(transform_at, weights, schedule.specs)
    objectives = make_objectives(
        schedule.specs, train_loss, lambda *args: 0.0, stateful=stateful, batch_size=batch_size
    )

    def init(params: Params, net_state: NetState = ()) -> ReplayState:
        point, _ = interpolate(schedule, jnp.zeros((), jnp.int32))
        return copied(ReplayState(params, net_state, training(point).init(params), jnp.zeros((), jnp.int32)))

    @functools.partial(jax.jit, static_argnames="num_steps")
    def run(state: ReplayState, key: jax.Array, data: Any, num_steps: int) -> tuple[ReplayState, jax.Array]:
        def body(state: ReplayState, _: None) -> tuple[ReplayState, jax.Array]:
            k_batch, k_noise, k_loss = jax.random.split(jax.random.fold_in(key, state.step), 3)
            batch = train_batch(data, k_batch)
            point, sigma = interpolate(schedule, state.step)
            transform = training(point)
            if perturb:
                noise = objectives.noise(k_noise, batch)
                point = jnp.broadcast_to(point, noise.shape) + jnp.broadcast_to(sigma, noise.shape) * noise
            (loss, net_state), grads = jax.value_and_grad(objectives.elementary, has_aux=True)(
                state.params, state.net_state, point, k_loss, batch
            )
            updates, opt_state = transform.update(grads, state.opt_state, state.params, value=loss)
            params = optax.apply_updates(state.params, updates)
            return ReplayState(params, net_state, opt_state, state.step + 1), loss

        return jax.lax.scan(body, state, None, length=num_steps)

    return Replay(init, run)


def plot(schedules: dict[str, Schedule], axes: Iterable[Any]) -> None:
    """Draw schedules of the same hyperparameters, one hyperparameter an axes.

    Args:
        schedules: the schedules by label, such as of several starts.
        axes: Matplotlib axes, one for each tuned hyperparameter, in the order of
            :func:`~learned_opt.self_tuning.names`.

    Example:
        >>> import matplotlib.pyplot as plt  # doctest: +SKIP
        >>> fig, axes = plt.subplots(1, 3)  # doctest: +SKIP
        >>> plot({"run": schedule}, axes.flat)  # doctest: +SKIP
    """
    drawn = {label: (schedule.steps, schedule.values()) for label, schedule in schedules.items()}
    for name, ax in zip(names(next(iter(schedules.values())).specs), axes, strict=False):
        for label, (steps, found) in drawn.items():
            ax.plot(steps, found[name], label=label)
        ax.set(xlabel="training step", title=name)
        ax.legend()
