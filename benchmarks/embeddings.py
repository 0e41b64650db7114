"""What the steps of embeddings are relative to at least, in short and long runs: of the rule `control`.

Character transformers (16 x 64 characters) under `flagship` with other floors to the size of their tables of tokens and
of positions: the root of the fan-in, as other matrices have it, or one number; as it is; and Muon (warm-up, cosine) at
two rates. In long runs `flagship` as it is and with the root have three seeds, all else one. Writes the validation
losses at the end to reports/control/embeddings.csv. Finished runs are kept with the benchmark's; the same command goes
on.

    learned-opt data fetch moby_dick && learned-opt data fetch kjv
    python benchmarks/embeddings.py
"""

import argparse
import functools
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import optax
import tables
from sizes import final, scaled

import learned_opt
from learned_opt.rules import control
from meta_train.bench.workloads.baselines import baselines
from meta_train.bench.workloads.optimizers import Optimizer
from meta_train.bench.workloads.training import program
from tasks.base import Workload
from tasks.workloads.language import gpt, llama

SIZES = {"layers": 2, "width": 64, "length": 64, "batch_size": 16}
NETWORKS = {
    "gpt-2x64": functools.partial(gpt, "moby_dick", **SIZES),
    "gpt-2x64-kjv": functools.partial(gpt, "kjv", **SIZES),
    "llama-2x64": functools.partial(llama, "moby_dick", **SIZES),
}
LENGTHS = {"gpt-2x64": (300, 1000, 3000)}  # of the others the last
SEVERAL = "flagship", "floor of other matrices"
FLOORS, LONG = (0.25, 0.5, 1.0), 3000  # more floors on networks with several lengths
RATES, SEEDS = (0.01, 0.02), (0, 1, 2)


def with_floor(floor: float | None) -> Optimizer:
    """`flagship` whose tables have one floor at every length, by default that of other matrices."""

    def floors(groups, _):
        usual = own_floors(groups, jnp.zeros(()))
        of_tables = control.in_order([jnp.asarray(group.tables) for group in groups], groups)
        return usual if floor is None else jnp.where(of_tables, floor, usual)

    own_floors = control.floors

    def make(_, num_steps):
        tx = learned_opt.load("flagship", num_steps=num_steps)

        def update_fn(*args, **kwargs):
            with mock.patch.object(control, "floors", floors):
                return tx.update(*args, **kwargs)

        return optax.GradientTransformationExtraArgs(tx.init, update_fn)

    return Optimizer(f"flagship, floor {floor}", make, {}, {}, "flagship", "learned")


def contenders(network: str) -> dict[str, tuple[Optimizer, dict]]:
    """By name: an optimizer and its settings."""
    muon = next(optimizer for optimizer in baselines() if optimizer.name == "muon")
    found: dict[str, tuple[Optimizer, dict]] = {}
    found |= {SEVERAL[0]: (scaled(), scaled().setting), SEVERAL[1]: (with_floor(None), {})}
    found |= {f"floor {floor:g}": (with_floor(floor), {}) for floor in FLOORS if network in LENGTHS}
    return found | {f"muon {rate:g}": (muon, {**muon.setting, "learning_rate": rate}) for rate in RATES}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/control"))
    out = parser.parse_args().out
    rows: list[dict] = []
    for network, make in NETWORKS.items():
        for length in LENGTHS.get(network, (LONG,)):
            workload = Workload(make, length, None, name=network)
            for name, (optimizer, settings) in contenders(network).items():
                made = program(workload, optimizer)
                for seed in SEEDS if length == LONG and name in SEVERAL else SEEDS[:1]:
                    loss = f"{final(made, workload, settings, seed):.4f}"
                    rows.append({"network": network, "updates": length, "optimizer": name, "seed": seed, "loss": loss})
                    print(rows[-1], flush=True)
                    tables.write(out / "embeddings.csv", rows)


if __name__ == "__main__":
    main()
