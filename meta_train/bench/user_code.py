"""A user's own task or optimizer for the benchmark, or network to tune, from one function in a file of theirs."""

import inspect
import math
import runpy
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tasks.base import Task, TaskFamily, Workload, only
from tasks.suites import Entry

from ..train.config import ConfigError
from ..train.problems import Problem, make_tuner, metrics_of
from .contenders import GRID, Contender, around


class UserCodeError(ConfigError):
    """A user's file is missing, does not run, or its function gives something else than what it should."""


def task(spec: str) -> Entry | Workload:
    """The benchmark's entry for a user's task, or a user's workload.

    Args:
        spec: ``FILE.py:FUNCTION``; the function takes nothing and returns a :class:`tasks.base.TaskFamily`, or a
            :class:`tasks.base.Task` where there is nothing to draw, or a :class:`tasks.base.Workload` with a budget
            and a validation target of its own.

    Returns:
        An entry or a workload called after the file (and the function, unless that is ``make``).

    Raises:
        UserCodeError: as it says.
    """
    name, make = _function(spec)
    made = _call(spec, make)
    workload = made if isinstance(made, Workload) else None
    if workload is not None:
        target = workload.target
        if target is not None and not (isinstance(target, int | float) and math.isfinite(target)):
            raise UserCodeError(f"{spec}: a workload's target is a finite number or None, not {target!r}")
        for field in ("steps", "every"):
            if not isinstance(getattr(workload, field), int) or getattr(workload, field) < 1:
                raise UserCodeError(
                    f"{spec}: a workload's {field} is a whole number from 1, not {getattr(workload, field)!r}"
                )
        made = _call(spec, workload.make)
    if not isinstance(made, Task | TaskFamily):
        kinds = "a tasks.Task, tasks.TaskFamily or tasks.Workload"
        raise UserCodeError(f"{spec} returned {type(made).__name__}, not {kinds}")
    made = only(made)

    def losses(data: Any, key: jax.Array) -> list[Any]:
        built, params = _begun(made, data, key)
        return [built.loss(params, key, built.batch(key, split)) for split in ("train", "valid")]

    def slope(data: Any, key: jax.Array) -> Any:
        built, params = _begun(made, data, key)
        return jax.grad(lambda params: built.loss(params, key, built.batch(key, "train"))[0])(params)

    for found in _call(spec, jax.eval_shape, losses, made.data, jax.random.PRNGKey(0)):
        if not isinstance(found, tuple) or len(found) != 2:
            raise UserCodeError(f"{spec}: the loss function returns the loss and a dict, as in `return loss, {{}}`")
        loss = found[0]
        if loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
            raise UserCodeError(f"{spec}: the loss is {loss.dtype}{list(loss.shape)}, not a float scalar")
    _call(spec, jax.eval_shape, slope, made.data, jax.random.PRNGKey(0))
    if workload is not None:
        return workload._replace(make=lambda: made, name=name, dataset=spec)
    return Entry(name, "own", spec, lambda: made)


def parameters(task: Entry | Workload) -> Any:
    """The shapes and dtypes of a task's parameters."""
    family = only(task.make())
    return jax.eval_shape(lambda data, key: _begun(family, data, key)[1], family.data, jax.random.PRNGKey(0))


def _begun(family: TaskFamily, data: Any, key: jax.Array) -> tuple[Task, Any]:
    """A task of a family, and its parameters."""
    built = family.task(data, family.sample(key))
    return built, built.init(key)


def optimizer(spec: str, num_steps: int = 10, params: Any = None) -> Contender:
    """The benchmark's contender for a user's optimizer.

    Args:
        spec: ``FILE.py:FUNCTION``; the function returns an Optax transform. Where it has a parameter ``learning_rate``,
            that is tuned over seven half-decades, about its default value if it has one, which is then reported
            beside the tuned one. Where it has a parameter ``num_steps``, it is given the planned number of updates.
        num_steps: that number, as the function will see it.
        params: of a task that it is for, arrays or their shapes; it is tried on them.

    Returns:
        A contender called after the file (and the function, unless that is ``make``).

    Raises:
        UserCodeError: as it says.
    """
    name, function = _function(spec)
    parameters = inspect.signature(function).parameters
    known = ("learning_rate", "num_steps")
    for parameter in parameters.values():
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if parameter.name not in known and required:
            raise UserCodeError(f"{spec}: its parameter {parameter.name!r} is none of {', '.join(known)}")

    def make(rate: Any, num_steps: int) -> optax.GradientTransformation:
        given = {"learning_rate": rate, "num_steps": num_steps}
        return function(**{key: value for key, value in given.items() if key in parameters})

    def update(rate: jax.Array, grads: Any) -> Any:
        made = make(rate, num_steps)
        if not hasattr(made, "init") or not hasattr(made, "update"):
            raise TypeError(f"returned {type(made).__name__}, not an Optax transform")
        transform = optax.with_extra_args_support(made)
        state = transform.init(grads)
        updates, new = transform.update(grads, state, grads, value=jnp.ones(()))
        shapes = [jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree) for tree in (state, new)]
        if shapes[0] != shapes[1]:
            raise TypeError("an update changes the structure, shapes or dtypes of the state: it cannot be compiled")
        return optax.apply_updates(grads, updates)

    tried = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)} if params is None else params
    _call(spec, jax.eval_shape, update, jnp.ones(()), tried)
    if "learning_rate" not in parameters:
        return Contender(name, make, (), about=f"{spec}, one setting everywhere")
    default = parameters["learning_rate"].default
    if not isinstance(default, int | float):
        return Contender(name, make, GRID, about=spec)
    if not 0 < default < math.inf:
        raise UserCodeError(f"{spec}: the default learning_rate is a positive number, not {default!r}")
    return Contender(name, make, around(default), default=float(default), about=spec)


def network(spec: str) -> tuple[str, Problem]:
    """A user's network to tune.

    Args:
        spec: ``FILE.py:FUNCTION``; the function takes nothing and returns a
            :class:`~meta_train.train.problems.Problem`.

    Returns:
        A name for tables, and the problem.

    Raises:
        UserCodeError: the file or the function is missing, gives something else, or fails in a cycle of the tuner.
    """
    name, make = _function(spec)
    made = _call(spec, make)
    if not isinstance(made, Problem):
        raise UserCodeError(f"{spec} returned {type(made).__name__}, not a meta_train.train.problems.Problem")
    for split in ("train", "valid", "test"):
        if split not in made.data:
            raise UserCodeError(f"{spec}: its data have no {split!r} among {', '.join(map(repr, made.data))}")

    def begin(data: Any, key: jax.Array) -> Any:
        tuner = make_tuner(made, weights=made.weights or optax.adam(1e-3))
        state, info = tuner.cycle(tuner.init(*made.init(key)), key, data)
        return metrics_of(made, state.params, made.batch(data["test"], key))["loss"], info

    _call(spec, jax.eval_shape, begin, made.data, jax.random.key(0))
    return name, made


def distinct(chosen: list, kind: str) -> list:
    """What was chosen, names being told apart.

    Raises:
        ConfigError: two have one name; ``kind`` says two of what.
    """
    names = [one.name for one in chosen]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two {kind}s are called {name!r}: rename a file or folder")
    return chosen


def _function(spec: str) -> tuple[str, Callable]:
    """A name for tables, and the function that ``FILE.py:FUNCTION`` names."""
    file, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier():
        raise UserCodeError(f"{spec!r}: give a file and a function in it, as in my_file.py:make")
    path = Path(file)
    if not path.is_file():
        raise UserCodeError(f"{spec!r}: there is no file {file}")
    found = _call(spec, runpy.run_path, str(path), run_name=path.stem).get(name)
    if not callable(found):
        raise UserCodeError(f"{spec!r}: {file} has no function {name}")
    return path.stem if name == "make" else f"{path.stem}:{name}", found


def _call(spec: str, function: Callable, *arguments: Any, **more: Any) -> Any:
    """Calls a user's code; whatever it raises becomes one line, with the last line of the user's file in it."""
    try:
        return function(*arguments, **more)
    except (Exception, SystemExit) as error:
        file = spec.rpartition(":")[0]
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == Path(file)
        ]
        where = f", line {lines[-1]}" if lines else ""
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserCodeError(f"{spec}{where}: {type(error).__name__}: {first}") from None
