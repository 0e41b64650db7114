"""Fewer bytes a round: what int8 and top-k cost DiLoCo, MuLoCo and the learned outer step beside Nesterov's.

The networks, seeds and settings of local_sgd_peers.py at H = 64, read from its peers.json: nothing is tuned here.
`int8` sends one byte an entry, `top-k` one entry in 32 with its place, both with error feedback. Each method's loss is
compared with its own without compression, seed by seed. Finished runs are kept: the same command goes on. Writes
reports/local_sgd/compressed.json and compressed.csv.

    learned-opt data fetch moby_dick && learned-opt data fetch kjv && learned-opt data fetch cifar10
    python benchmarks/local_sgd_compressed.py    # an hour and a half of one core
"""

import argparse
import json
from pathlib import Path

import numpy as np
import tables
from local_sgd_peers import REPORT, SEEDS, TASKS, methods, runner

from learned_opt import communication
from learned_opt.files import write_atomically

DELAY = 64
METHODS = {  # and the peer of each
    "DiLoCo (AdamW)": "DiLoCo (AdamW)",
    "Nesterov + outer, AdamW": "DiLoCo (AdamW)",
    "MuLoCo (Muon)": "MuLoCo (Muon)",
    "Nesterov + outer, Muon": "MuLoCo (Muon)",
    "Nesterov + outer, flagship": "MuLoCo (Muon)",
}
CODES = {"none": None, "int8": communication.int8(), "top-k": communication.top_k(1 / 32)}
BYTES = {"none": 4.0, "int8": 1.0, "top-k": 8 / 32}  # an entry; scales of tensors left out


def compared(losses, others):
    """The ratio of two lists of losses, a geometric mean, and the standard error of its logarithm."""
    logs = np.log(np.divide(losses, others))
    return round(float(np.exp(logs.mean())), 5), round(float(logs.std(ddof=1) / len(logs) ** 0.5), 5)


def table(found):
    """One row for each task, method and code: the loss over its own without the code, and over the peer's with it."""
    rows = []
    for task, results in found.items():
        for name, losses in results.items():
            for code, mine in losses.items():
                row = {"task": task, "H": DELAY, "method": name, "code": code, "bytes_an_entry": BYTES[code]}
                row["valid_loss"] = round(float(np.mean(mine)), 5)
                row["ratio"], row["standard_error"] = compared(mine, losses["none"])
                row["over_peer"], row["over_peer_error"] = compared(mine, results[METHODS[name]][code])
                rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = [task for task, network in TASKS.items() if not network.methods]
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=whole)
    parser.add_argument("--out", type=Path, default=REPORT)
    arguments = parser.parse_args()
    settings, path = json.loads((REPORT / "peers.json").read_text()), arguments.out / "compressed.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for task in arguments.only:
        family, rounds = TASKS[task].family(), TASKS[task].rounds[DELAY]
        for name in METHODS:
            chosen = settings[task]["delays"][str(DELAY)][name]
            setting = chosen["rate"], chosen["outer_rate"], chosen["momentum"]
            kept = found.setdefault(task, {}).setdefault(name, {})
            for code, compression in CODES.items():
                if code in kept:
                    continue
                run = runner(family, methods(["outer"])[name]._replace(options={"compression": compression}))
                kept[code] = [round(float(run(family.data, setting, DELAY, rounds, s)), 5) for s in SEEDS]
                write_atomically(path, json.dumps(found, indent=1) + "\n")
                print(task, name, code, kept[code], flush=True)
    tables.write(arguments.out / "compressed.csv", table(found))


if __name__ == "__main__":
    main()
