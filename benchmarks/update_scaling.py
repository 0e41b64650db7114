"""How the cost of one update grows with the number of parameters, next to optax.adam.

Networks of four square layers with biases, 10^4 to 10^8 parameters; as in `update.py`, each rule takes turns with Adam
in every round. Writes reports/update_cost/scaling.csv (medians over rounds) and scaling.png. The largest size takes
about 5 GB of memory:

    python benchmarks/update_scaling.py [--largest 8] [--rules celo2 adafac_mlp velo mlp]
"""

import argparse
import csv
import math
import os
from pathlib import Path

import jax
import matplotlib
import numpy as np
from update import measure, transform

import learned_opt

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROUNDS = {4: 60, 5: 40, 6: 20, 7: 7, 8: 3}  # by the power of ten
COLORS = ("#1b7fbd", "#d1711f", "#3a9a5b", "#a04db0", "#8c6d3f")


def square_layers(size):
    width = 16 * round(math.sqrt(size / 4) / 16)
    return {name: shape for i in range(4) for name, shape in ((f"w{i}", (width, width)), (f"b{i}", (width,)))}


def plot(rows, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    for rule, color in zip(rules, COLORS, strict=False):
        mine = [row for row in rows if row["rule"] == rule]
        sizes = [row["parameters"] for row in mine]
        left.loglog(sizes, [row["milliseconds_hot"] for row in mine], "o-", ms=4, color=color, label=rule)
        right.semilogx(sizes, [row["times_adam_hot"] for row in mine], "o-", ms=4, color=color, label=rule)
    sizes = sorted({row["parameters"] for row in rows})
    adam = [np.median([row["adam_milliseconds_hot"] for row in rows if row["parameters"] == size]) for size in sizes]
    left.loglog(sizes, adam, "o-", ms=4, color="#555555", label="optax.adam")
    left.loglog(sizes, np.array(sizes) * adam[2] / sizes[2], ":", color="#aaaaaa", label="linear")
    right.axhline(1, color="#555555", lw=1)
    left.set_ylabel("milliseconds an update")
    right.set_ylabel("times optax.adam")
    right.set_ylim(0)
    for ax in (left, right):
        ax.set_xlabel("parameters")
        ax.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=["celo2", "adafac_mlp", "velo", "mlp"],
                        choices=sorted(learned_opt.RULES))  # fmt: skip
    parser.add_argument("--largest", type=int, default=8, choices=sorted(ROUNDS), help="power of ten")
    parser.add_argument("--out", type=Path, default=Path("reports/update_cost"))
    arguments = parser.parse_args()
    rows = []
    for power, rounds in ROUNDS.items():
        if power > arguments.largest:
            break
        for rule in arguments.rules:
            load = os.getloadavg()[0]
            facts = measure({rule: transform(rule)}, square_layers(10**power), rounds)[rule]
            rows.append({"rule": rule, **facts, "load_before": round(load, 1)})
            print(
                f"10^{power} {rule:11} {facts['times_adam_hot']:6.2f} x adam, {facts['milliseconds_hot']:.3f} ms",
                flush=True,
            )
            jax.clear_caches()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "scaling.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, arguments.out / "scaling.png")


if __name__ == "__main__":
    main()
