"""Delays and batches laid out together with equal totals, and the input pipeline that they drive (host side)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .batches import BatchSchedule, constant_batch
from .delays import Statistics, SyncSchedule, at_least_one, constant


class Plan(NamedTuple):
    """Delays and batch sizes of a run, round by round.

    Attributes:
        delays: int64 [R], steps of each round.
        batches: int64 [T], samples that a worker takes at each step, T = sum(delays). The last may be smaller, so that
            sum(batches) is what was asked for.
    """

    delays: np.ndarray
    batches: np.ndarray


def make_plan(total_samples: int, sync_every: SyncSchedule | int, batch_size: BatchSchedule | int) -> Plan:
    """Lay out a run in which each worker takes exactly ``total_samples`` samples, whatever the schedules.

    Args:
        total_samples: of one worker.
        sync_every: a delay or a delay schedule that needs no statistics.
        batch_size: a batch size or a batch schedule that needs no statistics.

    Returns:
        A :class:`Plan`; feed ``plan_delays(plan)`` to :func:`learned_opt.local_sgd`, the plan to :func:`plan_batches`.

    Raises:
        ValueError: if a schedule answers below 1.

    Example:
        >>> from learned_opt.schedules import geometric_batch, make_plan
        >>> plan = make_plan(20, 2, geometric_batch(2, factor=2.0, every=2, maximum=8))
        >>> plan.delays.tolist(), plan.batches.tolist()
        ([2, 2, 1], [2, 2, 4, 4, 8])
    """
    at_least_one("make_plan: total_samples", total_samples)
    delay = sync_every if callable(sync_every) else constant(sync_every)
    batch = batch_size if callable(batch_size) else constant_batch(batch_size)
    delays: list[int] = []
    batches: list[int] = []
    left = total_samples
    while left > 0:
        steps = int(delay(len(delays), len(batches), Statistics()))
        if steps < 1:
            raise ValueError(f"make_plan: the delay schedule gave {steps} for round {len(delays)}")
        taken = 0
        while taken < steps and left > 0:
            size = int(batch(len(batches), Statistics()))
            if size < 1:
                raise ValueError(f"make_plan: the batch schedule gave {size} for step {len(batches)}")
            batches.append(min(size, left))
            left -= batches[-1]
            taken += 1
        delays.append(taken)
    return Plan(np.asarray(delays), np.asarray(batches))


def plan_delays(plan: Plan) -> SyncSchedule:
    """Return a plan's delays as a delay schedule; after the last round it stays at the last delay."""
    table = np.asarray(plan.delays, np.int32)
    return lambda round_, step, statistics: jnp.asarray(table)[jnp.minimum(round_, len(table) - 1)]


def bucket(size: int, buckets: Sequence[int]) -> int:
    """Return the smallest bucket that holds ``size``: few shapes, so few compilations.

    Raises:
        ValueError: if none does.
    """
    fitting = [b for b in buckets if b >= size]
    if not fitting:
        raise ValueError(f"bucket: {size} samples fit in none of {sorted(buckets)}; add a larger one")
    return min(fitting)


class PlannedBatch(NamedTuple):
    """One step's samples: ``indices`` int32 [workers, bucket] and ``mask`` bool [workers, bucket], False on padding."""

    indices: np.ndarray
    mask: np.ndarray


def plan_batches(
    plan: Plan, num_examples: int, workers: int, *, seed: int, buckets: Sequence[int] | None = None
) -> Iterator[PlannedBatch]:
    """Draw a plan's batches: each epoch is a permutation dealt to the workers, nothing is drawn twice in it.

    Args:
        plan: of :func:`make_plan`.
        num_examples: of the data set, at least ``workers``.
        workers: P.
        seed: of the permutations; with the other arguments it decides every batch.
        buckets: padded sizes to choose from; one, the largest batch, if None.

    Yields:
        A :class:`PlannedBatch` a step. Padding repeats index 0 under a False mask: use :func:`masked_mean`.
    """
    if num_examples < workers:
        raise ValueError(f"plan_batches: {num_examples} examples cannot be dealt to {workers} workers")
    sizes = [int(plan.batches.max())] if buckets is None else list(buckets)
    share = num_examples // workers
    epoch, order, start = -1, np.zeros(0, int), 0
    for size in plan.batches.tolist():
        indices = np.zeros((workers, bucket(size, sizes)), np.int32)
        places = np.arange(start, start + size)
        for turn in np.unique(places // share):
            if turn != epoch:
                epoch, order = int(turn), np.random.default_rng([seed, int(turn)]).permutation(num_examples)
            here = places // share == turn
            indices[:, :size][:, here] = order[: share * workers].reshape(workers, share)[:, places[here] % share]
        mask = np.broadcast_to(np.arange(indices.shape[1]) < size, indices.shape)
        start += size
        yield PlannedBatch(indices, mask)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean of the entries where mask is True (0 where there is none); padding may hold anything."""
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)
