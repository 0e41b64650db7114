"""The commands of ``learned-opt``, one a file, imported when one is called."""

import argparse
import importlib

from learned_opt.store import StoreError
from tasks.data import DataError

from ..errors import UsageError, UserError


def run(arguments: argparse.Namespace) -> int:
    """Runs a command.

    Args:
        arguments: parsed; ``command`` names the module here that has the function ``run`` for them.

    Returns:
        The exit code.

    Raises:
        UserError: whatever the user did wrong, whichever package found it.
    """
    try:
        command = importlib.import_module(f".{arguments.command}", __name__)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"this command needs {error.name!r}, of the extra `train`: pip install 'learned-opt[train]'"
        ) from None
    try:
        return command.run(arguments)
    except (DataError, StoreError) as error:
        raise UserError(str(error)) from None
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"{error.strerror}: {error.filename}") from None
