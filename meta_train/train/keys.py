"""Keys whose draws compile to one kernel each on CPUs, where JAX's compile to ten: the same numbers, bit for bit.

JAX rolls the twenty rounds of its generator into a loop on CPUs. A meta-step makes a dozen draws, and a second goes by
until such loops are compiled.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def _hash(key: jax.Array, high: jax.Array, low: jax.Array) -> list[jax.Array]:
    """Threefry-2x32 with twenty rounds: two 32-bit words for every 64-bit counter ``(high, low)``.

    Args:
        key: uint32 ``[2]``.
        high: uint32 ``[*shape]``.
        low: uint32 ``[*shape]``.

    Returns:
        Two arrays uint32 ``[*shape]``.

    Reference:
        Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
    """
    words = [jnp.broadcast_to(word, low.shape) for word in (key[0], key[1], key[0] ^ key[1] ^ _PARITY)]
    a, b = high + words[0], low + words[1]
    for i in range(5):
        for bits in _ROTATIONS[i % 2]:
            a = a + b
            b = a ^ (b << np.uint32(bits) | b >> np.uint32(32 - bits))
        a = a + words[(i + 1) % 3]
        b = b + (words[(i + 2) % 3] + np.uint32(i + 1))
    return [a, b]


def _once(x: jax.Array, key: jax.Array) -> jax.Array:
    """``x``, computed once: divided by a 1 that XLA does not see as one. It repeats all else in every user of ``x``."""
    one = np.uint32(1) + (key[0] >> np.uint32(16) >> np.uint32(16))
    return x // one.astype(x.dtype)


def _count(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    low = jax.lax.iota(np.uint32, math.prod(shape)).reshape(shape)
    return jnp.zeros_like(low), low


@functools.partial(jax.jit, static_argnums=(1, 2))
def _bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    high, low = _hash(key, *_count(shape))
    if bit_width == 64:
        return _once(high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64), key)
    return _once((high ^ low).astype(f"uint{bit_width}"), key)


@functools.partial(jax.jit, static_argnums=1)
def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _once(jnp.stack(_hash(key, *_count(shape)), axis=-1), key)


@jax.jit
def _fold_in(key: jax.Array, data: jax.Array) -> jax.Array:
    data = jnp.asarray(data).astype(np.uint32)
    return _once(jnp.stack(_hash(key, jnp.zeros_like(data), data)), key)


def _seed(seed: jax.Array) -> jax.Array:
    return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


_IMPLEMENTATION = define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_bits,
    fold_in=_fold_in,
    name="threefry2x32_spelt_out",
    tag="fry1",
)


def fast(key: jax.Array) -> jax.Array:
    """The key whose draws are those of ``key``, sooner compiled.

    Args:
        key: one of JAX's default generator, Threefry, typed or as uint32 ``[2]``; any other is returned as it is.

    Returns:
        A typed key for all functions of :mod:`jax.random`; of fewer than ``2**32`` numbers a draw.

    Example:
        >>> key = jax.random.key(0)
        >>> bool((jax.random.normal(fast(key), 3) == jax.random.normal(key, 3)).all())
        True
    """
    raw = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if raw.shape != (2,):
        return key
    return jax.random.wrap_key_data(raw, impl=_IMPLEMENTATION)
