"""The eigenbasis of SOAP against what it should be, and whose turn it is."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import learned_opt
from learned_opt import eigenbasis as eb


def start(shape, dtype=jnp.float32, max_dim=64, max_ratio=8.0):
    return eb.start(jnp.zeros(shape), max_dim=max_dim, max_ratio=max_ratio, dtype=dtype)


def one(sides, turning=(), squares=()):
    """A stack of one matrix."""
    return jax.tree.map(lambda x: x[None], eb.Stack(sides, turning, squares))


def alone(stack):
    return jax.tree.map(lambda x: x[0], stack)


@pytest.mark.parametrize("every", [1, 7])
def test_the_basis_diagonalises_its_statistic_and_keeps_its_signs(every):
    with jax.enable_x64(True):
        scales = jnp.diag(jnp.array([1.0, 4.0, 2.0, 8.0]))

        def step(sides, t):
            g = scales @ jax.random.normal(jax.random.key(t), (4, 3))
            (stack,) = eb.correct(t, [one(eb.observe(sides, g, 0.99))], every=every)
            return alone(stack).sides, alone(stack).sides.left[1]

        sides, bases = jax.lax.scan(step, start((4, 3), jnp.float64), jnp.arange(120))
        statistic, basis = sides.left
        np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-12)
        inside = basis.T @ statistic @ basis
        assert np.abs(inside - np.diag(np.diag(inside))).max() < 0.1 * np.diag(inside).max()
        if every > 1:
            np.testing.assert_array_equal(bases[1], bases[6])
        assert min(jnp.min(jnp.diag(a.T @ b)) for a, b in itertools.pairwise(bases[60:])) > 0.5
        x = jax.random.normal(jax.random.key(0), (4, 3))
        np.testing.assert_allclose(eb.rotate_back(eb.rotate(x, sides), sides), x, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "rotated"),
    [((4, 3), (False, True)), ((3, 25), (True, False)), ((5,), (False, False)), ((1, 3), (False, True))],
)
def test_long_sides_and_vectors_are_not_rotated(shape, rotated):
    sides = start(shape, max_dim=3)
    assert tuple(eb.turns(side) for side in sides) == rotated
    x = jnp.ones(shape)
    np.testing.assert_array_equal(eb.rotate(x, sides), x)  # the identity until a basis is found


def test_a_direction_goes_on_at_its_place_with_what_is_accumulated():
    """The second direction's gradients grow past the first's: both stay where they are. At the first turn: the mean."""
    sides, held = start((2, 2)), jnp.array([[1.0], [3.0]])
    for t, sizes in enumerate(([2.0, 1.0], [1.0, 50.0])):
        sides = eb.observe(sides, jnp.diag(jnp.array(sizes)), 0.5)
        held = held if t == 0 else jnp.array([[1.0], [3.0]])
        (stack,) = eb.correct(jnp.asarray(t), [one(sides, squares=held)], every=1)
        sides, held = alone(stack).sides, alone(stack).squares
        np.testing.assert_array_equal(held[:, 0], [[2.0, 2.0], [1.0, 3.0]][t])
    np.testing.assert_allclose(jnp.abs(sides.left[1]), jnp.eye(2), atol=1e-6)


@pytest.mark.parametrize("max_dim", [3, 4])
def test_what_is_kept_in_the_basis_turns_with_it(max_dim):
    """A mean of rotated gradients is the mean of the gradients, rotated."""
    with jax.enable_x64(True):
        sides = start((4, 3), jnp.float64, max_dim)
        inside, outside = jnp.zeros((2, 4, 3)), jnp.zeros((2, 4, 3))
        correct = jax.jit(lambda t, sides, x: eb.correct(t, [one(sides, x)], every=3)[0])
        for t in range(9):
            g = jax.random.normal(jax.random.key(t), (4, 3))
            outside = 0.5 * outside + jnp.stack([g, 2 * g])
            inside = 0.5 * inside + eb.rotate(jnp.stack([g, 2 * g]), sides)
            stack = alone(correct(jnp.asarray(t), eb.observe(sides, g, 0.9), inside))
            sides, inside = stack.sides, stack.turning
            np.testing.assert_allclose(inside, eb.rotate(outside, sides), atol=1e-12)


def test_each_matrix_has_its_turn_once_in_every_steps():
    count, every = 7, 3
    stack = jax.tree.map(lambda x: jnp.stack([x] * count), eb.Stack(start((4, 5)), (), ()))
    correct = jax.jit(lambda t, stack: eb.correct(t, [stack], every=every)[0])
    changed = np.zeros((2 * every, count), int)
    for t in range(2 * every):
        g = jax.random.normal(jax.random.key(t), (count, 4, 5))
        observed = stack._replace(sides=jax.vmap(eb.observe)(stack.sides, g))
        stack = correct(jnp.asarray(t), observed)
        changed[t] = np.any(np.asarray(stack.sides.left[:, 1] != observed.sides.left[:, 1]), (1, 2))
    np.testing.assert_array_equal(changed[:every].sum(0), np.ones(count))
    np.testing.assert_array_equal(changed[every:], changed[:every])
    assert changed.sum(1).max() == 3  # the work of a step is spread evenly


def test_lanes_of_other_ages_get_what_each_gets_alone_and_share_the_conditional():
    """Under vmap a plain `cond` would decompose at every step."""

    def walk(key, step):
        def one_step(carry, key):
            sides, step, held = carry
            sides = eb.observe(sides, jax.random.normal(key, (5, 7)), 0.9)
            stack = alone(eb.correct(step, [one(sides, squares=held)], every=3)[0])
            return (stack.sides, step + 1, stack.squares), None

        carry = (start((5, 7), max_dim=5), step, jnp.arange(5.0)[:, None])
        return jax.lax.scan(one_step, carry, jax.random.split(key, 12))[0]

    keys, steps = jax.random.split(jax.random.key(0), 6).reshape(2, 3), jnp.array([[0, 0, 1], [2, 4, 0]])
    together = jax.jit(jax.vmap(jax.vmap(walk)))
    found = together(keys, steps)
    for i, j in np.ndindex(2, 3):
        expected = jax.jit(walk)(keys[i, j], steps[i, j])
        jax.tree.map(
            lambda a, b, i=i, j=j: np.testing.assert_allclose(a[i, j], b, rtol=1e-4, atol=1e-4), found, expected
        )
    text = together.lower(keys, steps).compile().as_text()
    assert len(re.findall(r" conditional\(", text)) == 3  # one, and in it that of the first turn and that of the others
    for routine in ("geqrf", "syevd"):
        inside = re.findall(rf"op_name=\"([^\"]*)\"[^\n]*{routine}|{routine}[^\n]*op_name=\"([^\"]*)\"", text)
        assert inside
        assert all("/cond/" in name for names in inside for name in names if name)


def test_decompositions_are_divided_over_the_devices_of_the_mesh():
    """Five matrices in two turns are three a turn, six sides: two on each of four devices, instead of six on each.

    One after another on either, since at stacks jaxlib may wait for ever. In float64, since eigenvectors of close
    eigenvalues hang on the order of sums.
    """
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    tx = learned_opt.soap(0.1, every=2)

    def run(place):
        params = [jax.random.normal(jax.random.key(i), (12, 12)) for i in range(5)]
        gradients = [[jnp.roll(p, n + 1, 0) * jnp.arange(1.0, 13.0)[None] for p in params] for n in range(3)]
        update, state = jax.jit(tx.update), tx.init(place(params))
        compiled = update.lower(place(gradients[0]), state, place(params)).compile()
        for g in gradients:
            updates, state = update(place(g), state, place(params))
        text = compiled.as_text()
        stacks = set(re.findall(r"\(f64\[((?:\d+,)*)12,12\][^=\n]*custom-call[^\n]*lapack_dgeqrf", text))
        return updates, stacks, set(re.findall(r'"known_trip_count":\{"n":"(\d+)"\}', text))

    with jax.enable_x64(True):
        alone, stacks, turns = run(lambda x: x)
        with jax.set_mesh(mesh):
            sharded, stacks_of_four, turns_of_four = run(lambda x: jax.device_put(x, sharding))
    assert stacks == stacks_of_four == {"1,"}
    assert ("6" in turns, "2" in turns) == (True, False)
    assert ("6" in turns_of_four, "2" in turns_of_four) == (False, True)
    for u, v in zip(sharded, alone, strict=True):
        assert u.sharding.spec == sharding.spec
        np.testing.assert_allclose(u, v, atol=1e-9)
