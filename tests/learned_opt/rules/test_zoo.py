"""The rules over whole tensors and those with an LSTM: NumPy versions of their formulas, and what they promise."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT

import learned_opt
from learned_opt import RULES, kernels
from learned_opt.facts import rule_facts
from learned_opt.features import Moments
from learned_opt.rules import parts, recurrent
from learned_opt.rules.adafac_mlp import adafac_mlp, decays
from learned_opt.rules.celo import celo
from learned_opt.rules.mlp import mlp
from learned_opt.rules.scheduler import over, scheduler
from learned_opt.rules.velo import VeloTensor, tensor_features, velo

# --- NumPy, in float64


def accumulate(gradients, shape, momentum, rms, factored):
    """Momenta, second moment, ``facg``'s scale and the factored statistics after some gradients."""
    m, r = [np.zeros(shape)] * len(momentum), np.zeros(shape)
    vrow, vcol = [0.0] * len(factored), [0.0] * len(factored)
    matrix = len(shape) >= 2
    if matrix:
        d1, d0 = np.argsort(np.array(shape), kind="stable")[-2:]
    for g in gradients:
        m = [b * x + (1 - b) * g for b, x in zip(momentum, m, strict=True)]
        r = rms * r + (1 - rms) * g * g
        q = g * g + 1e-30
        for k, b in enumerate(factored):
            vrow[k] = b * vrow[k] + (1 - b) * (q.mean(d0, keepdims=True) if matrix else q)
            vcol[k] = b * vcol[k] + (1 - b) * (q.mean(d1, keepdims=True) if matrix else q)
    if matrix:
        R = [1 / np.sqrt(np.maximum(v / (v.mean(d1, keepdims=True) + 1e-9), 1e-9)) for v in vrow]
        scale = [a / np.sqrt(np.maximum(v, 1e-9)) for a, v in zip(R, vcol, strict=True)]
    else:
        scale = [1 / np.sqrt(np.maximum(v + 1e-9, 1e-9)) for v in vrow]
    return m, r, scale, vrow, vcol


def network(theta, columns, shape, more=()):
    """Outputs of the ReLU network on columns of unit RMS and on ``more`` numbers that all parameters share."""
    x = np.stack([np.broadcast_to(c, shape) for c in columns], -1)
    x = x / np.sqrt(1e-5 + np.mean(x * x, tuple(range(len(shape))), keepdims=True))
    x = np.concatenate([x, np.broadcast_to(np.asarray(more, float), (*shape, len(more)))], -1)
    for i in range(3):
        x = (np.maximum(x, 0) if i else x) @ theta[f"w{i}"] + theta[f"b{i}"]
    return x


def times(t):
    return np.tanh(t / np.array([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5]) - 1)


def step_of(x):
    return -0.001 * x[..., 0] * np.exp(0.001 * x[..., 1])


def mlp_update(theta, p, gradients):
    m, *_ = accumulate(gradients, p.shape, (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999), 0.0, ())
    return step_of(network(theta, [gradients[-1], p, *m], p.shape, times(len(gradients) - 1)))


def adafac_mlp_update(theta, p, gradients):
    def learned(name, start):
        return 1 - np.exp(10 * (np.log(1 - np.array(start)) / 10 + theta[name]))

    momentum, factored = learned("momentum_decays", (0.9, 0.99, 0.999)), learned("factored_decays", (0.9, 0.99, 0.999))
    rms = max(learned("rms_decays", (0.999,))[0], 0)
    g = gradients[-1]
    m, r, scale, vrow, vcol = accumulate(gradients, p.shape, momentum, rms, np.maximum(factored, 0))
    s = 1 / np.sqrt(r + 1e-6)
    columns = [g, p, *m, r, *(x * s for x in m), s, *(g * x for x in scale)]
    columns += [*vrow, *vcol, *(1 / np.sqrt(v + 1e-8) for v in (*vrow, *vcol))]
    last = scale if p.ndim >= 2 else [1 / np.sqrt(v + 1e-6) for v in vrow]
    columns += [x * y for x, y in zip(m, last, strict=True)]
    return step_of(network(theta, columns, p.shape, times(len(gradients) - 1)))


def celo_update(theta, p, gradients):
    """Without the scheduler; the per-parameter part is VeLO's too."""
    g = np.clip(gradients[-1], -1000, 1000)
    clipped = [np.clip(x, -1000, 1000) for x in gradients]
    m, r, scale, vrow, vcol = accumulate(clipped, p.shape, (0.9, 0.99, 0.999), 0.999, (0.9, 0.99, 0.999))
    s = 1 / np.sqrt(r + 1e-6)
    columns = [g, np.clip(g, -0.1, 0.1), p, *m, r, *(x * s for x in m), s, *(g * x for x in scale), g * s]
    columns += [*vrow, *vcol, *(1 / np.sqrt(v + 1e-8) for v in (*vrow, *vcol))]
    last = scale if p.ndim >= 2 else [1 / np.sqrt(v) for v in vrow]
    columns += [x * y for x, y in zip(m, last, strict=True)]
    weights = {name: x[0] for name, x in theta["bank"].items()}
    return np.sqrt(np.mean(p * p) + 1e-9) * step_of(network(weights, columns, p.shape))


# tied sizes, sizes of one, short last axes and a large matrix among them
SHAPES = [(), (1,), (7,), (4096,), (5, 3), (4, 4), (32, 10), (1, 1), (1, 6), (6, 1), (64, 32)]
SHAPES += [(2, 3, 4), (3, 3, 8, 16), (5, 5, 2, 4), (16, 1, 1)]
FEW = [(7,), (5, 3), (64, 32), (2, 3, 4)]
SOME = [(), (7,), (4, 4), (1, 6), (6, 1), (3, 3, 8, 16)]  # compiling a network of sums for every shape takes seconds
CASES = {
    "mlp": (mlp, mlp_update, FEW),
    "mlp of 4": (functools.partial(mlp, hidden_size=4), mlp_update, FEW),
    "adafac_mlp": (adafac_mlp, adafac_mlp_update, SOME),
    "adafac_mlp on all shapes": (adafac_mlp, adafac_mlp_update, SHAPES),
    "adafac_mlp of 16": (functools.partial(adafac_mlp, hidden_size=16), adafac_mlp_update, FEW[:2]),
    "adafac_mlp of 16 on large shapes": (functools.partial(adafac_mlp, hidden_size=16), adafac_mlp_update, FEW),
    "adafac_mlp of 32": (functools.partial(adafac_mlp, hidden_size=32), adafac_mlp_update, FEW),
    "celo": (functools.partial(celo, scheduled=False, lstm_size=1), celo_update, SOME),
    "celo on all shapes": (functools.partial(celo, scheduled=False, lstm_size=1), celo_update, SHAPES),
}


@pytest.mark.parametrize("case", [pytest.param(x, marks=[pytest.mark.slow] * ("shapes" in x)) for x in CASES])
def test_update_is_the_formula_s(case):
    rng = np.random.default_rng(0)
    make, expected, shapes = CASES[case]
    rule = make(published=True)
    theta = jax.tree.map(lambda x: x + jnp.float32(0.1) * rng.normal(size=x.shape), rule.init(jax.random.key(1)))
    params = [rng.normal(size=s).astype(np.float32) for s in shapes]
    gradients = [[rng.normal(size=s) * 10.0 ** rng.uniform(-3, 4) for s in shapes] for _ in range(3)]
    gradients = [[np.where(rng.uniform(size=g.shape) < 0.2, 0, g).astype(np.float32) for g in gs] for gs in gradients]
    for gs in gradients:
        gs[shapes.index((7,))][0] = 0  # one that never has a gradient
    tx = rule.build(theta)
    state, update = tx.init(params), jax.jit(tx.update)
    for gs in gradients:
        updates, state = update(gs, state, params)
    theta = jax.tree.map(lambda x: np.asarray(x, np.float64), theta)
    for i, shape in enumerate(shapes):
        p, history = np.atleast_1d(params[i]).astype(float), [np.atleast_1d(gs[i]).astype(float) for gs in gradients]
        want = expected(theta, p, history).reshape(shape)
        scale = np.sqrt(np.mean(want**2))
        np.testing.assert_allclose(updates[i], want, atol=2e-4 * scale, rtol=2e-5, err_msg=str(shape))


# rows that part into eights of any length, of a length in bounds, and not at all
@pytest.mark.parametrize("shape", [(4115, 64), (67, 4096), (261, 1001)])
@pytest.mark.parametrize("make", [adafac_mlp, functools.partial(celo, scheduled=False)])
def test_a_large_matrix_goes_by_blocks_and_gives_the_same(make, shape):
    rng = np.random.default_rng(0)
    rule = make()
    theta = rule.init(jax.random.key(1))
    p, g = rng.normal(size=shape), rng.normal(size=shape)
    expected = {adafac_mlp: adafac_mlp_update}.get(make, celo_update)
    tx = rule.build(theta)
    p32, g32 = jnp.asarray(p, jnp.float32), jnp.asarray(g, jnp.float32)
    updates, _ = jax.jit(tx.update)(g32, tx.init(p32), p32)
    want = expected(jax.tree.map(lambda x: np.asarray(x, np.float64), theta), p, [g])
    np.testing.assert_allclose(updates, want, atol=1e-4 * np.abs(want).max())


# --- the loss


def loss_features(losses, horizon):
    """The formula, in float64 from decays that were rounded to float32."""
    d = np.exp(-1 / np.logspace(1, np.log10(horizon), 10)).astype(np.float32).astype(float)
    means, minima, features = np.zeros(10), np.full(10, 999999999999.0), []
    for n, loss in enumerate(losses):
        a = loss if n == 0 else np.max(means / (1 - d ** (n + 1)))
        loss = min(2 * abs(a), loss)
        means = d * means + (1 - d) * loss
        corrected = means / (1 - d ** (n + 1))
        minima = np.minimum(minima, corrected)
        x = (corrected[:-1] - minima[:-1]) / np.maximum(1e-8, corrected[1:] - minima[:-1]) - 1
        features.append(np.clip(x, -1, 1) if n >= 2 else np.zeros(9))
    return np.array(features)


def run_losses(losses, horizon, dtype=jnp.float32):
    def step(state, loss):
        features, state = recurrent.loss_update(state, loss, horizon)
        return state, features

    losses = jnp.asarray(losses, dtype)
    return jax.jit(lambda losses: jax.lax.scan(step, recurrent.loss_start(dtype), losses)[1])(losses)


def test_a_first_loss_of_zero_does_not_blind():
    """It would cut all later ones to twice nothing, which looks like a new minimum, -1."""
    assert np.all(run_losses(np.linspace(0, 3, 30), 100)[5:] > 0)


def test_gradients_of_any_size_give_the_same_step_or_none():
    """Squares of the smallest are 0: a unit of 1 would leave the rule nothing to see but the weights."""
    rule = RULES["celo2"]()
    tx = rule.build(rule.init(jax.random.key(0)))
    p, g = jax.random.normal(jax.random.key(1), (2, 64))
    usual = tx.update(g, tx.init(p), p)[0]
    small = tx.update(1e-15 * g, tx.init(p), p)[0]
    np.testing.assert_allclose(small, usual, atol=2e-2 * np.abs(usual).max())
    assert not np.any(tx.update(1e-20 * g, tx.init(p), p)[0])


@pytest.mark.parametrize("horizon", [100, 5000, 3])
def test_loss_features_are_the_formula_s(horizon):
    rng = np.random.default_rng(0)
    losses = 2 * np.exp(-np.arange(60) / 30) + 0.3 * rng.uniform(size=60)
    losses[[20, 40]] = 50.0  # spikes, which are cut
    expected = loss_features(losses, horizon)
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(run_losses(losses, horizon), expected, atol=2e-3)
    traced = jax.jit(lambda n: run_losses(losses, n))(jnp.int32(horizon))
    np.testing.assert_allclose(traced, expected, atol=2e-3)
    with jax.enable_x64(True):  # nearly equal means are subtracted: float32 is what limits the above
        decays32 = run_losses(losses, horizon, jnp.float64)
        np.testing.assert_allclose(decays32, expected, atol=2e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-(10**6), 10**6).map(lambda x: x / 100), min_size=12, max_size=12))
def test_loss_features_are_bounded_and_with_one_horizon_tell_new_minima(losses):
    features = np.asarray(LOSSES_100(jnp.asarray(losses, jnp.float32)))
    assert np.all(np.abs(features) <= 1)
    assert np.all(features[:2] == 0)
    # of losses that differ by more than the rule's 1e-8, below which it does not tell a minimum from what is near it
    same = np.asarray(LOSSES_10(jnp.asarray(losses, jnp.float32)))
    assert np.all((same == 0) | (same == -1))
    assert np.all(same == same[:, :1])


LOSSES_100, LOSSES_10 = (jax.jit(functools.partial(run_losses, horizon=n)) for n in (100, 10))


def test_losses_that_are_not_finite_do_no_harm():
    losses = np.linspace(3, 2, 12)
    clean = run_losses(losses, 100)
    spoilt = np.concatenate([[np.nan, np.inf], losses])
    np.testing.assert_array_equal(run_losses(spoilt, 100)[2:], clean)  # passed over before the first finite one
    for bad in (np.nan, np.inf, -np.inf):
        losses[6] = bad
        assert np.all(np.isfinite(run_losses(losses, 100)))
    losses[6] = np.nan
    cut = run_losses(losses, 100)
    losses[6] = 1e30
    np.testing.assert_array_equal(cut, run_losses(losses, 100))


def test_the_lstm_s_gates():
    """A saturated gate at a time: what is forgotten, let in and let out."""
    big, H = 50.0, 2
    x, state = jnp.zeros((3, 1)), recurrent.LSTMState(jnp.zeros((3, H)), jnp.full((3, H), 0.7))

    def run(i, g, f, o):
        b = jnp.repeat(jnp.array([i, g, f, o]), H)
        return recurrent.lstm({"w": jnp.zeros((1 + H, 4 * H)), "b": b}, x, state)

    keep = run(-big, big, big, big)
    np.testing.assert_allclose(keep.cell, 0.7)
    np.testing.assert_allclose(keep.hidden, np.tanh(0.7), rtol=1e-6)
    np.testing.assert_allclose(run(big, big, -big, big).cell, 1.0)
    np.testing.assert_allclose(run(-big, big, -1.0, -big).cell, 0.35)  # the forget gate's 1 is added
    np.testing.assert_allclose(run(-big, big, big, -big).hidden, 0, atol=1e-6)


def test_what_velo_s_lstm_sees_of_a_tensor():
    rng = np.random.default_rng(0)
    for shape in ((), (5,), (1, 6), (4, 3), (2, 1, 3, 4), (1001, 70)):  # the last by blocks
        p, r = rng.normal(size=shape), rng.uniform(size=shape)
        m = [rng.normal(size=shape) + k for k in range(3)]
        q = 1 / np.sqrt(np.mean(p * p))
        logs = lambda x: 0.5 * np.clip(np.log(1e-8 + np.abs(10 * np.asarray(x))), -5, 5)  # noqa: E731
        rank = np.eye(5)[np.sum(np.array(shape) > 1, dtype=int)]
        spread = [np.var(q * x) for x in m]
        odd = [np.mean((q * r - np.mean(q * x)) ** 2) for x in m]
        want = np.concatenate([[logs(np.mean(q * r))], rank, logs(spread), logs(odd)])
        p, r, m = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (p, r, m))
        tensor = VeloTensor(Moments(jnp.stack(m), r, None, None), None)
        np.testing.assert_allclose(tensor_features(p, p, tensor), want, atol=1e-5, err_msg=str(shape))


# --- what the rules promise


def test_meta_parameters_are_as_many_as_published():
    counts = {"mlp": 1762, "adafac_mlp": 197, "velo": 2_320_385, "celo": 36_930 + 159, "celo_adam": 36_930 - 65}
    for rule, count in counts.items():
        assert rule_facts(rule)["meta_parameters"] == count, rule
    assert rule_facts("adafac_mlp", hidden_size=32)["meta_parameters"] == 2409
    needs = {rule: rule_facts(rule)["needs"] for rule in counts}
    both = ["value", "num_steps"]
    assert needs == {"mlp": [], "adafac_mlp": [], "velo": both, "celo": both, "celo_adam": both}


def test_the_table_of_the_rules_tells_the_truth():
    rows = {}
    text = (ROOT / "docs" / "rules.md").read_text()
    for line in text.split("\n## The zoo\n")[1].split("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall("`(\\w+)`", cells[0])
        if len(cells) != 6 or not names:
            continue
        for i, name in enumerate(names):  # "a, b" rows have ", " in the columns that differ; thousands have ","
            rows[name] = [cells[2], *(column.split(", ")[i if len(names) > 1 else 0] for column in cells[3:5])]
    assert set(rows) == set(RULES)
    del rows["scheduler"]
    for name, (needs, state, count) in rows.items():
        facts = rule_facts(name)
        assert re.findall("`(\\w+)`", needs) == facts["needs"], name
        assert int(state) == round(facts["state_bytes_per_parameter"]), name
        assert int(count.replace(",", "")) == facts["meta_parameters"], name


def test_fresh_decays_are_the_published_ones():
    np.testing.assert_allclose(decays(jnp.zeros(3), (0.9, 0.99, 0.999)), [0.9, 0.99, 0.999], rtol=1e-6)
    assert float(decays(jnp.full(1, 0.1), (0.9,))[0]) == pytest.approx(1 - 0.1 * np.e, rel=1e-5)


SMALL = {
    "mlp": {},
    "adafac_mlp": {},
    "velo": {"bank_size": 8, "lstm_size": 4},
    "celo": {"bank_size": 3, "lstm_size": 4},
    "celo_adam": {"lstm_size": 4},
}


@pytest.mark.parametrize("name", SMALL)
def test_a_fresh_rule_goes_downhill_by_a_thousandth(name):
    p = jax.random.normal(jax.random.key(0), (16, 8))
    g = 0.3 * jax.random.normal(jax.random.key(1), (16, 8))
    rule = RULES[name](**SMALL[name])
    tx = rule.build(rule.init(jax.random.key(2)), num_steps=10)
    u, _ = jax.jit(tx.update)(g, tx.init(p), p, value=jnp.float32(1.0))
    assert float(jnp.sum(u * g) / jnp.linalg.norm(u) / jnp.linalg.norm(g)) < -0.6
    assert 3e-4 < float(jnp.sqrt(jnp.mean(u * u))) < 3e-3


@pytest.mark.parametrize("name", ["velo", "celo", "celo_adam", "scheduler"])
def test_num_steps_learning_rate_and_weight_decay_may_be_traced(name, tmp_path):
    kwargs = {**SMALL, "scheduler": {"base": "sgd", "lstm_size": 4}}[name]
    rule = RULES[name](**kwargs)
    theta = rule.init(jax.random.key(0))
    theta = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), theta)
    folder, traces = learned_opt.save(tmp_path / "rule", name, theta, kwargs=kwargs), []
    p = jnp.linspace(-1, 1, 6).reshape(2, 3)

    def run(num_steps, learning_rate, weight_decay):
        traces.append(1)
        tx = learned_opt.load(folder, num_steps=num_steps, learning_rate=learning_rate, weight_decay=weight_decay)
        _, state = tx.update(jnp.sin(p), tx.init(p), p, value=jnp.float32(1.0))
        return tx.update(jnp.sin(p), state, p, value=jnp.float32(0.9))[0]

    compiled = jax.jit(run)
    settings = [(100, 1.0, 0.0), (1000, 1.0, 0.0), (100, 0.5, 0.0), (100, 1.0, 0.1)]
    first, longer, slower, decayed = (compiled(jnp.int32(n), rate, decay) for n, rate, decay in settings)
    assert len(traces) == 1
    np.testing.assert_allclose(first, run(100, 1.0, 0.0), rtol=1e-4)
    assert np.max(np.abs(first / longer - 1)) > 1e-6
    np.testing.assert_allclose(slower, 0.5 * first, rtol=1e-5)
    np.testing.assert_allclose(decayed, first - 0.1 * p, rtol=1e-4)


def test_gradients_that_vanish_leave_finite_meta_gradients():
    """VeLO divides a vector's momentum by the bare root of its second moment."""
    rule = celo(scheduled=False, lstm_size=1)
    p = jnp.ones(4)

    def outer(theta):
        tx = rule.build(theta)
        state, x, total = tx.init(p), p, 0.0
        for scale in (0.0, 1.0, 0.0):
            u, state = tx.update(scale * x * jnp.array([0.0, 1.0, 1e-12, 0.0]), state, x)
            x = x + u
            total += jnp.sum(x**2)
        return total

    grads = jax.jit(jax.grad(outer))(rule.init(jax.random.key(0)))
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))
    assert float(jnp.max(jnp.abs(grads["bank"]["w0"]))) > 0


def test_velo_counts_only_tensors_with_elements_and_takes_their_missing_gradients():
    rule = velo(bank_size=2, lstm_size=4)
    tx = rule.build(rule.init(jax.random.key(0)), num_steps=10)
    params = {"a": jnp.ones((2, 3)), "b": jnp.zeros((0, 4)), "c": None, "d": jnp.ones(3)}
    state = tx.init(params)
    assert all(x.shape == (1, 4) for x in jax.tree.leaves(state.tensors.memory))
    updates, new = tx.update({**params, "d": None}, state, params, value=jnp.float32(1.0))
    assert updates["d"] is None
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    assert float(jnp.max(jnp.abs(updates["a"]))) > 0


def test_velo_s_tensors_hear_of_each_other():
    rule = velo(bank_size=8, lstm_size=8)
    theta = rule.init(jax.random.key(0))
    theta = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), theta)
    tx = rule.build(theta, num_steps=10)
    update = jax.jit(lambda p: tx.update(p, tx.init(p), p, value=jnp.float32(1.0))[0])
    alone = update({"a": jnp.ones((2, 3))})
    together = update({"a": jnp.ones((2, 3)), "b": 100 * jnp.ones((4, 1))})
    assert np.max(np.abs(together["a"] / alone["a"] - 1)) > 1e-4


def test_the_memory_is_advanced_unless_told_otherwise():
    p = jnp.ones(3)
    for advance in (True, False):
        rule = velo(bank_size=2, lstm_size=4, recurrent_memory=advance)
        tx = rule.build(rule.init(jax.random.key(0)), num_steps=10)
        _, state = tx.update(p, tx.init(p), p, value=jnp.float32(1.0))
        assert bool(jnp.any(state.tensors.memory.hidden != 0)) is advance


# --- the scheduler


@pytest.mark.parametrize("base", sorted(set(RULES) - {"scheduler"}))
def test_a_scheduler_goes_over_any_rule(base):
    """Traced only: every base's own contract is tested elsewhere."""
    rule, bare = scheduler(base=base), RULES[base]()
    assert set(rule.needs) == {"value", *bare.needs}
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "none": None}

    def run(key):
        tx = rule.build(rule.init(key), num_steps=10)
        state = tx.init(params)
        return state, *tx.update(params, state, params, value=jnp.float32(1.0))

    before, updates, after = jax.eval_shape(run, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("rate", [None, 0.25])
def test_a_fresh_scheduler_is_its_base_at_its_default_rate(rate):
    p = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3)}
    rule = scheduler(base="celo2", learning_rate=rate, lstm_size=4)
    theta = rule.init(jax.random.key(0))
    tx, bare = rule.build(theta), RULES["celo2"]().build(theta["base"])
    assert rule.learning_rate is None
    state, bare_state = tx.init(p), bare.init(p)
    for t in range(4):
        u, state = tx.update(p, state, p, value=jnp.float32(3 - t))
        expected, bare_state = bare.update(p, bare_state, p)
        np.testing.assert_allclose(u["w"], (rate or RULES["celo2"]().learning_rate) * expected["w"], rtol=1e-5)


def test_a_scheduler_over_a_trained_rule_is_saved_and_loaded(tmp_path):
    trained = {"log_learning_rate": jnp.log(jnp.float32(0.5))}
    kwargs, theta = over("sgd", trained, jax.random.key(0), base_kwargs={"learning_rate": 0.1}, lstm_size=4)
    folder = learned_opt.save(tmp_path / "auto", "scheduler", theta, kwargs=kwargs)
    tx, p = learned_opt.load(folder), jnp.ones(2)
    updates, _ = tx.update(p, tx.init(p), p, value=jnp.float32(1.0))
    np.testing.assert_allclose(updates, -0.5)
    assert rule_facts("scheduler", **kwargs)["needs"] == ["value"]


def test_a_scheduler_does_without_the_number_of_steps():
    rule = scheduler(base="sgd", lstm_size=8)
    theta = rule.init(jax.random.key(0))
    theta["scheduler"]["step_size"]["w"] = jnp.ones((8, 1))
    p = jnp.ones(2)

    def last(num_steps, losses=(3.0, 2.0, 1.0, 0.5)):
        tx = rule.build(theta, num_steps=num_steps)
        state = tx.init(p)
        for value in losses:
            u, state = tx.update(p, state, p, value=jnp.float32(value))
        return float(u[0])

    assert last(None) == pytest.approx(last(0), rel=1e-6)
    assert last(None) == pytest.approx(last(jnp.int32(0)), rel=1e-6)
    assert abs(last(None) / last(5) - 1) > 1e-4  # knowing the length makes a difference,
    assert abs(last(5) / last(500) - 1) > 1e-4  # as do the length
    assert abs(last(None) / last(None, (3.0, 4.0, 5.0, 6.0)) - 1) > 1e-4  # and the loss


def test_a_scheduler_may_start_from_a_cosine():
    params = jnp.ones(2)

    def sizes(num_steps):
        rule = scheduler(base="sgd", lstm_size=4, schedule="cosine")
        tx = rule.build(rule.init(jax.random.key(0)), num_steps=num_steps)
        state, found = tx.init(params), []
        for _ in range(5):
            updates, state = tx.update(jnp.ones(2), state, params, value=jnp.float32(1.0))
            found.append(float(updates[0]))
        return np.asarray(found)

    unknown = sizes(None)
    np.testing.assert_allclose(unknown, unknown[0])
    np.testing.assert_array_equal(sizes(jnp.int32(0)), unknown)
    cosine = 0.5 * (1 + np.cos(np.pi * np.array([0, 1, 2, 3, 4]) / 4))  # 0 from the last step on
    np.testing.assert_allclose(sizes(4), cosine * unknown, atol=1e-7 * abs(unknown[0]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"base": "nothing"}, "unknown base 'nothing'"),
        ({"base": "adam", "base_kwargs": {"x": 1}}, "cannot be made"),
        ({"learning_rate": -1.0}, "positive"),
        ({"lstm_size": 0}, "lstm_size"),
        ({"schedule": "linear"}, "unknown schedule 'linear'"),
    ],
)
def test_a_scheduler_s_mistakes(kwargs, message):
    with pytest.raises(ValueError, match=message):
        scheduler(**kwargs)


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (mlp, {"hidden_size": 1}),
        (adafac_mlp, {"hidden_size": 0}),
        (velo, {"bank_size": 0}),
        (velo, {"loss_horizon": 0}),
        (celo, {"lstm_size": 0}),
        (RULES["celo_adam"], {"lstm_size": 0}),
    ],
)
def test_sizes_out_of_range_are_refused(make, kwargs):
    with pytest.raises(ValueError, match="needs"):
        make(**kwargs)


# --- training a part


def test_a_part_of_theta_alone_moves():
    rule = celo(lstm_size=4)
    theta = rule.init(jax.random.key(0))
    part = parts.only(rule, theta, ["scheduler"])
    p = jnp.linspace(-1, 1, 6).reshape(2, 3)

    def updates(rule, theta):
        tx = rule.build(theta, num_steps=10)
        return tx.update(p, tx.init(p), p, value=jnp.float32(1.0))[0]

    np.testing.assert_array_equal(updates(part.rule, part.theta), updates(rule, theta))
    moved = jax.tree.map(lambda x: x + 0.1, part.theta)
    assert np.any(updates(part.rule, moved) != updates(rule, theta))
    whole = part.whole(moved)
    assert jax.tree.structure(whole) == jax.tree.structure(theta)
    jax.tree.map(np.testing.assert_array_equal, whole["bank"], theta["bank"])
    assert jax.tree.structure(part.rule.init(jax.random.key(1))) == jax.tree.structure(part.theta)
    grads = jax.grad(lambda x: jnp.sum(updates(part.rule, x) ** 2))(part.theta)
    assert float(optax.tree.norm(grads)) > 0
    for names in ([], ["other"], ["bank", "other"]):
        with pytest.raises(ValueError, match="bank, scheduler"):
            parts.only(rule, theta, names)


def test_the_first_phase_of_celo_needs_no_scheduler():
    rule, full = celo(scheduled=False, lstm_size=4), celo(lstm_size=4)
    theta = full.init(jax.random.key(0))  # the multiplier starts at 1
    assert jax.tree.map(jnp.shape, theta) == jax.tree.map(jnp.shape, rule.init(jax.random.key(0)))
    assert rule.needs == ()
    p = jnp.linspace(-1, 1, 6).reshape(2, 3)
    alone, scheduled = rule.build(theta), full.build(theta, num_steps=10)
    u, _ = alone.update(p, alone.init(p), p)
    v, _ = scheduled.update(p, scheduled.init(p), p, value=jnp.float32(1.0))
    np.testing.assert_allclose(u, v, rtol=1e-5)


@pytest.mark.parametrize("hidden", [32, 29])  # units that part into eights, and that do not part
def test_blocks_of_rows_give_what_the_whole_matrix_does_and_an_accelerator(monkeypatch, accelerate, hidden):
    p = jax.random.normal(jax.random.key(0), (150, 256))  # four blocks of 32 rows, and more rows

    def update():
        rule = mlp(hidden_size=hidden)  # traced anew
        theta = rule.init(jax.random.key(1))

        def of(theta):
            tx = rule.build(theta)
            return tx.update(p, tx.init(p), p)[0]

        gradient = jax.grad(lambda theta: jnp.sum(of(theta) * jnp.sin(7 * p)))
        return jax.jit(of)(theta), jax.jit(gradient)(theta)

    by_blocks = update()
    monkeypatch.setattr(kernels, "_BLOCK", p.size)
    whole = update()
    accelerate()
    for other in (by_blocks, update()):
        np.testing.assert_allclose(other[0], whole[0], rtol=1e-5, atol=1e-8)
        for name, x in whole[1].items():
            np.testing.assert_allclose(other[1][name], x, rtol=1e-4, atol=1e-4 * np.abs(x).max(), err_msg=name)
