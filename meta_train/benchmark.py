"""The benchmark: optimizers on held-out tasks, tuned on a grid by other seeds than those that are reported."""

import functools
import math
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tasks.base import Data, Task, TaskFamily
from tasks.suites import Entry

from . import cache
from .contenders import Contender, baselines, few_baselines, fingerprint, learned, pretrained
from .measures import smooth

__all__ = ["Contender", "Result", "baselines", "few_baselines", "learned", "pretrained", "run_suite", "run_task"]

_VERSION = 1  # of what a run does: another number leaves the results kept so far unused
_VALID_BATCHES = 16
_TUNING, _REPORTING = 1_000_000, 2_000_000  # seeds of the two start here
_MOST_LANES = 16  # runs side by side in one compiled call on a CPU


class Result(NamedTuple):
    """One contender on one task."""

    task: str
    contender: str
    baseline: bool  # not a learned rule
    learning_rate: float  # the one reported
    on_edge: bool  # of the grid: a wider one might do better
    curves: np.ndarray  # [seeds, steps], training losses, smoothed
    initial: np.ndarray  # [seeds], training loss before the first step
    final: np.ndarray  # [seeds], mean training loss over the last twentieth of the steps
    valid: np.ndarray  # [seeds], validation loss after the last step
    state_bytes: int = 0  # of the optimizer's state
    num_params: int = 0

    @property
    def diverged(self) -> int:
        """How many runs ended non-finite or above their start."""
        return int(np.sum(~(self.final <= np.where(self.initial > 0, 1.05, 0.95) * self.initial)))


class Plan(NamedTuple):
    """How a benchmark is run.

    Attributes:
        steps: optimization steps, where a task does not fix its own.
        seeds: reporting seeds.
        tuning_seeds: seeds that choose the learning rate, by the mean of the final training loss, as is reported.
        folder: where results are kept, or ``None``.
    """

    steps: int
    seeds: int
    tuning_seeds: int = 2
    folder: Path | None = None


def run_task(entry: Entry, contender: Contender, plan: Plan, device: jax.Device | None = None) -> list[Result]:
    """Tunes a contender on one task and reports it on other seeds.

    A seed is one task of the family, one initialisation and one stream of batches: the same for all contenders.

    Args:
        entry: the task.
        contender: the optimizer.
        plan: how.
        device: where; by default the first.

    Returns:
        The result at the chosen learning rate, and the one at the default, as far as the contender has them.
    """
    family, steps = family_of(entry), entry.steps or plan.steps
    device = device or jax.local_devices()[0]
    key = run_key(entry, contender, plan, device)
    arrays = cache.load(plan.folder, key)
    if arrays is None:
        with jax.default_device(device):
            arrays = _compute(family, contender, steps, plan, device)
        cache.store(plan.folder, key, arrays)
    params = jax.eval_shape(lambda data: start_of_seed(family, data, jnp.uint32(0))[1], family.data)
    state = jax.eval_shape(contender.make(0.1, steps).init, params)
    labels = (
        [contender.name] if contender.default is None else [contender.name, f"{contender.name}@{contender.default:g}"]
    )
    return [
        Result(
            task=entry.name,
            contender=label,
            baseline=contender.baseline,
            learning_rate=float(arrays["rates"][row]),
            on_edge=bool(arrays["on_edge"]) and row == 0,
            curves=smooth(losses),
            initial=losses[:, 0],
            final=_final(losses),
            valid=arrays["valid"][row].astype(np.float64),
            state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
            num_params=sum(leaf.size for leaf in jax.tree.leaves(params)),
        )
        for row, (label, losses) in enumerate(zip(labels, arrays["losses"].astype(np.float64), strict=True))
    ]


def run_suite(
    entries: Sequence[Entry],
    contenders: Sequence[Contender],
    plan: Plan,
    show: Callable[..., None] | None = None,
) -> list[Result]:
    """Runs every contender on every task, on every local device one after another.

    Args:
        entries: the tasks.
        contenders: the optimizers.
        plan: how; results that its folder holds are not computed again.
        show: called with ``(runs done, text)`` after each.

    Returns:
        The results, tasks outermost, in the order of the arguments.
    """
    jobs = [(entry, contender) for entry in entries for contender in contenders]

    def run(job: tuple[Entry, Contender], device: jax.Device) -> list[Result]:
        return run_task(job[0], job[1], plan, device)

    found: dict[int, list[Result]] = {}
    for index, results in on_devices(run, jobs):
        found[index] = results
        if show:
            show(len(found), f"{jobs[index][0].name}: {jobs[index][1].name}")
    return [result for index in range(len(jobs)) for result in found[index]]


def on_devices(function: Callable[[Any, jax.Device], Any], jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Calls a function of ``(job, device)`` for every job, a thread a local device; compiling is parallel so too.

    Args:
        function: called once a job.
        jobs: any.

    Yields:
        ``(the job's index, its result)`` as they come. An exception of a job ends it all.
    """
    devices: queue.SimpleQueue[jax.Device] = queue.SimpleQueue()
    for device in jax.local_devices():
        devices.put(device)

    def run(job):
        device = devices.get()
        try:
            return function(job, device)
        finally:
            devices.put(device)

    with ThreadPoolExecutor(max_workers=jax.local_device_count()) as pool:
        pending: dict[Future, int] = {pool.submit(run, job): index for index, job in enumerate(jobs)}
        try:
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield pending.pop(future), future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=4)
def family_of(entry: Entry) -> TaskFamily:
    """An entry's family, made once for the contenders that meet on it."""
    return entry.make()


@functools.lru_cache(maxsize=64)
def _task_key(entry: Entry) -> str:
    """What a task is: its program and its data."""
    family = family_of(entry)

    def program(data, seed):
        task, params, k_train, k_valid = start_of_seed(family, data, seed)
        return params, [
            task.loss(params, key, task.batch(key, split))[0] for key, split in ((k_train, "train"), (k_valid, "valid"))
        ]

    return cache.key(program=cache.program(program, family.data, jnp.uint32(0)), data=cache.contents(family.data))


_fingerprint = functools.lru_cache(maxsize=256)(fingerprint)


def run_key(entry: Entry, contender: Contender, plan: Plan, device: jax.Device | None = None) -> str:
    """The hash of everything that the results of a run depend on."""
    device, steps = device or jax.local_devices()[0], entry.steps or plan.steps
    return cache.key(
        version=_VERSION,
        jax=jax.__version__,
        optax=optax.__version__,
        platform=device.platform,
        precision=str(jnp.result_type(float)),
        task=_task_key(entry),
        contender=_fingerprint(contender, steps),
        grid=contender.grid,
        default=contender.default,
        steps=steps,
        seeds=plan.seeds,
        tuning_seeds=plan.tuning_seeds,
    )


def start_of_seed(family: TaskFamily, data: Data, seed: jax.Array) -> tuple[Task, Any, jax.Array, jax.Array]:
    """A seed's task and initial parameters, and the keys of its batches for training and validation."""
    k_cfg, k_init, k_train, k_valid = jax.random.split(jax.random.PRNGKey(seed), 4)
    task = family.task(data, family.sample(k_cfg))
    return task, task.init(k_init), k_train, k_valid


def train_step(task: Task, transform: optax.GradientTransformation) -> Callable:
    """One optimization step, ``((params, state), key) -> ((params, state), loss)``, for ``jax.lax.scan``."""
    transform = optax.with_extra_args_support(transform)

    def step(carry, key):
        params, state = carry
        k_batch, k_loss = jax.random.split(key)
        batch = task.batch(k_batch, "train")
        loss, grads = jax.value_and_grad(lambda p: task.loss(p, k_loss, batch)[0])(params)
        updates, state = transform.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), loss

    return step


def _final(losses: np.ndarray) -> np.ndarray:
    return losses[..., -max(losses.shape[-1] // 20, 1) :].mean(axis=-1)


def _compute(
    family: TaskFamily, contender: Contender, steps: int, plan: Plan, device: jax.Device
) -> dict[str, np.ndarray]:
    """The arrays of a run: one compiled call for a few (rate, seed) lanes side by side, called for all of them."""

    def lane(data: Data, rate: jax.Array, seed: jax.Array):
        task, params, k_train, k_valid = start_of_seed(family, data, seed)
        transform = contender.make(rate, steps)
        carry = (params, transform.init(params))
        (params, state), losses = jax.lax.scan(train_step(task, transform), carry, jax.random.split(k_train, steps))
        if contender.evaluate is not None:
            params = contender.evaluate(state, params)

        def valid(key):
            k_batch, k_loss = jax.random.split(key)
            return task.loss(params, k_loss, task.batch(k_batch, "valid"))[0]

        return losses, jnp.mean(jax.lax.map(valid, jax.random.split(k_valid, _VALID_BATCHES)))

    most = max(len(contender.grid) * plan.tuning_seeds, plan.seeds)
    width = min(plan.seeds, _MOST_LANES) if device.platform == "cpu" else most
    data = jax.device_put(family.data, device)
    lanes = jax.jit(jax.vmap(lane, (None, 0, 0)))

    def run(rates: Sequence[float], seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Every rate with every seed: losses ``[rates, seeds, steps]`` and validation losses ``[rates, seeds]``."""
        pairs = [(rate, seed) for rate in rates for seed in seeds]
        parts = []
        for first in range(0, len(pairs), width):
            part = pairs[first : first + width]
            rate, seed = zip(*(part + part[-1:] * (width - len(part))), strict=True)
            losses, valid = jax.device_get(lanes(data, jnp.asarray(rate, jnp.float32), jnp.asarray(seed, jnp.uint32)))
            parts.append((losses[: len(part)], valid[: len(part)]))
        losses, valid = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return losses.reshape(len(rates), len(seeds), -1), valid.reshape(len(rates), len(seeds))

    best, scores = 0, np.zeros(0)
    if contender.grid:
        tuning, _ = run(contender.grid, range(_TUNING, _TUNING + plan.tuning_seeds))
        scores = np.nan_to_num(_final(tuning.astype(np.float64)), nan=np.inf).mean(axis=1)
        best = int(np.argmin(scores))
    rates = [contender.grid[best] if contender.grid else math.nan]
    if contender.default is not None:
        rates.append(contender.default)
    losses, valid = run(list(dict.fromkeys(rates)), range(_REPORTING, _REPORTING + plan.seeds))
    rows = [list(dict.fromkeys(rates)).index(rate) for rate in rates]
    return {
        "rates": np.asarray(rates),
        "losses": losses[rows],
        "valid": valid[rows],
        "scores": scores,  # of the grid, on the tuning seeds
        "on_edge": np.asarray(bool(contender.grid) and best in (0, len(contender.grid) - 1)),
    }
