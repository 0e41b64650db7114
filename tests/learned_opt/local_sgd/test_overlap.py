"""A round's mean used some steps later: the equations in NumPy, and real processes whose steps do not wait."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import ROOT

from learned_opt import communication, schedules
from learned_opt.local_sgd import (
    Link,
    diloco,
    load_anchor,
    load_tree,
    local_sgd,
    map_workers,
    save_anchor,
    spread_workers,
    worker_axes,
)

K, STEPS, LR = 3, 17, 0.1
RNG = np.random.default_rng(0)
W0 = {"a": RNG.normal(size=4), "b": RNG.normal(size=3)}
TARGETS = {name: RNG.normal(size=(STEPS, K, len(w))) for name, w in W0.items()}
NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)


def streaming(every, overlap, mixing, fragments):
    """Streaming DiLoCo, line by line, float64: fragments (lists of names) in turns, SGD inside, Nesterov outside."""
    workers = [{name: w.copy() for name, w in W0.items()} for _ in range(K)]
    anchor, buffer = dict(W0), {name: 0.0 for name in W0}
    flight, when, round_, since = None, None, 0, 0
    for t in range(STEPS):
        for k, w in enumerate(workers):
            for name in w:
                w[name] = w[name] - LR * (w[name] - TARGETS[name][t, k])
        since += 1
        if since == every:  # send
            names = fragments[round_ % len(fragments)]
            flight = {name: anchor[name] - np.mean([w[name] for w in workers], axis=0) for name in names}
            when, round_, since = t + overlap, round_ + 1, 0
        if flight is not None and t == when:  # take
            for name, delta in flight.items():
                buffer[name] = 0.9 * buffer[name] + delta
                anchor[name] = anchor[name] - 0.7 * (delta + 0.9 * buffer[name])
                for w in workers:
                    w[name] = mixing * w[name] + (1 - mixing) * anchor[name]
            flight = None
    return anchor, {name: np.stack([w[name] for w in workers]) for name in W0}, round_


def run(opt, params=W0, targets=TARGETS, steps=STEPS, link=False):
    """All workers on one device; step by step, the state given away."""
    state = opt.init(params)
    axes = worker_axes(state)

    def one(w, state, target):
        grads = jax.tree.map(lambda w, c: w - c, w, target)
        updates, state = opt.update(grads, state, w, value=optax.tree.norm(grads, squared=True))
        return optax.apply_updates(w, updates), state

    step = jax.jit(map_workers(one, in_axes=(0, axes, 0), out_axes=(0, axes)), donate_argnums=(0, 1))
    w, state = spread_workers(params, K), jax.tree.map(jnp.copy, spread_workers(state, K, axes))
    w = jax.tree.map(jnp.copy, w)
    carrier = Link(opt, state) if link else lambda *both: both
    for t in range(steps):
        w, state = carrier(*step(w, state, {name: x[t] for name, x in targets.items()}))
    return w, state


@pytest.mark.parametrize(
    ("every", "overlap", "mixing", "fragments", "link"),
    [
        (4, 0, 0.0, [["a", "b"]], False),
        (4, 0, 0.25, [["b"], ["a"]], False),
        *((4, 1, 0.0, [["a", "b"]], link) for link in (False, True)),
        *((5, 4, 0.5, [["a", "b"]], link) for link in (False, True)),
        *((3, 2, 0.5, [["a"], ["b"]], link) for link in (False, True)),
    ],
)
def test_streaming_diloco_line_by_line(every, overlap, mixing, fragments, link):
    anchor, workers, rounds = streaming(every, overlap, mixing, fragments)
    labels = {name: part for part, names in enumerate(fragments) for name in names}
    with jax.enable_x64(True):
        options = {"overlap": overlap, "mixing": mixing, "fragments": labels, "linked": link}
        w, state = run(diloco(optax.sgd(LR), sync_every=every, **options), link=link)
        for name in W0:
            np.testing.assert_allclose(state.anchor[name], anchor[name], rtol=0, atol=1e-13)
            np.testing.assert_allclose(w[name], workers[name], rtol=0, atol=1e-13)
    assert int(state.round) == rounds


def test_a_link_is_the_simulation():
    """Compression with its feedback, a schedule, a loss that drives it: the same numbers, 4 bytes a round more."""
    params = {"w": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32), "v": jnp.ones(5), "count": jnp.int32(7)}
    targets = {name: RNG.normal(size=(STEPS, K, *np.shape(w))).astype(np.float32) for name, w in params.items()}
    targets["count"] = np.zeros((STEPS, K), np.int32)
    for options in (
        {"sync_every": 3, "compression": "int8", "fragments": 2},
        {"sync_every": schedules.adacomm(6), "drop_nonfinite": True, "compression": None},
        {"sync_every": 4, "compression": "bf16", "error_feedback": False},
    ):
        options |= {"overlap": 2, "mixing": 0.5}
        w, state = run(local_sgd(optax.sgd(LR), NESTEROV, **options), params, targets)
        v, linked = run(local_sgd(optax.sgd(LR), NESTEROV, linked=True, **options), params, targets, link=True)
        for name in ("anchor", "outer", "inner", "error", "statistics", "round", "period", "since_sync"):
            one, other = getattr(state, name), getattr(linked, name)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, other)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), w, v)
        arrived = int(linked.round) - (int(linked.since_sync) < 2)
        sent = communication.total_bytes(state.bytes) / int(state.round)
        if options["compression"] == "bf16":  # the weight is sent too
            assert communication.total_bytes(linked.bytes) == arrived * (sent + 4)
        assert np.all(np.asarray(w["count"]) == 7)


def test_rounds_of_a_schedule_hold_a_message():
    opt = local_sgd(optax.sgd(LR), sync_every=lambda round_, step, statistics: 1 + 0 * round_, overlap=3)
    _, state = run(opt, steps=9)
    assert [int(state.period), int(state.round), int(state.since_sync)] == [4, 2, 1]


def test_outer_reads_the_rounds_loss():
    """Polyak's step of the mean delta by the mean loss of its round, 0.5 and 1.5: not of the step that takes it."""
    opt = local_sgd(optax.sgd(1.0), optax.polyak_sgd(max_learning_rate=10.0), sync_every=2, overlap=1)
    state = opt.init(jnp.zeros(2))
    axes = worker_axes(state)

    def one(w, state, value):
        updates, state = opt.update(jnp.full(2, 2.0), state, w, value=value)
        return optax.apply_updates(w, updates), state

    step = jax.jit(map_workers(one, in_axes=(0, axes, 0), out_axes=(0, axes)))
    w, state = spread_workers(jnp.zeros(2), K), spread_workers(state, K, axes)
    for value in (0.5, 1.5, 100.0):
        w, state = step(w, state, jnp.full(K, value))
    np.testing.assert_allclose(state.anchor, -4.0 * 1.0 / 32)  # delta 4 each, loss 1, |delta|^2 = 32
    np.testing.assert_allclose(w, np.tile(state.anchor, (K, 1)), atol=1e-6)


def test_with_no_worker_left_the_anchor_stays_and_the_lost_one_comes_back():
    opt = local_sgd(optax.sgd(1.0), optax.sgd(1.0, momentum=0.5), sync_every=2, overlap=1, drop_nonfinite=True)
    state = opt.init(jnp.zeros(2))
    axes = worker_axes(state)
    one = lambda w, s, g: (lambda u, s: (w + u, s))(*opt.update(g, s, w))  # noqa: E731
    step = jax.jit(map_workers(one, in_axes=(0, axes, 0), out_axes=(0, axes)))
    w, state = spread_workers(jnp.zeros(2), 2), spread_workers(state, 2, axes)
    for t in range(3):
        w, state = step(w, state, jnp.full((2, 2), jnp.nan if t == 1 else 1.0))
    np.testing.assert_array_equal(state.anchor, 0.0)
    np.testing.assert_array_equal(state.outer[0].trace, 0.0)
    assert int(state.round) == 1


def test_an_anchor_saved_with_a_message_on_its_way(tmp_path):
    """What was on its way is in the file: it is taken ``overlap`` steps after the restart, and once."""
    opt = local_sgd(optax.sgd(LR), NESTEROV, sync_every=4, overlap=2)
    _, state = run(opt, steps=5)
    _, later = run(opt, steps=6)
    assert bool(state.waiting)
    assert not bool(later.waiting)
    save_anchor(tmp_path / "anchor.safetensors", state)
    restored, _ = load_anchor(tmp_path / "anchor.safetensors", opt.init(W0))
    step = jax.jit(map_workers(lambda w, s: opt.update(jax.tree.map(jnp.zeros_like, w), s, w), in_axes=(0, worker_axes(
        restored)), out_axes=(0, worker_axes(restored))))  # fmt: skip
    axes, w = worker_axes(restored), spread_workers(restored.anchor, K)
    restored = spread_workers(restored, K, axes)
    for _ in range(3):
        _, restored = step(w, restored)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), restored.anchor, later.anchor)
    assert not bool(restored.waiting)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": -1}, "overlap must be a number of steps"),
        ({"overlap": 1.0}, "overlap must be a number of steps"),
        ({"overlap": 4}, "less than sync_every=4"),
        ({"mixing": 1.0}, "mixing must be within"),
        ({"overlap": 1, "inner_state": "average"}, "with overlap use 'keep'"),
        ({"linked": True}, "it needs overlap"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        local_sgd(optax.sgd(LR), sync_every=4, **options)


def test_what_goes_wrong_on_the_way_is_told_when_it_is_due():
    opt = local_sgd(optax.sgd(LR), sync_every=3, overlap=2, linked=True)
    state = opt.init(jnp.zeros(2))
    with pytest.raises(ValueError, match="this transform is none"):
        Link(local_sgd(optax.sgd(LR), sync_every=3, overlap=2), state)
    link, state = Link(opt, state), spread_workers(state, K, worker_axes(state))

    def broken(program, message):
        raise ConnectionError("the cable is out")

    link.carry = broken
    for _ in range(4):
        link(jnp.zeros((K, 2)), state)
    with pytest.raises(ConnectionError, match="the cable is out"):
        link(jnp.zeros((K, 2)), state)


# ---- real processes ----

PROCESS = """
import sys, threading
from pathlib import Path
import jax, jax.numpy as jnp, optax
from jax.sharding import AxisType
from learned_opt.local_sgd import Link, diloco, map_workers, save_tree, spread_workers, worker_axes

address, index, folder, steps, every, overlap, linked = *sys.argv[1:4], *map(int, sys.argv[4:])
mesh = None
if linked:
    jax.distributed.initialize(address, 2, int(index))
    mesh = jax.make_mesh((2,), ("workers",), axis_types=(AxisType.Auto,))
opt = diloco(optax.adamw(0.05), sync_every=every, overlap=overlap, mixing=0.5, fragments=2, linked=bool(linked))
params = {"w": jnp.linspace(-1, 1, 15).reshape(3, 5), "v": jnp.full(5, 0.3)}

def one(params, state):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), state.step), jax.lax.axis_index("workers"))
    x = jax.random.normal(key, (6, 3))
    loss = lambda p: jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"] - jnp.sin(x.sum(-1))) ** 2)
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = opt.update(grads, state, params, value=value)
    return optax.apply_updates(params, updates), state

state = opt.init(params)
axes = worker_axes(state)
step = jax.jit(map_workers(one, in_axes=(0, axes), out_axes=(0, axes), mesh=mesh), donate_argnums=(0, 1))
params = spread_workers(params, 2, mesh=mesh)
state = spread_workers(state, 2, axes, mesh=mesh)
if linked:
    link, late, went_on = Link(opt, state, mesh=mesh), threading.Event(), 0
    carry = link.carry
    def held(program, message):  # an all-reduce begins only when the steps that it is to hide behind are done
        assert late.wait(60)
        late.clear()
        return carry(program, message)
    link.carry = held
rounds, since = 0, 0
for t in range(steps):
    params, state = jax.block_until_ready(step(params, state))
    if linked:
        if rounds and since + 1 == overlap:  # the results of all steps in between are here
            went_on += 1
            late.set()
        params, state = link(params, state)
        since = link._since
        rounds = link._round
own = jax.tree.map(lambda x: x.addressable_shards[0].data if linked else x, params)
save_tree(Path(folder) / f"end_{index}.safetensors", (own, state.anchor, state.outer, state.round, state.statistics))
if linked:
    print("rounds hidden:", went_on)
"""


def start(folder, index, address, *numbers):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", PROCESS, address, str(index), str(folder), *map(str, numbers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_two_processes_go_on_while_their_message_travels(tmp_path):
    """Every all-reduce is held back until the steps that hide it are done; the numbers are one process's."""
    steps, every, overlap = 14, 4, 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = [start(tmp_path, index, address, steps, every, overlap, 1) for index in (0, 1)]
    running.append(start(tmp_path, "alone", address, steps, every, overlap, 0))
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], "\n".join(outputs)
    assert all("rounds hidden: 3" in text for text in outputs[:2]), outputs

    opt = diloco(optax.adamw(0.05), sync_every=every, overlap=overlap, mixing=0.5, fragments=2)
    params = {"w": jnp.zeros((3, 5)), "v": jnp.zeros(5)}
    state = opt.init(params)
    like = lambda workers: (spread_workers(params, workers), state.anchor, state.outer, state.round, state.statistics)  # noqa: E731
    alone, _ = load_tree(tmp_path / "end_alone.safetensors", like(2))
    assert int(alone[3]) == 3
    for index in (0, 1):
        found, _ = load_tree(tmp_path / f"end_{index}.safetensors", like(1))
        wanted = jax.tree.map(lambda x, index=index: x[index][None], alone[0]), *alone[1:]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, wanted)
