"""``learned-opt info``: what a rule is and needs."""

import argparse
from typing import Any

import learned_opt
from learned_opt import store
from learned_opt.facts import rule_facts
from learned_opt.kinds import KNOWN

from . import shared


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    saved = learned_opt.available() + store.available_unsupervised()
    if arguments.name in KNOWN and arguments.name not in saved:
        facts = rule_facts(arguments.name)
    else:
        record = store.read_record(arguments.name)
        store.read(arguments.name)  # the weights too are sound
        facts = {"name": arguments.name} | rule_facts(record["rule"], **record["kwargs"])
        if record.get("learning_rate") is not None:
            facts.pop("default_learning_rate", None)  # the rule's, where the folder has none
        for field in ("learning_rate", "kwargs", "seed", "config", "libraries", "sha256", "held_out"):
            if record.get(field) not in (None, {}):
                facts[field] = record[field]
    if arguments.json:
        shared.print_json(facts)
        return 0
    facts.pop("held_out", None)  # a table: the model card shows it
    if facts.get("needs") == []:
        facts["needs"] = "neither loss nor step count"
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):{width}}  {_shown(value)}")
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(map(str, value)) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items()) or "-"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
