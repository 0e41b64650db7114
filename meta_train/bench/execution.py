"""One contender on one task as compiled programs: losses of any learning rates and seeds, and the time of its steps."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tasks.base import Data, Task, TaskFamily
from tasks.suites import Entry

from .contenders import Contender

VALID_BATCHES = 16
_FIRST = 11  # steps that are not timed: SOAP's eigendecomposition is in the first, a first correction in the eleventh


class Run(NamedTuple):
    """A compiled contender on a task.

    Attributes:
        losses: ``(rates, seeds)``, pairs, to training losses ``[pairs, steps]`` and validation losses ``[pairs]``.
        seconds: a number of steps to how long they took, after the first eleven.
    """

    losses: Callable[[Sequence[float], Sequence[int]], tuple[np.ndarray, np.ndarray]]
    seconds: Callable[[int], float]


@functools.lru_cache(maxsize=4)
def family_of(entry: Entry) -> TaskFamily:
    """An entry's family, made once for the contenders that meet on it."""
    return entry.make()


def start_of_seed(family: TaskFamily, data: Data, seed: jax.Array) -> tuple[Task, Any, jax.Array, jax.Array]:
    """A seed's task and initial parameters, and the keys of its batches for training and validation."""
    k_cfg, k_init, k_train, k_valid = jax.random.split(jax.random.PRNGKey(seed), 4)
    task = family.task(data, family.sample(k_cfg))
    return task, task.init(k_init), k_train, k_valid


def train_step(task: Task, transform: optax.GradientTransformation) -> Callable:
    """One optimization step, ``((params, state), key) -> ((params, state), loss)``."""
    transform = optax.with_extra_args_support(transform)

    def step(carry, key):
        params, state = carry
        k_batch, k_loss = jax.random.split(key)
        batch = task.batch(k_batch, "train")
        loss, grads = jax.value_and_grad(lambda p: task.loss(p, k_loss, batch)[0])(params)
        updates, state = transform.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), loss

    return step


def compile_run(entry: Entry, contender: Contender, steps: int, device: jax.Device, width: int) -> Run:
    """Compiles a contender on a task, once for all its learning rates and seeds.

    Args:
        entry: the task.
        contender: the optimizer.
        steps: optimization steps of a run.
        device: where.
        width: how many runs are side by side, ``vmap``-ped, in one call. On a CPU one is as fast as many (measured:
            within a tenth, from 2,000 parameters on), and the same program then serves to time a step.

    Returns:
        The :class:`Run`. Both functions wait until the device is done.
    """
    family = family_of(entry)
    data, start, valid = _shared(entry, device)

    def lane(data: Data, params: Any, rate: jax.Array, seed: jax.Array, number: jax.Array):
        task, _, k_train, _ = start_of_seed(family, data, seed)
        transform = contender.make(rate, steps)
        step, keys = train_step(task, transform), jax.random.split(k_train, steps)

        def body(i, carry):
            carry, losses = carry
            carry, loss = step(carry, keys[i])
            return carry, losses.at[i].set(loss)

        (params, state), losses = jax.lax.fori_loop(
            0, number, body, ((params, transform.init(params)), jnp.zeros(steps))
        )
        return losses, params if contender.evaluate is None else contender.evaluate(state, params)

    def compiled(width: int):
        """The lanes; the number of steps is an argument, so that a few can be timed."""
        with jax.default_device(device):
            rates, seeds = jnp.zeros(width, jnp.float32), jnp.zeros(width, jnp.uint32)
            params = jax.eval_shape(start, data, seeds)
            lanes = jax.vmap(lane, (None, 0, 0, 0, None))
            return jax.jit(lanes).lower(data, params, rates, seeds, jnp.int32(0)).compile()

    program = compiled(width)

    def losses(rates: Sequence[float], seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        with jax.default_device(device):
            for first in range(0, len(seeds), width):
                part = slice(first, first + width)
                rate = _padded(np.asarray(rates[part], np.float32), width)
                seed = _padded(np.asarray(seeds[part], np.uint32), width)
                curves, params = program(data, start(data, seed), rate, seed, np.int32(steps))
                parts.append((np.asarray(curves), np.asarray(valid(data, params, seed))))
        curves, ends = (np.concatenate(arrays)[: len(seeds)] for arrays in zip(*parts, strict=True))
        return curves, ends

    @functools.cache
    def single():
        with jax.default_device(device):
            seed = np.zeros(1, np.uint32)
            rate = np.full(1, contender.grid[len(contender.grid) // 2] if contender.grid else 1.0, np.float32)
            return program if width == 1 else compiled(1), (start(data, seed), rate, seed)

    def clock(number: int) -> float:
        run, arguments = single()
        with jax.default_device(device):
            before = time.perf_counter()
            jax.block_until_ready(run(data, *arguments, np.int32(number)))
            return time.perf_counter() - before

    def seconds(number: int) -> float:
        """From a warmed state: a run with the first steps less one of these alone."""
        return max(clock(_FIRST + number) - clock(_FIRST), 1e-9 * number)  # an interruption of the shorter one

    return Run(losses, seconds)


@functools.lru_cache(maxsize=32)
def _shared(entry: Entry, device: jax.Device) -> tuple[Data, Callable, Callable]:
    """What all contenders on a task share: its data on the device, the start of some seeds and their validation."""
    family = family_of(entry)

    def start(data, seed):
        return start_of_seed(family, data, seed)[1]

    def valid(data, params, seed):
        task, _, _, k_valid = start_of_seed(family, data, seed)

        def loss(key):
            k_batch, k_loss = jax.random.split(key)
            return task.loss(params, k_loss, task.batch(k_batch, "valid"))[0]

        return jnp.mean(jax.lax.map(loss, jax.random.split(k_valid, VALID_BATCHES)))

    return (
        jax.device_put(family.data, device),
        jax.jit(jax.vmap(start, (None, 0))),
        jax.jit(jax.vmap(valid, (None, 0, 0))),
    )


def _padded(values: np.ndarray, width: int) -> np.ndarray:
    return np.concatenate([values, np.repeat(values[-1:], width - len(values))])
