"""What a seed is worth on workloads: NAdamW's one setting on the seed of the tables and on that of the trials.

Reads the runs of the tuned report and the table of `workloads_test`; writes reports/workloads/seeds.csv.

    for name in sqlite cmudict qm9 speech mail; do learned-opt data fetch $name; done
    python scripts/workload_seeds.py
"""

import csv
import json
from pathlib import Path

from meta_train.bench.workloads import baselines, protocol, training
from tasks.workloads import suite

REPORT = Path(__file__).parents[1] / "reports" / "workloads"


def main() -> None:
    """Writes the table."""
    nadamw = next(optimizer for optimizer in baselines.baselines() if optimizer.name == protocol.REFERENCE)
    figures = json.loads((REPORT / "test" / "results.json").read_text())["figures"]
    reported = {row["workload"]: row["valid_loss"] for row in figures if row["optimizer"] == nadamw.name}
    rows = [["workload", "optimizer", "seed_of_the_tables", "seed_of_the_trials"]]
    for workload in suite("workloads_test"):
        made = training.program(workload, nadamw)
        seed = protocol.TUNING_SEED
        try:
            other = training.run(made, workload, nadamw.setting, seed, REPORT / "runs", only_finished=True).final
        except training.NotFinishedError:
            other = None  # not run, or not kept
        rows.append([workload.name, nadamw.name, reported[workload.name], other and f"{other:.6g}"])
    with (REPORT / "seeds.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
