"""``learned-opt import``: a published checkpoint becomes a folder that ``learned_opt.load`` reads."""

import argparse
import json
from pathlib import Path

from .. import published
from ..errors import UsageError
from . import shared


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    rule = arguments.rule.replace("-", "_")
    kwargs = {}
    for name, text in shared.pairs(arguments.set):
        try:
            kwargs[name] = json.loads(text)
        except ValueError:
            raise UsageError(f"--set {name}: {text!r} is no JSON value") from None
    folder = arguments.to or Path("imported") / rule
    folder = published.import_rule(rule, arguments.file, folder, **kwargs)
    if arguments.json:
        shared.print_json({"folder": str(folder), "rule": rule})
    else:
        print(f"wrote {folder}; use it: {shared.use(rule, folder)}")
    return 0
