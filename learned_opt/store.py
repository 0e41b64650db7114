"""Saving and loading learned rules: safetensors for the weights, JSON for everything else, nothing pickled.

A saved rule is a folder::

    NAME/weights.safetensors   theta, one named tensor per leaf
    NAME/rule.json             which rule, its arguments, theta's tree, the weights' sha256, where they came from
    NAME/README.md             the model card, for people

Every problem with a saved rule is a :class:`StoreError` of one line.
"""

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import safetensors
import safetensors.numpy

from .base import Theta
from .files import write_folder_atomically
from .kinds import FEATURES, KNOWN, OPTIMIZER, Kind
from .layouts import Layout, name_of
from .loaded import Mask, check_rate, decay_weights, late

FORMAT_VERSION = 1
_WEIGHTS, _RULE, _CARD = "weights.safetensors", "rule.json", "README.md"
_FILES = {_WEIGHTS, _RULE, _CARD}
_MAX_BYTES = 1 << 30  # a larger file is not one of ours: refuse it before reading it into memory
_RECORDED = ("seed", "config", "libraries", "held_out")  # fields of a card that rule.json keeps


class StoreError(ValueError):
    """A saved rule is missing, damaged, or of a version that this release does not read."""


class SavedRule(NamedTuple):
    """A trained rule, and what :func:`save` needs to save it again.

    Attributes:
        rule: made of ``kwargs``: a :class:`learned_opt.LearnedOptimizer`, or a
            :class:`learned_opt.unsupervised.UnsupervisedRule`.
        theta: its meta-parameters, with the tree, shapes and dtypes of the rule's ``init``; NumPy arrays.
        name: of the rule, in :data:`learned_opt.RULES` or :data:`learned_opt.unsupervised.RULES`.
        kwargs: the factory's arguments.
        learning_rate: the default of :func:`load`, where one is recorded.
    """

    rule: Any
    theta: Theta
    name: str
    kwargs: dict[str, Any]
    learning_rate: float | None


def pretrained_dir() -> Path:
    """The folder of the rules that come with the package: inside it when installed, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "pretrained"
    return inside if inside.is_dir() else package.parent / "pretrained"


def available() -> tuple[str, ...]:
    """The names of the pretrained optimizers that come with the package, sorted.

    The unsupervised rules are no optimizers: :func:`learned_opt.unsupervised.available` lists them.

    Returns:
        Names that :func:`load` and :func:`load_rule` take.

    Example:
        >>> import learned_opt
        >>> isinstance(learned_opt.available(), tuple)
        True
    """
    return _names_of(OPTIMIZER)


def available_unsupervised() -> tuple[str, ...]:
    """The names of the pretrained unsupervised rules that come with the package, sorted.

    Returns:
        Names that :func:`load_unsupervised` and ``LearnedFeatures`` take.
    """
    return _names_of(FEATURES)


def _names() -> list[str]:
    return sorted(path.parent.name for path in pretrained_dir().glob(f"*/{_RULE}"))


def _names_of(kind: Kind) -> tuple[str, ...]:
    """The pretrained rules of a kind; a damaged one counts as an optimizer: loading it says what is wrong."""

    def found(name: str) -> Kind:
        try:
            return KNOWN.get(read_record(name)["rule"], OPTIMIZER)
        except StoreError:
            return OPTIMIZER

    return tuple(name for name in _names() if found(name) is kind)


def load(
    name_or_path: str | os.PathLike[str],
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    num_steps: int | jax.Array | None = None,
    layout: Layout | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A trained rule as an Optax transform.

    With :math:`u_t` the rule's (downhill) update and :math:`p_t` the parameters, the transform's updates are
    :math:`\eta_t (u_t - \lambda_t p_t)`. Like Optax's constructors it touches no device: the first ``init`` or
    ``update`` does.

    Args:
        name_or_path: one of :func:`available`, or the path of a folder that :func:`save` wrote.
        learning_rate: :math:`\eta_t`, a float, a traced scalar or an Optax schedule. A rule with a free step size
            (updates of unit RMS) defaults to the one recorded in its ``rule.json``; for any other rule this is a
            factor on its own step, 1 by default; a number of 0.01 or less, which looks like Adam's rate, is warned of.
        weight_decay: :math:`\lambda_t`, decoupled as in AdamW: a float, a traced scalar or a schedule. For a rule that
            sets its own step :math:`\eta_t` is 1, so that this is the share lost at every update; ``flagship`` has a
            decay of its own.
        mask: which parameters decay, as for ``optax.adamw``: a pytree of bools, a prefix of the parameters', or a
            function of them that gives one. All by default; it does not touch a decay that the rule has of its own.
        num_steps: the planned number of updates, at least 1, for a rule that wants it; may be traced. The steps of the
            shipped rules that take it fall to 0 over them, and later updates change nothing; those of ``flagship`` are
            also shorter in longer runs, and without it they fall as 1/t after 200 updates.
        layout: which axes of a parameter are inputs, which outputs and which index layers. By default
            :func:`~learned_opt.layouts.outputs_last`, for Haiku and Flax; :func:`~learned_opt.layouts.outputs_first` is
            for Equinox, and :func:`~learned_opt.layouts.stacked` for scanned networks, whose parameters are stacks of
            layers.

    Returns:
        An Optax transform. A rule that needs the loss takes it as ``update(grads, state, params, value=loss)``.

    Raises:
        StoreError: no such rule, or its files are damaged or of an unknown version.
        ValueError: an argument is no number, or out of range.

    Example:
        >>> import jax.numpy as jnp, learned_opt, optax
        >>> rule = learned_opt.RULES["celo2"]()
        >>> folder = learned_opt.save("/tmp/learned-opt-doctest", "celo2", rule.init(jax.random.key(0)))
        >>> optimizer = optax.chain(optax.clip_by_global_norm(1.0), learned_opt.load(folder, learning_rate=1e-3))
        >>> params = {"w": jnp.ones((3, 2))}
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> params = optax.apply_updates(params, updates)
    """
    saved = load_rule(name_or_path)
    check_rate("weight_decay", weight_decay)
    parts = [saved.rule.build(saved.theta, num_steps=num_steps, layout=layout)]
    if not (isinstance(weight_decay, int | float) and weight_decay == 0.0):
        parts.append(decay_weights(weight_decay, mask))
    elif mask is not None:
        raise ValueError("mask says what weight_decay is for: give both; a rule's own decay has no mask")
    if learning_rate is not None:
        check_rate("learning_rate", learning_rate)
        if saved.rule.learning_rate is None and isinstance(learning_rate, int | float) and 0 < learning_rate <= 0.01:
            said = f"{name_or_path} sets its own steps, and learning_rate={learning_rate:g} is a factor on them"
            warnings.warn(f"{said}: leave it out", stacklevel=2)
    else:
        learning_rate = saved.rule.learning_rate if saved.learning_rate is None else saved.learning_rate
    if learning_rate is not None:
        parts.append(optax.scale_by_learning_rate(learning_rate, flip_sign=False))
    return optax.with_extra_args_support(optax.chain(*parts))


def load_rule(name_or_path: str | os.PathLike[str]) -> SavedRule:
    """A trained rule and its meta-parameters, for fine-tuning or inspection.

    Args:
        name_or_path: as for :func:`load`.

    Returns:
        A :class:`SavedRule`: ``saved.rule.build(saved.theta)`` is the Optax transform, before learning rate and weight
        decay.

    Raises:
        StoreError: as for :func:`load`.

    Example:
        >>> import learned_opt
        >>> saved = learned_opt.load_rule("flagship-1")
        >>> facts = {"kwargs": saved.kwargs, "learning_rate": saved.learning_rate}
        >>> folder = learned_opt.save("/tmp/learned-opt-doctest", saved.name, saved.theta, **facts)  # the same again
    """
    saved = read(name_or_path)
    if KNOWN[saved.name] is not OPTIMIZER:
        raise StoreError(
            f"{str(name_or_path)!r} is an unsupervised rule, no Optax transform: "
            f"use {FEATURES.use.format(str(name_or_path))}.fit_transform(X)"
        )
    return saved


def load_unsupervised(name_or_path: str | os.PathLike[str]) -> SavedRule:
    """A trained unsupervised rule and its meta-parameters.

    Args:
        name_or_path: one of :func:`available_unsupervised`, or the path of a folder that :func:`save` wrote.

    Returns:
        A :class:`SavedRule`: ``saved.rule.update(saved.theta, phi, x)`` is a step of the network ``phi`` on a batch.

    Raises:
        StoreError: as for :func:`load`, or it is an optimizer.
    """
    saved = read(name_or_path)
    if KNOWN[saved.name] is not FEATURES:
        raise StoreError(f"{str(name_or_path)!r} is an optimizer, not an unsupervised rule: learned_opt.load takes it")
    return saved


def save(
    path: str | os.PathLike[str],
    rule: str,
    theta: Theta,
    *,
    kwargs: Mapping[str, Any] | None = None,
    learning_rate: float | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a rule as a folder that :func:`load` reads; whole or not at all.

    Args:
        path: the folder to write; an earlier saved rule there is replaced.
        rule: a name in :data:`learned_opt.RULES`, or in :data:`learned_opt.unsupervised.RULES`.
        theta: its meta-parameters, the tree of ``RULES[rule](**kwargs).init`` (``.init_theta``).
        kwargs: the factory's arguments, JSON values.
        learning_rate: the default of :func:`load`, for an optimizer with a free step size.
        card: what is known of the rule. ``seed``, ``config``, ``libraries`` and ``held_out`` go into ``rule.json``;
            ``readme`` is the text of the model card.

    Returns:
        The folder.

    Raises:
        StoreError: unknown rule, ``theta`` not of the rule's shapes, values that are no JSON, or the folder cannot
            be written (or holds something else).
    """
    path, kwargs, card = Path(path), dict(kwargs or {}), dict(card or {})
    made = _make(rule, kwargs)
    if learning_rate is None:
        learning_rate = getattr(made, "learning_rate", None)
    elif not _is_rate(learning_rate):
        raise StoreError(f"learning_rate {learning_rate!r} is no positive number")
    if unknown := sorted(card.keys() - {*_RECORDED, "readme"}):
        raise StoreError(f"the card has an unknown field {unknown[0]!r}; fields: {', '.join(_RECORDED)}, readme")
    template = _named(_theta_shapes(rule, made))
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in _named(theta).items()}
    _check_shapes(template, {name: (leaf.shape, leaf.dtype.name) for name, leaf in arrays.items()}, "theta")
    weights = safetensors.numpy.save(arrays)
    record = {
        "format_version": FORMAT_VERSION,
        "features_version": KNOWN[rule].version,
        "rule": rule,
        "kwargs": kwargs,
        "needs": list(getattr(made, "needs", ())),
        "learning_rate": None if learning_rate is None else float(learning_rate),
        "theta": {name: {"shape": list(x.shape), "dtype": x.dtype.name} for name, x in arrays.items()},
        "sha256": hashlib.sha256(weights).hexdigest(),
        "libraries": {"python": platform.python_version(), "jax": jax.__version__, "optax": optax.__version__},
    } | {field: card[field] for field in _RECORDED if field in card}
    try:
        text = json.dumps(record, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(f"cannot save {path}: kwargs and card must be JSON values ({error})") from None
    readme = card.get("readme", f"# {path.name}\n\nA learned update rule of the kind `{rule}`.\n")
    _write_folder(path, {_WEIGHTS: weights, _RULE: text.encode() + b"\n", _CARD: readme.encode()})
    return path


def read_record(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked contents of a saved rule's ``rule.json``.

    Args:
        name_or_path: as for :func:`load`.

    Returns:
        The record, a dict of JSON values.

    Raises:
        StoreError: as for :func:`load`.
    """
    return _record(_resolve(name_or_path))


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _record(folder: Path) -> dict[str, Any]:
    contents = _read_bytes(folder / _RULE)
    try:
        record = json.loads(contents, parse_constant=_refused)
    except (ValueError, RecursionError):
        raise StoreError(f"{folder / _RULE} is damaged: not JSON; export the rule again") from None
    expected = {"rule": str, "kwargs": dict, "theta": dict, "sha256": str}
    if not isinstance(record, dict):
        raise StoreError(f"{folder / _RULE} is damaged: not a JSON object; export the rule again")
    name = record.get("rule")
    features = (KNOWN.get(name, OPTIMIZER) if isinstance(name, str) else OPTIMIZER).version
    for field, known in (("format_version", FORMAT_VERSION), ("features_version", features)):
        if record.get(field) != known or isinstance(record.get(field), bool):
            raise StoreError(
                f"{folder / _RULE} has {field} {record.get(field)!r}, and this release reads {known}; "
                "install the learned-opt release that wrote it, or export the rule again"
            )
    for field, kind in expected.items():
        if not isinstance(record.get(field), kind):
            raise StoreError(f"{folder / _RULE} is damaged: {field!r} is missing or no {kind.__name__}")
    rate = record.get("learning_rate")
    if rate is not None and not _is_rate(rate):
        raise StoreError(f"{folder / _RULE} is damaged: learning_rate {rate!r} is no positive number")
    return record


def _is_rate(value: Any) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and bool(0 < value < float("inf"))


def _resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a saved rule; a bare name means a pretrained rule first, then a folder of that name."""
    if not isinstance(name_or_path, str | os.PathLike):
        raise StoreError(f"a rule is loaded by its name or folder, not by {name_or_path!r}")
    path = Path(name_or_path)
    names = _names()
    if str(name_or_path) in names:
        return pretrained_dir() / str(name_or_path)
    try:
        found, a_run = path.is_dir(), (path / "rule" / _RULE).exists() and not (path / _RULE).exists()
    except (OSError, ValueError):  # a name too long, or with a NUL
        found = a_run = False
    if a_run:
        raise StoreError(f"{path} is a run of `learned-opt train`; its rule is {path / 'rule'}")
    if found:
        return path
    known = ", ".join(names) or "none"
    raise StoreError(f"no pretrained rule or folder named {str(name_or_path)!r}; pretrained rules: {known}")


def read(name_or_path: str | os.PathLike[str]) -> SavedRule:
    """Reads and checks a saved rule of either kind.

    Args:
        name_or_path: as for :func:`load`.

    Returns:
        A :class:`SavedRule`.

    Raises:
        StoreError: as for :func:`load`.
    """
    folder = _resolve(name_or_path)
    record = _record(folder)
    weights = _read_bytes(folder / _WEIGHTS)
    if hashlib.sha256(weights).hexdigest() != record["sha256"]:
        raise StoreError(f"{folder / _WEIGHTS} is damaged: its sha256 is not that of {_RULE}; export the rule again")
    try:
        arrays = safetensors.numpy.load(weights)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise StoreError(f"{folder / _WEIGHTS} is damaged: {error}") from None
    rule = _make(record["rule"], record["kwargs"])
    template = _theta_shapes(record["rule"], rule)
    described = {
        name: (tuple(spec["shape"]), spec.get("dtype"))
        for name, spec in record["theta"].items()
        if isinstance(spec, dict) and isinstance(spec.get("shape"), list)
    }
    stored = {name: (leaf.shape, leaf.dtype.name) for name, leaf in arrays.items()}
    if described != stored:
        raise StoreError(f"{folder / _RULE} describes another theta than {_WEIGHTS} holds; export the rule again")
    _check_shapes(_named(template), stored, str(folder / _WEIGHTS))
    leaves = [arrays[name] for name in _named(template)]  # on the host: reading starts no backend
    if KNOWN[record["rule"]] is OPTIMIZER:
        rule = rule._replace(build=late(rule.build))
    theta = jax.tree.unflatten(jax.tree.structure(template), leaves)
    return SavedRule(rule, theta, record["rule"], record["kwargs"], record.get("learning_rate"))


def _make(rule: str, kwargs: Mapping[str, Any]) -> Any:
    if rule not in KNOWN:
        raise StoreError(f"unknown rule {rule!r}; known rules: {', '.join(sorted(KNOWN))}")
    try:
        return KNOWN[rule].rules[rule](**kwargs)
    except (TypeError, ValueError) as error:
        raise StoreError(f"the rule {rule!r} cannot be made with {dict(kwargs)}: {_line(error)}") from None


def _theta_shapes(name: str, rule: Any) -> Theta:
    try:
        return jax.eval_shape(KNOWN[name].init(rule), jax.eval_shape(jax.random.key, 0))  # of no key, but its shape
    except Exception as error:  # whatever wrong arguments make a factory's init raise
        raise StoreError(f"the rule {name!r} cannot be made with its arguments: {_line(error)}") from None


def _named(tree: Theta) -> dict[str, Any]:
    """The leaves of a pytree by path, ``a/b/0``, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {name_of(path) or "theta": leaf for path, leaf in leaves}


def _check_shapes(template: Mapping[str, Any], found: Mapping[str, tuple], what: str) -> None:
    wanted = {name: tuple(leaf.shape) for name, leaf in template.items()}
    if missing := sorted(wanted.keys() ^ found.keys()):
        raise StoreError(f"{what} does not fit the rule: {missing[0]!r} is in only one of the two")
    for name, shape in wanted.items():
        if tuple(found[name][0]) != shape:
            raise StoreError(f"{what} does not fit the rule: {name!r} has shape {found[name][0]}, not {shape}")
        if not np.issubdtype(np.dtype(found[name][1]), np.floating):
            raise StoreError(
                f"{what} does not fit the rule: {name!r} is {found[name][1]}, not float16, float32 or float64"
            )


def _read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise StoreError(f"{path} is larger than {_MAX_BYTES} bytes: not a saved rule")
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from None


def _write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes the folder beside its place, then renames it there."""
    try:
        if path.exists():  # it is replaced as a whole
            others = sorted({p.name for p in path.iterdir()} - _FILES) if path.is_dir() else [path.name]
            if others:
                raise StoreError(
                    f"cannot save {path}: {others[0]!r} is there, which is no part of a rule; name another folder"
                )
        write_folder_atomically(path, files)
    except OSError as error:
        raise StoreError(f"cannot save {path}: {error.strerror}; nothing was changed") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
