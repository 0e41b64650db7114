"""What one optimization step costs: every contender compiled for one run and timed alone, turn by turn with Adam."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tasks.suites import Entry

from . import cache
from .benchmark import Plan, family_of, on_devices, run_key, start_of_seed, train_step
from .contenders import REFERENCE, Contender, baselines

_ROUNDS = 5
_SECONDS = 0.04  # of one turn, about
_WARM_UP = 3  # steps
FLOOR = Contender("gradient", lambda rate, num_steps: optax.sgd(rate), ())  # what a step costs with next to no update


class Timing(NamedTuple):
    """Milliseconds of one optimization step, batch, gradient and update, on one task.

    Attributes:
        step: the contender's.
        reference: Adam's, measured in the same turns.
        gradient: plain SGD's, measured in the same turns: what the batch and the gradient cost alone.
    """

    step: float
    reference: float
    gradient: float


def time_suite(
    entries: Sequence[Entry],
    contenders: Sequence[Contender],
    plan: Plan,
    show: Callable[..., None] | None = None,
) -> dict[tuple[str, str], Timing]:
    """Times a step of every contender on every task.

    The steps of a task are compiled side by side and then run one after another: a turn of each, five rounds, so that
    whatever else slows the machine down meets them all. A contender's time is the median of its turns.

    Args:
        entries: the tasks.
        contenders: the optimizers.
        plan: as for the runs; ``folder`` keeps the times too.
        show: called with ``(tasks done, text)`` after each.

    Returns:
        ``{(task, contender's name): Timing}``.
    """
    times = {}
    for done, entry in enumerate(entries):
        steps = entry.steps or plan.steps
        keys = {c.name: cache.key(run=run_key(entry, c, plan), kind="timing", device=_device()) for c in contenders}
        kept = {c.name: cache.load(plan.folder, keys[c.name]) for c in contenders}
        missing = [c for c in contenders if kept[c.name] is None]
        if missing:
            turns = _turns(entry, missing, steps)
            for contender in missing:
                ours = [turns[name] for name in (contender.name, REFERENCE, FLOOR.name)]
                arrays = {"milliseconds": np.median(ours, axis=1)}
                cache.store(plan.folder, keys[contender.name], arrays)
                kept[contender.name] = arrays
        for name, found in kept.items():
            times[entry.name, name] = Timing(*map(float, found["milliseconds"] if found else ()))
        if show:
            show(done + 1, entry.name)
    return times


def _device() -> str:
    device = jax.local_devices()[0]
    return f"{device.device_kind} x{jax.local_device_count()}"


def _turns(entry: Entry, contenders: Sequence[Contender], steps: int) -> dict[str, list[float]]:
    """Milliseconds a step of every turn, of the contenders, the reference and the floor."""
    reference = next(c for c in baselines() if c.name == REFERENCE)
    everyone = {c.name: c for c in (FLOOR, reference, *contenders)}
    loops = dict(on_devices(lambda contender, _: _compiled(entry, contender, steps), list(everyone.values())))
    numbers = {}
    for index, seconds in sorted(loops.items()):
        seconds(_WARM_UP)
        numbers[index] = max(int(_SECONDS * _WARM_UP / seconds(_WARM_UP)), 1)
    turns: list[list[float]] = [[] for _ in everyone]
    for _ in range(_ROUNDS):
        for index, number in numbers.items():
            turns[index].append(1000 * loops[index](number) / number)
    return dict(zip(everyone, turns, strict=True))


def _compiled(entry: Entry, contender: Contender, steps: int) -> Callable[[int], float]:
    """A loop of optimization steps, compiled for the first device: from how many to how many seconds it took."""
    family, device = family_of(entry), jax.local_devices()[0]
    rate = contender.grid[len(contender.grid) // 2] if contender.grid else 1e-3

    def start(data):
        params = start_of_seed(family, data, jnp.uint32(0))[1]
        return params, contender.make(rate, steps).init(params)

    def loop(data, carry, key, number):
        task = start_of_seed(family, data, jnp.uint32(0))[0]
        step = train_step(task, contender.make(rate, steps))
        return jax.lax.fori_loop(0, number, lambda i, carry: step(carry, jax.random.fold_in(key, i))[0], carry)

    with jax.default_device(device):
        data, key = jax.device_put((family.data, jax.random.PRNGKey(1)), device)
        carry = jax.jit(start)(data)
        run = jax.jit(loop).lower(data, carry, key, jnp.int32(0)).compile()

    def seconds(number: int) -> float:
        count = jax.device_put(jnp.int32(number), device)
        before = time.perf_counter()
        jax.block_until_ready(run(data, carry, key, count))
        return time.perf_counter() - before

    return seconds
