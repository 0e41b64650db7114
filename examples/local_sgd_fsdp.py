"""Local SGD on a mesh of two axes: two workers of two devices each, a worker's parameters sharded over its devices.

    python examples/local_sgd_fsdp.py

On a CPU four devices are made for it. On accelerators give the mesh the shape of your machines: ``workers`` between
them, where the network is slow, ``fsdp`` inside.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

from learned_opt.local_sgd import local_sgd, map_workers, spread_workers, worker_axes

WORKERS, FSDP, BATCH, STEPS = 2, 2, 32, 120


def within(shape):
    """Inside a worker matrices are split by rows, the rest is copied."""
    return PartitionSpec("fsdp") if len(shape) == 2 and shape[0] % FSDP == 0 else PartitionSpec()


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["hidden"] + params["bias"][None])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["output"], y).mean()


def main():
    jax.config.update("jax_num_cpu_devices", WORKERS * FSDP)  # where there is no accelerator
    mesh = jax.make_mesh((WORKERS, FSDP), ("workers", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))
    x, y = load_digits(return_X_y=True)
    x, y = np.float32(x / 16), np.int32(y)
    rng = np.random.default_rng(0)
    params = {
        "hidden": np.float32(rng.normal(size=(64, 32)) / 8),
        "bias": np.zeros(32, np.float32),
        "output": np.float32(rng.normal(size=(32, 10)) / 6),
    }

    opt = local_sgd(optax.adam(3e-3), optax.sgd(0.7, momentum=0.6, nesterov=True), sync_every=10)
    state = opt.init(params)
    axes = worker_axes(state)

    def step(params, state, x, y):  # what one worker does; how its devices share the work is XLA's matter
        value, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    before = loss_fn(params, x, y)
    params = spread_workers(params, WORKERS, mesh=mesh, within=within)
    state = spread_workers(state, WORKERS, axes, mesh=mesh, within=within)
    kept = jax.tree.map(lambda leaf: leaf.sharding, (params, state))  # what comes out lies as what went in
    run = map_workers(step, in_axes=(0, axes, 0, 0), out_axes=(0, axes), mesh=mesh)
    run = jax.jit(run, out_shardings=kept, donate_argnums=(0, 1))
    batches = NamedSharding(mesh, PartitionSpec("workers", "fsdp"))  # a worker's batch over its devices
    for _ in range(STEPS):
        rows = rng.integers(0, len(x), (WORKERS, BATCH))
        params, state = run(params, state, jax.device_put(x[rows], batches), jax.device_put(y[rows], batches))

    anchor = jax.tree.map(np.asarray, state.anchor)
    print(f"loss before: {before:.3f}")
    print(f"loss after {int(state.round)} rounds: {loss_fn(anchor, x, y):.3f}")
    print("hidden:", params["hidden"].sharding.spec, "its anchor:", state.anchor["hidden"].sharding.spec)


if __name__ == "__main__":
    main()
