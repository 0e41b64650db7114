"""One setting at every size: `flagship` on a character transformer of other width, depth, batch and horizon.

From 2 layers of 64, batches of 16 x 64 characters of Moby Dick and 300 steps one number at a time is changed. Each
network is trained with the steps as they are, at half and at twice the size, and by NAdamW, Muon and SOAP (warm-up,
cosine) at rates a factor two apart until the best has worse neighbours, six at most; one seed. The longest runs are
made again on other seeds, at the rates found. Writes reports/sizes/losses.csv, seeds.csv and sizes.png. Finished runs
are kept with the benchmark's; the same command goes on.

    learned-opt data fetch moby_dick && python benchmarks/sizes.py
"""

import argparse
import functools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tables

import learned_opt
from meta_train.bench.workloads.baselines import baselines
from meta_train.bench.workloads.optimizers import Optimizer, Settings
from meta_train.bench.workloads.search import climb
from meta_train.bench.workloads.training import Program, program, run
from meta_train.commands import shared
from tasks.base import Workload
from tasks.workloads.language import gpt

USUAL = {"width": 64, "layers": 2, "batch_size": 16, "steps": 300}
AXES = {
    "steps": (100, 300, 1000, 3000),
    "width": (16, 32, 64, 128, 256),
    "layers": (1, 2, 4, 8),
    "batch_size": (4, 16, 64),
}
RULE, PEERS = "flagship", ("nadamw", "muon", "soap")
FACTORS = (0.5, 1.0, 2.0)
SEEDS = (0, 1, 2)


def scaled() -> Optimizer:
    """The rule with its steps multiplied."""

    def make(s, num_steps):
        return learned_opt.load(RULE, num_steps=num_steps, learning_rate=s["factor"])

    return Optimizer(RULE, make, {"factor": 1.0}, {}, RULE, "learned")


def of_size(steps: int, **sizes: int) -> Workload:
    """The character transformer of these sizes."""
    return Workload(functools.partial(gpt, "moby_dick", length=64, **sizes), steps, None, name=str(sizes))


def final(made: Program, workload: Workload, settings: Settings, seed: int = 0) -> float:
    """The validation loss at the end of a run."""
    return run(made, workload, settings, seed, shared.cache("bench")).final


def losses(peers: list[Optimizer], **sizes: int) -> dict[str, float]:
    """Validation losses at the end: of each factor, and the peers' least, each with its rate."""
    workload = of_size(**sizes)
    own = program(workload, scaled())
    found = {f"x{factor:g}": final(own, workload, {"factor": factor}) for factor in FACTORS}
    found["over_best"] = found["x1"] / min(found.values())
    for peer in peers:
        made, usual = program(workload, peer), peer.setting
        tried = climb(lambda rate: final(made, workload, {**usual, "learning_rate": rate}), usual["learning_rate"])  # noqa: B023
        rate = min(tried, key=tried.__getitem__)
        found |= {peer.name: tried[rate], f"{peer.name}_rate": rate}
    return found


def on_seeds(peers: list[Optimizer], row: dict) -> list[dict]:
    """The losses of a size on every seed, of the rule as it is and of the peers at the rates that were found."""
    workload = of_size(**{name: row[name] for name in USUAL})
    contenders = [(scaled(), {"factor": 1.0})]
    contenders += [(peer, {**peer.setting, "learning_rate": float(row[f"{peer.name}_rate"])}) for peer in peers]
    made = [(optimizer.name, program(workload, optimizer), settings) for optimizer, settings in contenders]
    return [
        {"seed": seed} | {name: final(own, workload, settings, seed) for name, own, settings in made} for seed in SEEDS
    ]


def plot(rows: list[dict], path: Path) -> None:
    figure, panels = plt.subplots(1, len(AXES), figsize=(11, 3.2), sharey=True, layout="constrained")
    for panel, (axis, values) in zip(panels, AXES.items(), strict=True):
        own = [next(r for r in rows if all(r[k] == v for k, v in (USUAL | {axis: value}).items())) for value in values]
        for peer, colour in zip(PEERS, ("tab:gray", "tab:orange", "tab:green"), strict=True):
            tuned = [float(r[peer]) for r in own]
            panel.plot(values, tuned, "o-", color=colour, ms=3, lw=1, label=f"{peer}, its rate tuned")
        for factor, style in zip(FACTORS, (":", "-", "--"), strict=True):
            label = RULE if factor == 1 else f"{RULE}, steps x {factor:g}"
            panel.plot(
                values, [float(r[f"x{factor:g}"]) for r in own], "o" + style, color="tab:blue", ms=3, label=label
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
        panel.set_xlabel(axis.replace("_", " "))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/sizes"))
    arguments = parser.parse_args()
    peers = [optimizer for optimizer in baselines() if optimizer.name in PEERS]
    every = [USUAL | {axis: value} for axis, values in AXES.items() for value in values]
    rows: list[dict] = []
    for sizes in {tuple(sizes.values()): sizes for sizes in every}.values():
        rows.append(sizes | tables.shortened([losses(peers, **sizes)], 4)[0])
        print(rows[-1], flush=True)
        tables.write(arguments.out / "losses.csv", rows)
    plot(rows, arguments.out / "sizes.png")
    longest = max(rows, key=lambda row: row["steps"])
    tables.write(arguments.out / "seeds.csv", tables.shortened(on_seeds(peers, longest), 4))


if __name__ == "__main__":
    main()
