"""What one update of a learned rule costs: time against optax.adam, memory, state.

Every optimizer's update and `optax.apply_updates` are one compiled step with donated buffers. Each rule takes turns
with Adam alone: what ran before would slow it down (after `celo2_soap` Adam takes half as long again). Prints medians
over rounds of the rule's time as a multiple of Adam's in the same round: "hot" of updates one after the other, "cold"
of one update after other data went through the caches, as a net's activations do in training; further the temporary
bytes and the state's bytes a parameter. Writes reports/update/one_core.json:

    python benchmarks/update.py [--rules celo2 adam] [--rounds 15]
"""

import argparse
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import learned_opt

STEPS = 5  # updates of one timing, hot
LARGER_THAN_CACHES = 48 * 2**20  # floats


def mlp_1m():
    return {"w": (1024, 1024), "b": (1024,)}


def transformer_10m():
    width, layers = 256, 4
    shapes = {"embedding": (26000, width)}
    for i in range(layers):
        for name, outputs in (("query", width), ("key", width), ("value", width), ("out", width), ("up", 4 * width)):
            shapes |= {f"{i}/{name}/w": (width, outputs), f"{i}/{name}/b": (outputs,)}
        shapes |= {f"{i}/down/w": (4 * width, width), f"{i}/down/b": (width,), f"{i}/norm": (width,)}
    return shapes


MODELS = {"mlp_1m": mlp_1m, "transformer_10m": transformer_10m}


def transform(rule):
    """A fresh rule with its default settings."""
    made = learned_opt.RULES[rule]()
    tx = made.build(made.init(jax.random.key(0)), num_steps=1000)
    return optax.chain(tx, optax.scale(made.learning_rate or 1.0))


def prepare(tx, shapes, dtype):
    """The compiled step and its first arguments; what it takes in memory."""
    keys = jax.random.split(jax.random.key(1), len(shapes))
    params = {n: 0.03 * jax.random.normal(k, s, dtype) for (n, s), k in zip(shapes.items(), keys, strict=True)}
    grads = jax.tree.map(lambda p: 0.1 * p + jnp.asarray(1e-3, dtype), params)

    def step(params, state, grads, value):
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)
    arguments = (params, state, grads, jnp.float32(1.0))
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    size = sum(p.size for p in params.values())
    facts = {
        "parameters": size,
        "compile_seconds": round(seconds, 2),
        "temporary_bytes_per_parameter": round(compiled.memory_analysis().temp_size_in_bytes / size, 2),
        "state_bytes_per_parameter": round(sum(x.nbytes for x in jax.tree.leaves(state)) / size, 2),
    }
    return compiled, list(arguments), facts


def seconds(compiled, arguments, steps):
    """Of one of several updates in a row."""
    start = time.perf_counter()
    for _ in range(steps):
        arguments[0], arguments[1] = compiled(*arguments)
    jax.block_until_ready(arguments[0])
    return (time.perf_counter() - start) / steps


def measure(transforms, shapes, rounds, dtype=jnp.float32):
    adam = prepare(optax.adam(1e-3), shapes, dtype)
    other = np.zeros(LARGER_THAN_CACHES, np.float32)
    rows = {}
    for name, tx in transforms.items():
        pair = (prepare(tx, shapes, dtype), adam)
        times = {"hot": [], "cold": []}
        for turn in range(rounds + 1):
            cold, hot = [], []
            for compiled, arguments, _ in pair:
                np.add(other, 1, out=other)
                cold.append(seconds(compiled, arguments, 1))
                hot.append(seconds(compiled, arguments, STEPS))
            if turn:  # the first warms up
                times["hot"].append(hot)
                times["cold"].append(cold)
        rows[name] = dict(pair[0][2])
        for kind, pairs in times.items():
            mine, adams = np.array(pairs).T
            rows[name] |= {
                f"times_adam_{kind}": round(float(np.median(mine / adams)), 2),
                f"milliseconds_{kind}": round(float(np.median(mine)) * 1e3, 3),
                f"adam_milliseconds_{kind}": round(float(np.median(adams)) * 1e3, 3),
            }
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=["celo2"], choices=sorted(learned_opt.RULES))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=Path("reports/update/one_core.json"))
    arguments = parser.parse_args()
    report = {
        "jax": jax.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "device": jax.devices()[0].device_kind,
        "models": {},
    }
    for model in arguments.models:
        transforms = {rule: transform(rule) for rule in arguments.rules}
        rows = measure(transforms, MODELS[model](), arguments.rounds, jnp.dtype(arguments.dtype))
        report["models"][model] = rows
        for rule, row in rows.items():
            print(
                f"{model:16} {rule:12} {row['times_adam_cold']:6.2f} x adam cold, {row['times_adam_hot']:.2f} hot;",
                f"bytes a parameter: temporaries {row['temporary_bytes_per_parameter']:.2f},",
                f"state {row['state_bytes_per_parameter']:.2f}; compiled in {row['compile_seconds']} s",
                flush=True,
            )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
