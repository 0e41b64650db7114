"""The model card of an exported rule: what it is, how it was made, what it is worth and where it fails."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...train.config import ConfigError
from .. import glossary
from ..comparison import lost
from ..measures import best_baseline

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
particles a family and {unroll} inner steps each, episodes of {min_length} to {max_length} steps, seed
{seed}{start}. The whole configuration is in `rule.json`; `learned-opt train` with these settings repeats it.
Libraries: {libraries}.

## What it is worth

{held_out}

## Where it fails

{failures}
Nothing is known of it far outside: much larger models, much longer runs, other kinds of loss. Compare it with a tuned
optimizer (`learned-opt bench {name}`) before you rely on it.

## Licence

Apache-2.0, as the code. The data that it was meta-trained on are listed with their licences in `tasks/data/embedded/`.
"""


def text(name: str, record: Mapping[str, Any], held_out: Mapping[str, Any] | None) -> str:
    """The card as Markdown.

    Args:
        name: the rule's name.
        record: its ``rule.json``.
        held_out: of :func:`own_results`, or ``None`` if there was no benchmark.

    Returns:
        The text.
    """
    config = record.get("config") or {}
    rate = record.get("learning_rate")
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
        start="" if config.get("init") is None else f", from {config['init']}",
        libraries=libraries or "unknown",
        held_out="No benchmark was run." if held_out is None else _worth(held_out),
        failures=_failures(held_out["figures"] if held_out else []),
        **{field: config.get(field, 0 if field == "meta_steps" else "unknown") for field in known},
    )


def own_results(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a benchmark says of one rule.

    Args:
        results: a benchmark's ``results.json``.
        name: the rule's. Where no contender is called so, it is the one that a run calls ``rule``, or the only learned
            one.

    Returns:
        ``about``; ``summary``, all contenders; ``figures``, the rule's own, each with its task's ``best_baseline``. The
        rule is called ``name`` in them.

    Raises:
        ConfigError: the benchmark is not of this rule, or of an earlier format.
    """
    if "summary" not in results:
        raise ConfigError("the benchmark's results are of an earlier version: run `learned-opt bench` again")
    if "contender" not in results["summary"][0]:
        raise ConfigError("a card shows a benchmark on small tasks, and this one is on workloads")
    learned = dict.fromkeys(row["contender"].partition("@")[0] for row in results["summary"] if not row["baseline"])
    called = name if name in learned else "rule" if "rule" in learned else next(iter(learned), None)
    if called is None or (called not in (name, "rule") and len(learned) > 1):
        raise ConfigError(f"the benchmark has no rule {name!r}; it has {', '.join(learned) or 'none'}")

    def renamed(row: Mapping[str, Any]) -> dict[str, Any]:
        base, at, rate = row["contender"].partition("@")
        return {**row, "contender": f"{name if base == called else base}{at}{rate}"}

    def is_own(row: Mapping[str, Any]) -> bool:
        return row["contender"].partition("@")[0] == called

    def best(task: str) -> dict[str, Any] | None:
        row = best_baseline([row for row in results["figures"] if row["task"] == task])
        return None if row is None else {field: row[field] for field in ("contender", "progress", "speed_up")}

    return {
        "about": {field: value for field, value in results["about"].items() if field != "contenders"},
        "summary": [{**renamed(row), "ours": is_own(row)} for row in results["summary"]],
        "figures": [{**renamed(row), "best_baseline": best(row["task"])} for row in results["figures"] if is_own(row)],
    }


def _size(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _worth(held_out: Mapping[str, Any]) -> str:
    """The rule among all contenders, then task by task."""
    about = held_out["about"]
    rates = sorted((row["contender"] for row in held_out["summary"] if row["ours"]), key=len)  # NAME before NAME@RATE
    timed = "time" in held_out["summary"][0]
    words = glossary.short("final loss", "validation", "steps", *(("clock",) if timed else ()), "score", "diverged")
    lines = [
        f"Suite `{about['suite']}`, for development, {about['steps']:,} steps, {about['seeds']} seeds"
        + (f", frozen as `{about['manifest'][:12]}`" if about.get("manifest") else "")
        + f". Every optimizer with a learning rate is tuned on each task, on other seeds. {glossary.AVERAGES} "
        f"{glossary.LABELS} In the table, {words}",
        "",
        f"| | final loss | validation | steps |{' clock |' if timed else ''} score | diverged |",
        f"|---|---|---|---|{'---|' if timed else ''}---|---|",
    ]
    for row in held_out["summary"]:
        label = f"**{row['contender']}**" if row["ours"] else row["contender"]
        clock = f" {_interval(row['time'])} |" if timed else ""
        valid = "–" if row.get("valid") is None else f"{row['valid']:.2f}"
        figures = f"{_interval(row['loss'], 3)} | {valid} | {_interval(row['steps'])} |{clock}"
        lines.append(f"| {label} | {figures} {row['score']:.2f} | {row['diverged']} of {row['runs']} |")
    lines += [
        "",
        "Task by task, the worst first: final loss (times fewer steps).",
        "",
        f"| task | {' | '.join(rates)} | best baseline |",
        "|---|" + "---|" * (len(rates) + 1),
    ]
    for task in dict.fromkeys(row["task"] for row in held_out["figures"]):
        cells = {row["contender"]: row for row in held_out["figures"] if row["task"] == task}
        best = cells[rates[0]]["best_baseline"]
        shown = [_cell(cells.get(rate)) for rate in rates] + [f"{best['contender']} {_cell(best)}" if best else "–"]
        lines.append(f"| {task} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _interval(values: Sequence[float], digits: int = 2) -> str:
    value, low, high = values
    return f"{value:.{digits}f} ({low:.2f}–{high:.2f})"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None or row["progress"] is None:
        return "–" if row is None else "diverged"
    return f"{row['progress']:.3f}" + (f" ({row['speed_up']:.2f}x)" if row["speed_up"] else " (–)")


def _failures(figures: Sequence[Mapping[str, Any]]) -> str:
    tuned = [row for row in figures if "@" not in row["contender"]]
    if not tuned:
        return "Unknown: no benchmark was run."
    lines = []
    if behind := [row for row in tuned if lost(row)]:
        lines += ["It ended behind tuned Adam, never reached its best loss, or had a run that diverged, on:", ""]
        for row in behind:
            diverged = f", {row['diverged']} of {row['seeds']} seeds diverged" if row["diverged"] else ""
            lines.append(f"- {row['task']}: {_cell(row)}{diverged}")
    else:
        lines.append("On none of the benchmark's tasks did it end behind tuned Adam.")
    for label in dict.fromkeys(row["contender"] for row in figures if "@" in row["contender"]):
        mine = [row for row in figures if row["contender"] == label]
        number = sum(map(lost, mine))
        lines += ["", f"At its default rate, {label}, it did on {number} of {len(mine)} tasks."]
    return "\n".join(lines) + "\n"


_UNSUPERVISED = """\
# {name}

A learned unsupervised rule of the kind `{rule}`, {size} meta-parameters, meta-trained with
[learned-opt](../../README.md). It trains networks on rows without labels; it is no optimizer.

```python
from learned_opt.unsupervised import LearnedFeatures
features = LearnedFeatures("{name}", sizes=(64, 32)).fit_transform(X)   # scikit-learn; in JAX: docs/unsupervised.md
```

## How it was made

By the estimator `{estimator}` on the suite `{suite}` of `tasks/families/representation.py`: {meta_steps:,} meta-steps
of {particles} particles a family and {unroll} inner steps each, episodes of {min_length} to {max_length} steps, seed
{seed}{start}. The whole configuration is in `rule.json`; `learned-opt train` with these settings repeats it.
Libraries: {libraries}.

## What it is worth

Not measured yet: `python benchmarks/unsupervised_features.py --rule FOLDER` does.

## Licence

Apache-2.0, as the code. The letters that it was meta-trained on are drawn from the fonts that come with matplotlib.
"""


def unsupervised_text(name: str, record: Mapping[str, Any]) -> str:
    """The card of an unsupervised rule as Markdown.

    Args:
        name: the rule's name.
        record: its ``rule.json``.

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
        start="" if config.get("init") is None else f", from {config['init']}",
        libraries=libraries or "unknown",
        **{field: config.get(field, 0 if field == "meta_steps" else "unknown") for field in known},
    )
