"""What `workloads_test` says by the clock, at the step times of clock.csv.

Writes clock.png, the validation losses of test/ against seconds, each curve beginning when its optimizer has compiled;
and clock_tuned.csv, the time that `flagship` takes to the losses at which NAdamW and Muon end that were tuned on each
network, over theirs, compiling left out.

    python benchmarks/clock.py && python scripts/workload_clock.py
"""

import csv
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

REPORT = Path(__file__).parents[1] / "reports" / "workloads"
COLOURS = {"nadamw": "#1f5f99", "muon": "#d98b2b", "soap": "#17a2a2", "flagship": "#b5202e"}
TITLES = {
    "mail": "word embeddings, mail",
    "speech": "U-Net, speech",
    "cmudict": "encoder and decoder, pronunciations",
    "qm9": "message passing, molecules",
    "sqlite": "transformer, C source",
}


def main() -> None:
    """Writes both."""
    with (REPORT / "clock.csv").open() as file:
        clock = {(row["workload"], row["optimizer"]): row for row in csv.DictReader(file)}
    figures, tuned = (json.loads((REPORT / name / "results.json").read_text())["figures"] for name in ("test", "tuned"))
    draw(clock, figures)
    with (REPORT / "clock_tuned.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["workload", "tuned", "its_steps", "steps", "time_over_its"])
        writer.writerows(against(clock, tuned))


def against(clock: dict, figures: list[dict]) -> list[list]:
    """Rows of clock_tuned.csv; no steps where the loss is not reached."""
    found = {(row["workload"], row["optimizer"]): row for row in figures}
    rows = []
    for peer in ("nadamw", "muon"):
        for workload in dict.fromkeys(row["workload"] for row in figures):
            target, pair = found[workload, peer]["valid_curves"][0][-1], []
            for name in (peer, "flagship"):
                row = found[workload, name]
                reached = [at for at, loss in zip(row["looks"], row["valid_curves"][0], strict=True) if loss <= target]
                pair.append((min(reached, default=None), float(clock[workload, name]["milliseconds"])))
            (theirs, their_time), (own, own_time) = pair
            ratio = "" if own is None else f"{own * own_time / (theirs * their_time):.3f}"
            rows.append([workload, peer, theirs, own or "", ratio])
    return rows


def draw(clock: dict, figures: list[dict]) -> None:
    """The picture: a panel a network."""
    plt.rcParams |= {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    figure, panels = plt.subplots(1, len(TITLES), figsize=(13, 2.9), layout="constrained")
    for panel, (dataset, title) in zip(panels, TITLES.items(), strict=True):
        rows = {r["optimizer"]: r for r in figures if r["dataset"] == dataset and r["optimizer"] in COLOURS}
        for name, row in rows.items():
            times = clock[row["workload"], name]
            seconds = np.array(row["looks"]) * float(times["milliseconds"]) / 1000 + float(times["compile_seconds"])
            width = 2.2 if name == "flagship" else 1.2
            panel.plot(seconds, row["valid_curves"][0], color=COLOURS[name], lw=width, label=name)
        target, end = rows["nadamw"]["target"], min(row["valid_loss"] for row in rows.values())
        panel.axhline(target, color="#888888", lw=0.8, ls=":")
        top = rows["nadamw"]["valid_curves"][0][5]  # what comes before the sixth look would flatten the rest
        panel.set_ylim(end - 0.05 * (top - end), top)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("seconds, compiling included")
    panels[0].set_ylabel("validation loss")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(COLOURS), frameon=False)
    figure.savefig(REPORT / "clock.png", dpi=110)


if __name__ == "__main__":
    main()
