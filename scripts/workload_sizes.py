"""How large the workloads' networks are: ``python scripts/workload_sizes.py``, after ``learned-opt data fetch`` of all.

Writes ``reports/workloads/sizes.csv``: parameters, in millions too, and the steps of the budget.
"""

import csv
from pathlib import Path

import jax

from tasks.workloads import SUITES

OUT = Path(__file__).parent.parent / "reports" / "workloads" / "sizes.csv"


def main() -> None:
    """Write the table."""
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with OUT.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["workload", "parameters", "millions", "steps"])
        for workload in {w.name: w for suite in SUITES.values() for w in suite}.values():
            family = workload.make()
            shapes = jax.eval_shape(
                lambda data, family=family: family.task(data, {}).init(jax.random.key(0)), family.data
            )
            number = sum(leaf.size for leaf in jax.tree.leaves(shapes))
            writer.writerow([workload.name, number, f"{number / 1e6:.2f}", workload.steps])


if __name__ == "__main__":
    main()
