"""Codes for deltas against their bounds, byte counts against 64-bit integers, the alpha-beta model by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learned_opt import communication

X = np.random.default_rng(0).normal(size=(6, 11)).astype(np.float32)


def sent_and_received(code, x):
    """Compiled as one: op by op each of the many small operations would be a program of its own."""

    @jax.jit
    def both(x):
        message = code.encode(x)
        return message, code.decode(message, jax.ShapeDtypeStruct(x.shape, x.dtype))

    message, y = both(jnp.asarray(x))
    return message, np.asarray(y)


def test_bfloat16():
    message, y = sent_and_received(communication.bfloat16(), X)
    assert communication.payload_bytes(message) == 2 * X.size
    assert np.max(np.abs(y - X) / np.abs(X)) <= 2**-8


def test_int8():
    message, y = sent_and_received(communication.int8(), X)
    assert communication.payload_bytes(message) == X.size + 4
    assert np.max(np.abs(y - X)) <= np.abs(X).max() / 254 * (1 + 1e-5)
    assert message[0].dtype == jnp.int8
    for edge in (
        np.zeros((2, 3), np.float32),
        np.zeros((0, 3), np.float32),
        np.float32(2.5),
        np.full(3, -1e30, np.float32),
    ):
        np.testing.assert_allclose(sent_and_received(communication.int8(), edge)[1], edge, rtol=1e-6)
    half = (1e-5 * X).astype(np.float16)  # a scale of 2e-7 would be none in float16
    error = np.abs(sent_and_received(communication.int8(), half)[1].astype(float) - half.astype(float))
    assert error.max() <= np.abs(half).max() / 254 + 2.0**-25  # and half of float16's least step


def test_top_k():
    message, y = sent_and_received(communication.top_k(0.1), X)
    assert communication.payload_bytes(message) == 8 * 7  # ceil(6.6) entries
    order = np.argsort(-np.abs(X).ravel())
    expected = np.zeros(X.size, np.float32)
    expected[order[:7]] = X.ravel()[order[:7]]
    np.testing.assert_array_equal(y.ravel(), expected)
    np.testing.assert_array_equal(sent_and_received(communication.top_k(1.0), X)[1], X)
    np.testing.assert_array_equal(sent_and_received(communication.top_k(0.01), np.float32(3.0))[1], 3.0)
    for bad in (0.0, 1.5, -0.1):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            communication.top_k(bad)


def chunked_top_k_reference(x, k, chunk, bits):
    """In NumPy: the largest of each chunk, as the means of equal intervals."""
    flat, sent = x.ravel().astype(np.float64), np.zeros(x.size)
    length = min(chunk, x.size)
    places = []
    for start in range(0, x.size, length):
        part = np.abs(flat[start : start + length])
        places += list(start + np.argsort(-part, kind="stable")[: min(-(-k * length // chunk), len(part))])
    places = [place for place in places if flat[place]]
    edges = np.linspace(-1, 1, 2**bits + 1) * np.abs(flat[places]).max()
    interval = np.clip(np.searchsorted(edges, flat[places], side="right") - 1, 0, 2**bits - 1)
    for level in np.unique(interval):
        chosen = np.asarray(places)[interval == level]
        sent[chosen] = flat[chosen].mean()
    return sent.reshape(x.shape)


@pytest.mark.parametrize(("k", "chunk", "bits"), [(4, 16, 2), (3, 100, 2), (2, 8, 1), (5, 16, 8), (16, 16, 4)])
def test_chunked_top_k(k, chunk, bits):
    code = communication.chunked_top_k(k, chunk, bits=bits)
    _, y = sent_and_received(code, X)
    np.testing.assert_allclose(y, chunked_top_k_reference(X, k, chunk, bits), rtol=1e-5, atol=1e-6)
    largest = np.abs(X).max()
    assert np.max(np.abs(y - X)[y != 0]) <= largest / 2 ** (bits - 1) * (1 + 1e-5)
    for edge in (np.zeros((2, 3), np.float32), np.zeros((0, 3), np.float32), np.float32(2.5)):
        np.testing.assert_allclose(sent_and_received(code, edge)[1], edge, rtol=1e-6)
    rows = X * (np.arange(6) % 3 == 0)[:, None]  # an embedding of which few rows are in use
    received = sent_and_received(code, rows)[1]
    assert not received[rows == 0].any()
    np.testing.assert_allclose(received, chunked_top_k_reference(rows, k, chunk, bits), rtol=1e-5, atol=1e-6)


def test_chunked_top_k_packs_its_bits():
    big = jnp.asarray(np.random.default_rng(1).normal(size=(128, 128)), jnp.float32)
    message = communication.chunked_top_k().encode(big)
    assert communication.payload_bytes(message) == 4 * (64 * 12 + 64 * 2) / 8 + 1 + 4 * 4  # 4 chunks of 4096
    for bad in ({"k": 0}, {"k": 5, "chunk": 4}, {"bits": 0}, {"bits": 9}):
        with pytest.raises(ValueError, match="chunked_top_k"):
            communication.chunked_top_k(**bad)


@pytest.mark.parametrize(("width", "count"), [(1, 9), (2, 5), (5, 16), (12, 3), (12, 0)])
def test_packed_numbers_come_back(width, count):
    numbers = np.random.default_rng(0).integers(0, 2**width, count)
    packed = communication._pack(jnp.asarray(numbers), width)
    assert packed.size == -(-count * width // 8)
    np.testing.assert_array_equal(communication._unpack(packed, count, width), numbers)


def test_names():
    assert communication.resolve(None) is None
    assert communication.resolve("int8").gather
    assert not communication.resolve("bf16").gather
    own = communication.top_k(0.5)
    assert communication.resolve(own) is own
    with pytest.raises(ValueError, match="got 'zip'"):
        communication.resolve("zip")


def test_payload():
    tree = {
        "a": jnp.zeros((3, 4)),
        "b": jnp.zeros(5, jnp.bfloat16),
        "c": jax.ShapeDtypeStruct((2,), jnp.int8),
        "d": None,
    }
    assert communication.payload_bytes(tree) == 48 + 10 + 2


@given(st.lists(st.integers(0, 2**40), max_size=6))
@settings(max_examples=30, deadline=None)
def test_the_counter_carries(amounts):
    counter = communication.zero_bytes()
    for amount in [*amounts, 2**32 - 1]:
        counter = communication.add_bytes(counter, amount)
    assert communication.total_bytes(counter) == sum(amounts) + 2**32 - 1


def test_alpha_beta_model():
    link = {"latency": 1e-3, "bandwidth": 1e6}
    assert communication.collective_seconds(5e6, workers=1, **link) == 0.0
    assert communication.collective_seconds(4e6, workers=4, **link) == pytest.approx(6e-3 + 1.5 * 4)
    assert communication.collective_seconds(4e6, workers=4, collective="all-gather", **link) == pytest.approx(3e-3 + 12)
    run = communication.wall_clock(steps=100, rounds=5, sent_bytes=20e6, workers=4, seconds_per_step=0.01, **link)
    assert run == pytest.approx((1.0, 5 * 6.006, 1.0 + 5 * 6.006))
    apart = communication.wall_clock(
        steps=100, rounds=5, sent_bytes=20e6, workers=4, seconds_per_step=0.01, collectives=3, **link
    )
    assert apart.communication == pytest.approx(5 * (3 * 6e-3 + 6))  # the latency thrice, the bytes once
    with pytest.raises(ValueError, match="collectives must be at least 1"):
        communication.wall_clock(
            steps=1, rounds=1, sent_bytes=1, workers=2, seconds_per_step=0.0, collectives=0, **link
        )
    alone = {"steps": 100, "rounds": 5, "sent_bytes": 20e6, "workers": 4, "seconds_per_step": 0.01, **link}
    each = run.communication / 5
    for overlap in (0, 1, 7):  # what the steps do not hide is left, a round at a time
        bare = communication.wall_clock(overlap=overlap, **alone)
        np.testing.assert_allclose(bare.communication, 5 * max(each - 0.01 * overlap, 0), rtol=1e-9)
        assert bare.total == bare.compute + bare.communication
    assert communication.wall_clock(overlap=10**6, **alone).total == run.compute
    with pytest.raises(ValueError, match="overlap at least 0"):
        communication.wall_clock(overlap=-1, **alone)
    none = communication.wall_clock(steps=3, rounds=0, sent_bytes=0, workers=4, seconds_per_step=2.0, **link)
    assert none == (6.0, 0.0, 6.0)
    for bad in ({"workers": 0}, {"workers": 2, "collective": "gossip"}):
        with pytest.raises(ValueError, match=r"workers >= 1|must be 'all-reduce'"):
            communication.collective_seconds(1.0, **({"latency": 0.0, "bandwidth": 1.0} | bad))


def test_report_of_a_state():
    counter = communication.add_bytes(communication.zero_bytes(), 5 * 4_000_000)
    state = types.SimpleNamespace(step=jnp.int32(102), round=jnp.int32(5), since_sync=jnp.int32(2), bytes=counter)
    text = communication.format_wall_clock(state, workers=4, seconds_per_step=0.01, latency=0.0, bandwidth=1e6)
    assert (
        text.splitlines()[0]
        == "102 steps, 5 rounds, 20,000,000 bytes a worker (4,000,000 a round), 2 steps since the last"
    )
    assert "compute 1.02 s + communication 30 s = 31 s" in text
    assert "synchronising every step: 613 s" in text
    network = {"workers": 4, "seconds_per_step": 0.01, "latency": 1.0, "bandwidth": 1e6}
    assert "communication 180 s" in communication.format_wall_clock(state, collectives=5, **network)
