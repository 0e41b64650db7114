"""The benchmark's milliseconds a step against a plain loop: ``python benchmarks/step_times.py --steps 1000``.

Writes ``reports/workloads/step_times.csv``: for some optimizers on two workloads what ``learned-opt bench`` measures,
ten turns of ten steps from a warmed state, the optimizers in turn, and what a plain loop of ``--steps`` steps takes;
both in one process with nothing else running.
"""

import argparse
import csv
import time
from pathlib import Path

import jax

from meta_train.bench.workloads import baselines, optimizers, protocol, training
from tasks.workloads import SUITES

OUT = Path(__file__).parent.parent / "reports" / "workloads" / "step_times.csv"
OPTIMIZERS = ("nadamw", "adamw", "muon", "soap", "flagship")
WORKLOADS = ("mail/embeddings-96-384", "cifar10/resnet-64-128-256")


def plain_loop(program, optimizer, steps: int) -> float:
    """Milliseconds a step of a loop from the start, the first step's compilation and warming apart."""
    carry = program.init(optimizer.setting, 0)
    carry, _ = program.step(carry, optimizer.setting, 0, 0)
    jax.block_until_ready(carry)
    began = time.perf_counter()
    for number in range(1, steps + 1):
        carry, _ = program.step(carry, optimizer.setting, 0, number)
    jax.block_until_ready(carry)
    return 1000 * (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    known = {workload.name: workload for suite in SUITES.values() for workload in suite}
    found = {o.name: o for o in [*baselines.baselines(), *optimizers.pretrained("flagship")]}
    chosen = [found[name] for name in arguments.optimizers.split(",")]
    rows = []
    for name in arguments.workloads.split(","):
        programs = {optimizer.name: training.program(known[name], optimizer) for optimizer in chosen}
        measured = protocol.step_times(known[name], chosen, programs)
        for optimizer in chosen:
            loop = plain_loop(programs[optimizer.name], optimizer, arguments.steps)
            ratio = measured[optimizer.name] / loop
            row = [name, optimizer.name, f"{measured[optimizer.name]:.2f}", f"{loop:.2f}", f"{ratio:.3f}"]
            rows.append([*row, arguments.steps])
            print(*rows[-1], flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["workload", "optimizer", "bench_milliseconds", "loop_milliseconds", "ratio", "loop_steps"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
