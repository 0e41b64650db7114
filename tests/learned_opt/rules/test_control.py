"""The control layer: its units, its bounds, its schedule, and the direction under it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt.rules import celo2_soap
from learned_opt.rules.control import braked, control, for_length
from learned_opt.rules.relative import schedule

PARAMS = {"w": jnp.linspace(-1.0, 2.0, 12).reshape(4, 3), "b": jnp.array([0.5, -2.0, 0.0])}
GRADIENTS = jax.tree.map(lambda p: jnp.cos(3 * p), PARAMS)
RULE = control()
THETA = RULE.init(jax.random.key(0))


def updates_of(rule, theta, gradients, params=PARAMS, steps=3, num_steps=None):
    tx = rule.build(theta, num_steps=num_steps)
    state, found = tx.init(params), []
    for _ in range(steps):
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        found.append(updates)
    return found


def first_direction(gradient, p):
    direction = celo2_soap.direction()
    return direction.step(THETA["direction"], gradient, p, direction.start(p))[0]


def test_a_fresh_state_can_be_donated():
    """No two of its arrays are one buffer."""
    tx = RULE.build(THETA)
    step = jax.jit(lambda state: tx.update(GRADIENTS, state, PARAMS)[1], donate_argnums=0)
    assert int(step(tx.init(PARAMS)).step) == 1


def test_the_first_update_is_the_direction_s_at_relative_length():
    """The decay pulls where the step does."""
    (updates,) = updates_of(RULE, THETA, GRADIENTS, steps=1)
    rate, p = 0.04 / 20, np.asarray(PARAMS["w"], np.float64)
    floor = 4**-0.5
    size = max(np.sqrt(np.mean(p**2)), floor)
    u = np.asarray(first_direction(GRADIENTS["w"], PARAMS["w"]), np.float64)
    u -= (size / floor - 1) / 7 * max(np.mean(u * p), 0) / size**2 * p
    np.testing.assert_allclose(updates["w"], rate * (size * u - 0.2 * np.where(u * p < 0, p, 0)), rtol=1e-4)
    np.testing.assert_allclose(updates["b"], rate * 0.05 * first_direction(GRADIENTS["b"], PARAMS["b"]), rtol=1e-5)


def test_small_weights_move_by_the_floor():
    params = jax.tree.map(lambda p: 1e-3 * p, PARAMS)
    (updates,) = updates_of(control(decay=0.0), THETA, GRADIENTS, params, steps=1)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(updates["w"] ** 2)), 0.04 / 20 * 0.5, rtol=1e-5)


TABLE = jnp.cos(jnp.arange(48.0)).reshape(16, 3)  # a matrix of its shape has a floor of a quarter


def at_update(number, total, size, gradient):
    """The sizes of one update of a table and of a matrix, which are the same but for their names."""
    params = {"embed": size * TABLE, "w": size * TABLE}
    tx = control(decay=0.0).build(THETA, num_steps=total)
    updates, _ = tx.update(
        dict.fromkeys(params, gradient), tx.init(params)._replace(step=jnp.int32(number - 1)), params
    )
    return updates["embed"], updates["w"]


@pytest.mark.parametrize(("total", "floor"), [(600, 0.25), (1800, 0.75), (9000, 1.0), (None, 0.25)])
def test_embeddings_have_a_higher_floor_in_longer_runs(total, floor):
    """And where the length is not told the floor of other matrices, late too."""
    for total_too in (total, None if total is None else jnp.int32(total)):
        table, matrix = at_update(400, total_too, 1e-3, TABLE)
        np.testing.assert_allclose(jnp.linalg.norm(table) / jnp.linalg.norm(matrix), floor / 0.25, rtol=1e-5)


def test_the_brake_on_embeddings_starts_at_their_own_floor():
    """Both are a half in size: the matrix, of twice its floor, is braked, and the table, of its floor, is not."""
    size = 0.5 / jnp.sqrt(jnp.mean(TABLE**2))
    table, matrix = at_update(400, 1200, size, -TABLE)
    along = [float(jnp.sum(u * TABLE) / jnp.linalg.norm(TABLE)) for u in (table, matrix)]
    assert along[0] > 0
    np.testing.assert_allclose(along[1], along[0] * (1 - 1 / 7), rtol=1e-4)


@pytest.mark.parametrize(("times", "share"), [(0.5, 0.0), (1.0, 0.0), (4.5, 0.5), (8.0, 1.0), (20.0, 1.0)])
def test_the_brake_takes_off_what_lengthens_a_matrix(times, share):
    """Times the floor, which is a half here: by the closed form, and nothing of what shortens it."""
    p = PARAMS["w"] * times * 0.5 / jnp.sqrt(jnp.mean(PARAMS["w"] ** 2))
    outward = p + 0.3 * GRADIENTS["w"]
    along = jnp.sum(outward * p) / jnp.sum(p * p)
    np.testing.assert_allclose(braked(outward, p, 0.5, 8.0), outward - share * along * p, atol=1e-5 * times)
    np.testing.assert_array_equal(braked(-outward, p, 0.5, 8.0), -outward)


def test_weights_do_not_grow_without_bound_where_the_loss_wants_them_to():
    """A gradient that always points inward: unbraked, the matrix doubles every thirty-three steps."""
    tx = RULE.build(THETA, num_steps=4000)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(-params, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = 0.5 * jnp.ones((4, 3))
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, 1000))((start, tx.init(start)))
    assert 4 < float(jnp.sqrt(jnp.mean(params**2)) / 0.5) < 16


def test_the_unit_of_the_loss_does_not_matter():
    drawn = jax.tree.map(lambda x: jax.random.normal(jax.random.key(2), x.shape), THETA["control"])
    theta, times = THETA | {"control": drawn}, jax.tree.map(lambda g: 1024 * g, GRADIENTS)  # a power of 2
    ones, many = updates_of(RULE, theta, GRADIENTS), updates_of(RULE, theta, times)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8), ones, many)


def test_the_unit_of_the_weights_does_not_matter_above_the_floor():
    scale = 8.0
    ones = updates_of(RULE, THETA, GRADIENTS, steps=2)
    eights = updates_of(RULE, THETA, GRADIENTS, PARAMS | {"w": scale * PARAMS["w"]}, steps=2)
    for a, b in zip(ones, eights, strict=True):
        np.testing.assert_allclose(scale * a["w"], b["w"], rtol=1e-5)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_no_network_goes_beyond_four_times(sign):
    """With a network at its bound the first update is four times, or a quarter of, the hand-set one."""
    rule = control(decay=0.0)
    control_theta = THETA["control"] | {"last": jax.tree.map(lambda x: x + sign * 1e6, THETA["control"]["last"])}
    control_theta["last"]["w"] = jnp.zeros_like(control_theta["last"]["w"])
    (fresh,), (bound,) = (updates_of(rule, t, GRADIENTS, steps=1) for t in (THETA, THETA | {"control": control_theta}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(4.0**sign * a, b, rtol=1e-5), fresh, bound)


def test_the_schedule():
    told = np.array([schedule(jnp.int32(t), jnp.int32(100), 0.05, jnp.float32) for t in range(101)])
    np.testing.assert_allclose(told[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose(told[5:], ((100 - np.arange(5, 101)) / 95) ** 1.2, atol=1e-6)
    untold = np.array([schedule(jnp.int32(t), jnp.int32(0), 0.05, jnp.float32) for t in (0, 9, 19, 20, 10_000)])
    np.testing.assert_allclose(untold, [0.05, 0.5, 1.0, 1.0, 1.0], rtol=1e-6)


def test_steps_of_longer_runs_are_shorter():
    """By the cube root of the length: 30 updates of warm-up to 240 are a factor of 8, the step is one of 2."""
    usual, longer = (updates_of(RULE, THETA, GRADIENTS, steps=1, num_steps=n)[0] for n in (600, 4800))
    np.testing.assert_allclose(usual["b"], 0.04 / 30 * 0.05 * first_direction(GRADIENTS["b"], PARAMS["b"]), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 16 * b, rtol=1e-5), usual, longer)


def test_steps_fall_where_the_length_is_not_told():
    """And 0, by which meta-training means the same, is no length."""
    found = [float(for_length(0, t)) for t in (0, 199, 399, 9_999)]
    np.testing.assert_allclose(found, [1.0, 1.0, 0.5, 0.02], rtol=1e-6)
    with jax.numpy_dtype_promotion("strict"):
        none, zero = (updates_of(RULE, THETA, GRADIENTS, num_steps=n) for n in (None, jnp.int32(0)))
    jax.tree.map(np.testing.assert_array_equal, none, zero)


def test_a_length_that_is_told_late_is_the_same():
    """Traced, as in meta-training, and a Python number."""
    told = updates_of(RULE, THETA, GRADIENTS, num_steps=7)
    traced = jax.jit(lambda n: updates_of(RULE, THETA, GRADIENTS, num_steps=n))(jnp.int32(7))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), told, traced)


def test_a_convex_problem_is_solved():
    target = jnp.linspace(-1.0, 1.0, 24).reshape(6, 4)
    tx = control(ratio=0.1).build(THETA, num_steps=500)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params - target, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = jnp.ones((6, 4))
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, 500))((start, tx.init(start)))
    assert float(jnp.max(jnp.abs(params - target))) < 0.01


@pytest.mark.parametrize(
    "arguments",
    [
        {"ratio": 0.0},
        {"decay": -1.0},
        {"warmup": 1.0},
        {"longest": 1.0},
        {"every": 0},
    ],
)
def test_a_mistake_gets_one_line(arguments):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        control(**arguments)
