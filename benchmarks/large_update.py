"""Whole training steps of networks of a million parameters: seconds a step by optimizer, on one core, in turns.

Transformers of 4 layers of 128 (16 x 64 characters) and of 256 (16 x 128), and a ResNet on 32 x 32 images with batches
of 64. The optimizers take turns, ten steps each, so that a machine that slows down slows all. Writes
reports/large_update/run_1.json:

    python benchmarks/large_update.py
"""

import argparse
import json
import os
import time
from pathlib import Path

import jax
import numpy as np
import optax
from contenders import OPTIMIZERS
from models import resnet, transformer

MODELS = {
    "transformer 4 x 128": lambda: transformer(4, 128),
    "transformer 4 x 256": lambda: transformer(4, 256, length=128),
    "resnet": lambda: resnet(32),
}
COMPARED = ("adam", "muon", "soap", "soap_muon", "flagship-1", "flagship")
TURN = 10  # steps: a period of the bases' corrections


def measure(model, rounds: int) -> dict[str, dict]:
    """Median seconds a step over the turns, and its ratio to Adam's and Muon's in the same turn."""
    params, batch = model.init(jax.random.key(0)), model.batch(jax.random.key(1))

    def stepper(tx):
        tx = optax.with_extra_args_support(tx)

        def step(params, state):
            loss, grads = jax.value_and_grad(model.loss)(params, batch)
            updates, state = tx.update(grads, state, params, value=loss)
            return optax.apply_updates(params, updates), state

        return jax.jit(step, donate_argnums=(0, 1)), tx.init(params)

    running = {}
    for name in COMPARED:
        step, state = stepper(OPTIMIZERS[name]())
        carry = (jax.tree.map(lambda x: x + 0, params), state)
        for _ in range(TURN):
            carry = step(*carry)
        running[name] = (step, jax.block_until_ready(carry))
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, (step, carry) in running.items():
            begun = time.perf_counter()
            for _ in range(TURN):
                carry = step(*carry)
            running[name] = (step, jax.block_until_ready(carry))
            seconds[name].append((time.perf_counter() - begun) / TURN)
    turns = {name: np.array(times) for name, times in seconds.items()}
    return {
        name: {
            "milliseconds": round(1e3 * float(np.median(times)), 1),
            "times_adam": round(float(np.median(times / turns["adam"])), 2),
            "times_muon": round(float(np.median(times / turns["muon"])), 2),
        }
        for name, times in turns.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("reports/large_update/run_1.json"))
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    rows = {}
    for name in arguments.models:
        model = MODELS[name]()
        size = sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
        rows[name] = {"parameters": size, "optimizers": measure(model, arguments.rounds)}
        print(name, rows[name], flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
