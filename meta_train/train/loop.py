"""The meta-training run: a configuration and a folder in, checkpoints, metrics and a rule out."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

import learned_opt
from learned_opt import store
from learned_opt.base import Theta
from learned_opt.files import write_atomically
from learned_opt.kinds import FEATURES, KNOWN
from learned_opt.rules import parts
from tasks import suites
from tasks.base import Data
from tasks.families import representation

from .. import claim
from ..errors import UserError
from . import checkpoint, problems, progress
from . import config as configs
from .config import Config, ConfigError
from .estimators import ESTIMATORS, one_by_one
from .learners import MEASURES, SCHEDULES, Learner, task_learner
from .learners.local_sgd import local_sgd_learner
from .learners.self_tuning import self_tuning_learner
from .learners.unsupervised import feature_learner
from .trainer import Trainer, TrainInfo, TrainState, begin, make_mesh, make_trainer, place

_WHOLE_EPISODES = ("bptt", "es")  # the estimators whose window is a whole episode


class Setup(NamedTuple):
    """What a configuration stands for."""

    rule: Any  # of either kind
    names: tuple[str, ...]  # of the suite's families
    data: Data
    trainer: Trainer
    inner_steps: int  # of one meta-step
    whole: Callable[[Theta], Theta]  # all of the rule's meta-parameters, from those that are trained


class Outcome(NamedTuple):
    """How a run ended."""

    theta: Theta
    step: int
    finished: bool
    stopped_by: int | None = None  # the signal that ended it before its last step


def _optimizer(config: Config, rule, entry, family, lengths) -> Learner:
    """The rule optimizes tasks; one that sets its own step size is given neither rate nor schedule."""
    del entry
    free = rule.learning_rate is not None
    return task_learner(
        rule,
        family,
        lengths=lengths,
        multiple_of=config.unroll,
        learning_rates=config.learning_rates if free else None,
        schedule=SCHEDULES[config.inner_schedule if free else "constant"],
        max_loss=config.max_loss,
        measure=MEASURES[config.measure],
        told_length=config.told_length,
        judged_on=config.judged_on,
        judged_from=config.judged_from,
    )


def _outer_step(config: Config, rule, entry, family, lengths) -> Learner:
    """The rule is the outer step of local SGD; one that sets its own step size is given none."""
    del entry
    return local_sgd_learner(
        rule,
        family,
        local_optimizers={name: (low, high) for name, (low, high) in config.local_optimizers.items()},
        rounds=lengths,
        multiple_of=config.unroll,
        learning_rates=None if rule.learning_rate is None else config.learning_rates,
        max_loss=config.max_loss,
        measure=MEASURES[config.measure],
        told_length=config.told_length,
    )


def _self_tuned(config: Config, rule, entry, problem, lengths) -> Learner:
    """The rule trains networks whose hyperparameters are tuned meanwhile; lengths are cycles of the tuner."""
    del entry
    return self_tuning_learner(
        rule,
        problem,
        problem.data,
        cycles=lengths,
        multiple_of=config.unroll,
        learning_rates=None if rule.learning_rate is None else config.learning_rates,
        max_loss=config.max_loss,
        measure=MEASURES[config.measure],
    )


def _features(config: Config, rule, entry, family, lengths) -> Learner:
    """The rule learns features without labels."""
    return feature_learner(rule, family, entry, lengths=lengths, multiple_of=config.unroll)


# What a particle runs, and where the suite is found.
LEARNERS: dict[str, tuple[Callable[..., Learner], Callable[[str], Any]]] = {
    "features": (_features, representation.suite),
    "local_sgd": (_outer_step, suites.suite),
    "optimizer": (_optimizer, suites.suite),
    "self_tuning": (_self_tuned, problems.suite),
}


def set_up(config: Config, mesh: Mesh) -> Setup:
    """Builds the rule, the task families and the trainer that a configuration names.

    Args:
        config: the configuration.
        mesh: the devices.

    Returns:
        A :class:`Setup`; its data sets lie on the devices.

    Raises:
        ConfigError: an unknown rule, suite, estimator or outer optimizer, arguments that do not fit, or particles
            that the devices do not divide.
        DataError: a data set is missing.
    """
    rule, init_theta, whole_theta = _trained(config, *_rule(config))
    unsupervised = KNOWN[config.rule] is FEATURES
    if config.estimator not in ESTIMATORS:
        raise ConfigError(f"unknown estimator {config.estimator!r}; estimators: {', '.join(sorted(ESTIMATORS))}")
    kind = config.learner or ("features" if unsupervised else "optimizer")
    if kind not in LEARNERS or unsupervised != (kind == "features"):
        raise ConfigError(f"rule {config.rule!r} has no learner {kind!r}; learners: {', '.join(LEARNERS)}")
    make_learner, find = LEARNERS[kind]
    try:
        entries: Any = find(config.suite)  # of every kind has `name` and `make`
    except ValueError as error:
        raise ConfigError(str(error)) from None
    families = [entry.make() for entry in entries]
    whole = config.estimator in _WHOLE_EPISODES
    lengths = (config.unroll, config.unroll) if whole else (config.min_length, config.max_length)

    def estimators(data: Data):
        for entry, family, held in zip(entries, families, data, strict=True):
            learner = make_learner(config, rule, entry, family._replace(data=held), lengths)
            estimator = ESTIMATORS[config.estimator](learner, unroll=config.unroll, sigma=config.sigma)
            yield one_by_one(estimator) if unsupervised else estimator

    if config.particles % mesh.size:
        raise ConfigError(f"particles ({config.particles}) must be a multiple of the number of devices ({mesh.size})")
    trainer = make_trainer(
        init_theta,
        lambda data: list(estimators(data)),
        outer_optimizer(config),
        particles=config.particles,
        mesh=mesh,
        particle_clip=math.inf if config.particle_clip is None else config.particle_clip,
    )
    data = place(tuple(family.data for family in families), mesh)
    halves = 1 if "bptt" in config.estimator else 2
    names = tuple(entry.name for entry in entries)
    inner_steps = halves * len(families) * config.particles * config.unroll
    return Setup(rule, names, data, trainer, inner_steps, whole_theta)


def outer_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimizer of theta: a global-norm clip, then any Optax optimizer on a schedule.

    Raises:
        ConfigError: not an Optax optimizer, or arguments that it does not take.
    """
    schedule: optax.ScalarOrSchedule = config.outer_learning_rate
    if config.outer_schedule == "cosine":
        schedule = optax.cosine_decay_schedule(config.outer_learning_rate, max(config.meta_steps, 1))
    try:
        optimizer = getattr(optax, config.outer_optimizer)(schedule, **config.outer_kwargs)
        theta = {"theta": jax.numpy.zeros(1)}
        jax.eval_shape(lambda theta: optimizer.update(theta, optimizer.init(theta), theta), theta)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"outer_optimizer {config.outer_optimizer!r} cannot be made with optax: {error}") from None
    return optax.flatten(optax.chain(optax.clip_by_global_norm(config.outer_clip), optimizer))


def run(config: Config, workdir: Path, *, resume: bool = False, console: Console | None = None) -> Outcome:
    """Meta-trains, from the start or from the last sound checkpoint.

    The folder holds ``config.json``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/`` and ``rule/``, the rule at
    the last checkpoint, which ``learned_opt.load`` reads. SIGTERM and SIGINT save and end the run. While it lives the
    folder is claimed (:func:`meta_train.claim.claim`); a mistake that is found before the first meta-step leaves
    nothing there.

    Args:
        config: the configuration.
        workdir: the run's folder; with several processes, one that all of them see.
        resume: go on with the run that ``workdir`` holds.
        console: where progress is shown.

    Returns:
        An :class:`Outcome`.

    Raises:
        ConfigError: bad settings, or ``workdir`` holds another run.
        ClaimError: another process holds ``workdir``.
        CheckpointError: a checkpoint cannot be written.
    """
    console = console or Console(stderr=True)
    leader = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        mistake = None
        try:
            if leader:
                stack.enter_context(claim.claim(workdir))
            _check_folder(workdir, config, resume=resume)
        except UserError as error:
            mistake = error
        _share(mistake, config)
        ours = workdir / "init"  # what the run started from, whatever becomes of it elsewhere
        kept_start = resume and config.init is not None and ours.is_dir()
        setup = set_up(dataclasses.replace(config, init=str(ours)) if kept_start else config, make_mesh())
        if leader:  # a mistake in the settings has come out by now
            what = f"meta-training {config.rule} by {config.estimator} on {jax.device_count()} device(s)"
            console.print(f"{what} → {workdir}", soft_wrap=True)

        def checkpoints():
            made = checkpoint.manager(workdir, config.keep_checkpoints)
            stack.callback(checkpoint.finish, made)
            return made

        def saved(like: TrainState) -> TrainState | None:
            found = checkpoint.restore(kept, like) if resume else None
            return None if found is None else found[1]

        kept = checkpoints() if resume else None
        state, compiled = begin(setup.trainer, jax.random.PRNGKey(config.seed), setup.data, saved)
        setup = setup._replace(trainer=setup.trainer._replace(meta_step=compiled))
        if kept is None:  # only now is anything written: what is wrong with the settings has come out
            if leader:
                _write_config(workdir, config)
                if config.init is not None:
                    start = store.read(config.init)
                    theta, rate = start.theta, start.learning_rate
                    learned_opt.save(ours, start.name, theta, kwargs=start.kwargs, learning_rate=rate)
            kept = checkpoints()
        metrics = progress.Metrics(workdir, int(state.step) + 1) if leader else None
        if metrics:
            stack.callback(metrics.close)
        caught = stack.enter_context(_stop_signals())
        state, finished = _steps(state, setup, config, workdir, kept, metrics, caught, console)
        theta = setup.whole(jax.tree.map(np.asarray, state.theta))
    by = None if finished else caught[0] if caught else signal.SIGTERM  # of another process of the run
    return Outcome(theta, int(state.step), finished, by)


def _steps(state: TrainState, setup: Setup, config: Config, workdir, checkpoints, metrics, caught, console: Console):
    """The loop. The host reads a step's figures one step late, so that the devices never wait for it."""
    step, saved = int(state.step), None
    pending: list[TrainInfo] = []
    window_start, stopped = time.monotonic(), False
    with progress.progress(console, "meta-train", config.meta_steps, step) as show:
        while step < config.meta_steps and not stopped:
            state, info = setup.trainer.meta_step(state, setup.data)
            step += 1
            if pending:
                jax.block_until_ready(pending[-1])
            pending.append(info)
            if step % config.log_every == 0 or step == config.meta_steps:
                values = _figures(pending, setup, time.monotonic() - window_start)
                window_start, pending = time.monotonic(), []
                if metrics:
                    metrics.write(step, values)
                lost = f", {values['dropped']:.0%} of the particles not finite" if values["dropped"] > 1e-6 else ""
                show(step, f"loss {values['loss']:.4f}, {values['inner_steps_per_second']:,.0f} inner steps/s{lost}")
            stopped = bool(caught) if jax.process_count() == 1 else checkpoints.reached_preemption(step)
            if step % config.checkpoint_every == 0 or step == config.meta_steps or stopped:
                _save(state, step, config, workdir, checkpoints, setup)
                saved = step
    if saved is None:
        _save_rule(state, step, config, workdir, setup)
    return state, step >= config.meta_steps


def _figures(infos: list[TrainInfo], setup: Setup, seconds: float) -> dict[str, float]:
    mean: Any = jax.tree.map(lambda *x: np.mean(np.stack(x), axis=0), *jax.device_get(infos))
    values = {
        "loss": float(mean.loss),
        "gradient_norm": float(mean.gradient_norm),
        "dropped": float(mean.dropped),
        "restarts": float(mean.restarts),
        "inner_steps_per_second": setup.inner_steps * len(infos) / seconds,
    }
    return values | {f"loss/{name}": float(loss) for name, loss in zip(setup.names, mean.losses, strict=True)}


def _save(state: TrainState, step: int, config: Config, workdir: Path, checkpoints, setup: Setup) -> None:
    checkpoint.save(checkpoints, step, state)
    _save_rule(state, step, config, workdir, setup)


def _save_rule(state: TrainState, step: int, config: Config, workdir: Path, setup: Setup) -> None:
    if jax.process_index() == 0:
        start = None if config.init is None else Path(config.init).name  # a rule's file tells nothing of this machine
        card = {"seed": config.seed, "config": dataclasses.asdict(config) | {"meta_steps": step, "init": start}}
        learning_rate = None
        if config.learning_rates is not None and getattr(setup.rule, "learning_rate", None) is not None:
            # the middle of what it was trained at
            learning_rate = float(f"{math.sqrt(math.prod(config.learning_rates)):.1g}")
        theta = setup.whole(jax.tree.map(np.asarray, state.theta))
        learned_opt.save(
            workdir / "rule", config.rule, theta, kwargs=config.rule_kwargs, learning_rate=learning_rate, card=card
        )


def _rule(config: Config):
    """The rule, and where its theta starts."""
    if config.init is not None:
        saved = store.read(config.init)
        if (saved.name, saved.kwargs) != (config.rule, config.rule_kwargs):
            raise ConfigError(
                f"init {config.init!r} is a {saved.name!r} with {saved.kwargs}: set rule and rule_kwargs so"
            )
        theta = jax.tree.map(lambda x: x.astype(jax.numpy.promote_types(x.dtype, np.float32)), saved.theta)
        return saved.rule, lambda key: theta  # in half precision an outer optimizer's squares would be 0
    if config.rule not in KNOWN:
        raise ConfigError(f"unknown rule {config.rule!r}; rules: {', '.join(sorted(KNOWN))}")
    kind = KNOWN[config.rule]
    try:
        rule = kind.rules[config.rule](**config.rule_kwargs)
        jax.eval_shape(kind.init(rule), jax.random.key(0))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"the rule {config.rule!r} cannot be made with {config.rule_kwargs}: {error}") from None
    return rule, kind.init(rule)


def _trained(config: Config, rule, init_theta):
    """The rule, where its theta starts, and all of theta from what is trained of it."""
    if not config.trainable:
        return rule, init_theta, lambda theta: theta
    if KNOWN[config.rule] is FEATURES:
        raise ConfigError("trainable is for optimizers: an unsupervised rule is trained whole")
    theta = jax.tree.map(np.asarray, init_theta(jax.random.PRNGKey(config.seed)))
    try:
        part = parts.only(rule, theta, config.trainable)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trainable: {error}") from None
    return part.rule, lambda key: part.theta, part.whole


def _check_folder(workdir: Path, config: Config, *, resume: bool) -> None:
    """Says what is wrong with the run's folder, if anything."""
    path = workdir / "config.json"
    if path.exists():
        if not resume:
            raise ConfigError(f"{workdir} holds a run already: name another --workdir, or go on with it by --resume")
        theirs, ours = (json.loads(configs.to_json(of)) for of in (configs.read(path), config))
        for name in theirs.keys() - configs.RESUMABLE:
            if theirs[name] != ours[name]:
                raise ConfigError(
                    f"{workdir} holds a run with {name} {theirs[name]!r}, not {ours[name]!r}: name another --workdir"
                )
    elif resume:
        raise ConfigError(f"{workdir} holds no run to resume")
    elif workdir.is_dir() and any(not path.name.startswith(claim.FILE) for path in workdir.iterdir()):
        raise ConfigError(f"{workdir} holds something that is no run: name another --workdir")


def _share(mistake: UserError | None, config: Config) -> None:
    """Ends all processes of a run where one has found a mistake, or was given other settings than the first."""
    if jax.process_count() > 1:
        mesh = make_mesh()
        settings = 1 + int(hashlib.sha256(configs.to_json(config).encode()).hexdigest()[:7], 16)
        mine = np.full(jax.local_device_count(), 0 if mistake else settings, np.int32)
        marks = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(*mesh.axis_names)), mine)
        found = jax.jit(lambda m: m, out_shardings=NamedSharding(mesh, PartitionSpec()))(marks)
        # On all devices: one that still connected to a process that has ended would keep this one from ending.
        found = np.asarray(jax.block_until_ready(found))
        if mistake is None and not found.all():
            number = mesh.devices[int(np.argmin(found))].process_index
            mistake = UserError(f"process {number} of this run has found a mistake, which it names")
        if mistake is None and (found != found[0]).any():
            first, other = (mesh.devices[i].process_index for i in (0, int(np.argmax(found != found[0]))))
            mistake = UserError(f"processes {first} and {other} of this run have other settings: give all the same")
    if mistake is not None:
        raise mistake


def _write_config(workdir: Path, config: Config) -> None:
    """Makes the folder this run's."""
    try:
        write_atomically(workdir / "config.json", configs.to_json(config))
    except OSError as error:
        raise ConfigError(f"cannot write {workdir}: {error.strerror}") from None


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """While inside, SIGTERM and SIGINT are only added to the list; in one of several processes JAX hears them."""
    caught: list[int] = []
    before = {}
    if jax.process_count() > 1:
        handlers = {signal.SIGINT: lambda received, frame: os.kill(os.getpid(), signal.SIGTERM)}
    else:
        handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT), lambda received, frame: caught.append(received))
    with contextlib.suppress(ValueError):  # not the main thread: the signals are somebody else's
        for number, handler in handlers.items():
            before[number] = signal.signal(number, handler)
    try:
        yield caught
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
