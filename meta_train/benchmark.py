"""The benchmark: optimizers on held-out tasks, tuned on a grid by other seeds than those that are reported."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

import learned_opt
from learned_opt.base import LearnedOptimizer, Theta
from tasks.base import Data, TaskFamily
from tasks.suites import Entry

from .trainer import AXIS, make_mesh, place

# Half-decades around each optimizer's usual learning rate.
GRID = tuple(float(f"{10 ** (k / 2):.3g}") for k in range(-8, -1))  # 1e-04 ... 1e-01
REFERENCE = "adam"  # what losses and speed-ups are relative to: tuned, at a constant rate
_VALID_BATCHES = 16
_TUNING, _REPORTING = 1_000_000, 2_000_000  # seeds of the two start here


class Contender(NamedTuple):
    """An optimizer in the benchmark.

    Attributes:
        name: its label; reported as ``NAME`` at the rate chosen from the grid, and as ``NAME@RATE`` at its default.
        make: ``(learning_rate, num_steps) -> optax transform``; the rate is traced.
        grid: the learning rates to choose from; empty for an optimizer that has none.
        default: the learning rate that its users start with, one of the grid, or ``None``.
        baseline: whether it is no learned rule.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    grid: tuple[float, ...]
    default: float | None = None
    baseline: bool = False


class Result(NamedTuple):
    """One contender on one task."""

    task: str
    contender: str
    baseline: bool  # not a learned rule
    learning_rate: float  # the one reported
    on_edge: bool  # of the grid: a wider one might do better
    curve: np.ndarray  # [steps], training loss, smoothed, mean over the reporting seeds
    initial: float  # training loss before the first step, mean over the reporting seeds
    final: np.ndarray  # [seeds], mean training loss over the last twentieth of the steps
    valid: np.ndarray  # [seeds], validation loss after the last step
    diverged: int  # reporting seeds that ended non-finite or above their start


def baselines(weight_decay: float = 1e-4) -> list[Contender]:
    """Adam, tuned and as people first try it, and tuned AdamW with a cosine schedule."""

    def adamw_cosine(rate, num_steps):
        return optax.adamw(_cosine(rate, num_steps), weight_decay=weight_decay)

    return [
        Contender("adam", lambda rate, num_steps: optax.adam(rate), GRID, default=1e-3, baseline=True),
        Contender("adamw-cosine", adamw_cosine, GRID, baseline=True),
    ]


def learned(name: str, rule: LearnedOptimizer, theta: Theta, learning_rate: float | None) -> Contender:
    """A learned rule: as it comes, and on the grid too if it has a free step size.

    Args:
        name: its label.
        rule: the rule.
        theta: its meta-parameters.
        learning_rate: the default that its ``rule.json`` records, or ``None``.

    Returns:
        A contender. A rule with a free step size runs under a cosine schedule from its rate.
    """
    if learning_rate is None:
        return Contender(name, lambda rate, num_steps: rule.build(theta, num_steps=num_steps), ())

    def make(rate, num_steps):
        step_size = optax.scale_by_learning_rate(_cosine(rate, num_steps), flip_sign=False)
        return optax.chain(rule.build(theta, num_steps=num_steps), step_size)

    return Contender(name, make, tuple(sorted({*GRID, learning_rate})), default=learning_rate)


def pretrained(name_or_path: str) -> Contender:
    """The contender of a saved rule.

    Raises:
        StoreError: as ``learned_opt.load``.
    """
    rule, theta = learned_opt.load_rule(name_or_path)
    record = learned_opt.store.read_record(name_or_path)
    return learned(str(name_or_path).rstrip("/").rsplit("/", 1)[-1], rule, theta, record.get("learning_rate"))


def run_task(
    entry: Entry, contender: Contender, *, steps: int, seeds: int, tuning_seeds: int, mesh: Mesh
) -> list[Result]:
    """Tunes a contender on one task and reports it on other seeds.

    A seed is one task of the family, one initialisation and one stream of batches: the same for all contenders. All
    rates and seeds run side by side over the mesh, in one compiled call.

    Args:
        entry: the task.
        contender: the optimizer.
        steps: optimization steps.
        seeds: reporting seeds.
        tuning_seeds: seeds that choose the learning rate, by the mean of the final training loss, as is reported.
        mesh: the devices.

    Returns:
        The result at the chosen learning rate, and the one at the default, as far as the contender has them.
    """
    rates = contender.grid or (1.0,)
    lanes = [(rate, _TUNING + s) for rate in rates for s in range(tuning_seeds)] if contender.grid else []
    split = len(lanes)
    lanes += [(rate, _REPORTING + s) for rate in rates for s in range(seeds)]
    losses, valid = _run(entry.make(), contender, lanes, steps, mesh)
    final = losses[:, -max(steps // 20, 1) :].mean(axis=1)

    def result(label: str, index: int, on_edge: bool = False) -> Result:
        mine = slice(split + index * seeds, split + (index + 1) * seeds)
        initial = losses[mine, 0]
        diverged = ~(final[mine] <= 1.05 * initial)  # what is not finite too
        return Result(
            task=entry.name,
            contender=label,
            baseline=contender.baseline,
            learning_rate=rates[index],
            on_edge=on_edge,
            curve=smooth(losses[mine].mean(axis=0)),
            initial=float(initial.mean()),
            final=final[mine],
            valid=valid[mine],
            diverged=int(np.sum(diverged)),
        )

    if not contender.grid:
        return [result(contender.name, 0)]
    score = np.nan_to_num(final[:split].reshape(len(rates), tuning_seeds), nan=np.inf).mean(axis=1)
    best = int(np.argmin(score))
    results = [result(contender.name, best, on_edge=best in (0, len(rates) - 1))]
    if contender.default is not None:
        results.append(result(f"{contender.name}@{contender.default:g}", rates.index(contender.default)))
    return results


def run_suite(
    entries: Sequence[Entry],
    contenders: Sequence[Contender],
    *,
    steps: int,
    seeds: int,
    tuning_seeds: int = 2,
    show: Callable[..., None] | None = None,
) -> list[Result]:
    """Runs every contender on every task.

    Args:
        entries: the tasks.
        contenders: the optimizers.
        steps: optimization steps.
        seeds: reporting seeds.
        tuning_seeds: seeds for the learning-rate grids.
        show: called with ``(runs done, text)`` before each, and at the end.

    Returns:
        The results, tasks outermost.
    """
    mesh = make_mesh(jax.local_devices())
    results: list[Result] = []
    runs = [(entry, contender) for entry in entries for contender in contenders]
    for done, (entry, contender) in enumerate(runs):
        if show:
            show(done, f"{entry.name}: {contender.name}")
        results += run_task(entry, contender, steps=steps, seeds=seeds, tuning_seeds=tuning_seeds, mesh=mesh)
    if show:
        show(len(runs))
    return results


def smooth(curve: np.ndarray) -> np.ndarray:
    """A running mean over a fiftieth of the curve, trailing, shorter at the start."""
    width = max(len(curve) // 50, 1)
    padded = np.concatenate([np.zeros(width - 1), curve])
    sums = np.lib.stride_tricks.sliding_window_view(padded, width).sum(axis=1)
    return sums / np.minimum(np.arange(1, len(curve) + 1), width)


def speed_up(curve: np.ndarray, reference: np.ndarray) -> float:
    """How many times fewer steps a curve takes to the best loss that the reference reaches; 0 if it never does.

    Args:
        curve: [steps], a smoothed training loss.
        reference: [steps], the reference's.

    Returns:
        The steps that the reference takes to its own best value, over the steps that ``curve`` takes to it.
    """
    if not np.isfinite(reference).any():
        return 0.0
    target = np.nanmin(reference)
    own = int(np.nanargmin(reference)) + 1
    reached = np.flatnonzero(curve <= target)
    return own / (int(reached[0]) + 1) if reached.size else 0.0


def _cosine(rate, num_steps):
    return lambda count: rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count / num_steps, 1.0)))


def _run(family: TaskFamily, contender: Contender, lanes, steps: int, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Every (rate, seed) lane: training losses [lanes, steps] and validation losses [lanes]."""

    def lane(data: Data, rate: jax.Array, seed: jax.Array):
        k_cfg, k_init, k_train, k_valid = jax.random.split(jax.random.PRNGKey(seed), 4)
        task = family.task(data, family.sample(k_cfg))
        transform = optax.with_extra_args_support(contender.make(rate, steps))
        params = task.init(k_init)

        def step(carry, key):
            params, state = carry
            k_batch, k_loss = jax.random.split(key)
            batch = task.batch(k_batch, "train")
            loss, grads = jax.value_and_grad(lambda p: task.loss(p, k_loss, batch)[0])(params)
            updates, state = transform.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), loss

        (params, _), losses = jax.lax.scan(step, (params, transform.init(params)), jax.random.split(k_train, steps))

        def valid(key):
            k_batch, k_loss = jax.random.split(key)
            return task.loss(params, k_loss, task.batch(k_batch, "valid"))[0]

        return losses, jnp.mean(jax.lax.map(valid, jax.random.split(k_valid, _VALID_BATCHES)))

    padding = -len(lanes) % mesh.size
    padded = list(lanes) + [lanes[-1]] * padding
    rates = jnp.asarray([rate for rate, _ in padded], jnp.float32)
    seeds = jnp.asarray([seed for _, seed in padded], jnp.uint32)
    split = PartitionSpec(AXIS)
    run = jax.jit(
        jax.shard_map(
            jax.vmap(lane, (None, 0, 0)),
            mesh=mesh,
            in_specs=(PartitionSpec(), split, split),
            out_specs=split,
            check_vma=False,
        )
    )
    losses, valid = jax.device_get(run(place(family.data, mesh), rates, seeds))
    return losses[: len(lanes)].astype(np.float64), valid[: len(lanes)].astype(np.float64)
