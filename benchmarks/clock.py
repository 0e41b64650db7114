"""Seconds to NAdamW's validation loss on `workloads_test`: milliseconds a step, times the steps of the report.

Steps are timed as the benchmark times them, a hundred from a warmed state in ten turns of ten, the optimizers in turn
and on one core; how many each needs is read from reports/workloads/test. Compiling is timed too, without a cache, and
added in the last column. Writes reports/workloads/clock.csv after every workload.

    for name in sqlite cmudict qm9 speech mail; do learned-opt data fetch $name; done
    taskset -c 0 python benchmarks/clock.py     # an hour
"""

import argparse
import json
from pathlib import Path

import jax
import tables

from meta_train.bench.workloads import baselines, optimizers, protocol, training
from tasks.workloads import suite

REPORT = Path(__file__).parents[1] / "reports" / "workloads"
OPTIMIZERS = ("nadamw", "muon", "soap", "flagship", "flagship-1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPORT / "clock.csv")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    figures = json.loads((REPORT / "test" / "results.json").read_text())["figures"]
    steps = {(row["workload"], row["optimizer"]): row["steps_to_target"] for row in figures}
    learned = [optimizer for name in ("flagship", "flagship-1") for optimizer in optimizers.pretrained(name)]
    found = {optimizer.name: optimizer for optimizer in [*baselines.baselines(), *learned]}
    chosen = [found[name] for name in OPTIMIZERS]
    rows: list[dict] = []
    for workload in suite("workloads_test"):
        programs = {optimizer.name: training.program(workload, optimizer) for optimizer in chosen}
        times = protocol.step_times(workload, chosen, programs, show=print)
        seconds = {name: times[name] * steps[workload.name, name] / 1000 for name in OPTIMIZERS}
        compiling = {name: programs[name].compile() for name in OPTIMIZERS}
        whole = {name: seconds[name] + compiling[name] for name in OPTIMIZERS}
        rows += [
            {
                "workload": workload.name,
                "optimizer": name,
                "milliseconds": f"{times[name]:.1f}",
                "step_over_nadamw": f"{times[name] / times['nadamw']:.3f}",
                "steps_to_target": f"{steps[workload.name, name]:.0f}",
                "seconds_to_target": f"{seconds[name]:.1f}",
                "seconds_over_nadamw": f"{seconds[name] / seconds['nadamw']:.3f}",
                "compile_seconds": f"{compiling[name]:.1f}",
                "with_compiling_over_nadamw": f"{whole[name] / whole['nadamw']:.3f}",
            }
            for name in OPTIMIZERS
        ]
        print(*rows[-len(OPTIMIZERS) :], sep="\n", flush=True)
        tables.write(arguments.out, rows)


if __name__ == "__main__":
    main()
