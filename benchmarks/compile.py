"""Seconds to compile a training step beyond its gradient, by depth: transformers of width 64 with 2, 8 and 24 layers.

Each figure comes from a process of its own on one core, with no cache of compiled programs; the lines of HLO beside it
do not depend on the machine. Writes reports/compile/run_1.json:

    python benchmarks/compile.py
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import optax
from contenders import OPTIMIZERS
from models import transformer


def measure(name: str, layers: int) -> dict:
    """Seconds and lines of HLO of a step, and of the gradient alone."""
    model = transformer(layers, 64)
    params, batch = jax.eval_shape(model.init, jax.random.key(0)), jax.eval_shape(model.batch, jax.random.key(0))
    tx = optax.with_extra_args_support(OPTIMIZERS[name]())
    state = jax.eval_shape(tx.init, params)

    def gradient(params, batch):
        return jax.value_and_grad(model.loss)(params, batch)

    def step(params, state, batch):
        loss, grads = gradient(params, batch)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    def compiled(function, *arguments):
        begun = time.perf_counter()
        lowered = jax.jit(function).lower(*arguments)
        traced = time.perf_counter()
        lines = len(lowered.compile().as_text().splitlines())
        return traced - begun, time.perf_counter() - traced, lines

    alone, whole = compiled(gradient, params, batch), compiled(step, params, state, batch)
    return {
        "optimizer": name,
        "layers": layers,
        "tensors": len(jax.tree.leaves(params)),
        "seconds": round(sum(whole[:2]) - sum(alone[:2]), 1),
        "trace_seconds": round(whole[0] - alone[0], 1),
        "gradient_seconds": round(sum(alone[:2]), 1),
        "hlo_lines": whole[2] - alone[2],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--layers", nargs="+", type=int, default=(2, 8, 24))
    parser.add_argument("--out", type=Path, default=Path("reports/compile/run_1.json"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]))))
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    rows = []
    for name in arguments.optimizers:
        for layers in arguments.layers:
            command = [sys.executable, __file__, "--one", name, str(layers)]
            found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            rows.append(json.loads(found.stdout))
            print(rows[-1], flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
