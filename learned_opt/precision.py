r"""Half the memory: bfloat16 optimizer states and parameters, for any Optax transform.

A bfloat16 has 8 significant bits: neighbours differ by up to one part in 128. Rounded to the nearest, a moving average
with decay .999 stalls: what one update adds to it or takes from it is too small to reach the next value, so that a
second moment never falls again, and a parameter does not move by steps below 1/512 of itself. Rounded up or down at
random, with the chances that make the mean right, both move as they should, and what is left is noise.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Rounding = Callable[[jax.Array, jax.Array], jax.Array]


def nearest(x: jax.Array, key: jax.Array) -> jax.Array:
    """``x`` to the nearest bfloat16; ``key`` is not used."""
    del key
    return x.astype(jnp.bfloat16)


@jax.custom_jvp
def stochastic(x: jax.Array, key: jax.Array) -> jax.Array:
    """``x`` to one of the two bfloat16 around it, at random with mean ``x``; bfloat16 values stay as they are.

    Derivatives are those of no rounding.

    Args:
        x: float32, any shape.
        key: uint32 scalar; the same key and index give the same random number.

    Returns:
        bfloat16, the shape of ``x``.
    """
    # A hash of the index in place of jax.random: threefry costs five Adam updates, this a fifth of one.
    index = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
    noise = _hash(index + _hash(key)) >> 16
    # float32 bits are ordered as their sizes are: adding to the 16 bits that go carries over with their share
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isnan(x), jnp.bfloat16(jnp.nan), rounded)  # a NaN of many set bits would carry over to 0


@stochastic.defjvp
def _stochastic_jvp(primals, tangents):
    return stochastic(*primals), tangents[0].astype(jnp.bfloat16)


class Bfloat16State(NamedTuple):
    """State of :func:`bfloat16_state`.

    Attributes:
        step: int32 scalar, updates done.
        inner: the state of the transform inside, its large float32 arrays as bfloat16.
    """

    step: jax.Array
    inner: Any


def bfloat16_state(
    tx: optax.GradientTransformation, *, rounding: Rounding = stochastic, min_size: int = 1024, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Keep an optimizer's state in bfloat16 between updates; what it computes stays float32.

    Args:
        tx: any Optax transform, or a whole chain.
        rounding: ``(x, key) -> bfloat16``: :func:`stochastic` or :func:`nearest`, which stalls (see above).
        min_size: float32 arrays of fewer elements are left alone: they cost nothing, and hold counts and statistics.
        seed: of the rounding, in ``[0, 2^32)``. The same on all devices that hold copies of the state.

    Returns:
        An Optax transform with ``tx``'s updates, up to the rounding of its state.

    Raises:
        ValueError: if ``seed`` is out of range.

    Example:
        >>> tx = bfloat16_state(optax.adam(1e-3))
        >>> params = jnp.ones((64, 64))
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> state.inner[0].nu.dtype
        dtype(bfloat16)
    """
    tx, seed = optax.with_extra_args_support(tx), _checked(seed)

    def is_large(x):
        return x.dtype == jnp.float32 and x.size >= min_size

    def init_fn(params):
        inner = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if is_large(x) else x, tx.init(params))
        return Bfloat16State(jnp.zeros((), jnp.int32), inner)

    def update_fn(updates, state, params=None, **extra_args):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state.inner)
        updates, wide = tx.update(updates, wide, params, **extra_args)
        keys = _keys(seed, state.step)

        def narrow(new, old):
            return rounding(new.astype(jnp.float32), next(keys)) if old.dtype == jnp.bfloat16 else new

        inner = jax.tree.map(narrow, wide, state.inner)
        return updates, Bfloat16State(optax.safe_increment(state.step), inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class RoundedUpdatesState(NamedTuple):
    """State of :func:`bfloat16_params`.

    Attributes:
        step: int32 scalar, updates done.
    """

    step: jax.Array


def bfloat16_params(*, rounding: Rounding = stochastic, seed: int = 0) -> optax.GradientTransformation:
    """Let bfloat16 parameters move by steps too small for them; to be chained last.

    Changes the updates of bfloat16 parameters such that ``optax.apply_updates`` arrives at ``rounding(p + u)``, where
    it would else round to the nearest. Other parameters' updates pass through. ``update`` needs ``params``. The changed
    updates are float32: ``equinox.apply_updates`` would make the parameters float32 too, and a wrapper that skips
    updates, as ``optax.apply_if_finite``, belongs inside, around what comes before.

    Args:
        rounding: as for :func:`bfloat16_state`, as the next one.
        seed: see there.

    Returns:
        An Optax transform.

    Raises:
        ValueError: if ``seed`` is out of range.

    Example:
        >>> tx = optax.chain(optax.sgd(1e-3), bfloat16_params())
        >>> params = jnp.ones((64, 64), jnp.bfloat16)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> moved = optax.apply_updates(params, updates)
        >>> bool(0 < jnp.sum(moved < 1) < 64 * 64)
        True
    """
    seed = _checked(seed)

    def init_fn(params):
        del params
        return RoundedUpdatesState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("bfloat16_params reads the parameters: call update(gradients, state, params)")
        keys = _keys(seed, state.step)

        def land(update, param):
            if update is None or param.dtype != jnp.bfloat16:
                return update
            wide = param.astype(jnp.float32)
            landed = rounding(wide + update.astype(jnp.float32), next(keys))
            # a float32 difference: as a bfloat16 it would be rounded in its turn
            return landed.astype(jnp.float32) - wide

        updates = jax.tree.map(land, updates, params, is_leaf=lambda x: x is None)
        return updates, RoundedUpdatesState(optax.safe_increment(state.step))

    return optax.GradientTransformation(init_fn, update_fn)


def _checked(seed: int) -> int:
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}")
    return seed


def _keys(seed: int, step: jax.Array) -> Iterator[jax.Array]:
    """A key for each array of an update."""
    key = _hash(step.astype(jnp.uint32) ^ jnp.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF))
    return (key + jnp.uint32(i) for i in itertools.count())


def _hash(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: every bit of ``x`` (uint32) changes half of the bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
