"""``learned-opt export``: a run's rule becomes a folder with a model card."""

import argparse
from pathlib import Path
from typing import Any

import learned_opt
from learned_opt import store
from learned_opt.kinds import FEATURES, KNOWN

from ..bench.report import card as cards
from ..errors import UsageError
from . import shared


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if not (arguments.workdir / "rule").is_dir():
        raise UsageError(
            f"{arguments.workdir} holds no rule: is it a run of `learned-opt train` that reached a checkpoint?"
        )
    if arguments.name != Path(arguments.name).name or arguments.name.startswith("."):
        raise UsageError(f"{arguments.name!r} is no name for a folder")
    saved = store.read(arguments.workdir / "rule")
    record = store.read_record(arguments.workdir / "rule")
    kept = ("seed", "config", "libraries")
    card: dict[str, Any] = {field: record[field] for field in kept if field in record}
    results = (arguments.bench or arguments.workdir / "bench") / "results.json"
    if arguments.bench or results.is_file():
        card["held_out"] = cards.own_results(shared.read_json(results), arguments.name)
    if KNOWN[record["rule"]] is FEATURES:
        card["readme"] = cards.unsupervised_text(arguments.name, record)
    else:
        card["readme"] = cards.text(arguments.name, record, card.get("held_out"))
    folder = learned_opt.save(
        arguments.to / arguments.name,
        saved.name,
        saved.theta,
        kwargs=saved.kwargs,
        learning_rate=saved.learning_rate,
        card=card,
    )
    if arguments.json:
        shared.print_json({"folder": str(folder), "rule": record["rule"]})
    else:
        # a bare name would be that of a pretrained rule first
        named = folder.absolute() if str(folder) in learned_opt.available() + store.available_unsupervised() else folder
        print(f"wrote {folder}; use it: {shared.use(record['rule'], named)}")
    return 0
