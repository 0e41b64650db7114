"""Who takes part on workloads: the form of an optimizer and its schedule; learned rules and their controls.

All make an Optax transform of a few settings, under one schedule: a linear warm-up, then a cosine to 0. Weight decay is
decoupled and spares vectors; Prodigy and schedule-free AdamW decay them too. A setting may be traced, so that all
trials of an optimizer share one program.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import learned_opt
from learned_opt.base import LearnedOptimizer, Theta
from learned_opt.directions import scale_by_soap
from learned_opt.features import unit_rms
from learned_opt.rules.celo2_soap import celo2_soap
from learned_opt.rules.scheduler import stepped
from learned_opt.store import SavedRule

from .. import contenders

Settings = Mapping[str, Any]
SOAP_RATE = 1.2e-2  # of the ruleset "nothing set"
REFERENCE = "nadamw"  # whose validation losses are the targets


class Range(NamedTuple):
    """What a setting is searched in: from ``low`` to ``high``, evenly in the logarithm unless ``linear``."""

    low: float
    high: float
    linear: bool = False


WARMUP = {"warmup": Range(0.02, 0.1)}  # what every optimizer of a free rate is searched in
DECAY = {"weight_decay": Range(1e-3, 1.0)}


class Optimizer(NamedTuple):
    """An optimizer on workloads.

    Attributes:
        name: its label.
        make: ``(settings, num_steps) -> Optax transform``; settings may be traced.
        setting: one setting for all workloads, for the ruleset *nothing set*; the search's first trial, too.
        space: what the ruleset *tuned* searches; empty where there is nothing to set.
        source: where it comes from.
        kind: ``"baseline"``, ``"learned"`` or ``"control"``.
        evaluate: ``(optimizer state, params) -> params`` to validate with, where these are not the trained ones.
    """

    name: str
    make: Callable[[Settings, int], optax.GradientTransformation]
    setting: Mapping[str, float]
    space: Mapping[str, Range]
    source: str
    kind: str = "baseline"
    evaluate: Callable[[Any, Any], Any] | None = None


def learned(
    name: str,
    rule: LearnedOptimizer,
    theta: Theta,
    learning_rate: float | None,
    kind: str = "learned",
    source: str = "",
) -> Optimizer:
    """A learned rule; one with a free step size has the schedule and the weight decay of the baselines.

    Args:
        name: its label.
        rule: the rule.
        theta: its meta-parameters.
        learning_rate: the default rate, or ``None`` for a rule that sets its own step size.
        kind: of :class:`Optimizer`.
        source: of :class:`Optimizer`.

    Returns:
        The optimizer.
    """
    if learning_rate is None:
        return Optimizer(name, lambda s, num_steps: rule.build(theta, num_steps=num_steps), {}, {}, source, kind)

    def make(s: Settings, num_steps: int) -> optax.GradientTransformation:
        downhill = rule.build(theta, num_steps=num_steps)
        return optax.chain(downhill, optax.scale(-1.0), *_decayed(s, num_steps))

    setting = {"learning_rate": learning_rate, "weight_decay": 0.0, "warmup": 0.05}
    space = {"learning_rate": Range(learning_rate / 10, learning_rate * 10), **DECAY, **WARMUP}
    return Optimizer(name, make, setting, space, source, kind)


def pretrained(name_or_path: str) -> list[Optimizer]:
    """A saved rule, and its controls where it is a network in SOAP's basis or a learned schedule.

    The controls take the network away and keep the rest: ``identity``, the same direction with Adam in its place, the
    same Newton-Schulz steps, unit RMS and rates; ``untrained``, fresh weights; ``no-newton-schulz``. That of a learned
    schedule is ``over-soap``, the same schedule over SOAP. Those of a control layer are ``untrained``, in which nothing
    is trained, and, where both its direction and its network were, ``hand-set``, a fresh network.

    Raises:
        StoreError: as ``learned_opt.load``.
        UserError: it is no optimizer by itself.
    """
    saved = contenders.saved_optimizer(name_or_path)
    name = str(name_or_path).rstrip("/").rsplit("/", 1)[-1]
    source = f"{saved.name}, {name_or_path}"
    found = [learned(name, saved.rule, saved.theta, saved.learning_rate, source=source)]
    if saved.name == "celo2_soap" and saved.kwargs.get("orthogonalize", True):
        rate = saved.learning_rate or 0.005
        plain = learned_opt.RULES["celo2_soap"](**{**saved.kwargs, "orthogonalize": False})
        fresh = saved.rule.init(jax.random.key(0))
        found += [
            identity(f"{name}:identity", rate, saved.kwargs),
            learned(f"{name}:untrained", saved.rule, fresh, rate, "control", "the same rule, fresh weights"),
            learned(f"{name}:no-newton-schulz", plain, saved.theta, rate, "control", "the same weights without it"),
        ]
    if saved.name in ("control", "light"):
        fresh = saved.rule.init(jax.random.key(0))
        found.append(learned(f"{name}:untrained", saved.rule, fresh, None, "control", "the same, nothing trained"))
        if jax.tree.leaves(fresh.get("direction")) and np.any(saved.theta["control"]["last"]["w"]):
            hand_set = saved.theta | {"control": fresh["control"]}
            found.append(learned(f"{name}:hand-set", saved.rule, hand_set, None, "control", "a fresh control network"))
    if saved.name == "scheduler":
        found.append(over_soap(f"{name}:over-soap", saved))
    return found


def over_soap(name: str, saved: SavedRule) -> Optimizer:
    """A rule's learned schedule over SOAP in place of the rule's direction."""

    def make(s: Settings, num_steps: int) -> optax.GradientTransformation:
        del s
        shape = saved.kwargs.get("schedule", "constant")
        return stepped(scale_by_soap(), saved.theta["scheduler"], SOAP_RATE, shape, num_steps)

    return Optimizer(name, make, {}, {}, "the same schedule over SOAP, at SOAP's default rate", "control")


def identity(name: str, learning_rate: float, kwargs: Mapping[str, Any]) -> Optimizer:
    """SOAP's direction through Newton-Schulz steps at unit RMS: what is left of ``flagship-1`` without its network.

    Args:
        name: its label.
        learning_rate: the rule's default rate.
        kwargs: of the rule, whose basis it has.

    Returns:
        The optimizer.
    """
    options = {**(celo2_soap.__kwdefaults__ or {}), **kwargs}
    basis = {key: options[key] for key in ("every", "max_dim", "max_ratio")}
    unit = optax.stateless_with_tree_map(lambda u, p: unit_rms(u, 1e-16, tuple(range(u.ndim))))

    def make(s: Settings, num_steps: int) -> optax.GradientTransformation:
        direction = scale_by_soap(orthogonalize=True, **basis)
        return optax.chain(direction, optax.scale(-1.0), unit, *_decayed(s, num_steps))

    setting = {"learning_rate": learning_rate, "weight_decay": 0.0, "warmup": 0.05}
    space = {"learning_rate": Range(learning_rate / 10, learning_rate * 10), **DECAY, **WARMUP}
    return Optimizer(name, make, setting, space, "SOAP, then Newton-Schulz, at unit RMS", "control")


def schedule(s: Settings, num_steps: int) -> optax.Schedule:
    r"""A linear warm-up over the share ``warmup`` of the run, then a cosine to 0.

    Args:
        s: ``learning_rate`` and ``warmup``, which may be traced.
        num_steps: of the run.

    Returns:
        The schedule, of the number of updates done before.
    """

    def rate(count):
        warm = s["warmup"] * num_steps
        done = jnp.clip((count - warm) / (num_steps - warm), 0.0, 1.0)
        return (
            s["learning_rate"] * jnp.minimum((count + 1) / jnp.maximum(warm, 1), 1) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        )

    return rate


def assembled(direction: optax.GradientTransformation, s: Settings, num_steps: int) -> optax.GradientTransformation:
    """A direction, decoupled weight decay, the schedule."""
    return optax.chain(direction, *_decayed(s, num_steps))


def _decayed(s: Settings, num_steps: int) -> tuple[optax.GradientTransformation, ...]:
    return (
        optax.add_decayed_weights(s["weight_decay"], not_vectors),
        optax.scale_by_learning_rate(schedule(s, num_steps)),
    )


def not_vectors(params: Any) -> Any:
    """What is decayed: ``True`` for tensors of rank 2 and more."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)
