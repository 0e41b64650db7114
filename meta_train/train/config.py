"""The configuration of a meta-training run: one frozen dataclass, presets, and JSON."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

_MEASURES = ("log", "relative")
_SCHEDULES = ("constant", "cosine")
_SPLITS = ("train", "valid")
_LOCAL_OPTIMIZERS = ("adamw", "flagship", "muon", "sgd")


class ConfigError(UserError):
    """A setting is unknown or has a bad value."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines a meta-training run.

    Attributes:
        rule: a name in ``learned_opt.RULES`` or ``learned_opt.unsupervised.RULES``.
        rule_kwargs: arguments of its factory.
        init: a pretrained name or a saved rule's folder to start from; by default fresh meta-parameters.
        trainable: the top-level entries of theta that are trained, the others stay as they start; by default all.
        learner: what a particle runs: ``"optimizer"`` (the rule optimizes tasks), ``"local_sgd"`` (it is the outer step
            of local SGD; lengths are rounds), ``"self_tuning"`` (it trains networks whose hyperparameters are tuned
            meanwhile, and is judged by their validation losses; lengths are cycles of the tuner) or ``"features"`` (an
            unsupervised rule); by default by the rule's kind.
        suite: a training suite of ``tasks.suites``; of ``tasks.families.representation`` for an unsupervised rule, of
            ``meta_train.train.problems`` for self-tuning.
        estimator: a name in ``meta_train.train.estimators.ESTIMATORS``.
        meta_steps: number of meta-steps.
        particles: learning processes (antithetic pairs of them, for the evolution strategies) per task family; the
            number of devices divides it.
        unroll: inner steps of one window; of a whole episode for the estimators ``"es"`` and ``"bptt"``, which have no
            windows and take no notice of ``min_length`` and ``max_length``.
        sigma: standard deviation of the evolution strategies' perturbations.
        min_length: shortest episode, in inner steps; rounded to whole windows.
        max_length: longest episode; lengths are drawn log-uniformly.
        min_learning_rate: lower end of the log-uniform inner step size of a rule that has a free one; by default
            the rule's own.
        max_learning_rate: upper end.
        local_optimizers: for an outer step of local SGD, what the workers step by (``"sgd"``, ``"adamw"``, ``"muon"``,
            ``"flagship"``), with the least and most of the step size, drawn log-uniformly.
        inner_schedule: such a step size over an episode of the learner ``"optimizer"``: ``"constant"`` or ``"cosine"``.
        told_length: share of the episodes in which the rule is told their length (see ``task_learner``), by the
            learners ``"optimizer"`` and ``"local_sgd"``; the others always tell it.
        judged_on: the split whose loss is the meta-loss of the learner ``"optimizer"``: ``"train"``, whose loss the
            gradient is of, or ``"valid"``, at the cost of one evaluation of the loss a step.
        judged_from: the share of such an episode before which the meta-loss is 0, below 1.
        max_loss: cap of the meta-loss in units of the initial loss; what a non-finite loss counts as.
        measure: the meta-loss, ``"relative"`` (the loss in units of the initial loss) or ``"log"`` (its logarithm).
        outer_optimizer: the name of an Optax optimizer that takes a learning rate; it sees theta as one vector.
        outer_kwargs: its other arguments.
        outer_learning_rate: its peak learning rate.
        outer_schedule: ``"constant"`` or ``"cosine"`` (to zero at the last meta-step).
        outer_clip: the meta-gradient's global norm is clipped to this.
        particle_clip: each particle's gradient is clipped to this norm before the mean; by default not at all.
        seed: of everything random, 0 to 2^32 - 1.
        checkpoint_every: meta-steps between checkpoints; the last one is always saved.
        keep_checkpoints: how many of the latest checkpoints to keep.
        log_every: meta-steps between lines of ``metrics.jsonl``.
        bench_suite: the held-out suite that shows the result; empty for none.
        bench_steps: inner steps of that benchmark.
        bench_seeds: its reporting seeds.
    """

    rule: str = "celo2"
    rule_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    init: str | None = None
    trainable: list[str] = dataclasses.field(default_factory=list)
    learner: str | None = None
    suite: str = "quick"
    estimator: str = "pes"
    meta_steps: int = 1000
    particles: int = 16
    unroll: int = 50
    sigma: float = 0.01
    min_length: int = 100
    max_length: int = 1000
    min_learning_rate: float | None = None
    max_learning_rate: float | None = None
    local_optimizers: dict[str, Any] = dataclasses.field(default_factory=lambda: {"sgd": [0.05, 0.4]})
    inner_schedule: str = "constant"
    told_length: float = 1.0
    judged_on: str = "train"
    judged_from: float = 0.0
    max_loss: float = 4.0
    measure: str = "relative"
    outer_optimizer: str = "adam"
    outer_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    outer_learning_rate: float = 1e-3
    outer_schedule: str = "cosine"
    outer_clip: float = 1.0
    particle_clip: float | None = None
    seed: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    log_every: int = 10
    bench_suite: str = "quick"
    bench_steps: int = 500
    bench_seeds: int = 3

    def __post_init__(self):
        """Checks every value."""
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name))
        positive = (
            *("particles", "unroll", "sigma", "min_length", "max_loss", "outer_learning_rate", "outer_clip"),
            *("checkpoint_every", "keep_checkpoints", "log_every", "bench_steps", "bench_seeds"),
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        if self.particle_clip is not None and not self.particle_clip > 0:
            raise ConfigError(f"particle_clip must be positive, not {self.particle_clip}")
        if not 0 <= self.told_length <= 1:
            raise ConfigError(f"told_length must be between 0 and 1, not {self.told_length}")
        if self.meta_steps < 0:
            raise ConfigError("meta_steps must not be negative")
        check_seed(self.seed)
        if self.max_length < self.min_length:
            raise ConfigError(f"max_length {self.max_length} is below min_length {self.min_length}")
        if (self.min_learning_rate is None) != (self.max_learning_rate is None):
            raise ConfigError("set both of min_learning_rate and max_learning_rate, or neither")
        if self.learning_rates is not None and not 0 < self.learning_rates[0] <= self.learning_rates[1] < math.inf:
            raise ConfigError("min_learning_rate must be positive and at most max_learning_rate, which is finite")
        if not self.local_optimizers or not set(self.local_optimizers) <= set(_LOCAL_OPTIMIZERS):
            raise ConfigError(f"local_optimizers must have some of {', '.join(_LOCAL_OPTIMIZERS)}")
        for name, ends in self.local_optimizers.items():
            rates = [x for x in ends if isinstance(x, int | float)] if isinstance(ends, list | tuple) else []
            if not (len(rates) == 2 == len(ends) and 0 < rates[0] <= rates[1]):
                raise ConfigError(f"local_optimizers: {name} must have two positive numbers in order, not {ends}")
        if self.measure not in _MEASURES:
            raise ConfigError(f"measure must be one of {', '.join(_MEASURES)}, not {self.measure!r}")
        if not 0 <= self.judged_from < 1:
            raise ConfigError(f"judged_from must be at least 0 and below 1, not {self.judged_from}")
        if self.judged_on not in _SPLITS:
            raise ConfigError(f"judged_on must be one of {', '.join(_SPLITS)}, not {self.judged_on!r}")
        for name, schedule in (("inner_schedule", self.inner_schedule), ("outer_schedule", self.outer_schedule)):
            if schedule not in _SCHEDULES:
                raise ConfigError(f"{name} must be one of {', '.join(_SCHEDULES)}, not {schedule!r}")

    @property
    def learning_rates(self) -> tuple[float, float] | None:
        """The range of the inner step size, or ``None`` for the rule's own."""
        if self.min_learning_rate is None or self.max_learning_rate is None:
            return None
        return self.min_learning_rate, self.max_learning_rate


def check_seed(seed: int) -> None:
    """Refuses a seed of which JAX would take the last 32 bits.

    Raises:
        ConfigError: it is not within 0 to 2^32 - 1.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed must be within 0 to 4294967295, not {seed}")


def preset(name: str) -> Config:
    """The configuration of a preset.

    Args:
        name: one of :data:`PRESETS`.

    Returns:
        The :class:`Config`.

    Raises:
        ConfigError: unknown name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; presets: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]


def with_settings(config: Config, settings: Mapping[str, str]) -> Config:
    """The configuration with some fields given as text.

    Args:
        config: to start from.
        settings: field name to JSON value; a bare word counts as a string.

    Returns:
        A new :class:`Config`.

    Raises:
        ConfigError: unknown field or bad value.

    Example:
        >>> with_settings(Config(), {"sigma": "0.02", "estimator": "nres"}).sigma
        0.02
    """
    return replace(config, **{name: _parse(name, text) for name, text in settings.items()})


def replace(config: Config, **changes: Any) -> Config:
    """``dataclasses.replace`` that names an unknown field in one line."""
    names = {field.name for field in dataclasses.fields(Config)}
    for name in changes:
        if name not in names:
            raise ConfigError(f"unknown field {name!r} of the config; fields: {', '.join(sorted(names))}")
    return dataclasses.replace(config, **changes)


def to_json(config: Config) -> str:
    """The configuration as JSON text, one field a line."""
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


def from_json(text: str) -> Config:
    """Reads :func:`to_json`'s text back.

    Raises:
        ConfigError: not JSON, unknown field or bad value.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"not a config: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError("not a config: not a JSON object")
    return replace(Config(), **values)


def read(path: Path) -> Config:
    """Reads a run's ``config.json``.

    Raises:
        ConfigError: missing or damaged.
    """
    try:
        return from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _allowed(name: str) -> tuple[type, ...]:
    hint = typing.get_type_hints(Config)[name]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    allowed = tuple(typing.get_origin(option) or option for option in options)
    return (*allowed, int) if float in allowed else allowed


def _check_type(name: str, value: Any) -> None:
    allowed = _allowed(name)
    if not isinstance(value, allowed) or isinstance(value, bool):
        wanted = " or ".join(sorted({"none" if kind is type(None) else kind.__name__ for kind in allowed}))
        raise ConfigError(f"{name} must be {wanted}, not {value!r}")


def _parse(name: str, text: str) -> Any:
    if name in typing.get_type_hints(Config) and _allowed(name)[0] is str:
        return None if text in ("", "none", "null") and type(None) in _allowed(name) else text
    try:
        return json.loads(text)
    except ValueError:
        return None if text == "none" else text


# Meta-trained as it will be used: under a cosine schedule from the rates that tuning finds.
_QUICK = Config(meta_steps=300, min_learning_rate=1e-3, max_learning_rate=3e-2, inner_schedule="cosine")
_FLAGSHIP = dataclasses.replace(  # the settings of the last stage of `pretrained/flagship-1`
    _QUICK,
    rule_kwargs={"orthogonalize": True},
    suite="mixed",
    measure="log",
    estimator="nres",
    particles=8,
    meta_steps=8000,
    max_length=2000,
    outer_learning_rate=2e-3,
    bench_suite="held_out",
    bench_steps=1000,
)

PRESETS: dict[str, Config] = {
    "quick": _QUICK,
    "cpu": _FLAGSHIP,
    "accelerator": dataclasses.replace(
        _FLAGSHIP, suite="broad", meta_steps=100_000, particles=128, checkpoint_every=1000, log_every=100
    ),
    "unsupervised": Config(
        rule="unsupervised",
        suite="letters",
        estimator="truncated_bptt",
        meta_steps=5000,
        particles=2,
        unroll=10,
        min_length=20,
        max_length=300,
        bench_suite="",  # it is no optimizer: reports/unsupervised shows what it is worth
    ),
}

# What may differ when a run is resumed: none of it changes the meta-trajectory up to the step it was stopped at.
RESUMABLE = {"checkpoint_every", "keep_checkpoints", "log_every", "bench_suite", "bench_steps", "bench_seeds"}
