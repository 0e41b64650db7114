"""Meta-training throughput: PES on `celo2` against a bare vmap(scan) of optax.adam on the same tasks and devices.

Prints, for the 64-32-10 image MLP at batch 64 and 128 with 16 and 128 particles, the inner steps a second of both and
their ratio, the seconds from nothing compiled to the first meta-step's end, and the peak memory. The two take turns, so
that a machine that slows down slows both. Writes reports/meta_training/run_1.json:

    python benchmarks/meta_training.py
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec

import learned_opt
from meta_train import xla_flags
from meta_train.train.estimators import pes
from meta_train.train.learners import task_learner
from meta_train.train.trainer import AXIS, begin, make_mesh, make_trainer, place
from tasks.families.vision import image_mlp

UNROLL = 50
BATCHES, PARTICLES = (64, 128), (16, 128)


def bare_adam(family, lanes, mesh):
    """``(state, data, key) -> state``: UNROLL steps of optax.adam on every lane, and the lanes' first state."""
    adam = optax.adam(1e-3)

    def init(key):
        params = family.task(family.data, family.sample(key)).init(key)
        return params, adam.init(params)

    def run(state, data, key):
        task = family.task(data, family.sample(key))

        def step(state, key):
            params, inner = state
            batch = task.batch(key, "train")
            loss, grads = jax.value_and_grad(lambda p: task.loss(p, key, batch)[0])(params)
            updates, inner = adam.update(grads, inner, params)
            return (optax.apply_updates(params, updates), inner), loss

        return jax.lax.scan(step, state, jax.random.split(key, UNROLL))

    split, whole = PartitionSpec(AXIS), PartitionSpec()
    mapped = jax.shard_map(
        jax.vmap(run, (0, None, 0)), mesh=mesh, in_specs=(split, whole, split), out_specs=split, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=0), jax.jit(jax.vmap(init))(jax.random.split(jax.random.PRNGKey(0), lanes))


def measure(batch, particles, rounds):
    mesh = make_mesh()
    family = image_mlp("fashion_mnist_small", batch_size=batch)
    rule = learned_opt.RULES["celo2"]()
    data = place((family.data,), mesh)

    begun = time.perf_counter()
    trainer = make_trainer(
        rule.init,
        lambda data: [pes(task_learner(rule, family._replace(data=data[0]), multiple_of=UNROLL), unroll=UNROLL)],
        optax.flatten(optax.adam(1e-4)),  # as `learned-opt train` does
        particles=particles,
        mesh=mesh,
    )
    state, meta_step = begin(trainer, jax.random.PRNGKey(0), data)
    state, _ = jax.block_until_ready(meta_step(state, data))
    first = time.perf_counter() - begun

    lanes = 2 * particles  # the antithetic halves
    run, adam_state = bare_adam(family, lanes, mesh)
    keys = jax.random.split(jax.random.PRNGKey(1), lanes)
    adam_state, _ = jax.block_until_ready(run(adam_state, data[0], keys))
    seconds = []
    for _ in range(rounds):
        t0 = time.perf_counter()
        state, _ = jax.block_until_ready(meta_step(state, data))
        t1 = time.perf_counter()
        adam_state, _ = jax.block_until_ready(run(adam_state, data[0], keys))
        seconds.append((t1 - t0, time.perf_counter() - t1))
    ours, adam = np.asarray(seconds).T
    steps = lanes * UNROLL
    return {
        "batch": batch,
        "particles": particles,
        "celo2_inner_steps_per_second": round(steps / float(np.median(ours))),
        "adam_inner_steps_per_second": round(steps / float(np.median(adam))),
        "ratio": round(float(np.median(adam / ours)), 3),
        "ratio_quartiles": [round(float(q), 3) for q in np.quantile(adam / ours, (0.25, 0.75))],
        "seconds_to_first_meta_step": round(first, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("reports/meta_training/run_1.json"))
    arguments = parser.parse_args()
    xla_flags.one_thread_a_device()  # as `learned-opt train` does, for both
    xla_flags.widest_vectors()
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    rows = []
    for batch in BATCHES:
        for particles in PARTICLES:
            jax.clear_caches()
            row = measure(batch, particles, max(arguments.rounds * 16 // particles, 5))
            print(row, flush=True)
            rows.append(row)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {"devices": jax.device_count(), "jax": jax.__version__, "peak_memory_mib": round(peak), "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"peak memory {peak:.0f} MiB; wrote {arguments.out}")


if __name__ == "__main__":
    main()
