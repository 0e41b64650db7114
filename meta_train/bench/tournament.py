"""The benchmark: optimizers on held-out tasks, tuned on a grid by other seeds than those that are reported."""

import functools
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tasks.suites import Entry

from . import cache
from .contenders import REFERENCE, Contender, baselines, fingerprint, learned, pretrained
from .execution import Run, compile_run, family_of, start_of_seed
from .measures import smooth
from .timing import FLOOR, Timing, machine, take_turns

__all__ = ["Contender", "Plan", "Result", "baselines", "learned", "pretrained", "run_suite"]

_VERSION = 5  # of what a run does: another number leaves the results kept so far unused
_EXTENSIONS = 3  # times that a grid is made longer, at most, where the best rate lies on its edge
_AHEAD = 3  # learning rates that go on from the first tuning seed to the others
_TUNING, _REPORTING = 1_000_000, 2_000_000  # seeds of the two start here


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
    timing: Timing | None = None
    has_data: bool = True  # and no synthetic function

    @property
    def diverged(self) -> int:
        """How many runs ended non-finite or above their start."""
        return int(np.sum(~(self.final <= self.initial + 0.05 * np.abs(self.initial))))


class Plan(NamedTuple):
    """How a benchmark is run.

    Attributes:
        steps: optimization steps, where a task does not fix its own.
        seeds: reporting seeds.
        tuning_seeds: seeds that choose the learning rate, by the mean of the validation loss at the end: the first
            tries the whole grid, and more beyond it where the best lies on its edge; the others try the three
            rates that did best.
        timed: whether a step of each contender is timed, too.
        folder: where results are kept, or ``None``. Those that it holds are not computed again.
    """

    steps: int
    seeds: int
    tuning_seeds: int = 2
    timed: bool = False
    folder: Path | None = None


def run_suite(
    entries: Sequence[Entry], contenders: Sequence[Contender], plan: Plan, show: Callable[..., None] | None = None
) -> list[Result]:
    """Tunes every contender on every task and reports it on other seeds.

    A seed is one task of the family, one initialisation and one stream of batches: the same for all contenders. The
    contenders of a task run on the local devices side by side; then, where that is planned, their steps are timed, one
    at a time with all else at rest.

    Args:
        entries: the tasks.
        contenders: the optimizers.
        plan: how.
        show: called with ``(runs done, text)`` after each.

    Returns:
        Tasks outermost, both in the order of the arguments: a result at the chosen learning rate, and one at the
        default, as far as the contender has them.

    Raises:
        ValueError: steps are to be timed without the reference, tuned Adam, among the contenders.
    """
    if plan.timed and REFERENCE not in {contender.name for contender in contenders}:
        raise ValueError(f"steps are timed beside {REFERENCE!r}: it must be one of the contenders")
    results, done = [], 0
    for entry in entries:
        outcomes: dict[str, _Outcome] = {}
        for contender, outcome in _outcomes(entry, contenders, plan):
            outcomes[contender.name] = outcome
            if contender is not FLOOR:
                done += 1
                if show:
                    show(done, f"{entry.name}: {contender.name}")
        timings = _timings(entry, contenders, plan, outcomes) if plan.timed else {}
        for contender in contenders:
            results += _results(entry, contender, plan, outcomes[contender.name].arrays, timings.get(contender.name))
    return results


def run_key(entry: Entry, contender: Contender, plan: Plan) -> str:
    """The hash of everything that the results of a run depend on."""
    steps = entry.steps or plan.steps
    return cache.key(
        **_environment(),
        task=_task_key(entry),
        contender=_fingerprint(contender, steps, entry),
        grid=contender.grid,
        default=contender.default,
        steps=steps,
        seeds=plan.seeds,
        tuning_seeds=plan.tuning_seeds,
    )


def on_devices(
    function: Callable[[Any, jax.Device, Callable[[], None]], Any], jobs: Sequence[Any]
) -> Iterator[tuple[int, Any]]:
    """Calls a function for every job, a thread a local device; so compiling is parallel too.

    Args:
        function: called once a job, with the job, a device and ``go_on``, which it calls now and then: it raises once
            another job has failed or Ctrl-C has ended it all, since nobody can end a thread from outside.
        jobs: any.

    Yields:
        ``(the job's index, its result)`` as they come. An exception of a job ends it all.
    """
    over = threading.Event()

    def go_on() -> None:
        if over.is_set():
            raise CancelledError

    devices: queue.SimpleQueue[jax.Device] = queue.SimpleQueue()
    for device in jax.local_devices():
        devices.put(device)

    def run(job):
        device = devices.get()
        try:
            return function(job, device, go_on)
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
            over.set()
            pool.shutdown(cancel_futures=True)


class _Outcome(NamedTuple):
    arrays: dict[str, np.ndarray]  # of _tune_and_report
    run: Run | None  # compiled, where it is to be timed


def _outcomes(entry: Entry, contenders: Sequence[Contender], plan: Plan) -> Iterator[tuple[Contender, _Outcome]]:
    """The contenders' runs on a task, as they come; those to be timed, and what they are timed against, compiled."""
    steps = entry.steps or plan.steps
    untimed = [c for c in contenders if plan.timed and cache.load(plan.folder, _timing_key(entry, c)) is None]
    to_time = {contender.name for contender in untimed} | ({REFERENCE, FLOOR.name} if untimed else set())

    def work(contender: Contender, device: jax.Device, go_on: Callable[[], None]) -> _Outcome:
        def compiled() -> Run:
            width = 1 if device.platform == "cpu" else max(len(contender.grid), plan.seeds)
            return compile_run(entry, contender, steps, device, width)

        run = compiled() if contender.name in to_time else None
        if contender is FLOOR:
            return _Outcome({}, run)
        key = run_key(entry, contender, plan)
        arrays = cache.load(plan.folder, key)
        if arrays is None:
            arrays = _tune_and_report(run or compiled(), contender, plan, go_on)
            cache.store(plan.folder, key, arrays)
        return _Outcome(arrays, run)

    jobs = [*contenders, FLOOR] if untimed else list(contenders)
    for index, outcome in on_devices(work, jobs):
        yield jobs[index], outcome


def _timings(
    entry: Entry, contenders: Sequence[Contender], plan: Plan, outcomes: dict[str, _Outcome]
) -> dict[str, Timing]:
    """The contenders' times: those kept, and the others', measured beside the reference's and the floor's."""
    loops = {name: outcome.run.seconds for name, outcome in outcomes.items() if outcome.run}
    milliseconds = take_turns(loops)
    timings = {}
    for contender in contenders:
        key = _timing_key(entry, contender)
        kept = cache.load(plan.folder, key)
        if kept is None:
            against = (milliseconds[name] for name in (contender.name, REFERENCE, FLOOR.name))
            kept = {"milliseconds": np.fromiter(against, float)}
            cache.store(plan.folder, key, kept)
        timings[contender.name] = Timing(*map(float, kept["milliseconds"]))
    return timings


def _results(
    entry: Entry, contender: Contender, plan: Plan, arrays: dict[str, np.ndarray], timing: Timing | None
) -> list[Result]:
    family, steps, params = family_of(entry), entry.steps or plan.steps, _shapes(entry)
    state = jax.eval_shape(contender.make(0.1, steps).init, params)
    labels = [contender.name] + ([] if contender.default is None else [f"{contender.name}@{contender.default:g}"])
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
            timing=timing,
            has_data=entry.family == "own" or bool(jax.tree.leaves(family.data)),
        )
        for row, (label, losses) in enumerate(zip(labels, arrays["losses"].astype(np.float64), strict=True))
    ]


def _tune_and_report(run: Run, contender: Contender, plan: Plan, go_on: Callable[[], None]) -> dict[str, np.ndarray]:
    """Chooses the rate on the tuning seeds; the chosen one's and the default's losses on the reporting seeds."""

    def losses(rates: Sequence[float], first: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
        """``[rates, seeds, steps]`` in training and ``[rates, seeds]`` in validation."""
        pairs = [(rate, first + seed) for rate in rates for seed in range(seeds)]
        go_on()
        train, valid = run.losses(*zip(*pairs, strict=True))
        return train.reshape(len(rates), seeds, -1), valid.reshape(len(rates), seeds).astype(np.float64)

    def validations(rates: Sequence[float], first: int, seeds: int) -> np.ndarray:
        """``[rates, seeds]``, ``inf`` for a run that diverged."""
        found = losses(rates, first, seeds)[1]
        return np.where(np.isfinite(found), found, np.inf)

    grid, best, scores = list(contender.grid), 0, np.zeros((0, 1))
    if grid:
        scores = validations(grid, _TUNING, 1)
        for _ in range(_EXTENSIONS):
            best = int(np.argmin(scores[:, 0]))
            beyond = _beyond(grid, best)
            if not beyond:
                break
            more = validations(beyond, _TUNING, 1)
            order = np.argsort([*grid, *beyond])
            grid = [float(rate) for rate in np.array([*grid, *beyond])[order]]
            scores = np.concatenate([scores, more])[order]
        ahead = np.argsort(scores[:, 0], kind="stable")[:_AHEAD]
        if plan.tuning_seeds > 1:
            more = validations([grid[i] for i in ahead], _TUNING + 1, plan.tuning_seeds - 1)
            scores = np.concatenate([scores, np.full((len(scores), plan.tuning_seeds - 1), np.inf)], axis=1)
            scores[ahead, 1:] = more
        best = int(ahead[np.argmin(scores[ahead].mean(axis=1))])
    rates = [grid[best] if grid else math.nan]
    if contender.default is not None:
        rates.append(contender.default)
    distinct = list(dict.fromkeys(rates))
    train, valid = losses(distinct, _REPORTING, plan.seeds)
    rows = [distinct.index(rate) for rate in rates]
    return {
        "rates": np.asarray(rates),
        "losses": train[rows],
        "valid": valid[rows],
        "scores": scores,  # [grid, tuning seeds], inf where a rate was no longer tried
        "on_edge": np.asarray(bool(grid) and best in (0, len(grid) - 1)),
    }


def _beyond(grid: Sequence[float], best: int) -> list[float]:
    """Two more rates beyond the edge of a grid where the best one lies on it."""
    if len(grid) < 2 or 0 < best < len(grid) - 1:
        return []
    edge, factor = (grid[0], grid[0] / grid[1]) if best == 0 else (grid[-1], grid[-1] / grid[-2])
    return [float(f"{edge * factor**number:.3g}") for number in (1, 2)]


def _final(losses: np.ndarray) -> np.ndarray:
    return losses[..., -max(losses.shape[-1] // 20, 1) :].mean(axis=-1)


def _environment() -> dict[str, Any]:
    return {
        "version": _VERSION,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "platform": jax.local_devices()[0].platform,
        "precision": str(jnp.result_type(float)),
    }


def _timing_key(entry: Entry, contender: Contender) -> str:
    """The number of steps is left out: it changes a schedule's constants, not what a step costs."""
    return cache.key(
        **_environment(), task=_task_key(entry), contender=_fingerprint(contender, 1000, entry), machine=machine()
    )


@functools.lru_cache(maxsize=256)
def _fingerprint(contender: Contender, steps: int, entry: Entry) -> str:
    return fingerprint(contender, steps, _shapes(entry))


def _shapes(entry: Entry) -> Any:
    """The shapes of an entry's parameters."""
    family = family_of(entry)
    return jax.eval_shape(lambda data: start_of_seed(family, data, jnp.uint32(0))[1], family.data)


@functools.lru_cache(maxsize=64)
def _task_key(entry: Entry) -> str:
    """What a task is: its program and its data."""
    family = family_of(entry)

    def program(data, seed):
        task, params, k_train, k_valid = start_of_seed(family, data, seed)

        def loss(params, key, split):
            return task.loss(params, key, task.batch(key, split))[0]

        return params, jax.value_and_grad(loss)(params, k_train, "train"), loss(params, k_valid, "valid")

    return cache.key(program=cache.program(program, family.data, jnp.uint32(0)), data=cache.contents(family.data))
