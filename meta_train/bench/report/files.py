"""A benchmark's results as files."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learned_opt.files import write_atomically

from ..comparison import rows, summary
from ..tournament import Result
from . import charts


def write(
    folder: Path, results: Sequence[Result], about: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Writes ``results.csv``, ``results.json`` and ``curves.png``, each whole or not at all.

    Args:
        folder: made if it is not there.
        results: from :func:`meta_train.bench.tournament.run_suite`.
        about: what was run, JSON values, for ``results.json``.

    Returns:
        The figures of :func:`rows` and of :func:`summary`.
    """
    figures, overview = rows(results), summary(results)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(figures[0]) if figures else [])
    writer.writeheader()
    writer.writerows(figures)
    write_atomically(folder / "results.csv", text.getvalue().encode())
    document = {"about": about, "summary": overview, "figures": figures}
    write_atomically(folder / "results.json", (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    write_atomically(folder / "curves.png", charts.overview_png(results, charts.styles(overview)))
    return figures, overview
