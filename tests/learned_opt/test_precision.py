"""bfloat16 states and parameters: rounding without bias, averages and parameters that move, every rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rules import SHORT_BY_DEFAULT, small

from learned_opt import precision
from learned_opt.rules import RULES

N = 1 << 14


@settings(deadline=None, max_examples=50)
@given(st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=False), st.integers(0, 2**32 - 1))
def test_rounding_goes_to_a_neighbour_with_the_right_mean(x, key):
    low = float(jnp.float32(x).astype(jnp.bfloat16))
    got = np.asarray(precision.stochastic(jnp.full(N, x, jnp.float32), jnp.uint32(key)), np.float64)
    values = np.unique(got)
    assert len(values) <= 2
    gap = abs(low) * 2.0**-7
    assert np.all(np.abs(values - x) < gap + (x == 0))
    # six standard errors of the mean of N draws from two values
    assert abs(got.mean() - x) <= 6 * gap * 0.5 / np.sqrt(N)


def test_what_is_a_bfloat16_stays_and_infinities_do():
    x = jnp.asarray([0.0, -0.0, 1.0, -1.5, 2.0**-100, jnp.inf, -jnp.inf], jnp.float32)
    np.testing.assert_array_equal(precision.stochastic(x, jnp.uint32(3)).astype(jnp.float32), x)
    assert bool(jnp.isnan(precision.stochastic(jnp.full(3, jnp.nan), jnp.uint32(3))).all())
    full = jax.lax.bitcast_convert_type(jnp.asarray([0x7FFFFFFF, 0xFFFFFFFF], jnp.uint32), jnp.float32)  # GPUs' NaN
    assert bool(jnp.isnan(precision.stochastic(full, jnp.uint32(3))).all())


def test_derivatives_are_those_of_no_rounding():
    x = jnp.linspace(-2, 2, 7)
    slope = jax.grad(lambda x: jnp.sum(x * precision.stochastic(x, jnp.uint32(1)).astype(jnp.float32)))(x)
    np.testing.assert_allclose(slope, 2 * x, atol=0.02)


def test_random_numbers_differ_between_elements_updates_arrays_and_seeds():
    def draws(seed, step):
        keys = precision._keys(seed, jnp.int32(step))
        return [precision.stochastic(jnp.full(N, 1 + 2.0**-8), next(keys)) > 1 for _ in range(2)]

    a, b = draws(0, 0)
    others = [b, *draws(0, 1), *draws(1, 0), jnp.roll(a, 1), jnp.roll(a, 64)]
    for other in others:  # agreement of independent fair coins: 1/2, with a standard error of 1/256
        assert abs(float(jnp.mean(a == other)) - 0.5) < 4 / 256
    assert bool(jnp.all(a == draws(0, 0)[0]))


def test_second_moment_follows_its_mean_where_rounding_to_nearest_stalls():
    def second_moments(tx):
        def step(state, t):
            gradient = jnp.where(t < 2000, 1.0, 0.1) * jax.random.normal(jax.random.key(t), (1024,))
            _, state = tx.update(gradient, state, gradient)
            return state, jnp.mean(jax.tree.leaves(optax.tree_utils.tree_get(state, "nu"))[0].astype(jnp.float32))

        return jax.lax.scan(step, tx.init(jnp.zeros(1024)), jnp.arange(4000))[1]

    @jax.jit
    def run():
        adam = optax.adam(1e-3)
        wrapped = [precision.bfloat16_state(adam, rounding=r) for r in (precision.stochastic, precision.nearest)]
        return [second_moments(tx) for tx in (adam, *wrapped)]

    exact, stochastic, nearest = (np.asarray(x) for x in run())
    assert exact[1999] > 0.8
    assert exact[-1] < 0.2
    np.testing.assert_allclose(stochastic, exact, rtol=0.02, atol=1e-4)
    assert nearest[-1] > 0.8


@pytest.mark.parametrize("name", SHORT_BY_DEFAULT)
def test_every_rule_runs_on_a_bfloat16_state(name):
    rule = small(RULES[name])
    params = {"w": jnp.linspace(-1, 1, 16).reshape(4, 4), "b": jnp.ones(4), "none": None}
    # random matrices: what is next to zero in a rule's coordinates is rounding, which it normalises
    grads = {"w": jax.random.normal(jax.random.key(1), (3, 4, 4)), "b": jnp.cos(jnp.ones((3, 4))), "none": None}

    def updates_of(tx):
        def step(state, grads):
            updates, state = tx.update(grads, state, params, value=jnp.float32(1.0))
            return state, updates

        return jax.lax.scan(step, tx.init(params), grads)

    @jax.jit
    def run(theta):
        tx = rule.build(theta, num_steps=10)
        return updates_of(tx)[1], updates_of(precision.bfloat16_state(tx, min_size=1))

    exact, (state, rounded) = run(rule.init(jax.random.key(0)))
    assert not [x for x in jax.tree.leaves(state) if x.dtype == jnp.float32]
    for key in ("w", "b"):
        scale = float(jnp.max(jnp.abs(exact[key])))
        np.testing.assert_allclose(rounded[key], exact[key], atol=0.1 * scale)


def test_only_large_float32_arrays_are_rounded_and_adam_s_state_takes_half():
    params = {"large": jnp.ones((64, 64)), "small": jnp.ones(64)}
    state = precision.bfloat16_state(optax.adam(1e-3)).init(params)
    nu = state.inner[0].nu
    assert (nu["large"].dtype, nu["small"].dtype) == (jnp.bfloat16, jnp.float32)
    assert state.inner[0].count.dtype == jnp.int32
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == 4 * 64 * 64 + 8 * 64 + 8


def test_parameters_move_by_steps_too_small_for_them():
    params = {"half": jnp.ones((32, 32), jnp.bfloat16), "full": jnp.ones(3), "none": None}

    def moved(rounding):
        tx = optax.chain(optax.sgd(1e-4), precision.bfloat16_params(rounding=rounding))

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (end, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=1000)
        return jax.tree.map(lambda x: x.astype(jnp.float32), end)

    stochastic, nearest = jax.jit(lambda: [moved(r) for r in (precision.stochastic, precision.nearest)])()
    # each of 1000 roundings adds a variance of at most 1e-4 / 256: a standard error of the mean of 6e-4
    assert abs(float(jnp.mean(stochastic["half"])) - 0.9) < 2.5e-3
    np.testing.assert_array_equal(nearest["half"], 1)
    np.testing.assert_allclose(stochastic["full"], 0.9, rtol=1e-4)
    assert stochastic["none"] is None
    with pytest.raises(ValueError, match="bfloat16_params"):
        precision.bfloat16_params().update(params, precision.bfloat16_params().init(params))


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: precision.bfloat16_state(optax.sgd(0.1), seed=seed),
        lambda seed: precision.bfloat16_params(seed=seed),
    ],
)
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused_not_wrapped(make, seed):
    make(2**32 - 1)
    with pytest.raises(ValueError, match="seed must be in"):
        make(seed)
