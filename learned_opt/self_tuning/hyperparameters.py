r"""Hyperparameters to tune: their bounds, transforms, start and scale.

A tuned hyperparameter lives on the whole line as :math:`\ell`; its value is :math:`t(\ell)`. A pytree (dicts and lists)
of :class:`Hyperparameter` declares those of a run, and says by which mechanism each is tuned: by the best response
where it changes the optimum of the training loss (weights of losses, noise, augmentation, regularisers), by the
hypergradient through the last training steps where it only changes the way there (the optimizer's learning rate,
momentum, decay).
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Specs = Any  # a pytree of Hyperparameter
FORMAT = 1
MECHANISMS = ("response", "hypergradient")
_REACH = 5.0  # of l where a sigmoid is steep enough to come back from


@dataclasses.dataclass(frozen=True)
class Hyperparameter:
    """One hyperparameter; make it with :func:`interval`, :func:`positive`, :func:`logit`, :func:`log` or :func:`real`.

    Not a pytree: a leaf of the specs.

    Attributes:
        kind: a name in :data:`KINDS`.
        start: start value, within the bounds.
        low: lower bound, not attained; ``None`` where the kind has none.
        high: upper bound, not attained; ``None`` where the kind has none.
        scale: start standard deviation of the perturbation of l, > 0.
        discrete: whether the value is rounded down.
        per_example: whether every example of a batch has a perturbation of its own; else one a batch.
        tuned: ``False`` holds the hyperparameter at ``start``.
        by: ``"response"``, by the weights' best response: for what changes the optimum of the training loss.
            ``"hypergradient"``, through the last training steps: for the optimizer's own. These are not perturbed, and
            ``scale`` only bounds how far one validation step moves them.
    """

    kind: str
    start: float
    low: float | None = None
    high: float | None = None
    scale: float = 0.5
    discrete: bool = False
    per_example: bool = True
    tuned: bool = True
    by: str = "response"

    @property
    def own(self) -> bool:
        """Whether every example has a value of its own."""
        return self.per_example and self.by == "response"

    def __post_init__(self):
        if self.by not in MECHANISMS:
            raise ValueError(f"a hyperparameter is tuned by one of {MECHANISMS}, got {self.by!r}")
        if self.by == "hypergradient" and self.discrete:
            raise ValueError("a discrete hyperparameter has no hypergradient")
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of hyperparameter {self.kind!r}: one of {sorted(KINDS)}")
        for name in KINDS[self.kind].bounds:
            if getattr(self, name) is None:
                raise ValueError(f"a hyperparameter of kind {self.kind!r} needs {name}")
        for name in ("start", "low", "high", "scale"):  # a NumPy number would be no JSON
            if (number := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(number))
        low, high = self.low, self.high
        if low is not None and high is not None and not low < high:
            raise ValueError(f"a hyperparameter's low must be below its high, got {low} and {high}")
        outside = (low is not None and self.start < low) or (high is not None and self.start > high)
        if outside or not math.isfinite(self.start):
            raise ValueError(f"a hyperparameter's start must lie in ({low}, {high}), got {self.start}")
        if not self.scale > 0:
            raise ValueError(f"a hyperparameter's scale must be above 0, got {self.scale}")
        if self.tuned and not math.isfinite(unconstrained(self)):
            raise ValueError(
                f"start {self.start} lies on a bound of ({low}, {high}), from where it cannot move: start inside, "
                "or pass tuned=False"
            )


class Kind(NamedTuple):
    """A transform of the line: ``forward(l, low, high)`` and its inverse in NumPy, and the bounds it needs."""

    forward: Callable[[jax.Array, float, float], jax.Array]
    inverse: Callable[[float, float, float], float]
    bounds: tuple[str, ...] = ()


def _logit(x: float, low: float, high: float) -> float:
    return float(np.log(x - low) - np.log(high - x))


def _log_interval(value: float, low: float, high: float) -> float:
    return _logit(math.log(value), math.log(low), math.log(high))


KINDS: dict[str, Kind] = {
    "interval": Kind(lambda x, a, b: a + (b - a) * jax.nn.sigmoid(x), _logit, ("low", "high")),
    "logit": Kind(lambda x, a, b: jax.nn.sigmoid(x), lambda v, a, b: _logit(v, 0.0, 1.0), ("low", "high")),
    "positive": Kind(lambda x, a, b: a + jax.nn.softplus(x), lambda v, a, b: inverse_softplus(v - a), ("low",)),
    "log": Kind(lambda x, a, b: jnp.exp(x), lambda v, a, b: float(np.log(v))),
    "log_interval": Kind(
        lambda x, a, b: jnp.exp(math.log(a) + (math.log(b) - math.log(a)) * jax.nn.sigmoid(x)),
        _log_interval,
        ("low", "high"),
    ),
    "real": Kind(lambda x, a, b: x, lambda v, a, b: v),
}


def inverse_softplus(value: float) -> float:
    r"""The :math:`x` of :math:`\log(1 + e^x) = v`, for :math:`v > 0`; minus infinity for 0."""
    return float(value + np.log(-np.expm1(-value)))


def interval(start: float, low: float, high: float, **options: Any) -> Hyperparameter:
    r"""A value in an interval, :math:`t(\ell) = a + (b - a)\,\mathrm{sigmoid}(\ell)`.

    Args:
        start: start value in (low, high).
        low: :math:`a`.
        high: :math:`b`.
        **options: ``scale``, ``discrete``, ``per_example``, ``tuned``, ``by`` of :class:`Hyperparameter`.

    Returns:
        A :class:`Hyperparameter`.

    Raises:
        ValueError: if the start lies outside the bounds, or on one while tuned.

    Example:
        >>> interval(0.25, 0.0, 0.5).start
        0.25
    """
    return Hyperparameter("interval", start, low, high, **options)


def logit(start: float, **options: Any) -> Hyperparameter:
    r"""A value in (0, 1), :math:`t(\ell) = \mathrm{sigmoid}(\ell)`; arguments as :func:`interval`."""
    return Hyperparameter("logit", start, 0.0, 1.0, **options)


def positive(start: float, low: float = 0.0, **options: Any) -> Hyperparameter:
    r"""A value above ``low``, :math:`t(\ell) = a + \log(1 + e^\ell)`; arguments as :func:`interval`."""
    return Hyperparameter("positive", start, low, None, **options)


def log(start: float, low: float | None = None, high: float | None = None, **options: Any) -> Hyperparameter:
    r"""A positive value on a logarithmic scale, :math:`t(\ell) = e^\ell`.

    With both bounds (positive), :math:`\log t` is :func:`interval`'s between their logarithms.

    Args:
        start: start value > 0.
        low: lower bound > 0, or None.
        high: upper bound, given if and only if ``low`` is.
        **options: as in :func:`interval`.

    Returns:
        A :class:`Hyperparameter`.

    Raises:
        ValueError: if the start lies outside the bounds, or one bound only is given.
    """
    if start <= 0 or (low is not None and low <= 0):
        raise ValueError(f"log: start and low must be above 0, got {start} and {low}")
    if (low is None) != (high is None):
        raise ValueError("log: give both low and high, or neither")
    return Hyperparameter("log" if low is None else "log_interval", start, low, high, **options)


def real(start: float, **options: Any) -> Hyperparameter:
    r"""Any real value, :math:`t(\ell) = \ell`; arguments as :func:`interval`."""
    return Hyperparameter("real", start, **options)


def unconstrained(spec: Hyperparameter) -> float:
    r"""The :math:`\ell` of a spec's start value; a discrete start stands in the middle of its step."""
    value = spec.start
    if spec.discrete:
        step = math.floor(value)
        value = (step + min(step + 1, math.inf if spec.high is None else max(spec.high, step))) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return KINDS[spec.kind].inverse(np.float64(value), spec.low, spec.high)  # type: ignore[arg-type]


def _named(specs: Specs) -> list[tuple[str, Hyperparameter]]:
    found = by_name(specs)
    for name, leaf in found.items():
        if not isinstance(leaf, Hyperparameter):
            raise ValueError(
                f"hyperparameter {name} is a {type(leaf).__name__}: make it with interval(), positive(), logit(), "
                "log() or real()"
            )
    return list(found.items())


def names(specs: Specs) -> tuple[str, ...]:
    """The names of the tuned hyperparameters, in the order of the vector l.

    Args:
        specs: a pytree of :class:`Hyperparameter`.

    Returns:
        A tuple of H paths, such as ``"dropout/0"``.

    Example:
        >>> names({"dropout": [logit(0.2), logit(0.1, tuned=False)], "l2": log(1e-3)})
        ('dropout/0', 'l2')
    """
    return tuple(name for name, spec in _named(specs) if spec.tuned)


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree like the specs, by the names that :func:`names` has for them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def tuned(specs: Specs) -> tuple[Hyperparameter, ...]:
    """The tuned hyperparameters, in the order of :func:`names`."""
    return tuple(spec for _, spec in _named(specs) if spec.tuned)


def start(specs: Specs) -> tuple[jax.Array, jax.Array]:
    r"""Where a run starts.

    Args:
        specs: a pytree of :class:`Hyperparameter`, H of them tuned.

    Returns:
        :math:`\ell` and the inverse softplus of the perturbation's scale, floats [H].

    Raises:
        ValueError: if none is tuned.
    """
    chosen = tuned(specs)
    if not chosen:
        raise ValueError("no hyperparameter is tuned: leave tuned=True in at least one")
    dtype = jnp.result_type(float)
    mean = jnp.asarray([unconstrained(spec) for spec in chosen], dtype)
    return mean, jnp.asarray([inverse_softplus(spec.scale) for spec in chosen], dtype)


def draw(specs: Specs, key: jax.Array) -> jax.Array:
    r"""A point of the search space: each value uniform between its bounds, or its logarithm where that is its scale.

    Args:
        specs: a pytree of :class:`Hyperparameter`, H of them tuned, all with two bounds.
        key: a PRNG key.

    Returns:
        :math:`\ell`, floats [H], within :func:`span`.

    Raises:
        ValueError: if a hyperparameter has no bounds, by name.

    Example:
        >>> import jax
        >>> point = draw({"l2": log(1e-3, 1e-6, 1e-1), "dropout": logit(0.1)}, jax.random.key(0))
        >>> point.shape
        (2,)
    """
    for name, spec in zip(names(specs), tuned(specs), strict=True):
        if KINDS[spec.kind].bounds != ("low", "high"):
            raise ValueError(f"{name} has no bounds to draw from: give it a low and a high")
    low, high = span(specs)
    uniform = jax.random.uniform(key, low.shape, low.dtype, minval=jax.nn.sigmoid(low), maxval=jax.nn.sigmoid(high))
    return jnp.clip(jnp.log(uniform) - jnp.log1p(-uniform), low, high)


def span(specs: Specs) -> tuple[jax.Array, jax.Array]:
    r"""How low and how high :math:`\ell` may go.

    Where the transform is a sigmoid, to 5 on either side, or on both as far as the start where that lies further out:
    5 is within 0.7 % of the bounds. Beyond it is flat, and no gradient would bring the hyperparameter back. Unbounded
    elsewhere.

    Args:
        specs: a pytree of :class:`Hyperparameter`, H of them tuned.

    Returns:
        Two arrays of floats [H].

    Example:
        >>> span({"dropout": logit(0.5), "l2": log(1.0)})
        (Array([ -5., -inf], dtype=float32), Array([ 5., inf], dtype=float32))
    """
    mean, _ = start(specs)
    flat = jnp.asarray([KINDS[spec.kind].bounds == ("low", "high") for spec in tuned(specs)])
    reach = jnp.where(flat, jnp.maximum(jnp.abs(mean), _REACH), jnp.inf)
    return -reach, reach


def values(specs: Specs, point: jax.Array) -> Any:
    r"""The hyperparameters' values :math:`t(\ell)`.

    Args:
        specs: a pytree of :class:`Hyperparameter`, H of them tuned.
        point: :math:`\ell`, floats [H], or [B, H] with one row an example.

    Returns:
        A pytree like ``specs``: floats [], or [B] for a hyperparameter that is tuned per example where ``point`` has
        rows. Where hyperparameters are tuned per batch the rows of ``point`` must agree.

    Example:
        >>> specs = {"dropout": logit(0.5), "l2": log(1.0)}
        >>> values(specs, start(specs)[0])
        {'dropout': Array(0.5, dtype=float32), 'l2': Array(1., dtype=float32)}
    """
    column = iter(range(point.shape[-1]))

    def value(spec: Hyperparameter) -> jax.Array:
        if not spec.tuned:
            out = jnp.asarray(spec.start, point.dtype)
        else:
            x = point[..., next(column)]
            x = x[0] if x.ndim and not spec.own else x
            out = KINDS[spec.kind].forward(x, spec.low, spec.high)  # type: ignore[arg-type]
        return jnp.floor(out) if spec.discrete else out

    return jax.tree.map(value, specs)


def _kind(spec: Hyperparameter) -> str:
    if spec.by == "hypergradient":
        return " by hypergradient"
    return "" if spec.per_example else " a batch"


def describe(specs: Specs, point: Any = None, scale: Any = None) -> str:
    r"""A table of the hyperparameters, a line each.

    Args:
        specs: a pytree of :class:`Hyperparameter`, H of them tuned.
        point: :math:`\ell`, floats [H]; the start by default.
        scale: standard deviations of the perturbation, floats [H]; the start's by default.

    Returns:
        Lines of name, value, range and scale.

    Example:
        >>> print(describe({"l2": log(0.5), "dropout": logit(0.25, tuned=False)}))
        name     value  range      scale
        dropout  0.25   (0, 1)     fixed
        l2       0.5    (0, inf)   0.5
    """
    if point is None:
        point = np.array([unconstrained(spec) for spec in tuned(specs)])
    point = jnp.asarray(point, jnp.result_type(float)).reshape(-1)
    shown = jax.tree.leaves(values(specs, point))
    scales = iter([spec.scale for spec in tuned(specs)] if scale is None else np.asarray(scale).tolist())
    rows = [("name", "value", "range", "scale")]
    for (name, spec), value in zip(_named(specs), shown, strict=True):
        low = -math.inf if spec.kind == "real" else spec.low or 0.0
        bounds = f"({low:.4g}, {math.inf if spec.high is None else spec.high:.4g})" + " whole" * spec.discrete
        text = f"{next(scales):.3g}{_kind(spec)}" if spec.tuned else "fixed"
        rows.append((name, f"{float(value):.4g}", bounds, text))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    widths[2] = max(widths[2], 9)
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[3]]) for r in rows)


def to_json(specs: Specs) -> str:
    """The specs as JSON.

    Args:
        specs: dicts and lists of :class:`Hyperparameter`.

    Returns:
        A JSON text that :func:`from_json` turns into equal specs.

    Raises:
        ValueError: if ``specs`` holds anything else.

    Example:
        >>> specs = {"dropout": [logit(0.2), logit(0.1, discrete=False)]}
        >>> from_json(to_json(specs)) == specs
        True
    """

    def encode(node: Any) -> Any:
        if isinstance(node, Hyperparameter):
            return {"hyperparameter": dataclasses.asdict(node)}
        if type(node) is dict and all(isinstance(key, str) for key in node):
            return {"dict": {key: encode(child) for key, child in node.items()}}
        if type(node) is list:
            return {"list": [encode(child) for child in node]}
        raise ValueError(f"to_json: specs must be dicts and lists of hyperparameters, got a {type(node).__name__}")

    return json.dumps({"format": FORMAT, "specs": encode(specs)}, indent=1)


def from_json(text: str) -> Specs:
    """Specs of :func:`to_json`'s text.

    Args:
        text: JSON.

    Returns:
        Dicts and lists of :class:`Hyperparameter`.

    Raises:
        ValueError: if the text is no such JSON.
    """

    def decode(node: Any) -> Specs:
        if not isinstance(node, dict) or len(node) != 1:
            raise ValueError(f"from_json: not the specs of hyperparameters: {node!r}")
        ((kind, content),) = node.items()
        if kind == "dict" and isinstance(content, dict):
            return {key: decode(child) for key, child in content.items()}
        if kind == "list" and isinstance(content, list):
            return [decode(child) for child in content]
        try:
            return Hyperparameter(**content)
        except TypeError as error:
            raise ValueError(f"from_json: not a hyperparameter: {content!r} ({error})") from None

    found = json.loads(text)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"from_json: this is no text of to_json, format {FORMAT}")
    return decode(found.get("specs"))
