"""``learned-opt data``: list or fetch data sets."""

import argparse

from tasks import data

from ..errors import UsageError
from . import shared


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if arguments.action == "path":
        folder = str(data.data_dir())
        if arguments.json:
            shared.print_json({"path": folder})
        else:
            print(folder)
        return 0
    if arguments.action == "list":
        sets = data.available()
        if arguments.json:
            shared.print_json({name: list(row) for name, row in sets.items()})
        else:
            for name, row in sets.items():
                print(f"{name:22} {'  '.join(map(str, row))}")
        return 0
    if arguments.name is None:
        raise UsageError("name the data set to fetch; see `learned-opt data list`")
    path = data.fetch(arguments.name, arguments.source)
    if arguments.json:
        shared.print_json({"name": arguments.name, "path": str(path)})
    else:
        print(f"{arguments.name}: {path}")
    return 0
