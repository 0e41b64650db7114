"""The trials of the ruleset *tuned* that are finished, and the runs at the best of them: a table of them all.

Reads the kept runs of `workloads_test`; writes reports/workloads/trials.csv, a row a run. The row "reported" is the run
at the best trial's settings, on another seed; it is there where all trials are.

    for name in sqlite cmudict qm9 speech mail; do learned-opt data fetch $name; done
    python scripts/workload_trials.py
"""

import csv
from pathlib import Path

from meta_train.bench.workloads import baselines, protocol, search, training
from tasks.workloads import suite

REPORT = Path(__file__).parents[1] / "reports" / "workloads"
SETTINGS = ("learning_rate", "one_minus_b1", "one_minus_b2", "weight_decay", "warmup")


def main() -> None:
    """Writes the table."""
    rows = [["workload", "optimizer", "trial", *SETTINGS, "valid_loss"]]
    for workload in suite("workloads_test"):
        for optimizer in baselines.baselines():
            if optimizer.name in ("nadamw", "muon"):
                for trial, settings, loss in _finished(workload, optimizer):
                    shown = [settings.get(name, "") for name in SETTINGS]
                    rows.append([workload.name, optimizer.name, trial, *shown, f"{loss:.6g}"])
    with (REPORT / "trials.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _finished(workload, optimizer) -> list[tuple[int | str, dict[str, float], float]]:
    made, rows = training.program(workload, optimizer), []

    def final(settings, seed):
        return training.run(made, workload, settings, seed, REPORT / "runs", only_finished=True).final

    def score(settings, number):
        loss = final(settings, protocol.TUNING_SEED)
        rows.append((number, settings, loss))
        return loss

    try:
        trials = search.trials(optimizer, search.TRIALS, score)
        best = trials[search.best(trials)].settings
        return [*rows, ("reported", best, final(best, 0))]
    except training.NotFinishedError:
        return rows


if __name__ == "__main__":
    main()
