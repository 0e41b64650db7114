"""Validation losses of a benchmark's report beside tuned Adam's.

``python scripts/validation_losses.py reports/held_out`` reads ``results.json`` of the folder and writes
``validation.csv`` there: for each contender the geometric mean over the tasks with data of its validation loss over
tuned Adam's, on how many of them it is above 1, and on how many of all tasks the chosen learning rate lies on the edge
of its grid. Synthetic functions have no data to hold out.
"""

import csv
import json
import math
import sys
from pathlib import Path

REFERENCE = "adam"


def table(figures: list[dict]) -> list[dict]:
    """One row a contender, the highest validation losses first."""
    found = {(row["task"], row["contender"]): row for row in figures}
    tasks = list(dict.fromkeys(row["task"] for row in figures))
    with_data = [task for task in tasks if "(" not in task]  # a synthetic family's name holds its range
    rows = []
    for name in dict.fromkeys(row["contender"] for row in figures):
        losses = [(found[task, name]["valid_loss"], found[task, REFERENCE]["valid_loss"]) for task in with_data]
        ratios = [math.inf if own is None else own / theirs for own, theirs in losses]  # it diverged there
        rows.append(
            {
                "contender": name,
                "times_adam": f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}",
                "higher_on": sum(ratio > 1 for ratio in ratios),
                "tasks_with_data": len(with_data),
                "on_grid_edge": sum(found[task, name]["on_grid_edge"] for task in tasks),
                "tasks": len(tasks),
            }
        )
    return sorted(rows, key=lambda row: -float(row["times_adam"]))


def main(folder: Path) -> None:
    """Writes the folder's ``validation.csv``."""
    rows = table(json.loads((folder / "results.json").read_text())["figures"])
    with (folder / "validation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
