"""The model card of an exported rule: what it is, how it was made, what it is worth and where it fails."""

from collections.abc import Mapping, Sequence
from typing import Any

_TEMPLATE = """\
# {name}

A learned update rule of the kind `{rule}`, {size} meta-parameters, meta-trained with
[learned-opt](../../README.md).

```python
import learned_opt
optimizer = learned_opt.load("{name}"{arguments})   # an Optax transform
```

Needs: {needs}. {rate}

## How it was made

Meta-trained by the estimator `{estimator}` on the training suite `{suite}` for {meta_steps:,} meta-steps of {particles}
particles a family and {unroll} inner steps each, episodes of {min_length} to {max_length} steps, seed {seed}. The whole
configuration is in `rule.json`; `learned-opt train` with these settings repeats it.
Libraries: {libraries}.

## What it is worth

{held_out}

## Where it fails

{failures}
Nothing is known of it far outside: much larger models, much longer runs, other kinds of loss. Compare it with a tuned
optimizer (`learned-opt bench {name}`) before you rely on it.

## Licence

Apache-2.0, as the code. The data that it was meta-trained on are listed with their licences in `tasks/embedded/`.
"""


def text(name: str, record: Mapping[str, Any], held_out: Mapping[str, Any] | None) -> str:
    """The card as Markdown.

    Args:
        name: the rule's name.
        record: its ``rule.json``.
        held_out: the benchmark's ``results.json``, or ``None`` if there was none.

    Returns:
        The text.
    """
    config = record.get("config") or {}
    rate = record.get("learning_rate")
    figures = [] if held_out is None else held_out["figures"]
    known = ("estimator", "suite", "meta_steps", "particles", "unroll", "min_length", "max_length")
    libraries = ", ".join(f"{library} {version}" for library, version in record.get("libraries", {}).items())
    return _TEMPLATE.format(
        name=name,
        rule=record["rule"],
        size=sum(_size(spec["shape"]) for spec in record["theta"].values()),
        arguments="" if rate is None else f", learning_rate={rate:g}",
        needs=" and ".join(f"`{need}`" for need in record.get("needs", []))
        or "neither the loss nor the number of steps",
        rate="It sets its own step size." if rate is None else f"Its learning rate is free, {rate:g} by default.",
        seed=record.get("seed", "unknown"),
        libraries=libraries or "unknown",
        held_out="No benchmark was run." if held_out is None else _table(held_out["about"], figures),
        failures=_failures(figures),
        **{field: config.get(field, 0 if field == "meta_steps" else "unknown") for field in known},
    )


def _size(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _table(about: Mapping[str, Any], figures: Sequence[Mapping[str, Any]]) -> str:
    contenders = list(dict.fromkeys(row["contender"] for row in figures))
    lines = [
        f"Held-out suite `{about['suite']}`, {about['steps']} steps, {about['seeds']} seeds: how far the training loss "
        "came down, tuned Adam's way being 1 (in brackets, how many times fewer steps tuned Adam's best loss took). "
        "Tuned on a grid of learning rates, or @ the one given. The worst tasks come first.",
        "",
        "| task | " + " | ".join(contenders) + " |",
        "|---|" + "---|" * len(contenders),
    ]
    for task in dict.fromkeys(row["task"] for row in figures):
        cells = {row["contender"]: row for row in figures if row["task"] == task}
        lines.append(f"| {task} | " + " | ".join(_cell(cells.get(name)) for name in contenders) + " |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None or row["progress"] is None:
        return "–" if row is None else "diverged"
    return f"{row['progress']:.3f}" + (f" ({row['speed_up']:.2f}x)" if row["speed_up"] else " (–)")


def _failures(figures: Sequence[Mapping[str, Any]]) -> str:
    ours = [row for row in figures if not row["baseline"]]
    lost = [row for row in ours if row["progress"] is None or row["progress"] < 1 or row["diverged"]]
    if not ours:
        return "Unknown: no benchmark was run."
    if not lost:
        return "On none of the benchmark's tasks did it end behind tuned Adam."
    lines = [
        f"- {row['task']}, as {row['contender']}: {_cell(row)}, {row['diverged']} of {row['seeds']} seeds diverged"
        for row in lost
    ]
    return "It ended behind tuned Adam, or diverged, on:\n\n" + "\n".join(lines) + "\n"


_UNSUPERVISED = """\
# {name}

A learned unsupervised rule of the kind `{rule}`, {size} meta-parameters, meta-trained with
[learned-opt](../../README.md). It trains networks on rows without labels; it is no optimizer.

```python
from learned_opt.unsupervised import LearnedFeatures
features = LearnedFeatures("{name}", sizes=(64, 32)).fit_transform(X)   # scikit-learn; in JAX: docs/unsupervised.md
```

## How it was made

By the estimator `{estimator}` on the suite `{suite}` of `tasks/representation.py`: {meta_steps:,} meta-steps of
{particles} particles a family and {unroll} inner steps each, episodes of {min_length} to {max_length} steps, seed
{seed}{start}. The whole configuration is in `rule.json`; `learned-opt train` with these settings repeats it.
Libraries: {libraries}.

## What it is worth

{held_out}

## Licence

Apache-2.0, as the code. The letters that it was meta-trained on are drawn from the fonts that come with matplotlib.
"""


def unsupervised_text(name: str, record: Mapping[str, Any], held_out: str | None = None) -> str:
    """The card of an unsupervised rule as Markdown.

    Args:
        name: the rule's name.
        record: its ``rule.json``.
        held_out: what it is worth, as Markdown; ``None`` if nobody has looked yet.

    Returns:
        The text.
    """
    config = record.get("config") or {}
    known = ("estimator", "suite", "meta_steps", "particles", "unroll", "min_length", "max_length")
    libraries = ", ".join(f"{library} {version}" for library, version in record.get("libraries", {}).items())
    return _UNSUPERVISED.format(
        name=name,
        rule=record["rule"],
        size=sum(_size(spec["shape"]) for spec in record["theta"].values()),
        seed=record.get("seed", "unknown"),
        start="" if config.get("init") is None else ", from an earlier rule",
        libraries=libraries or "unknown",
        held_out=held_out or "Not measured yet: `python benchmarks/unsupervised_features.py --rule FOLDER` does.",
        **{field: config.get(field, 0 if field == "meta_steps" else "unknown") for field in known},
    )
