"""How the benchmarks write their tables: one CSV file, whole after every row that was added."""

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from learned_opt.files import write_atomically


def write(path: str | Path, rows: Sequence[Mapping[str, Any]], without: Collection[str] = ()) -> None:
    """Rows as a CSV file whose folder is made if missing; columns are those of the first row but ``without``."""
    path, text = Path(path), io.StringIO()
    columns = [name for name in rows[0] if name not in without]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode())


def shortened(rows: Sequence[Mapping[str, Any]], digits: int) -> list[dict[str, Any]]:
    """Rows with their floats as text of so many significant digits."""
    return [{k: f"{v:.{digits}g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
