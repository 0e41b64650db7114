"""Rates of the ruleset *nothing set*: ``python scripts/choose_rates.py``, after ``learned-opt data fetch`` of three.

On every workload of ``workloads_small`` each baseline runs at its rate of before and at twice of it, and on beyond
whichever end is the best until the best has a neighbour on both sides, one seed. ``reports/workloads/rates.csv`` has
the validation losses at the end of the budget; what is chosen is the rate of the lowest geometric mean, and stands in
``optimizers.py``. Finished runs are kept with the benchmark's own; the same command goes on where it was.
"""

import argparse
import csv
import math
import tempfile
from pathlib import Path

from meta_train.bench.workloads.optimizers import Optimizer, baselines, pretrained
from meta_train.bench.workloads.search import climb
from meta_train.bench.workloads.training import program, run
from meta_train.commands import shared
from tasks import workloads
from tasks.base import Workload

OUT = Path(__file__).parent.parent / "reports" / "workloads" / "rates.csv"
FACTOR = 2.0  # between neighbours


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["nadamw", "muon", "soap", "flagship:identity"])
    parser.add_argument("--workloads", default="")
    arguments = parser.parse_args()
    known = {optimizer.name: optimizer for optimizer in [*baselines(), *pretrained("flagship")]}
    found = _read()
    for workload in workloads.suite("workloads_small"):
        if arguments.workloads not in workload.name:
            continue
        for name in arguments.names:
            _climb(workload, known[name], found)


def _climb(workload: Workload, optimizer: Optimizer, found: dict[tuple[str, str, float], float]) -> None:
    """From the rate of before uphill or downhill, until the best has worse neighbours."""
    made = program(workload, optimizer)

    def loss(place: int) -> float:
        rate = float(f"{optimizer.setting['learning_rate'] * FACTOR**place:.4g}")
        settings = {**optimizer.setting, "learning_rate": rate}
        final = run(made, workload, settings, 0, shared.cache("bench")).final
        found[workload.name, optimizer.name, rate] = final = final if math.isfinite(final) else math.inf
        _write(found)
        print(f"{workload.name} {optimizer.name} {rate:g}: {final:.4f}", flush=True)
        return final

    climb(loss)


def _read() -> dict[tuple[str, str, float], float]:
    if not OUT.exists():
        return {}
    with OUT.open(newline="") as file:
        rows = csv.DictReader(file)
        return {(r["workload"], r["optimizer"], float(r["learning_rate"])): float(r["valid_loss"]) for r in rows}


def _write(found: dict[tuple[str, str, float], float]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=OUT.parent, delete=False, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["workload", "optimizer", "learning_rate", "valid_loss"])
        writer.writerows([*key, f"{loss:.5f}"] for key, loss in sorted(found.items()))
    Path(file.name).replace(OUT)


if __name__ == "__main__":
    main()
