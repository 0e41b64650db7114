"""What a synchronisation sends, and what that costs: compressed messages, byte counts and the alpha-beta model."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Message = Any  # a pytree of arrays: what one worker sends for one tensor


class Compression(NamedTuple):
    """A lossy code for one real tensor of a worker's delta; complex ones are sent by :func:`both_parts`.

    Attributes:
        encode: ``array [...] -> message``, a pytree of arrays.
        decode: ``(message, like) -> array``; ``like`` carries the tensor's shape and dtype.
        gather: whether every worker receives all the messages (an all-gather, decoded after it), or, where messages
            can be added as they are, only their sum (an all-reduce).
    """

    encode: Callable[[jax.Array], Message]
    decode: Callable[[Message, Any], jax.Array]
    gather: bool = True


def both_parts(code: Compression) -> Compression:
    """Let a code send complex tensors: as the real tensor [2, ...] of their real and imaginary parts.

    The codes of this module do so already, and ``local_sgd`` does it for any code.

    Args:
        code: for real tensors.

    Returns:
        A :class:`Compression` for real and complex tensors.

    Example:
        >>> code = both_parts(int8())
        >>> z = jnp.array([127.0 + 1.0j, -64.0j])
        >>> code.decode(code.encode(z), z)
        Array([127. +1.j,   0.-64.j], dtype=complex64)
    """

    def encode(x: jax.Array) -> Message:
        return code.encode(jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x)

    def decode(message: Message, like: Any) -> jax.Array:
        if not jnp.issubdtype(like.dtype, jnp.complexfloating):
            return code.decode(message, like)
        real = jnp.finfo(like.dtype).dtype
        parts = code.decode(message, jax.ShapeDtypeStruct((2, *like.shape), real))
        return jax.lax.complex(parts[0], parts[1])

    return Compression(encode, decode, code.gather)


def bfloat16() -> Compression:
    """Send bfloat16: 2 bytes an element (4 a complex one), added on the way by an all-reduce.

    Returns:
        A :class:`Compression` with relative error at most 2^-8 an element.
    """
    return both_parts(Compression(lambda x: x.astype(jnp.bfloat16), lambda m, like: m.astype(like.dtype), gather=False))


def int8() -> Compression:
    """Send 8-bit integers and one scale a tensor: q = round(127 x / max|x|), x ≈ q max|x| / 127.

    Returns:
        A :class:`Compression` with error at most max|x| / 254 an element; 1 byte an element (2 a complex one) and 4 a
        tensor.
    """

    def encode(x: jax.Array) -> Message:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale = (jnp.max(jnp.abs(x), initial=0.0) / 127).astype(jnp.float32)
        return jnp.round(x / jnp.where(scale > 0, scale, 1).astype(x.dtype)).astype(jnp.int8), scale

    def decode(message: Message, like: Any) -> jax.Array:
        codes, scale = message
        wide = jnp.promote_types(like.dtype, jnp.float32)
        return (codes.astype(wide) * scale.astype(wide)).astype(like.dtype)

    return both_parts(Compression(encode, decode))


def top_k(fraction: float) -> Compression:
    """Send the largest entries by magnitude, ceil(fraction · n) of a tensor's n, with their places.

    Args:
        fraction: in (0, 1].

    Returns:
        A :class:`Compression`; 8 bytes an entry that is sent (float32 and int32). The parts of a complex entry count as
        two.

    Raises:
        ValueError: if ``fraction`` is outside (0, 1].

    Reference:
        Stich, Cordonnier, Jaggi, "Sparsified SGD with memory", 2018.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"top_k: fraction must be in (0, 1], got {fraction}")

    def encode(x: jax.Array) -> Message:
        flat = x.reshape(-1)
        _, places = jax.lax.top_k(jnp.abs(flat), math.ceil(fraction * flat.size))
        return flat[places].astype(jnp.float32), places.astype(jnp.int32)

    def decode(message: Message, like: Any) -> jax.Array:
        values, places = message
        flat = jnp.zeros(math.prod(like.shape), like.dtype)
        return flat.at[places].set(values.astype(like.dtype)).reshape(like.shape)

    return both_parts(Compression(encode, decode))


def chunked_top_k(k: int = 64, chunk: int = 4096, *, bits: int = 2) -> Compression:
    """Send the k largest entries by magnitude of each chunk of a tensor, each as one of 2^bits levels.

    The levels of a tensor are the means of what falls into each of 2^bits intervals, equal parts of [-max, max] of the
    entries that are sent. Places take log2(chunk) bits and levels ``bits``, packed into bytes, with a bit for each
    chunk and 4 bytes for each level of a tensor: with the defaults 14 bits for one entry in 64, 0.027 bytes an
    element. Entries that are 0 arrive as 0, even where a chunk has fewer than k others.

    Args:
        k: entries of a chunk that are sent; of a tensor smaller than that in proportion, one at least.
        chunk: elements, counted along the flattened tensor.
        bits: 1 to 8.

    Returns:
        A :class:`Compression`. What is sent is off by at most max / 2^(bits - 1), what is not is 0: for error feedback.

    Raises:
        ValueError: if a number is out of range.

    Reference:
        Sarfi, Thérien, Lidin, Belilovsky, "Communication efficient LLM pre-training with SparseLoCo", 2025
        (arXiv:2508.15706).
    """
    if not 1 <= k <= chunk:
        raise ValueError(f"chunked_top_k: k must be within 1 to the chunk's {chunk}, got {k}")
    if not 1 <= bits <= 8:
        raise ValueError(f"chunked_top_k: bits must be within 1 to 8, got {bits}")
    levels = 2**bits

    def layout(size: int) -> tuple[int, int, int, int]:
        length = min(chunk, size)
        return -(-size // length), length, -(-k * length // chunk), max(1, (length - 1).bit_length())

    def encode(x: jax.Array) -> Message:
        if not x.size:
            return (*(jnp.zeros(0, jnp.uint8) for _ in range(3)), jnp.zeros(levels, jnp.float32))
        rows, length, count, width = layout(x.size)
        table = jnp.pad(x.reshape(-1), (0, rows * length - x.size)).reshape(rows, length)
        _, places = jax.lax.top_k(jnp.abs(table), count)
        values = jnp.take_along_axis(table, places, axis=1).astype(jnp.float32)
        largest = jnp.max(jnp.abs(values))
        share = values / jnp.where(largest > 0, largest, 1)  # in [-1, 1]
        codes = jnp.clip(jnp.floor((share + 1) * (levels / 2)), 0, levels - 1).astype(jnp.uint8)
        zero = values == 0  # in place of these the chunk's largest is sent once more, if that is not 0 too
        places, codes = (jnp.where(zero, x[:, :1], x) for x in (places, codes))
        member = (codes[None] == jnp.arange(levels, dtype=jnp.uint8)[:, None, None]) & ~zero[None]
        sums = jnp.sum(jnp.where(member, values[None], 0), axis=(1, 2))
        means = sums / jnp.maximum(jnp.sum(member, axis=(1, 2)), 1)
        return _pack(places, width), _pack(codes, bits), _pack(~zero[:, 0], 1), means

    def decode(message: Message, like: Any) -> jax.Array:
        size = math.prod(like.shape)
        if not size:
            return jnp.zeros(like.shape, like.dtype)
        rows, length, count, width = layout(size)
        places = _unpack(message[0], rows * count, width).reshape(rows, count)
        codes = _unpack(message[1], rows * count, bits).reshape(rows, count)
        filled = _unpack(message[2], rows, 1)[:, None]
        values = message[3][codes].astype(like.dtype) * filled.astype(like.dtype)
        table = jnp.zeros((rows, length), like.dtype).at[jnp.arange(rows)[:, None], places].set(values)
        return table.reshape(-1)[:size].reshape(like.shape)

    return both_parts(Compression(encode, decode))


def _pack(numbers: jax.Array, width: int) -> jax.Array:
    """Non-negative integers below 2^width as uint8, ``width`` bits each, one after the other."""
    bits = (numbers.astype(jnp.int32).reshape(-1, 1) >> jnp.arange(width)[None]) & 1
    return jnp.packbits(bits.astype(jnp.uint8).reshape(-1))


def _unpack(packed: jax.Array, count: int, width: int) -> jax.Array:
    bits = jnp.unpackbits(packed, count=count * width).reshape(count, width).astype(jnp.int32)
    return jnp.sum(bits << jnp.arange(width)[None], axis=1)


def resolve(compression: str | Compression | None) -> Compression | None:
    """Return the :class:`Compression` that a name stands for: ``"bf16"``, ``"int8"``, or one made by the user.

    Raises:
        ValueError: if the name is unknown.
    """
    if compression is None or isinstance(compression, Compression):
        return compression
    if compression == "bf16":
        return bfloat16()
    if compression == "int8":
        return int8()
    raise ValueError(
        f"compression must be None, 'bf16', 'int8' or a Compression such as top_k(0.01), got {compression!r}"
    )


def payload_bytes(tree: Any) -> int:
    """Return the bytes of a pytree of arrays (or of their shapes): the size of the message that they make."""
    return sum(math.prod(jnp.shape(leaf)) * jnp.result_type(leaf).itemsize for leaf in jax.tree.leaves(tree))


def zero_bytes() -> jax.Array:
    """Return an empty byte counter: uint32 [2], the high and low halves of a 64-bit count (JAX has none by default)."""
    return jnp.zeros(2, jnp.uint32)


def add_bytes(counter: jax.Array, amount: int) -> jax.Array:
    """Return the counter (uint32 [2]) with a Python int added, carry included."""
    low = counter[1] + jnp.uint32(amount % 2**32)
    return jnp.stack([counter[0] + jnp.uint32(amount // 2**32) + (low < counter[1]).astype(jnp.uint32), low])


def total_bytes(counter: jax.Array) -> int:
    """Return the counter (uint32 [2]) as a Python int."""
    high, low = (int(part) for part in np.asarray(counter).reshape(-1, 2)[0])
    return high * 2**32 + low


class WallClock(NamedTuple):
    """Simulated seconds of a run: floats ``compute``, ``communication`` and ``total``."""

    compute: float
    communication: float
    total: float


def collective_seconds(
    message_bytes: float, *, workers: int, latency: float, bandwidth: float, collective: str = "all-reduce"
) -> float:
    """Return the seconds of one collective on a ring of workers, by the alpha-beta model.

    all-reduce: 2 (P-1) alpha + 2 (P-1)/P · n/beta;    all-gather: (P-1) alpha + (P-1) n/beta,

    for P workers, messages of n bytes, latency alpha and bandwidth beta.

    Args:
        message_bytes: n, the bytes that one worker contributes.
        workers: P >= 1.
        latency: alpha, seconds a message.
        bandwidth: beta, bytes a second of one link.
        collective: ``"all-reduce"`` or ``"all-gather"`` (what the int8 and top-k messages use).

    Returns:
        Seconds.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> collective_seconds(1e9, workers=2, latency=0.0, bandwidth=1e9)
        1.0

    Reference:
        Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH", 2005.
    """
    if workers < 1 or latency < 0 or bandwidth <= 0 or message_bytes < 0:
        raise ValueError(
            "collective_seconds: need workers >= 1, latency >= 0, bandwidth > 0 and message_bytes >= 0, got "
            f"{workers}, {latency}, {bandwidth}, {message_bytes}"
        )
    hops = workers - 1
    if collective == "all-reduce":
        return 2 * hops * latency + 2 * hops / workers * message_bytes / bandwidth
    if collective == "all-gather":
        return hops * latency + hops * message_bytes / bandwidth
    raise ValueError(f"collective must be 'all-reduce' or 'all-gather', got {collective!r}")


def wall_clock(
    *,
    steps: int,
    rounds: int,
    sent_bytes: float,
    workers: int,
    seconds_per_step: float,
    latency: float,
    bandwidth: float,
    collective: str = "all-reduce",
    collectives: int = 1,
    overlap: int = 0,
) -> WallClock:
    """Return the simulated seconds of a run that synchronised ``rounds`` times.

    total = steps · seconds_per_step + Σ_rounds max(0, c T(bytes / (c rounds)) - overlap · seconds_per_step),

    T as in :func:`collective_seconds`; workers are taken to be equally fast, and steps to be no slower while a message
    is on its way.

    Args:
        steps: local steps a worker took.
        rounds: synchronisations.
        sent_bytes: bytes that one worker contributed over all the rounds.
        workers: P.
        seconds_per_step: of one local step.
        latency: seconds a message.
        bandwidth: bytes a second.
        collective: as in :func:`collective_seconds`.
        collectives: c, how many of them a round makes, each with its latency: 1 where the backend packs all tensors
            into one; gloo sends them one by one, which makes one a tensor and one for the statistics.
        overlap: tau, steps from a round's message to its use, which hide so much of it.

    Returns:
        A :class:`WallClock`; ``communication`` is what is not hidden.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> network = {"workers": 2, "latency": 0.0, "bandwidth": 1e9}
        >>> wall_clock(steps=100, rounds=10, sent_bytes=1e9, seconds_per_step=0.01, **network)
        WallClock(compute=1.0, communication=1.0, total=2.0)
        >>> wall_clock(steps=100, rounds=10, sent_bytes=1e9, seconds_per_step=0.01, overlap=8, **network).total
        1.2
    """
    if collectives < 1 or overlap < 0:
        raise ValueError(
            f"wall_clock: collectives must be at least 1 and overlap at least 0, got {collectives} and {overlap}"
        )
    count = rounds * collectives
    each = collective_seconds(
        sent_bytes / max(count, 1), workers=workers, latency=latency, bandwidth=bandwidth, collective=collective
    )
    bare = max(collectives * each - overlap * seconds_per_step, 0.0)
    compute, communication = steps * seconds_per_step, rounds * bare
    return WallClock(compute, communication, compute + communication)


def format_wall_clock(
    state: Any,
    *,
    workers: int,
    seconds_per_step: float,
    latency: float,
    bandwidth: float,
    collective: str = "all-reduce",
    collectives: int = 1,
    overlap: int = 0,
) -> str:
    """Return a few lines to print: what a run has sent, and its simulated wall-clock on a given network.

    Args:
        state: a :class:`~learned_opt.local_sgd.LocalSGDState` (counters read to the host).
        workers: P.
        seconds_per_step: of one local step.
        latency: seconds a message.
        bandwidth: bytes a second.
        collective: as in :func:`collective_seconds`.
        collectives: of a round, as in :func:`wall_clock`.
        overlap: as in :func:`wall_clock`; of no use to synchronising every step, with which the last line compares.

    Returns:
        Text; the last line compares with synchronising after every step.
    """
    steps, rounds, sent = int(state.step), int(state.round), total_bytes(state.bytes)
    network = {"workers": workers, "seconds_per_step": seconds_per_step, "latency": latency, "bandwidth": bandwidth}
    network |= {"collectives": collectives}
    hidden: dict[str, Any] = {**network, "overlap": overlap}
    run = wall_clock(steps=steps, rounds=rounds, sent_bytes=sent, collective=collective, **hidden)
    each = sent / max(rounds, 1)
    every = wall_clock(steps=steps, rounds=steps, sent_bytes=each * steps, collective=collective, **network)  # type: ignore[arg-type]
    return (
        f"{steps} steps, {rounds} rounds, {sent:,} bytes a worker ({each:,.0f} a round), "
        f"{int(state.since_sync)} steps since the last\n"
        f"compute {run.compute:.3g} s + communication {run.communication:.3g} s = {run.total:.3g} s "
        f"({workers} workers, latency {latency:.3g} s, {bandwidth:.3g} bytes/s, {collective})\n"
        f"synchronising every step: {every.total:.3g} s ({every.total / max(run.total, 1e-30):.2f} times)"
    )
