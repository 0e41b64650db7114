"""Validation losses of `flagship-1`'s arithmetic before and after its changes, each at its default rate.

``python scripts/validation_forms.py reports/validation/forms.csv`` runs the validation suite at the commits in
``FORMS``, a worktree each, and writes the table: some twenty minutes on two cores.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FORMS = {"before": "54debc2", "rests, no unit": "627f427", "long sides not rotated": "9ec1b1c"}
CONTENDERS = {"flagship@0.005": "flagship-1@0.005", "flagship-auto": "flagship-1-auto"}  # as they were called, and are
BENCH = ("bench", "flagship", "flagship-auto", "--suite", "validation", "--baselines", "soap")


def run(commit: str, folder: Path) -> list[dict]:
    """The figures of the suite at a commit."""
    tree, out = folder / commit, folder / f"{commit}-results"
    subprocess.run(["git", "worktree", "add", "--detach", str(tree), commit], check=True)
    try:
        command = [sys.executable, "-m", "meta_train.cli", *BENCH, "--out", str(out)]
        subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, check=True)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True)
    return json.loads((out / "results.json").read_text())["figures"]


def table(figures: dict[str, list[dict]]) -> list[dict]:
    """One row a contender, task and form, beside the form before and the first; ratios where there are data."""
    found = [{(row["task"], row["contender"]): row for row in rows} for rows in figures.values()]
    rows = []
    for name, label in CONTENDERS.items():
        for task in dict.fromkeys(task for task, _ in found[-1]):
            losses = [run[task, name]["valid_loss"] for run in found]
            for i, (form, run_) in enumerate(zip(figures, found, strict=True)):
                ratios = ("", "")
                if i and "(" not in task:  # a synthetic family's name holds its range
                    ratios = (f"{losses[i] / losses[i - 1]:.3f}", f"{losses[i] / losses[0]:.2f}")
                row = run_[task, name]
                rows.append(
                    {
                        "contender": label,
                        "task": task,
                        "form": form,
                        "commit": FORMS[form],
                        "valid_loss": row["valid_loss"],
                        "valid_loss_stderr": row["valid_loss_stderr"],
                        "train_loss": row["final_loss"],
                        "train_loss_stderr": row["final_loss_stderr"],
                        "times_the_form_before": ratios[0],
                        "times_the_first_form": ratios[1],
                    }
                )
    return rows


def main(path: Path) -> None:
    """Runs the suite at each commit and writes the table."""
    with tempfile.TemporaryDirectory() as folder:
        rows = table({form: run(commit, Path(folder)) for form, commit in FORMS.items()})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
