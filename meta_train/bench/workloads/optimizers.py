"""Who takes part on workloads: baselines with their sources and search spaces, learned rules, controls.

All make an Optax transform of a few settings, under one schedule: a linear warm-up, then a cosine to 0. Weight decay is
decoupled and spares vectors. A setting may be traced, so that all trials of an optimizer share one program.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import learned_opt
from learned_opt.base import LearnedOptimizer, Theta
from learned_opt.directions import scale_by_soap
from learned_opt.features import unit_rms
from learned_opt.rules.celo2_soap import celo2_soap
from learned_opt.rules.scheduler import stepped
from learned_opt.store import SavedRule

Settings = Mapping[str, Any]
_SOAP_RATE = 1.2e-2  # of the ruleset "nothing set"
REFERENCE = "nadamw"  # whose validation losses are the targets


class Range(NamedTuple):
    """What a setting is searched in: from ``low`` to ``high``, evenly in the logarithm unless ``linear``."""

    low: float
    high: float
    linear: bool = False


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


_WARMUP = {"warmup": Range(0.02, 0.1)}
_DECAY = {"weight_decay": Range(1e-3, 1.0)}
_BETAS = {"one_minus_b1": Range(0.02, 0.3), "one_minus_b2": Range(1e-3, 0.2)}
_ADAM = {"learning_rate": Range(3e-4, 1e-2), **_BETAS, **_DECAY, **_WARMUP}
# Rates of the ruleset "nothing set": reports/workloads/rates.csv. NAdamW's relatives take over its own.
_ADAM_SETTING = {
    "learning_rate": 4e-3,
    "one_minus_b1": 0.1,
    "one_minus_b2": 0.01,
    "weight_decay": 0.05,
    "warmup": 0.05,
}


def baselines() -> list[Optimizer]:
    """The optimizers to beat; the first is the reference."""

    def adam_like(name, direction, source, **changed):
        return Optimizer(
            name,
            lambda s, num_steps: assembled(direction(s), s, num_steps),
            {**_ADAM_SETTING, **{key: setting for key, (setting, _) in changed.items()}},
            {**_ADAM, **{key: space for key, (_, space) in changed.items()}},
            source,
        )

    def betas(s):
        return {"b1": 1 - s["one_minus_b1"], "b2": 1 - s["one_minus_b2"]}

    def prodigy(s, num_steps):
        return optax.contrib.prodigy(
            schedule(s, num_steps),
            betas=tuple(betas(s).values()),
            weight_decay=s["weight_decay"],
            safeguard_warmup=True,
        )

    def schedule_free(s, num_steps):
        rate = s["learning_rate"] * jnp.ones(())
        return optax.contrib.schedule_free_adamw(
            rate, warmup_steps=max(num_steps // 20, 1), **betas(s), weight_decay=s["weight_decay"]
        )

    no_warmup = {key: value for key, value in _ADAM_SETTING.items() if key != "warmup"}
    return [
        adam_like("nadamw", lambda s: optax.scale_by_adam(**betas(s), nesterov=True), "Dozat 2016; optax"),
        adam_like("adamw", lambda s: optax.scale_by_adam(**betas(s)), "Loshchilov & Hutter 2019; optax"),
        adam_like(
            "cautious-adamw",
            lambda s: cautious(optax.scale_by_adam(**betas(s))),
            "Liang et al. 2024, arXiv:2411.16085; here",
        ),
        adam_like(
            "ademamix",
            lambda s: optax.contrib.scale_by_ademamix(**betas(s), b3=0.999, alpha=s["alpha"]),
            "Pagliardini et al. 2024, arXiv:2409.03137; optax.contrib",
            alpha=(5.0, Range(1.0, 10.0)),
        ),
        adam_like(
            "adopt",
            lambda s: optax.contrib.scale_by_adopt(**betas(s)),
            "Taniguchi et al. 2024, arXiv:2411.02853; optax.contrib",
        ),
        Optimizer(
            "muon",
            _muon,
            {"learning_rate": 0.01, "one_minus_b1": 0.05, "weight_decay": 0.05, "warmup": 0.05},
            {"learning_rate": Range(1e-3, 0.1), "one_minus_b1": Range(0.02, 0.3), **_DECAY, **_WARMUP},
            "Jordan 2024, hidden matrices alone, AdamW for the rest; optax.contrib",
        ),
        Optimizer(
            "soap",
            lambda s, num_steps: assembled(soap_direction(s), s, num_steps),
            {
                "learning_rate": _SOAP_RATE,
                "one_minus_b1": 0.05,
                "one_minus_b2": 0.05,
                "weight_decay": 0.05,
                "warmup": 0.05,
            },
            {**_ADAM, "learning_rate": Range(3e-4, 3e-2)},
            "Vyas et al. 2024, arXiv:2409.11321; here",
        ),
        Optimizer(
            "prodigy",
            prodigy,
            {**_ADAM_SETTING, "learning_rate": 1.0},
            {**_ADAM, "learning_rate": Range(0.1, 10.0)},
            "Mishchenko & Defazio 2023, arXiv:2306.06101; optax.contrib",
        ),
        Optimizer(
            "schedule-free-adamw",
            schedule_free,
            {**no_warmup, "learning_rate": 5e-3},
            {key: space for key, space in {**_ADAM, "learning_rate": Range(1e-3, 3e-2)}.items() if key != "warmup"},
            "Defazio et al. 2024, arXiv:2405.15682; optax.contrib",
            evaluate=optax.contrib.schedule_free_eval_params,
        ),
    ]


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
    space = {"learning_rate": Range(learning_rate / 10, learning_rate * 10), **_DECAY, **_WARMUP}
    return Optimizer(name, make, setting, space, source, kind)


def pretrained(name_or_path: str) -> list[Optimizer]:
    """A saved rule, and its controls where it is a network in SOAP's basis or a learned schedule.

    The controls take the network away and keep the rest: ``identity``, the same direction with Adam in its place, the
    same Newton-Schulz steps, unit RMS and rates; ``untrained``, fresh weights; ``no-newton-schulz``. That of a learned
    schedule is ``over-soap``, the same schedule over SOAP. Those of a control layer are ``untrained``, in which nothing
    is trained, and, where its network was, ``hand-set``, a fresh one.

    Raises:
        StoreError: as ``learned_opt.load``.
    """
    saved = learned_opt.load_rule(name_or_path)
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
    if saved.name == "control":
        fresh = saved.rule.init(jax.random.key(0))
        if jax.tree.leaves(fresh["direction"]):
            found.append(learned(f"{name}:untrained", saved.rule, fresh, None, "control", "the same, nothing trained"))
        if np.any(saved.theta["control"]["last"]["w"]):
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
        return stepped(scale_by_soap(), saved.theta["scheduler"], _SOAP_RATE, shape, num_steps)

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
    space = {"learning_rate": Range(learning_rate / 10, learning_rate * 10), **_DECAY, **_WARMUP}
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


def soap_direction(s: Settings) -> optax.GradientTransformation:
    """SOAP's direction, uphill; a side of 8,192 words, whose basis takes 16 s a step on one core, is not turned."""
    betas = {"b1": 1 - s["one_minus_b1"], "b2": 1 - s["one_minus_b2"]}
    return optax.chain(scale_by_soap(**betas, max_dim=4096), optax.scale(-1.0))


def cautious(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    r"""Keeps the coordinates of a direction that agree in sign with the gradient, and makes up for the others.

    :math:`u \leftarrow u \odot m / \max(\bar m, 10^{-3})` with :math:`m = [u \odot g > 0]`.

    Args:
        inner: gives directions uphill.

    Returns:
        An Optax transform with the inner one's state.

    Reference: Liang et al., "Cautious optimizers: improving training with one line of code", 2024, arXiv:2411.16085.
    """

    def update_fn(updates, state, params=None):
        directions, state = inner.update(updates, state, params)

        def masked(u, g):
            agree = (u * g > 0).astype(u.dtype)
            return u * agree / jnp.maximum(agree.mean(), 1e-3)

        return jax.tree.map(masked, directions, updates), state

    return optax.GradientTransformation(inner.init, update_fn)


def is_hidden(path: tuple, leaf: Any) -> bool:
    """Whether a tensor is a matrix or kernel between layers: neither a vector nor an embedding nor the last layer.

    Parameters that a Haiku function makes outside its layers (in ``"~"``) are embeddings; so is what has ``embed`` or
    ``positions`` in its name; the last layer has ``output`` or ``head``.
    """
    name = jax.tree_util.keystr(path, simple=True, separator="/").lower()
    outside = any(word in name for word in ("~", "embed", "positions", "output", "head"))
    return jnp.ndim(leaf) >= 2 and not outside


def _muon(s: Settings, num_steps: int) -> optax.GradientTransformation:
    """One rate for both halves: the orthogonalised updates are scaled to the RMS of Adam's (Liu et al. 2025)."""

    def numbers(path, leaf):
        rank = jnp.ndim(leaf)
        return optax.contrib.MuonDimensionNumbers(tuple(range(rank - 1)), rank - 1) if is_hidden(path, leaf) else None

    return optax.contrib.muon(
        schedule(s, num_steps),
        beta=1 - s["one_minus_b1"],
        weight_decay=s["weight_decay"],
        weight_decay_mask=_not_vectors,
        adam_b2=0.99,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(numbers, params),
        consistent_rms=0.2,
    )


def _decayed(s: Settings, num_steps: int) -> tuple[optax.GradientTransformation, ...]:
    return (
        optax.add_decayed_weights(s["weight_decay"], _not_vectors),
        optax.scale_by_learning_rate(schedule(s, num_steps)),
    )


def _not_vectors(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)
