"""What the numbers of the rule `control` are worth, each by itself, on four small networks that it was chosen on.

A character transformer and an LSTM (16 x 64 characters, 300 steps), a ResNet and a ViT (32 images, 400 steps), one
seed. Writes the validation losses at the end of every setting, and the geometric mean of their ratios to those of the
first. Finished runs are kept with the benchmark's; the same command goes on.

    learned-opt data fetch moby_dick && learned-opt data fetch kjv && learned-opt data fetch cifar10
    python benchmarks/control.py             # reports/control/losses.csv
    python benchmarks/control.py --steps 1600 --networks gpt-2x64 lstm-1x128 --settings 'as it is' 'no brake'
                                             # in longer runs weights have time to grow: reports/control/losses_1600.csv
"""

import argparse
import functools
from pathlib import Path

import jax
import numpy as np
import tables

import learned_opt
from meta_train.bench.workloads.baselines import baselines
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
    "longest 2": {"longest": 2.0},
    "longest 16": {"longest": 16.0},
    "no brake": {"longest": 1e9},
    "no rotation": {"max_dim": 0},
}


def on(network: str, length: int | None = None) -> Workload:
    """A network, to be trained for so many steps or for its own."""
    make, steps = NETWORKS[network]
    return Workload(make, length or steps, None, name=network, network=network, dataset=network)


def optimizer(name: str) -> Optimizer:
    """A peer at its one setting for all workloads, a setting of the layer, or the folder of one that was trained."""
    if name in SETTINGS:
        rule = learned_opt.RULES["control"](**SETTINGS[name])
        theta = rule.init(jax.random.key(0)) | {"direction": learned_opt.load_rule("flagship-1").theta}
        return learned(name, rule, theta, None)
    known = {baseline.name: baseline for baseline in baselines()}
    return known[name] if name in known else pretrained(name)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=["flagship-1", *SETTINGS])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    out = Path("reports/control") / (f"losses_{arguments.steps}.csv" if arguments.steps else "losses.csv")
    rows: list[dict] = []
    for name in arguments.settings:
        losses = {}
        for network in arguments.networks:
            workload = on(network, arguments.steps)
            chosen = optimizer(name)
            losses[network] = run(program(workload, chosen), workload, chosen.setting, 0, shared.cache("bench")).final
        ratios = [losses[network] / float((rows or [losses])[0][network]) for network in losses]
        row = {"setting": Path(name).name} | {network: f"{loss:.4f}" for network, loss in losses.items()}
        rows.append(row | {"ratio": f"{np.exp(np.mean(np.log(ratios))):.4f}"})
        print(rows[-1], flush=True)
        tables.write(out, rows)


if __name__ == "__main__":
    main()
