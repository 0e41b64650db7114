"""Local SGD on several devices: equal to the simulation, one all-reduce a round, one compilation, clear errors."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from learned_opt import communication, schedules
from learned_opt.local_sgd import local_sgd, map_workers, spread_workers, worker_axes, worker_specs

PARAMS = {"w": np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5), "v": np.full(5, 0.3, np.float32)}
STEPS = 12
NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices: jax_num_cpu_devices=8")


def loss_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)


@functools.cache
def batches(workers):
    x = np.random.default_rng(0).normal(size=(STEPS, workers, 6, 3)).astype(np.float32)
    return x, np.sin(x.sum(-1))


def worker_step(opt, params, state, x, y):
    value, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, state = opt.update(grads, state, params, value=value)
    return optax.apply_updates(params, updates), state


def mesh_of(workers):
    return jax.make_mesh((workers,), ("workers",), axis_types=(AxisType.Auto,), devices=jax.devices()[:workers])


def start(opt, workers, mesh, state=None):
    state = opt.init(PARAMS) if state is None else state
    axes = worker_axes(state)
    fn = functools.partial(worker_step, opt)
    step = jax.jit(map_workers(fn, in_axes=(0, axes, 0, 0), out_axes=(0, axes), mesh=mesh))
    return step, spread_workers(PARAMS, workers, mesh=mesh), spread_workers(state, workers, axes, mesh=mesh)


def run(opt, workers, mesh):
    step, params, state = start(opt, workers, mesh)
    x, y = batches(workers)
    for t in range(STEPS):
        params, state = step(params, state, x[t], y[t])
    assert step._cache_size() == 1  # whatever the schedule says
    return jax.device_get((params, state.anchor, state.outer, state.inner, state.error, state.statistics)), state


@pytest.mark.parametrize(
    ("opt", "workers", "rounds"),
    [
        (local_sgd(optax.adam(0.05), NESTEROV, sync_every=schedules.post_local(2, 5), inner_state="average"), 8, 4),
        (local_sgd(optax.sgd(0.1), sync_every=2, compression="int8", fragments=2), 4, 6),
        (local_sgd(optax.adam(0.05), NESTEROV, sync_every=3, overlap=1, mixing=0.5, fragments=2), 2, 4),
    ],
    ids=["post-local, Nesterov, averaged Adam, 8 devices", "int8, fragments, 4 devices", "overlap, 2 devices"],
)
def test_devices_equal_lanes(opt, workers, rounds):
    lanes, state = run(opt, workers, None)
    devices, device_state = run(opt, workers, mesh_of(workers))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), lanes, devices)
    assert int(state.round) == int(device_state.round) == rounds
    for shard in device_state.anchor["w"].addressable_shards:  # every device holds the same
        np.testing.assert_array_equal(shard.data, devices[1]["w"])


@pytest.mark.parametrize("code", [None, "int8"])
def test_a_worker_may_be_many_devices(code):
    """A mesh of two axes, parameters and states sharded inside a worker: the same numbers, and they stay sharded."""
    opt = local_sgd(optax.adam(0.05), NESTEROV, sync_every=3, compression=code)
    lanes, _ = run(opt, 2, None)
    automatic = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((2, 3), ("workers", "fsdp"), axis_types=automatic, devices=jax.devices()[:6])
    within = lambda shape: PartitionSpec("fsdp") if shape and shape[0] % 3 == 0 else PartitionSpec()  # noqa: E731
    state = opt.init(PARAMS)
    axes = worker_axes(state)
    params = spread_workers(PARAMS, 2, mesh=mesh, within=within)
    state = spread_workers(state, 2, axes, mesh=mesh, within=within)
    kept = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    fn = functools.partial(worker_step, opt)
    step = map_workers(fn, in_axes=(0, axes, 0, 0), out_axes=(0, axes), mesh=mesh)
    step = jax.jit(step, out_shardings=kept, donate_argnums=(0, 1))
    x, y = batches(2)
    for t in range(STEPS):
        params, state = step(params, state, x[t], y[t])
    found = jax.device_get((params, state.anchor, state.outer, state.inner, state.error, state.statistics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), lanes, found)
    assert params["w"].addressable_shards[0].data.shape == (1, 1, 5)
    assert state.anchor["w"].addressable_shards[0].data.shape == (1, 5)


def test_all_reduces_executed_are_synchronisations(tmp_path):
    opt = local_sgd(optax.sgd(0.05), sync_every=schedules.post_local(3, 4))
    step, params, state = start(opt, 4, mesh_of(4))
    x, y = batches(4)
    jax.block_until_ready(step(params, state, x[0], y[0]))  # compile outside the profile
    with jax.profiler.trace(str(tmp_path)):
        for t in range(STEPS):
            params, state = jax.block_until_ready(step(params, state, x[t], y[t]))
    profile = jax.profiler.ProfileData.from_file(str(next(tmp_path.rglob("*.xplane.pb"))))
    names = collections.Counter(e.name for plane in profile.planes for line in plane.lines for e in line.events)
    assert int(state.round) == 3 + 2  # of 12 steps: one a step until step 3, then at 7 and 11
    assert names["all-reduce"] == 4 * int(state.round)  # one a device and round, all tensors in it
    payload = 4 * (15 + 5 + 2)  # the tensors and two scalars of statistics, float32
    assert communication.total_bytes(state.bytes) == int(state.round) * payload


def test_several_workers_a_device():
    """Eight workers as 4 devices of 2 lanes, over a tuple of axes, against 8 lanes."""
    lanes, _ = run(local_sgd(optax.sgd(0.05), sync_every=3), 8, None)
    opt = local_sgd(optax.sgd(0.05), sync_every=3, axis_name=("workers", "lanes"))
    state = opt.init(PARAMS)
    axes, specs, split = worker_axes(state), worker_specs(state), PartitionSpec("workers")
    block = jax.vmap(
        functools.partial(worker_step, opt), in_axes=(0, axes, 0, 0), out_axes=(0, axes), axis_name="lanes"
    )
    step = jax.jit(
        jax.shard_map(
            block, mesh=mesh_of(4), in_specs=(split, specs, split, split), out_specs=(split, specs), check_vma=False
        )
    )
    params, state = spread_workers(PARAMS, 8), spread_workers(state, 8, axes)
    x, y = batches(8)
    for t in range(STEPS):
        params, state = step(params, state, x[t], y[t])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), lanes[0], jax.device_get(params))


def differing(round_, step, statistics):
    return 2 + jax.lax.axis_index("workers")


def test_a_schedule_that_differs_is_refused():
    opt = local_sgd(optax.sgd(0.1), sync_every=differing)
    state = local_sgd(optax.sgd(0.1), sync_every=1).init(PARAMS)
    step, params, state = start(opt, 4, mesh_of(4), state)
    with pytest.raises(ValueError, match="the schedule's answer differs across workers"):
        step(params, state, *(d[0] for d in batches(4)))


def test_a_schedule_that_differs_unseen_cannot_hang():
    opt = local_sgd(optax.sgd(0.1), sync_every=differing)
    state = local_sgd(optax.sgd(0.1), sync_every=1).init(PARAMS)
    step, params, state = start(opt, 4, None, state)  # vmap does not track what differs, no more does check_vma=False
    x, y = batches(4)
    periods = []
    for t in range(7):
        params, state = step(params, state, x[t], y[t])
        periods.append(int(state.period))
    assert periods == [5] * 7
    assert int(state.round) == 2


def test_a_state_split_over_workers_is_refused():
    opt = local_sgd(optax.sgd(0.1), sync_every=2)
    step = map_workers(functools.partial(worker_step, opt), in_axes=(0, 0, 0, 0), out_axes=(0, 0), mesh=mesh_of(4))
    with pytest.raises(ValueError, match=r"state\.step differs across workers"):
        step(spread_workers(PARAMS, 4), spread_workers(opt.init(PARAMS), 4), *(d[0] for d in batches(4)))


def test_the_mesh_must_fit():
    opt = local_sgd(optax.sgd(0.1), sync_every=2)
    with pytest.raises(ValueError, match="none of them 'workers'"):
        map_workers(print, in_axes=(0,), out_axes=0, mesh=jax.make_mesh((2,), ("data",)))
    step, params, state = start(opt, 4, mesh_of(2))
    with pytest.raises(ValueError, match="4 workers on 2 devices"):
        step(params, state, *(d[0] for d in batches(4)))
