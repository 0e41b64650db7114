"""Saved rules: exact round trips, and one documented error for everything that can be wrong with them."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ROOT

import learned_opt
from learned_opt import StoreError, store

KWARGS = {"hidden_size": 4}
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "b": jnp.ones(2)}
GRADS = jax.tree.map(lambda x: 0.1 * x + 0.01, PARAMS)


@pytest.fixture(scope="module")
def theta():
    return learned_opt.RULES["celo2"](**KWARGS).init(jax.random.key(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, theta):
    return learned_opt.save(tmp_path_factory.mktemp("saved") / "mine", "celo2", theta, kwargs=KWARGS)


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "mine")


def _update(transform, params=PARAMS):
    return transform.update(GRADS, transform.init(params), params)[0]


def test_round_trip(saved, theta):
    rule, again, *rest = learned_opt.load_rule(saved)
    assert rest == ["celo2", KWARGS, 0.001]
    jax.tree.map(np.testing.assert_array_equal, again, theta)
    assert jax.tree.structure(again) == jax.tree.structure(theta)
    expected = _update(rule.build(theta))
    loaded = _update(learned_opt.load(saved, learning_rate=0.5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.5 * b, rtol=1e-6), loaded, expected)


def test_the_default_learning_rate_is_recorded(tmp_path, theta):
    folder = learned_opt.save(tmp_path / "a", "celo2", theta, kwargs=KWARGS, learning_rate=np.float32(0.02))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        _update(learned_opt.load(folder)),
        _update(learned_opt.load(folder, learning_rate=0.02)),
    )


def test_learning_rate_may_be_a_schedule_and_weight_decay_is_decoupled(saved):
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    plain, decayed = learned_opt.load(saved, learning_rate=schedule), None
    decayed = learned_opt.load(saved, learning_rate=schedule, weight_decay=0.3)
    states = [t.init(PARAMS) for t in (plain, decayed)]
    for step in range(3):
        updates = []
        for i, transform in enumerate((plain, decayed)):
            update, states[i] = transform.update(GRADS, states[i], PARAMS)
            updates.append(update)
        rate = float(schedule(step))
        jax.tree.map(
            lambda u, d, p, rate=rate: np.testing.assert_allclose(d - u, -rate * 0.3 * p, rtol=1e-4, atol=1e-7),
            *updates,
            PARAMS,
        )


def test_a_rule_that_sets_its_own_step_takes_a_factor(tmp_path):
    theta = learned_opt.RULES["adam"]().init(jax.random.key(0))
    folder = learned_opt.save(tmp_path / "adam", "adam", theta)
    one, half = (_update(learned_opt.load(folder, learning_rate=rate)) for rate in (None, 0.5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(0.5 * a, b, rtol=1e-6), one, half)


def test_record_and_card(tmp_path, theta):
    card = {"seed": 3, "config": {"a": 1}, "held_out": {"x": 0.5}, "readme": "# Hello\n"}
    folder = learned_opt.save(tmp_path / "r", "celo2", theta, kwargs=KWARGS, card=card)
    record = store.read_record(folder)
    assert (record["seed"], record["config"], record["held_out"]) == (3, {"a": 1}, {"x": 0.5})
    assert record["theta"]["w1"] == {"shape": [4, 4], "dtype": "float32"}
    assert (folder / "README.md").read_text() == "# Hello\n"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "rule.json", "weights.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["r"]  # nothing left beside it


def test_a_folder_called_like_a_pretrained_rule_is_read_by_its_path_and_a_run_names_its_rule(
    tmp_path, theta, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    learned_opt.save("flagship", "celo2", theta, kwargs=KWARGS)
    assert learned_opt.load_rule("flagship").name == "control"
    assert learned_opt.load_rule(tmp_path / "flagship").name == "celo2"
    learned_opt.save("run/rule", "celo2", theta, kwargs=KWARGS)
    with pytest.raises(StoreError, match="run is a run of `learned-opt train`; its rule is run/rule"):
        learned_opt.load("run")


def test_saving_again_replaces_and_saving_over_something_else_does_not(copy, theta, tmp_path):
    learned_opt.save(copy, "celo2", jax.tree.map(lambda x: x + 1, theta), kwargs=KWARGS)
    np.testing.assert_array_equal(learned_opt.load_rule(copy)[1]["b0"], theta["b0"] + 1)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear").write_text("x")
    (copy / "notes").write_text("x")
    for folder, other in ((tmp_path / "letters", "dear"), (copy, "notes")):
        with pytest.raises(StoreError, match=f"'{other}' is there, which is no part of a rule"):
            learned_opt.save(folder, "celo2", theta, kwargs=KWARGS)
        assert (folder / other).read_text() == "x"


@pytest.mark.parametrize(
    ("rule", "kwargs", "change", "message"),
    [
        ("nonesuch", KWARGS, lambda t: t, "unknown rule 'nonesuch'"),
        ("celo2", {"hidden": 4}, lambda t: t, "cannot be made"),
        ("celo2", {"hidden_size": 8}, lambda t: t, "has shape"),
        ("celo2", KWARGS, lambda t: t | {"extra": jnp.ones(1)}, "'extra' is in only one"),
        ("celo2", KWARGS, lambda t: t | {"b0": jnp.ones(4, jnp.int32)}, "is int32, not float16"),
    ],
)
def test_saving_what_does_not_fit(tmp_path, theta, rule, kwargs, change, message):
    with pytest.raises(StoreError, match=message):
        learned_opt.save(tmp_path / "x", rule, change(theta), kwargs=kwargs)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_earlier_rule(copy, theta, monkeypatch):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def full(path, contents):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("learned_opt.files._write_synced", full)
    with pytest.raises(StoreError, match="No space left on device; nothing was changed"):
        learned_opt.save(copy, "celo2", theta, kwargs=KWARGS)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["mine"]


def _edit(folder, **changes):
    record = json.loads((folder / "rule.json").read_text()) | changes
    (folder / "rule.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2, and this release reads 1"),
        ({"features_version": 9}, "features_version 9"),
        ({"format_version": True}, "format_version True"),
        ({"rule": "nonesuch"}, "unknown rule"),
        ({"rule": 3}, "'rule' is missing"),
        ({"kwargs": {"hidden_size": 8}}, "has shape"),
        ({"kwargs": {"size": 8}}, "cannot be made"),
        ({"theta": {}}, "describes another theta"),
        ({"theta": {"b0": {"shape": 5, "dtype": "float32"}}}, "describes another theta"),
        ({"kwargs": {"hidden_size": 4.5}}, "cannot be made"),
        ({"learning_rate": float("inf")}, "not JSON"),
        ({"sha256": "0" * 64}, "sha256"),
        ({"learning_rate": -1}, "learning_rate -1"),
    ],
)
def test_a_wrong_record(copy, changes, message):
    _edit(copy, **changes)
    with pytest.raises(StoreError, match=message) as raised:
        learned_opt.load(copy)
    assert "\n" not in str(raised.value)


def test_a_free_step_without_a_recorded_rate_takes_the_rules_own(copy, saved):
    _edit(copy, learning_rate=None)
    gradients = {"w": jnp.ones((3, 2))}
    one, other = (learned_opt.load(folder, learning_rate=rate) for folder, rate in ((copy, None), (saved, 1e-3)))
    found, wanted = (tx.update(gradients, tx.init(gradients), gradients)[0] for tx in (one, other))
    np.testing.assert_array_equal(found["w"], wanted["w"])


def test_missing_files_and_names(copy):
    with pytest.raises(StoreError, match="no pretrained rule or folder named 'nonesuch'"):
        learned_opt.load("nonesuch")
    (copy / "weights.safetensors").unlink()
    with pytest.raises(StoreError, match="cannot read"):
        learned_opt.load(copy)
    (copy / "rule.json").unlink()
    with pytest.raises(StoreError, match="cannot read"):
        learned_opt.load(copy)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["rule.json", "weights.safetensors"]))
def test_mutated_files_raise_only_the_documented_error(saved, tmp_path, data, name):
    folder = tmp_path / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    contents = bytearray((folder / name).read_bytes())
    kind = data.draw(st.sampled_from(["flip", "truncate", "insert", "replace"]))
    place = data.draw(st.integers(0, len(contents) - 1))
    if kind == "flip":
        contents[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "truncate":
        del contents[place:]
    elif kind == "insert":
        contents[place:place] = data.draw(st.binary(min_size=1, max_size=20))
    else:
        contents[place : place + 4] = data.draw(st.binary(min_size=1, max_size=8))
    changed = bytes(contents) != (saved / name).read_bytes()
    (folder / name).write_bytes(contents)
    try:
        learned_opt.load(folder)
    except StoreError as error:
        assert changed and "\n" not in str(error)  # noqa: PT017, PT018
    else:  # only text that does not bear on the weights may change unseen
        assert name == "rule.json" or not changed


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from(["format_version", "rule", "kwargs", "theta", "sha256", "learning_rate", "needs"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_any_json_in_a_field_raises_only_the_documented_error(saved, tmp_path, field, value):
    folder = tmp_path / "edited"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    _edit(folder, **{field: value})
    try:
        learned_opt.load(folder)
    except StoreError as error:
        assert "\n" not in str(error)  # noqa: PT017


# --- inside Optax


def _descend(transform, steps=3):
    params, state = PARAMS, transform.init(PARAMS)
    for _ in range(steps):
        updates, state = jax.jit(transform.update)(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.fixture(scope="module")
def plain(saved):
    return _descend(learned_opt.load(saved, learning_rate=0.01))


def _close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), a, b)


def test_in_chain(saved, plain):
    _close(_descend(optax.chain(learned_opt.load(saved, learning_rate=0.02), optax.scale(0.5))), plain)


def test_in_multi_steps(saved):
    every = optax.MultiSteps(learned_opt.load(saved, learning_rate=0.01), 3)
    _close(_descend(every, 9), _descend(learned_opt.load(saved, learning_rate=0.01), 3))


def test_in_masked_and_multi_transform(saved):
    rule = learned_opt.load(saved, learning_rate=0.01)
    masked = _descend(optax.masked(rule, {"w": True, "b": False}))
    alone = _descend_only_w(rule)
    np.testing.assert_allclose(masked["w"], alone, rtol=1e-5)
    several = _descend(optax.multi_transform({"ours": rule, "sgd": optax.sgd(0.1)}, {"w": "ours", "b": "sgd"}))
    np.testing.assert_allclose(several["w"], alone, rtol=1e-5)
    np.testing.assert_allclose(several["b"], PARAMS["b"] - 3 * 0.1 * GRADS["b"], rtol=1e-5)


def _descend_only_w(rule):
    params, grads = {"w": PARAMS["w"]}, {"w": GRADS["w"]}
    state = rule.init(params)
    for _ in range(3):
        updates, state = rule.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params["w"]


def test_in_apply_if_finite(saved, plain):
    _close(_descend(optax.apply_if_finite(learned_opt.load(saved, learning_rate=0.01), 3)), plain)


def test_in_inject_hyperparams(saved, plain):
    make = optax.inject_hyperparams(
        lambda learning_rate, weight_decay: learned_opt.load(
            saved, learning_rate=learning_rate, weight_decay=weight_decay
        )
    )
    transform = make(learning_rate=0.01, weight_decay=0.0)
    _close(_descend(transform), plain)
    state = transform.init(PARAMS)
    state.hyperparams["learning_rate"] = jnp.asarray(0.03)
    tripled, _ = transform.update(GRADS, state, PARAMS)
    _close(tripled, _update(learned_opt.load(saved, learning_rate=0.03)))


def test_in_vmap_and_scan(saved, plain):
    transform = learned_opt.load(saved, learning_rate=0.01)

    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = transform.update(GRADS, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, transform.init(params)), None, length=3)[0][0]

    stacked = jax.jit(jax.vmap(run))(jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS))
    _close(jax.tree.map(lambda x: x[1], stacked), plain)


def test_with_sharded_params(saved):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {"w": jnp.arange(24.0).reshape(8, 3) / 10}
    grads = {"w": jnp.cos(params["w"])}
    transform = learned_opt.load(saved, learning_rate=0.01)
    whole, _ = jax.jit(transform.update)(grads, transform.init(params), params)
    placed = jax.device_put(params, sharding)
    split, _ = jax.jit(transform.update)(jax.device_put(grads, sharding), jax.jit(transform.init)(placed), placed)
    _close(split, whole)


# ---- step size, decay, number of updates


def test_weight_decay_may_be_a_schedule_and_have_a_mask(saved):
    def decayed(**options):
        tx = learned_opt.load(saved, learning_rate=0.5, **options)
        state, states = tx.init(PARAMS), []
        for _ in range(2):
            updates, state = tx.update(GRADS, state, PARAMS)
            states.append(updates)
        return states

    bare = decayed()
    for options, factors in (
        ({"weight_decay": 0.1}, [0.1, 0.1]),
        ({"weight_decay": jnp.float32(0.1)}, [0.1, 0.1]),
        ({"weight_decay": lambda step: 0.1 * (step + 1)}, [0.1, 0.2]),
    ):
        for name, kept in (("w", ("w", "b")), ("masked", ("w",))):
            more = {"mask": {"w": True, "b": False}} if name == "masked" else {}
            for updates, without, factor in zip(decayed(**options, **more), bare, factors, strict=True):
                for leaf, start in PARAMS.items():
                    expected = without[leaf] - 0.5 * factor * start * (leaf in kept)
                    np.testing.assert_allclose(updates[leaf], expected, rtol=1e-4, atol=1e-6)
    function = decayed(weight_decay=0.1, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    jax.tree.map(np.testing.assert_array_equal, function, decayed(weight_decay=0.1, mask={"w": True, "b": False}))


def test_decay_keeps_the_dtype_of_the_updates(saved):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    for decay in (0.1, jnp.float32(0.1), lambda step: jnp.float32(0.1)):
        tx = learned_opt.load(saved, weight_decay=decay)
        updates, _ = tx.update(params, tx.init(params), params)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="params"):
        learned_opt.load(saved, weight_decay=0.1).update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_decay": None}, "weight_decay must be a number, a scalar array or a schedule, not None"),
        ({"weight_decay": "0.1"}, "weight_decay must be a number, a scalar array or a schedule, not '0.1'"),
        ({"weight_decay": jnp.ones(8)}, "weight_decay must be .* not an array of shape"),
        ({"learning_rate": "1e-3"}, "learning_rate must be a number, a scalar array or a schedule, not '1e-3'"),
        ({"learning_rate": np.ones(2)}, "learning_rate must be .* not an array of shape"),
        ({"learning_rate": True}, "learning_rate must be .* not True"),
        ({"learning_rate": [1e-3]}, "learning_rate must be"),
        ({"learning_rate": -1e-3}, "learning_rate must be finite and at least 0, not -0.001"),
        ({"learning_rate": jnp.inf}, "learning_rate must be finite"),
        ({"weight_decay": np.float32("nan")}, "weight_decay must be finite"),
        ({"mask": {"w": True}}, "mask says what weight_decay is for: give both"),
        ({"num_steps": "100"}, "num_steps must be an integer of at least 1, not '100'"),
        ({"num_steps": -5}, "num_steps must be at least 1, not -5"),
        ({"num_steps": 0}, "num_steps must be at least 1, not 0"),
        ({"num_steps": jnp.int32(-5)}, "num_steps must be at least 1, not -5"),
        ({"num_steps": 100.0}, "num_steps must be an integer"),
        ({"num_steps": True}, "num_steps must be an integer"),
        ({"num_steps": jnp.arange(3)}, "num_steps must be an integer scalar"),
    ],
)
def test_arguments_that_cannot_be_meant(saved, arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        learned_opt.load(saved, **arguments)
    assert "\n" not in str(raised.value)
    if "num_steps" in arguments:
        rule, theta, *_ = learned_opt.load_rule(saved)
        with pytest.raises(ValueError, match=message):
            rule.build(theta, **arguments)


def test_adams_rate_given_to_a_rule_that_sets_its_own_steps_is_warned_of():
    with pytest.warns(UserWarning, match="flagship sets its own steps, and learning_rate=0.001 is a factor on them"):
        learned_opt.load("flagship", learning_rate=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned_opt.load("flagship", learning_rate=0.5)
        learned_opt.load("flagship-1", learning_rate=1e-3)


@pytest.mark.parametrize("name", [None, 3, b"flagship-1"])
def test_what_is_no_name(name):
    for load in (learned_opt.load, learned_opt.load_rule, learned_opt.unsupervised.load):
        with pytest.raises(StoreError, match="by its name or folder"):
            load(name)


def test_arguments_may_be_traced(saved):
    @jax.jit
    def update(rate, decay, steps):
        return _update(learned_opt.load(saved, learning_rate=rate, weight_decay=decay, num_steps=steps))

    traced = update(0.5, 0.1, 10)
    plain = _update(learned_opt.load(saved, learning_rate=0.5, weight_decay=0.1, num_steps=10))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), traced, plain)


# ---- devices


def test_nothing_touches_a_device_before_the_first_use():
    """The backend is not there after all of this: processes may still be joined, and devices still be chosen."""
    program = """
import socket
import jax
import learned_opt
from learned_opt import facts, local_sgd, mup, schedules, self_tuning, unsupervised

loaded = [learned_opt.load(name, num_steps=10, weight_decay=0.1) for name in learned_opt.available()]
saved = [learned_opt.load_rule(name) for name in learned_opt.available()]
built = [rule.rule.build(rule.theta, num_steps=10) for rule in saved]
unsupervised.load(unsupervised.available()[0])
for name in learned_opt.RULES:
    facts.rule_facts(name)
inner = learned_opt.bfloat16_state(loaded[0])
local_sgd.local_sgd(inner, built[0], sync_every=schedules.adacomm(8), compression="int8")
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
jax.distributed.initialize(address, 1, 0)
jax.config.update("jax_num_cpu_devices", 3)
assert jax.local_device_count() == 3
params = {"w": jax.numpy.ones((3, 2))}
loaded[0].update(params, loaded[0].init(params), params)
print("fine")
"""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.parametrize("name", ["flagship", "flagship-1", "adafac-mlp"])
@pytest.mark.parametrize("first", ["on the mesh", "off it"])
def test_a_loaded_rule_is_of_no_mesh(name, first):
    """JAX's default mesh is explicit: what is made under it is of its type."""
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    tx, params = learned_opt.load(name, num_steps=10), jax.random.normal(jax.random.key(0), (4, 6))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    step = jax.jit(lambda p: tx.update(jnp.cos(p), tx.init(p), p)[0])

    def on():
        with jax.set_mesh(mesh):
            return step(jax.device_put(params, rows))

    def off():
        return step(params)

    found = [np.asarray(one()) for one in ((on, off) if first == "on the mesh" else (off, on))]
    np.testing.assert_allclose(*found, atol=1e-5)


def test_a_loaded_rule_is_of_use_in_one_trace_after_another(saved):
    """What is made while one function is traced is not kept for the next."""
    tx = learned_opt.load(saved)
    first = jax.jit(lambda p: _update(tx, p))(PARAMS)
    again = jax.jit(lambda p: _update(tx, p), donate_argnums=0)(jax.tree.map(jnp.copy, PARAMS))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), first, _update(tx))
