"""When may workers meet how rarely? One picture of the measurements of local_sgd_stich.py, with what a meeting costs.

Left: steps until the loss is reached, relative to meeting after every step, over the steps between two meetings H; the
line is the median of two data sets and two batch sizes, the band their range. Right: the time until then, with 8
workers, where a meeting takes as long as 1, 10 or 100 steps: steps(H) (1 + cost / H).

    python benchmarks/local_sgd_when.py    # draws reports/local_sgd/when.png and when.csv from stich.csv, in a second
"""

import csv
from pathlib import Path

import numpy as np
import tables
from matplotlib.figure import Figure

REPORT = Path(__file__).parents[1] / "reports" / "local_sgd"
WORKERS, COSTS = (2, 8, 32), (1, 10, 100)


def read():
    """``(delays, {workers: steps relative to H = 1, [settings, delays]})``."""
    found = {}
    with (REPORT / "stich.csv").open() as file:
        for row in csv.DictReader(file):
            steps = found.setdefault((int(row["workers"]), row["data"], row["batch"]), {})
            steps[int(row["delay"])] = float(row["steps"])
    delays = sorted(next(iter(found.values())))
    relative = {
        workers: np.array([[s[h] / s[1] for h in delays] for key, s in found.items() if key[0] == workers])
        for workers in WORKERS
    }
    return np.array(delays), relative


def main():
    delays, relative = read()
    rows = []
    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (workers, ratios) in enumerate(relative.items()):
        left.plot(delays, np.median(ratios, 0), "o-", ms=3, color=f"C{i}", label=f"{workers} workers")
        left.fill_between(delays, ratios.min(0), ratios.max(0), color=f"C{i}", alpha=0.15, lw=0)
        for cost in COSTS:
            times = np.median(ratios, 0) * (1 + cost / delays)
            for delay, ratio, time in zip(delays, np.median(ratios, 0), times, strict=True):
                rows.append({"workers": workers, "cost_in_steps": cost, "delay": delay, "steps": round(ratio, 3),
                             "time": round(time / (1 + cost), 4), "best": time == times.min()})  # fmt: skip
    for i, cost in enumerate(COSTS):
        times = np.median(relative[8], 0) * (1 + cost / delays) / (1 + cost)
        right.plot(delays, times, "o-", ms=3, color=f"C{i + 3}", label=f"a meeting takes {cost} step{'s'[: cost > 1]}")
        best = int(np.argmin(times))
        right.plot(delays[best], times[best], "*", ms=13, color=f"C{i + 3}")
    left.set(ylabel="steps needed, times those of H = 1", ylim=(0, None), title="More steps are needed ...")
    right.set(
        ylabel="time needed, times that of H = 1", ylim=(0, None), title="... and less time (8 workers; star: best)"
    )
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(delays, delays)
        axes.set_xlabel("H, steps between two meetings")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(REPORT / "when.png", dpi=120)
    tables.write(REPORT / "when.csv", rows)
    for row in rows:
        if row["best"]:
            print(*row.values())


if __name__ == "__main__":
    main()
