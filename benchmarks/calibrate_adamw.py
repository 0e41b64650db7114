"""The one AdamW setting that does best on the training suite: the benchmark's row `adamw-calibrated`.

    python benchmarks/calibrate_adamw.py

Every learning rate and weight decay is run on every task of a training suite under a cosine schedule. A setting's mark
on a task is how far it brings the training loss down, the best setting's way being 1; the highest mean mark wins. The
held-out suites take no part. The winner is written into `CALIBRATED` of meta_train/bench/contenders.py by hand.
"""

import argparse
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import optax

from meta_train.bench import execution
from meta_train.bench.contenders import Contender, around, cosine_schedule
from meta_train.bench.measures import normalised
from meta_train.bench.tournament import on_devices
from tasks import suites

RATES = around(10**-2.5)
DECAYS = (1e-4, 1e-2)
FIRST_SEED = 3_000_000  # neither the benchmark's tuning seeds nor its reporting seeds


def main() -> None:
    """Run all settings, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()

    def finals(job, device, go_on):
        """``[rates]``: mean first and last losses."""
        entry, decay = job
        contender = Contender(
            "adamw", lambda rate, steps: optax.adamw(cosine_schedule(rate, steps), weight_decay=decay), RATES
        )
        go_on()
        run = execution.compile_run(entry, contender, options.steps, device, 1)
        pairs = list(itertools.product(RATES, range(FIRST_SEED, FIRST_SEED + options.seeds)))
        losses, _ = run.losses(*zip(*pairs, strict=True))
        losses = losses.reshape(len(RATES), options.seeds, -1).astype(float)
        last = max(options.steps // 20, 1)
        return losses[:, :, 0].mean(), losses[:, :, -last:].mean(axis=(1, 2))

    entries = suites.suite(options.suite)
    jobs = list(itertools.product(entries, DECAYS))
    found = dict(on_devices(finals, jobs))
    marks = np.zeros((len(entries), len(DECAYS), len(RATES)))
    for task in range(len(entries)):
        mine = [found[task * len(DECAYS) + k] for k in range(len(DECAYS))]
        ends = np.stack([end for _, end in mine])
        initial = np.full_like(ends, mine[0][0])
        marks[task] = np.nan_to_num(normalised(initial, ends, np.full_like(ends, np.nanmin(ends))), nan=-1)
    mean = marks.mean(axis=0)
    for (k, decay), (r, rate) in itertools.product(enumerate(DECAYS), enumerate(RATES)):
        print(f"weight decay {decay:g}  learning rate {rate:<9g}  mean mark {mean[k, r]:.4f}  " +
              " ".join(f"{mark:.4f}" for mark in marks[:, k, r]))  # fmt: skip
    k, r = np.unravel_index(mean.argmax(), mean.shape)
    best = {"learning_rate": RATES[r], "weight_decay": DECAYS[k]}
    print("best:", best)
    if options.out:
        table = [
            {"weight_decay": decay, "learning_rate": rate, "mean_mark": round(float(mean[k, r]), 5)}
            for (k, decay), (r, rate) in itertools.product(enumerate(DECAYS), enumerate(RATES))
        ]
        about = {"suite": options.suite, "steps": options.steps, "seeds": options.seeds, "jax": jax.__version__}
        options.out.write_text(json.dumps({"about": about, "best": best, "settings": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
