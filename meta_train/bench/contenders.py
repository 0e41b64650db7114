"""Who takes part in the benchmark: the baselines, each with a grid of learning rates, and learned rules."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import learned_opt
from learned_opt.base import LearnedOptimizer, Theta
from learned_opt.kinds import optimizes
from learned_opt.layouts import name_of, outputs_last

from ..errors import UserError
from . import cache


def around(usual: float) -> tuple[float, ...]:
    """Seven half-decades, the usual learning rate in the middle.

    Example:
        >>> around(1e-2)
        (0.000316, 0.001, 0.00316, 0.01, 0.0316, 0.1, 0.316)
    """
    return tuple(float(f"{usual * 10 ** (k / 2):.3g}") for k in range(-3, 4))


# Small networks want larger rates than the usual 1e-3: the middle is half a decade above it.
GRID = around(10**-2.5)
REFERENCE = "adam"  # what losses and speed-ups are relative to: tuned, at a constant rate
FEW = (REFERENCE, "adamw-cosine")  # for the look at the end of a meta-training run
QUICK = (*FEW, "muon", "soap")  # for `learned-opt bench --quick`
_UNTRAINED = ":untrained"
_WEIGHT_DECAY = 1e-4
# benchmarks/calibrate_adamw.py: the best single setting on the training suite
CALIBRATED = {"learning_rate": 0.0316, "weight_decay": 1e-2}


class Contender(NamedTuple):
    """An optimizer in the benchmark.

    Attributes:
        name: its label; reported as ``NAME`` at the rate chosen from the grid, and as ``NAME@RATE`` at its default.
        make: ``(learning_rate, num_steps) -> optax transform``; the rate is traced.
        grid: the learning rates to choose from; empty for an optimizer that has none.
        default: the learning rate that its users start with, or ``None``.
        baseline: whether it is no learned rule and not the user's own.
        evaluate: ``(optimizer state, params) -> params`` to validate with, where these are not the trained ones.
        about: one line for the report.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    grid: tuple[float, ...]
    default: float | None = None
    baseline: bool = False
    evaluate: Callable[[Any, Any], Any] | None = None
    about: str = ""


def baselines() -> list[Contender]:
    """The optimizers to beat, tuned: a learning-rate grid of seven half-decades each.

    All but Adam, schedule-free AdamW and Prodigy's estimate follow a cosine schedule from the rate to 0, as learned
    rules with a free step size do: no row owes its place to a schedule that the others were denied.
    """

    def cosine(name, make, usual=10**-2.5, about=""):
        def scheduled(rate, num_steps):
            return make(cosine_schedule(rate, num_steps))

        return Contender(name, scheduled, around(usual), baseline=True, about=f"{about}, cosine schedule")

    decay = {"weight_decay": _WEIGHT_DECAY}
    adam = Contender(
        REFERENCE, lambda rate, num_steps: optax.adam(rate), GRID, 1e-3, True, about="Adam at a constant rate"
    )
    calibrated = Contender(
        "adamw-calibrated",
        lambda rate, num_steps: optax.adamw(
            cosine_schedule(CALIBRATED["learning_rate"], num_steps), weight_decay=CALIBRATED["weight_decay"]
        ),
        (),
        baseline=True,
        about="AdamW, cosine schedule, at the one setting that is best on the training suite",
    )
    schedule_free = Contender(
        "schedule-free-adamw",
        lambda rate, num_steps: optax.contrib.schedule_free_adamw(rate, **decay),
        GRID,
        baseline=True,
        evaluate=optax.contrib.schedule_free_eval_params,
        about="schedule-free AdamW; its training loss is at the interpolated point where gradients are taken",
    )
    return [
        adam,
        cosine("sgdm", lambda rate: optax.sgd(rate, momentum=0.9), 0.1, "SGD with momentum 0.9"),
        cosine("adamw-cosine", lambda rate: optax.adamw(rate, **decay), about="AdamW"),
        cosine("nadamw", lambda rate: optax.nadamw(rate, **decay), about="NAdamW"),
        cosine("lion", lambda rate: optax.lion(rate, **decay), 1e-3, "Lion"),
        cosine("muon", _muon, about="Muon on matrices and kernels, AdamW on the rest"),
        cosine("soap", lambda rate: learned_opt.soap(rate, weight_decay=_WEIGHT_DECAY), about="SOAP"),
        schedule_free,
        cosine("prodigy", lambda rate: optax.contrib.prodigy(rate, **decay), 1.0, "Prodigy"),
        calibrated,
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
        return Contender(
            name, lambda rate, num_steps: rule.build(theta, num_steps=num_steps), (), about="one setting everywhere"
        )

    def make(rate, num_steps):
        step_size = optax.scale_by_learning_rate(cosine_schedule(rate, num_steps), flip_sign=False)
        return optax.chain(rule.build(theta, num_steps=num_steps), step_size)

    return Contender(name, make, GRID, default=learning_rate, about="learned, cosine schedule")


def saved_optimizer(name_or_path: str) -> learned_opt.SavedRule:
    """A saved rule that optimizes by itself.

    Raises:
        StoreError: as ``learned_opt.load``.
        UserError: it is the outer step of local SGD.
    """
    saved = learned_opt.load_rule(name_or_path)
    if not optimizes(saved.name):
        raise UserError(f"{name_or_path} is an outer step of local SGD, which takes what workers did, and no optimizer")
    return saved


def pretrained(name_or_path: str) -> Contender:
    """The contender of a saved rule; with ``:untrained`` after its name, of its fresh meta-parameters, the control.

    Raises:
        StoreError: as ``learned_opt.load``.
        UserError: it is no optimizer by itself.
    """
    where = str(name_or_path).removesuffix(_UNTRAINED)
    saved = saved_optimizer(where)
    theta = saved.theta if where == str(name_or_path) else saved.rule.init(jax.random.key(0))
    name = str(name_or_path).rstrip("/").rsplit("/", 1)[-1]
    return learned(name, saved.rule, theta, saved.learning_rate)


def fingerprint(contender: Contender, num_steps: int, params: Any) -> str:
    """The SHA-256 of what a contender computes, its meta-parameters included: its program on some parameters.

    Args:
        contender: any.
        num_steps: the planned number of updates.
        params: the parameters, by whose names and shapes it may go.

    Returns:
        The hash; its name, grid and default are not part of it.
    """

    def update(rate, grads, state, params, loss):
        transform = optax.with_extra_args_support(contender.make(rate, num_steps))
        updates, state = transform.update(grads, state, params, value=loss)
        return updates, state, state if contender.evaluate is None else contender.evaluate(state, params)

    def init(rate, params):
        return optax.with_extra_args_support(contender.make(rate, num_steps)).init(params)

    rate, loss = jnp.asarray(0.1), jnp.asarray(1.0)
    state = jax.eval_shape(init, rate, params)
    return cache.key(
        init=cache.program(init, rate, params), update=cache.program(update, rate, params, state, params, loss)
    )


def cosine_schedule(rate, num_steps: int) -> optax.Schedule:
    """The schedule from ``rate``, which may be traced, to 0 at the last step."""
    return lambda count: rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count / num_steps, 1.0)))


def _muon(rate):
    """One rate for both halves: the orthogonalised updates are scaled to the RMS of Adam's (Liu et al. 2025)."""

    def matrices(params):
        def numbers(path, p):
            return outputs_last(name_of(path), p.shape) if jnp.ndim(p) > 1 else None

        return jax.tree_util.tree_map_with_path(numbers, params)

    return optax.contrib.muon(
        rate,
        weight_decay=_WEIGHT_DECAY,
        adam_weight_decay=_WEIGHT_DECAY,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
    )
