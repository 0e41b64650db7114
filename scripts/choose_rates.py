"""Rates of the ruleset *nothing set*: ``python scripts/choose_rates.py``, after ``learned-opt data fetch`` of three.

On every workload of ``workloads_small`` each baseline runs at its present rate, at half and at twice of it, and on
beyond whichever end is the best until the best has a neighbour on both sides, six rates at most, one seed. The
validation losses at the end of the budget are in ``reports/workloads/rates.csv``; what is chosen is the rate of the
lowest geometric mean, and stands in ``baselines.py`` and ``optimizers.py``. Finished runs are kept with the
benchmark's own; the same command goes on where it was.
"""

import argparse
import csv
from pathlib import Path

from learned_opt.files import write_atomically
from meta_train.bench.workloads.baselines import baselines
from meta_train.bench.workloads.optimizers import Optimizer, pretrained
from meta_train.bench.workloads.search import climb
from meta_train.bench.workloads.training import program, run
from meta_train.commands import shared
from tasks import workloads
from tasks.base import Workload

OUT = Path(__file__).parent.parent / "reports" / "workloads" / "rates.csv"


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["nadamw", "muon", "soap", "flagship-1:identity"])
    parser.add_argument("--workloads", default="")
    arguments = parser.parse_args()
    known = {optimizer.name: optimizer for optimizer in [*baselines(), *pretrained("flagship-1")]}
    found = _read()
    for workload in workloads.suite("workloads_small"):
        if arguments.workloads not in workload.name:
            continue
        for name in arguments.names:
            _climb(workload, known[name], found)


def _climb(workload: Workload, optimizer: Optimizer, found: dict[tuple[str, str, float], float]) -> None:
    made = program(workload, optimizer)

    def loss(rate: float) -> float:
        final = run(made, workload, {**optimizer.setting, "learning_rate": rate}, 0, shared.cache("bench")).final
        found[workload.name, optimizer.name, rate] = final
        _write(found)
        print(f"{workload.name} {optimizer.name} {rate:g}: {final:.4f}", flush=True)
        return final

    climb(loss, optimizer.setting["learning_rate"])


def _read() -> dict[tuple[str, str, float], float]:
    if not OUT.exists():
        return {}
    with OUT.open(newline="") as file:
        rows = csv.DictReader(file)
        return {(r["workload"], r["optimizer"], float(r["learning_rate"])): float(r["valid_loss"]) for r in rows}


def _write(found: dict[tuple[str, str, float], float]) -> None:
    lines = [f"{workload},{name},{rate:g},{loss:.5f}\n" for (workload, name, rate), loss in sorted(found.items())]
    write_atomically(OUT, "workload,optimizer,learning_rate,valid_loss\n" + "".join(lines))


if __name__ == "__main__":
    main()
