"""Bytes a parameter of an optimizer's state and of an update's temporaries, transformers of 10^6 to 10^8 parameters.

Nothing is run: XLA tells what the compiled update allocates beside its arguments, gradients and the state in place.
Writes reports/memory/memory.csv:

    python benchmarks/memory.py
"""

import argparse
from pathlib import Path

import jax
import optax
import tables
from contenders import OPTIMIZERS
from models import transformer

import learned_opt

SIZES = ((4, 144), (8, 320), (12, 832))  # layers, width
MEASURED = {name: OPTIMIZERS[name] for name in ("adam", "muon", "celo2", "flagship-1")} | {
    "SOAP, sides up to 1,024": lambda: learned_opt.soap(3e-3, max_dim=1024),  # as `flagship-1`'s
    "flagship-1, state in bfloat16": lambda: learned_opt.bfloat16_state(learned_opt.load("flagship-1")),
}


def measure(params, make) -> tuple[float, float]:
    """Bytes a parameter: of the state, of temporaries."""
    tx, size = optax.with_extra_args_support(make()), sum(x.size for x in jax.tree.leaves(params))
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return held / size, compiled.memory_analysis().temp_size_in_bytes / size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/memory/memory.csv"))
    arguments = parser.parse_args()
    rows = []
    for layers, width in SIZES:
        params = jax.eval_shape(transformer(layers, width).init, jax.random.key(0))
        size = sum(x.size for x in jax.tree.leaves(params))
        for name, make in MEASURED.items():
            state, temporaries = measure(params, make)
            rows.append(
                {"parameters": size, "optimizer": name, "state": f"{state:.1f}", "temporaries": f"{temporaries:.1f}"}
            )
            print(rows[-1], flush=True)
    tables.write(arguments.out, rows)


if __name__ == "__main__":
    main()
