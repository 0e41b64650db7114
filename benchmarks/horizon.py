"""Which steps are best in shorter and longer runs, and what it costs not to tell the length: of the rule `control`.

The four networks of control.py, in runs of so many updates, with so many times the step that the rule has in a run of
600 (STEPS): the evidence for the power that steps fall with, reports/control/horizon.csv and horizon.png. Then runs of
some lengths that `flagship` is told and is not told (TOLD), untold.csv. One seed. Finished runs are kept with the
benchmark's; the same command goes on.

    learned-opt data fetch moby_dick && learned-opt data fetch kjv && learned-opt data fetch cifar10
    python benchmarks/horizon.py
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tables
from control import NETWORKS, on
from sizes import final, scaled

import learned_opt
from learned_opt.rules.control import for_length
from meta_train.bench.workloads.optimizers import Optimizer
from meta_train.bench.workloads.training import program

STEPS = {
    150: (0.5, 0.71, 1.0, 1.41, 2.0),
    600: (0.5, 0.71, 1.0, 1.41, 2.0),
    1600: (0.35, 0.5, 0.71, 1.0, 1.41),
}
TOLD = {"gpt-2x64": (500, 2000, 6000), "lstm-1x128": (2000,), "resnet-16-32-64": (2000,)}


def at_length(told: bool) -> Optimizer:
    """`flagship`, which is told the length of the run or is not."""

    def make(_, num_steps):
        return learned_opt.load("flagship", num_steps=num_steps if told else None)

    return Optimizer(f"flagship, {told=}", make, {}, {}, "flagship", "learned")


def plot(rows: list[dict], path: Path) -> None:
    """Losses over the best of their length, against the step; a line where the rule's own step lies."""
    figure, panels = plt.subplots(1, len(NETWORKS), figsize=(11, 3), sharey=True, layout="constrained")
    for panel, network in zip(panels, NETWORKS, strict=True):
        for length, colour in zip(STEPS, plt.cm.viridis(np.linspace(0, 0.8, len(STEPS))), strict=True):
            own = [row for row in rows if (row["network"], row["updates"]) == (network, length)]
            losses = np.array([float(row["loss"]) for row in own])
            panel.plot([row["step"] for row in own], losses / losses.min(), "o-", ms=3, color=colour, label=length)
            panel.axvline(for_length(length), color=colour, lw=0.8, ls=":")
        panel.set(title=network, xscale="log", yscale="log", xlabel="step, times that of 600 updates")
        ticks = sorted(set().union(*STEPS.values()))
        panel.set_xticks(ticks, [f"{step:g}" for step in ticks])
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss / the best")
    panels[0].set_yticks(ticks := (1, 1.05, 1.1, 1.2, 1.3), ticks)
    panels[0].legend(title="updates", frameon=False, fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=120)


def by_step(out: Path) -> None:
    """Every length with every step."""
    rows, own = [], scaled()
    for network in NETWORKS:
        for length, steps in STEPS.items():
            workload = on(network, length)
            made = program(workload, own)
            for step in steps:
                loss = final(made, workload, {"factor": step / for_length(length)})
                rows.append({"network": network, "updates": length, "step": step, "loss": f"{loss:.4f}"})
            print(*rows[-len(steps) :], sep="\n", flush=True)
            tables.write(out / "horizon.csv", rows)
    plot(rows, out / "horizon.png")


def by_what_is_told(out: Path) -> None:
    """Every length, told and not told."""
    rows = []
    for network, lengths in TOLD.items():
        for workload in (on(network, length) for length in lengths):
            told, untold = (final(program(workload, at_length(told)), workload, {}) for told in (True, False))
            row = {"network": network, "updates": workload.steps}
            rows.append(row | {"told": f"{told:.4f}", "untold": f"{untold:.4f}"})
            tables.write(out / "untold.csv", rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/control"))
    out = parser.parse_args().out
    by_step(out)
    by_what_is_told(out)


if __name__ == "__main__":
    main()
