"""What every registered rule promises, whatever it is: one suite over RULES, so that registering a rule tests it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P
from support.rules import SHORT_BY_DEFAULT, small

from learned_opt.layouts import outputs_first, stacked
from learned_opt.rules import RULES

# The same few shapes in all tests: what one has compiled the others need not.
PARAMS = {
    "scalar": jnp.array(0.5, jnp.float32),
    "vector": jnp.linspace(-1, 1, 5),
    "matrix": jnp.linspace(-1, 2, 12).reshape(4, 3),
    "kernel": jnp.linspace(-1, 2, 24).reshape(2, 3, 4, 1),
    "nothing": None,
}


def gradients(params, t=0.0):
    return jax.tree.map(lambda p: jnp.cos(3 * p + t).astype(p.dtype), params)


@pytest.fixture(scope="module", params=sorted(RULES))
def rule(request):
    """A rule at fresh meta-parameters, its update compiled at most once a structure."""
    made = small(RULES[request.param])
    theta = made.init(jax.random.key(0))
    return made, theta, made.build(theta, num_steps=10)


# of learned_opt/tensors.py
of_the_scaffold = pytest.mark.parametrize("rule", SHORT_BY_DEFAULT, indirect=True, scope="module")

# Every rule has its own meta-gradient; through these four it takes seven to eleven seconds.
META_GRADIENTS = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in ("celo", "outer", "rnn_mlp", "scheduler")))
    for name in sorted(RULES)
]


def extra(rule):
    return {"value": jnp.array(1.5, jnp.float32)} if "value" in rule[0].needs else {}


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.all(np.isfinite(np.asarray(leaf, np.float32)))


def assert_same_types(new, old):
    assert jax.tree.structure(new) == jax.tree.structure(old)
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), new, old)


def test_one_trace_and_stable_types(rule):
    tx, kwargs, traces = rule[2], extra(rule), []

    @jax.jit
    def update(g, state, params):
        traces.append(1)
        return tx.update(g, state, params, **kwargs, unknown_argument=jnp.ones(3))

    params, state = PARAMS, tx.init(PARAMS)
    for t in range(3):
        updates, new_state = update(gradients(params, t), state, params)
        assert_same_types(updates, params)
        assert_same_types(new_state, state)
        params, state = optax.apply_updates(params, updates), new_state
    assert len(traces) == 1
    assert_finite(updates)


@of_the_scaffold
def test_a_scan_computes_what_a_loop_does(rule):
    tx, kwargs = rule[2], extra(rule)
    params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    for t in range(3):
        updates, state = update(gradients(params, t), state, params, **kwargs)
        params = optax.apply_updates(params, updates)

    def step(carry, t):
        params, state = carry
        updates, state = tx.update(gradients(params, t), state, params, **kwargs)
        return (optax.apply_updates(params, updates), state), None

    (scanned, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(3.0)))((PARAMS, tx.init(PARAMS)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), scanned, params)


def test_zero_huge_and_non_finite_gradients_give_finite_updates(rule):
    tx = rule[2]
    params = {k: PARAMS[k] for k in ("vector", "matrix")}
    update = jax.jit(lambda g, state: tx.update(g, state, params, **extra(rule)))
    first = None
    for bad in (0.0, 1e30, -1e30, jnp.inf, jnp.nan):
        updates, state = update(jax.tree.map(lambda p, bad=bad: jnp.full_like(p, bad), params), tx.init(params))
        assert_finite((updates, state))
        if not np.isfinite(bad):  # counts as 0
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updates, first)
        first = updates if first is None else first
    updates, _ = update(gradients(params), state)
    assert_finite(updates)


def test_what_has_no_gradient_stays_where_it_is(rule):
    """A tensor, rows, a column and single entries without a gradient: at rest for ever, to the last bit.

    A row that had gradients and has none any more comes to rest, and what is not finite is no gradient.
    """
    theta, tx = rule[1], rule[0].build(rule[1], num_steps=1000)
    used = np.ones((6, 4), np.float32)
    used[3:5], used[:, 2], used[0, 0] = 0, 0, 0
    params = {"frozen": jnp.full((3, 2), 0.5), "table": jnp.full((6, 4), 0.5), "vector": jnp.full(5, 0.5)}

    def step(carry, t):
        params, state = carry
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (6, 4)) * used
        late = jnp.where(jnp.arange(6)[:, None] == 5, t < 5, True)
        grads = {"frozen": jnp.zeros((3, 2)), "table": noise * late, "vector": jnp.full(5, jnp.nan)}
        updates, state = tx.update(grads, state, params, **extra(rule))
        return (optax.apply_updates(params, updates), state), updates

    (end, _), updates = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(200)))((params, tx.init(params)))
    decay = "log_weight_decay" in theta  # nadamw's, which moves everything
    for name, rest in (("frozen", np.ones((3, 2))), ("vector", np.ones(5)), ("table", 1 - used)):
        moved = np.abs(np.asarray(end[name]) - 0.5)[rest > 0]
        assert np.all(moved < 1e-4) if decay else np.all(moved == 0), name
    table = np.abs(updates["table"])
    assert table[:5, 5, 1].max() > 0  # while it had gradients
    assert table[-1, 5, [1, 3]].max() < 1e-6 + 1e-4 * table[:5, 5, [1, 3]].max()
    assert table[-1, 1, [1, 3]].min() > 0


@of_the_scaffold
def test_parameters_of_any_kind_and_what_holds_no_parameters(rule):
    """Functions of an unfiltered model, NumPy arrays and numbers; shapes alone at the start; no implicit promotion."""
    tx, kwargs = rule[2], extra(rule)
    params = {"w": np.full((4, 3), 0.5, np.float32), "x": 0.5, "apply": jnp.tanh}
    grads = {"w": np.ones((4, 3), np.float32), "x": 1.0, "apply": None}
    start = tx.init({**params, "apply": None})
    with jax.numpy_dtype_promotion("strict"):
        updates, state = tx.update(grads, start, params, **kwargs)
        half = {"w": jnp.ones((4, 3), jnp.bfloat16)}
        assert tx.update(half, tx.init(half), half, **kwargs)[0]["w"].dtype == jnp.bfloat16
    assert updates["apply"] is None
    assert updates["w"].shape == (4, 3)
    assert updates["x"].dtype == jnp.float32
    with pytest.raises(ValueError, match=r"\['k'\] is key"):
        tx.init({"k": jax.random.key(0)})
    assert_same_types(state, start)
    shapes = {"w": jax.ShapeDtypeStruct((4, 3), jnp.float32), "x": jax.ShapeDtypeStruct((), jnp.float32), "apply": None}
    assert_same_types(tx.init(shapes), jax.tree.map(jnp.asarray, start))


def test_states_mirror_the_parameters_for_optax_s_tools(rule):
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    state = rule[2].init(params)
    names = {"w": "the matrix", "b": "the vector"}
    named = optax.tree_utils.tree_map_params(
        rule[2], lambda _, name: name, state, names, transform_non_params=lambda _: "neither"
    )
    found = jax.tree_util.tree_flatten_with_path(named)[0]
    for path, name in found:
        last = jax.tree_util.keystr(path[-1:])
        assert name == {"['w']": "the matrix", "['b']": "the vector"}.get(last, "neither")
    assert jax.tree.structure(named) == jax.tree.structure(state)


@of_the_scaffold
def test_half_precision_params_and_vmap(rule):
    tx = rule[2]
    params = {k: PARAMS[k].astype(jnp.bfloat16) for k in ("vector", "matrix")}
    updates, state = jax.jit(tx.update)(gradients(params), tx.init(params), params, **extra(rule))
    assert_same_types(updates, params)
    assert_same_types(state, tx.init(params))
    assert_finite(updates)

    matrix = PARAMS["matrix"]
    stacked = jnp.stack([matrix, 2 * matrix])

    def run(p):
        return tx.update(gradients(p), tx.init(p), p, **extra(rule))[0]

    together = jax.jit(jax.vmap(run))(stacked)
    np.testing.assert_allclose(together[0], jax.jit(run)(matrix), rtol=1e-4, atol=1e-5)


@of_the_scaffold
def test_empty_trees_none_and_masked_nodes_pass_through(rule):
    tx, kwargs = rule[2], extra(rule)
    for empty in ({}, (), {"a": None}):
        updates, state = tx.update(empty, tx.init(empty), empty, **kwargs)
        assert updates == empty
    some = {"a": jnp.ones(5), "b": jnp.zeros((0, 4))}
    updates, _ = tx.update(some, tx.init(some), some, **kwargs)
    assert updates["b"].shape == (0, 4)
    masked = optax.masked(tx, {"a": True, "b": False})
    updates, _ = masked.update(some, masked.init(some), some, **kwargs)
    np.testing.assert_array_equal(updates["b"], some["b"])
    del state


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_params_that_are_not_real_floats_are_refused(rule, dtype):
    with pytest.raises(ValueError, match=r"\['x'\] is .*optax.multi_transform"):
        rule[2].init({"x": jnp.zeros(3, dtype)})


@of_the_scaffold
def test_inside_optax_s_wrappers(rule):
    made, theta, tx = rule
    params = {"a": jnp.ones(5), "b": jnp.ones((4, 3))}
    wrappers = {
        "chain": optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(0.1)),
        "multi_steps": optax.MultiSteps(tx, 2),
        "multi_transform": optax.multi_transform({"ours": tx, "theirs": optax.sgd(0.1)}, {"a": "ours", "b": "theirs"}),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "inject_hyperparams": optax.inject_hyperparams(
            lambda scale: optax.chain(made.build(theta, num_steps=10), optax.scale(scale))
        )(scale=0.5),
    }
    for name, wrapped in wrappers.items():
        # these two make the transform, or a conditional around it, anew at every update
        update = jax.jit(wrapped.update) if name in ("multi_steps", "inject_hyperparams") else wrapped.update
        state = wrapped.init(params)
        updates, state = update(gradients(params), state, params, **extra(rule))
        updates, state = update(gradients(params), state, params, **extra(rule))
        assert_finite(updates)
        assert any(float(jnp.max(jnp.abs(u))) > 0 for u in jax.tree.leaves(updates)), name


def test_sharded_params_give_the_same_and_stay_sharded(rule):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("model",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    params = {"w": PARAMS["matrix"]}
    g = {"w": jax.random.normal(jax.random.key(0), (4, 3))}  # of full rank: it determines its singular vectors
    update = jax.jit(lambda g, params: rule[2].update(g, rule[2].init(params), params, **extra(rule))[0])
    alone, sharded = update(g, params)["w"], update(*jax.device_put((g, params), rows))["w"]
    assert sharded.sharding.is_equivalent_to(rows, 2)
    np.testing.assert_allclose(sharded, alone, atol=2e-3 * np.abs(alone).max())  # Newton-Schulz steps magnify rounding


SPECS = {
    "rows": P("x", None),
    "columns": P(None, "x"),
    "vector": P("x"),
    "kernel": P(None, "x", None),
    "query/kernel": P(None, "x", None),
}


@of_the_scaffold
def test_explicit_meshes_take_every_sharding_and_keep_it(rule):
    """JAX's default mesh, whose axes are explicit: shards of rows, of columns, of vectors and of kernels."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    shapes = {"rows": (4, 6), "columns": (3, 4), "vector": (4,), "kernel": (3, 4, 2), "query/kernel": (3, 2, 4)}
    params = {name: jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(shapes.items())}
    g = {name: jax.random.normal(jax.random.key(9 + i), shape) for i, (name, shape) in enumerate(shapes.items())}

    def update(g, params):
        state = rule[2].init(params)
        updates, new = rule[2].update(g, state, params, **extra(rule))
        assert_same_types(new, state)
        assert [jax.typeof(x).sharding.spec for x in jax.tree.leaves(new)] == [
            jax.typeof(x).sharding.spec for x in jax.tree.leaves(state)
        ]
        return updates

    shardings = {name: jax.sharding.NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    alone, sharded = jax.jit(update)(g, params), jax.jit(update)(*jax.device_put((g, params), (shardings, shardings)))
    for name in shapes:
        assert sharded[name].sharding.is_equivalent_to(shardings[name], len(shapes[name]))
        largest = np.abs(alone[name]).max()
        np.testing.assert_allclose(sharded[name], alone[name], atol=2e-3 * largest, err_msg=name)


@of_the_scaffold
def test_one_network_in_any_layout(rule):
    """Layers in a stack, one with gradients a hundred times as large; outputs first, of windows too, or in two axes."""
    made, theta, _ = rule

    def layout(path, shape):
        of = outputs_first if path.startswith("linear") else stacked(lambda path: path == "layers/w")
        return of(path, shape)

    def other(tree):
        query = {"kernel": tree["kernel"].reshape(4, 2, 3), "bias": tree["bias"].reshape(2, 3)}
        linear = {"weight": tree["w"].T, "kernel": tree["window"].transpose(3, 2, 0, 1)}
        return {"layers": {"w": jnp.stack(tree["layers"])}, "linear": linear, "query": query}

    def drawn(key):
        keys = jax.random.split(key, 7)
        layers = [scale * jax.random.normal(k, (4, 5)) for k, scale in zip(keys, (1, 1, 100), strict=False)]
        w, kernel, bias, window = map(jax.random.normal, keys[3:], ((4, 5), (4, 6), (6,), (2, 2, 3, 4)))
        return {"layers": layers, "w": w, "kernel": kernel, "bias": bias, "window": window}

    def two(tx, params, grads):
        state = tx.init(params)
        for one in grads:
            updates, state = tx.update(one, state, params, **extra(rule))
        return updates

    params, *grads = map(drawn, jax.random.split(jax.random.key(0), 3))
    plain, laid = (made.build(theta, num_steps=10, layout=given) for given in (None, layout))
    wanted = other(jax.jit(lambda grads: two(plain, params, grads))(grads))
    found = jax.jit(lambda grads: two(laid, other(params), [other(g) for g in grads]))(grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), found, wanted)


def test_workers_of_a_shard_map_step_by_themselves(rule):
    """What an update makes varies over the devices as what it was given, or a loop's carry would change its type."""
    mesh, params = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("workers",)), {"w": jnp.ones((2, 2, 3))}
    over = jax.sharding.PartitionSpec("workers")

    def worker(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = jax.vmap(lambda p, s: rule[2].update(gradients(p), s, p, **extra(rule)))(params, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), None, length=2)[0][0]

    mapped = jax.shard_map(worker, mesh=mesh, in_specs=over, out_specs=over)
    shapes = jax.eval_shape(mapped, params, jax.vmap(rule[2].init)(params))
    assert shapes["w"].shape == (2, 2, 3)


@of_the_scaffold
def test_state_survives_a_checkpoint(rule, tmp_path):
    tx = rule[2]
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(5)}
    _, state = tx.update(gradients(params), tx.init(params), params, **extra(rule))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"state": state, "step": 3})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", {"state": tx.init(params), "step": 0})["state"]
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_state_may_be_donated_from_the_start(rule):
    """No two of its arrays are one buffer, and none is theta's."""
    made, theta, _ = rule
    params = {k: jnp.copy(PARAMS[k]) for k in ("scalar", "vector")}
    tx = made.build(theta, num_steps=10)
    state = tx.init(params)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)
    assert not {x.unsafe_buffer_pointer() for x in jax.tree.leaves((theta, params))} & set(pointers)


def test_what_a_rule_needs_is_named_when_missing(rule):
    made, theta, tx = rule
    params = jnp.ones(5)
    if "value" in made.needs:
        for wrong in (None, "x", jnp.ones(8)):
            with pytest.raises(ValueError, match=r"update\(gradients, state, params, value=loss\)"):
                tx.update(params, tx.init(params), params, value=wrong)
    if "num_steps" in made.needs:
        with pytest.raises(ValueError, match="num_steps"):
            made.build(theta).init(params)
    if not made.needs:
        made.build(theta).update(params, tx.init(params), params)


@pytest.mark.parametrize("rule", META_GRADIENTS, indirect=True, scope="module")
def test_meta_gradients_are_finite_differences_in_float64(rule):
    """Twenty steps on a smooth loss, a random direction of theta; central differences at two sizes, extrapolated to 0.

    Third derivatives may be large: through `outer` the difference at the larger size is off by .003 for some theta.
    """
    made = rule[0]
    with jax.enable_x64(True):
        key = jax.random.key(3)

        def noise(key, like):
            leaves, tree = jax.tree.flatten(like)
            keys = jax.random.split(key, len(leaves))
            return tree.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])

        # off the fresh meta-parameters, whose zeros put some ReLUs exactly on their kink
        theta = made.init(key)
        theta = jax.tree.map(lambda x, n: x + 0.05 * n, theta, noise(jax.random.key(4), theta))
        along = noise(key, theta)
        params = {"w": jnp.linspace(-1, 1, 6, dtype=jnp.float64).reshape(2, 3), "b": jnp.full(3, 0.3, jnp.float64)}

        def loss(p):
            y = jnp.tanh(jnp.linspace(0.2, 1.0, 2) @ p["w"] + p["b"])
            return jnp.sum((y - jnp.array([0.5, -0.3, 0.1])) ** 2)

        def outer(size):
            tx = made.build(jax.tree.map(lambda x, d: x + size * d, theta, along), num_steps=20)

            def step(carry, _):
                params, state = carry
                value, grads = jax.value_and_grad(loss)(params)
                updates, state = tx.update(grads, state, params, value=value)
                updates = jax.tree.map(lambda u: u * (made.learning_rate or 1.0), updates)
                return (optax.apply_updates(params, updates), state), value

            return jnp.sum(jax.lax.scan(step, (params, tx.init(params)), None, length=20)[1])

        both = jax.jit(jax.value_and_grad(outer))
        value, slope = both(0.0)
        coarse, fine = (float(both(h)[0] - both(-h)[0]) / (2 * h) for h in (9e-7, 3e-7))
        assert np.isfinite(value)
        assert abs(slope) > 1e-9
        np.testing.assert_allclose(slope, (9 * fine - coarse) / 8, rtol=2e-4)
