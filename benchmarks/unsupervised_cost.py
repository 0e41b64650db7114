"""What an inner step of the unsupervised rule costs, on one core at 64-32-32 and batch 64, and how memory grows.

taskset -c 0 python benchmarks/unsupervised_cost.py --out reports/unsupervised/cost.json
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from learned_opt import unsupervised
from meta_train import xla_flags
from meta_train.train.estimators import ESTIMATORS
from meta_train.train.learners.unsupervised import feature_learner
from tasks.families.representation import suite

STEPS = 20
REPEATS = 10
UNROLLS = (10, 50, 250)


def fastest(function, *arguments) -> tuple[float, float]:
    """Milliseconds an inner step: of the processor, which others cannot take, and by the clock."""
    jax.block_until_ready(function(*arguments))
    processor, clock = [], []
    for _ in range(REPEATS):
        starts = time.process_time(), time.perf_counter()
        jax.block_until_ready(function(*arguments))
        processor.append(time.process_time() - starts[0])
        clock.append(time.perf_counter() - starts[1])
    return min(processor) / STEPS * 1e3, min(clock) / STEPS * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    xla_flags.one_thread_a_device()
    rule = unsupervised.unsupervised()
    theta = rule.init_theta(jax.random.key(0))
    (entry,) = suite("letters_small")
    family = entry.make()
    sizes = (family.inputs, *entry.units)

    @jax.jit
    def learn(theta, phi, x):
        return jax.lax.scan(lambda phi, x: (rule.update(theta, phi, x), None), phi, x)[0]

    def learner(data):
        return feature_learner(rule, family._replace(data=data), entry, lengths=(STEPS, STEPS))

    @jax.jit
    def meta_gradient(theta, data, key):
        return ESTIMATORS["bptt"](learner(data), unroll=STEPS).estimate(theta, (), key)

    def memory(unroll):
        made = jax.jit(
            lambda theta, data, key: ESTIMATORS["bptt"](learner(data), unroll=unroll).estimate(theta, (), key)
        )
        return made.lower(theta, family.data, jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes

    x = jax.random.normal(jax.random.key(1), (STEPS, 64, family.inputs))
    update = fastest(learn, theta, rule.init(jax.random.key(2), sizes), x)
    gradient = fastest(meta_gradient, theta, family.data, jax.random.key(3))
    result = {
        "sizes": sizes,
        "batch": 64,
        "meta_parameters": sum(leaf.size for leaf in jax.tree.leaves(theta)),
        "update_ms": {"processor": round(update[0], 2), "clock": round(update[1], 2)},
        "update_meta_loss_and_meta_gradient_ms": {"processor": round(gradient[0], 2), "clock": round(gradient[1], 2)},
        "temporary_bytes_by_unroll": {str(n): memory(n) for n in UNROLLS},
        "bytes_of_a_network": sum(
            leaf.nbytes for leaf in jax.tree.leaves(rule.init(jax.random.key(2), sizes, jnp.asarray(0)))
        ),
        "jax": jax.__version__,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
