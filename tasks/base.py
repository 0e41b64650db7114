"""What is learned on: tasks, and families of tasks that share their array shapes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Params = Any
Batch = Any
Data = Any  # a pytree of arrays, passed to jit as an argument, never closed over
Cfg = Any  # a pytree of arrays: what distinguishes one task of a family from the next


class Task(NamedTuple):
    """One learning problem.

    Attributes:
        init: ``key -> params``.
        batch: ``(key, split) -> batch``, a random batch; ``split`` is the Python string ``"train"`` or ``"valid"``.
        loss: ``(params, key, batch) -> (scalar loss, aux)``, ``aux`` a dict of scalars (possibly empty).
    """

    init: Callable[[jax.Array], Params]
    batch: Callable[[jax.Array, str], Batch]
    loss: Callable[[Params, jax.Array, Batch], tuple[jax.Array, dict[str, jax.Array]]]


class TaskFamily(NamedTuple):
    """A distribution of tasks of one shape.

    Attributes:
        data: a pytree of arrays (stacked, uint8 where possible) that every task of the family reads.
        sample: ``key -> cfg``; ``vmap`` runs over ``cfg``, which is an empty dict where nothing is left to draw.
        task: ``(data, cfg) -> Task``; ``data`` and ``cfg`` may be traced.
    """

    data: Data
    sample: Callable[[jax.Array], Cfg]
    task: Callable[[Data, Cfg], Task]


def only(made: "Task | TaskFamily") -> TaskFamily:
    """The family of one task, which holds its own data; a family stays as it is."""
    return made if isinstance(made, TaskFamily) else TaskFamily((), lambda key: {}, lambda data, cfg: made)


class Workload(NamedTuple):
    """A network to train as people train it, with the rules by which optimizers are judged on it.

    Attributes:
        make: makes the :class:`Task`, or a family, of which one task is drawn; data are read only then.
        steps: the budget, in steps.
        target: the validation loss to reach; ``None`` takes NAdamW's at the end of its budget.
        every: steps between two looks at the validation loss.
        name: what tables call it.
        network: what kind of network it is.
        dataset: the data set; a comparison over workloads takes those on one data set for one observation.

    Example:
        >>> from tasks.families.synthetic import quadratic
        >>> Workload(quadratic, steps=100, target=0.1).every
        25
    """

    make: Callable[[], TaskFamily | Task]
    steps: int
    target: float | None = None
    every: int = 25
    name: str = "own"
    network: str = "own"
    dataset: str = "own"


def num_params(family: TaskFamily) -> int:
    """Count the parameters of a family's tasks, from shapes alone.

    Args:
        family: any family.

    Returns:
        The number of scalars in ``params``, masked ones included.

    Example:
        >>> from tasks.families.vision import image_mlp
        >>> num_params(image_mlp(side=8, width=32))
        2410
    """

    def init(data: Data, key: jax.Array) -> Params:
        sample_key, init_key = jax.random.split(key)
        return family.task(data, family.sample(sample_key)).init(init_key)

    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init, family.data, jax.random.key(0))))
