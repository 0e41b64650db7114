"""What the numbers of the rule `control` are worth, each by itself, on four small networks that it was chosen on.

A character transformer and an LSTM (16 x 64 characters, 300 steps), a ResNet and a ViT (32 images, 400 steps), one
seed. Writes reports/control/losses.csv, the validation losses at the end of every setting, and the geometric mean of
their ratios to those of `flagship-1` at its default rate. Finished runs are kept with the benchmark's; the same command
goes on.

    learned-opt data fetch moby_dick && learned-opt data fetch kjv && learned-opt data fetch cifar10
    python benchmarks/control.py
"""

import argparse
import functools
from pathlib import Path

import jax
import numpy as np
import tables

import learned_opt
from meta_train.bench.workloads.optimizers import Optimizer, learned, pretrained
from meta_train.bench.workloads.training import program, run
from meta_train.commands import shared
from tasks.base import Workload
from tasks.workloads import images, language

NETWORKS = {
    "gpt-2x64": (functools.partial(language.gpt, "moby_dick", layers=2, width=64, length=64, batch_size=16), 300),
    "lstm-1x128": (functools.partial(language.lstm, "kjv", layers=1, width=128, length=64, batch_size=16), 300),
    "resnet-16-32-64": (functools.partial(images.resnet, "cifar10", channels=(16, 32, 64), batch_size=32), 400),
    "vit-2x64": (functools.partial(images.vit, "cifar10", layers=2, width=64, batch_size=32), 400),
}
SETTINGS = {
    "as it is": {},
    "ratio .025": {"ratio": 0.025},
    "ratio .06": {"ratio": 0.06},
    "no decay": {"decay": 0.0},
    "decay .4": {"decay": 0.4},
    "warm-up .1": {"warmup": 0.1},
}


def optimizers(trained: list[Path]) -> list[Optimizer]:
    """`flagship-1`, the settings, and control layers that were trained."""
    direction = learned_opt.load_rule("flagship-1").theta
    found = [pretrained("flagship-1")[0]]
    for name, setting in SETTINGS.items():
        rule = learned_opt.RULES["control"](**setting)
        found.append(learned(name, rule, rule.init(jax.random.key(0)) | {"direction": direction}, None))
    return found + [pretrained(str(folder))[0]._replace(name=f"trained, {folder.name}") for folder in trained]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("reports/control/losses.csv"))
    arguments = parser.parse_args()
    rows: list[dict] = []
    for optimizer in optimizers(arguments.trained):
        losses = {}
        for name, (make, steps) in NETWORKS.items():
            workload = Workload(make, steps, None, name=name, network=name, dataset=name)
            made = program(workload, optimizer)
            losses[name] = run(made, workload, optimizer.setting, 0, shared.cache("bench")).final
        ratios = [losses[name] / float((rows or [losses])[0][name]) for name in NETWORKS]
        row = {"setting": optimizer.name} | {name: f"{loss:.4f}" for name, loss in losses.items()}
        rows.append(row | {"ratio": f"{np.exp(np.mean(np.log(ratios))):.4f}"})
        print(rows[-1], flush=True)
        tables.write(arguments.out, rows)


if __name__ == "__main__":
    main()
