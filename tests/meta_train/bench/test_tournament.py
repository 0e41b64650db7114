"""The benchmark's runs against runs by hand; what is kept, and what is computed anew."""

import functools
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import learned_opt
from meta_train.bench import cache, contenders, measures, timing, tournament
from meta_train.bench.contenders import Contender
from meta_train.bench.tournament import Plan, run_suite
from tasks.families.synthetic import quadratic
from tasks.suites import Entry

FAMILY = quadratic(dim=3, condition=(1.0, 10.0))
ENTRY = Entry("quadratic", "quadratic", "quadratic 1-10", lambda: FAMILY)
STEPS, SEEDS = 30, 3
PLAN = Plan(STEPS, SEEDS, tuning_seeds=2)
ADAM = Contender("adam", lambda rate, num_steps: optax.adam(rate), (1e-2, 1e-1), baseline=True)


@functools.cache
def step_by_hand(transform):
    @jax.jit
    def step(task_key, params, state, key):
        task = FAMILY.task(FAMILY.data, FAMILY.sample(task_key))
        k_batch, k_loss = jax.random.split(key)
        batch = task.batch(k_batch, "train")
        loss, grads = jax.value_and_grad(lambda p: task.loss(p, k_loss, batch)[0])(params)
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def by_hand(transform, seed, steps=STEPS):
    k_cfg, k_init, k_train, _ = jax.random.split(jax.random.PRNGKey(seed), 4)
    params = FAMILY.task(FAMILY.data, FAMILY.sample(k_cfg)).init(k_init)
    state, losses = transform.init(params), []
    for key in jax.random.split(k_train, steps):
        params, state, loss = step_by_hand(transform)(k_cfg, params, state, key)
        losses.append(float(loss))
    return np.asarray(losses)


@pytest.fixture(scope="module")
def results():
    contender = Contender(
        "sgd", lambda rate, num_steps: optax.sgd(rate), (1e-3, 0.3, 100.0), default=1e-2, baseline=True
    )
    shown = []
    found = run_suite([ENTRY], [ADAM, contender], PLAN, show=lambda *told: shown.append(told))
    assert [done for done, *_ in shown] == [1, 2]
    assert [result.contender for result in found] == ["adam", "sgd", "sgd@0.01"]
    return {result.contender: result for result in found}


@pytest.mark.parametrize(("name", "rate"), [("sgd", 0.3), ("sgd@0.01", 0.01)])
def test_a_run_is_what_optax_does_by_hand(results, name, rate):
    losses = np.stack([by_hand(optax.sgd(rate), 2_000_000 + seed) for seed in range(SEEDS)])
    np.testing.assert_allclose(results[name].curves, measures.smooth(losses), rtol=1e-4)
    np.testing.assert_allclose(results[name].initial, losses[:, 0], rtol=1e-5)
    np.testing.assert_allclose(results[name].final, losses[:, -1], rtol=1e-4)  # a twentieth of 30 steps is one
    assert results[name].learning_rate == pytest.approx(rate)
    assert results[name].num_params == 3


def test_the_grid_is_searched_on_other_seeds(results):
    assert not results["sgd"].on_edge
    assert not results["adam"].on_edge  # the grid went up to 0.1, and was made longer to 10
    # without noise the validation loss after the last step is the training loss of one more
    ends = {rate: [by_hand(optax.adam(rate), 1_000_000 + s, STEPS + 1)[-1] for s in range(2)] for rate in (0.1, 1, 10)}
    assert results["adam"].learning_rate == min(ends, key=lambda rate: np.mean(ends[rate]))
    assert results["adam"].state_bytes == 4 * (3 + 3 + 1)


def test_rates_are_chosen_by_the_validation_loss():
    class State(NamedTuple):
        rate: jax.Array

    def make(rate, num_steps):
        def update(grads, state, params=None):
            return jax.tree.map(lambda g: -rate * g, grads), state

        return optax.GradientTransformation(lambda params: State(jnp.asarray(rate)), update)

    def validated(state, params):  # far off at any rate but 0.1
        return jax.tree.map(lambda p: p + 10 * (jnp.abs(state.rate - 0.1) > 0.01), params)

    contender = Contender("mine", make, (0.01, 0.1, 0.3), evaluate=validated)
    (result,) = run_suite([ENTRY], [contender], PLAN)
    assert result.learning_rate == pytest.approx(0.1)
    assert by_hand(optax.sgd(0.3), 1_000_000)[-1] < by_hand(optax.sgd(0.1), 1_000_000)[-1]


def test_a_grid_grows_beyond_the_edge_that_the_best_lies_on():
    assert tournament._beyond((0.1, 0.2, 0.4), 1) == []
    assert tournament._beyond((0.1, 0.2, 0.4), 2) == [0.8, 1.6]
    assert tournament._beyond((0.1, 0.2, 0.4), 0) == [0.05, 0.025]
    assert tournament._beyond((0.1,), 0) == []
    tiny = Contender("tiny", lambda rate, num_steps: optax.sgd(rate), (1e-8, 1e-7))
    (result,) = run_suite([ENTRY], [tiny], PLAN._replace(tuning_seeds=1))
    assert result.on_edge  # longer three times, and still
    assert result.learning_rate == pytest.approx(1e-1)


def test_a_diverging_rate_is_never_chosen_and_is_counted():
    wild = Contender("wild", lambda rate, num_steps: optax.sgd(rate), (0.1, 100.0, 1e30))
    (result,) = run_suite([ENTRY], [wild], PLAN._replace(tuning_seeds=1))
    assert result.learning_rate == 0.1
    assert result.diverged == 0
    (result,) = run_suite([ENTRY], [wild._replace(grid=(1e30,))], PLAN._replace(tuning_seeds=1))
    assert result.diverged == SEEDS


def test_a_task_may_fix_its_number_of_steps():
    (result,) = run_suite([ENTRY._replace(steps=7)], [ADAM._replace(grid=())], PLAN)
    assert result.curves.shape == (SEEDS, 7)
    assert np.isnan(result.learning_rate)


def test_what_is_evaluated_may_differ_from_what_is_trained():
    still = Contender("still", lambda rate, num_steps: optax.sgd(0.0), ())
    moved = still._replace(name="moved", evaluate=lambda state, params: jax.tree.map(lambda p: p + 1e3, params))
    before, after = run_suite([ENTRY], [still, moved], PLAN)
    np.testing.assert_array_equal(before.final, after.final)
    assert np.all(after.valid > 1e3 * before.valid)


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_a_second_run_computes_nothing(tmp_path, monkeypatch):
    plan = PLAN._replace(folder=tmp_path / "kept")
    first = run_suite([ENTRY], [ADAM], plan)
    monkeypatch.setattr(tournament, "compile_run", None)  # not called
    for ours, theirs in zip(first, run_suite([ENTRY], [ADAM], plan), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_damaged_file_is_computed_anew(tmp_path):
    plan = PLAN._replace(folder=tmp_path)
    (first,) = run_suite([ENTRY], [ADAM], plan)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    (again,) = run_suite([ENTRY], [ADAM], plan)
    np.testing.assert_array_equal(first.curves, again.curves)
    assert path.read_bytes() == whole


def test_the_key_is_of_what_is_computed():
    other = Entry("quadratic", "quadratic", "quadratic 1-10", lambda: quadratic(dim=3, condition=(1.0, 20.0)))
    data = Entry("data", "f", "d", lambda: FAMILY._replace(data={"unused": jnp.ones(2)}))
    more = Entry("data", "f", "d", lambda: FAMILY._replace(data={"unused": jnp.ones(2) + 1}))

    def without_gradient(data, cfg):
        task = FAMILY.task(data, cfg)
        return task._replace(loss=lambda p, key, batch: task.loss(jax.lax.stop_gradient(p), key, batch))

    still = Entry("quadratic", "quadratic", "no gradient", lambda: FAMILY._replace(task=without_gradient))
    changed = [
        (other, ADAM, PLAN),
        (data, ADAM, PLAN),
        (more, ADAM, PLAN),
        (still, ADAM, PLAN),
        (ENTRY._replace(steps=31), ADAM, PLAN),
        (ENTRY, ADAM._replace(make=lambda rate, num_steps: optax.adam(rate, b1=0.91)), PLAN),
        (ENTRY, ADAM._replace(grid=(1e-2,)), PLAN),
        (ENTRY, ADAM._replace(default=1e-2), PLAN),
        (ENTRY, ADAM, PLAN._replace(steps=31)),
        (ENTRY, ADAM, PLAN._replace(seeds=4)),
        (ENTRY, ADAM, PLAN._replace(tuning_seeds=1)),
    ]
    keys = {tournament.run_key(*arguments) for arguments in (*changed, (ENTRY, ADAM, PLAN))}
    assert len(keys) == len(changed) + 1 - 1  # 31 steps are 31 steps, whoever asks for them
    named = ADAM._replace(name="other", make=lambda rate, num_steps: optax.adam(rate), about="the same by another name")
    assert tournament.run_key(ENTRY._replace(name="other"), named, PLAN) == tournament.run_key(ENTRY, ADAM, PLAN)


def test_a_contenders_meta_parameters_are_in_its_key():
    def scaled(scale):
        return Contender("c", lambda rate, num_steps: optax.stateless(lambda g, p: jax.tree.map(scale.__mul__, g)), ())

    params = {"w": jnp.ones((3, 2))}
    one, same, other = (contenders.fingerprint(scaled(jnp.asarray(s)), 10, params) for s in (1.0, 1.0, 1.0 + 1e-7))
    assert one == same != other


def test_what_an_optimizer_does_with_a_task_s_names_is_in_its_key():
    def decayed(name):
        mask = lambda params: {key: key == name for key in params}  # noqa: E731
        return Contender("c", lambda rate, num_steps: optax.adamw(rate, weight_decay=0.1, mask=mask), ())

    params = {"first": jnp.ones((3, 2)), "last": jnp.ones((3, 2))}
    assert len({contenders.fingerprint(decayed(name), 10, params) for name in ("first", "last", "none")}) == 3


def test_contents_tell_arrays_apart():
    trees = [{"a": np.zeros(2)}, {"b": np.zeros(2)}, {"a": np.zeros((2, 1))}, {"a": np.zeros(4, np.float32)}]
    assert len({cache.contents(tree) for tree in trees}) == len(trees)


# -- contenders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contender", contenders.baselines(), ids=lambda contender: contender.name)
def test_baselines_have_their_grid_and_learn(contender):
    assert contender.baseline
    assert len(contender.grid) == (0 if contender.name == "adamw-calibrated" else 7)
    if contender.grid:
        np.testing.assert_allclose(np.diff(np.log10(contender.grid)), 0.5, atol=2e-3)
    result, *_ = run_suite([ENTRY], [contender], Plan(60, 2, 1))
    assert result.diverged == 0
    assert np.all(result.final < 0.9 * result.initial)


def test_names_of_baselines_are_unique():
    names = [contender.name for contender in contenders.baselines()]
    assert len(set(names)) == len(names)
    assert names[0] == contenders.REFERENCE
    assert set(contenders.FEW) < set(contenders.QUICK) < set(names)


def test_muon_orthogonalises_kernels_of_any_rank_over_their_last_axis():
    (muon,) = (contender for contender in contenders.baselines() if contender.name == "muon")
    transform = muon.make(1.0, 10**9)
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 4)) * jnp.array([1.0, 0.3, 0.1, 0.1]).reshape(1, 1, 1, 4)
    params = {"kernel": jnp.zeros_like(kernel), "bias": jnp.zeros(4)}
    grads = {"kernel": kernel, "bias": kernel[0, 0, 0]}
    updates, _ = transform.update(grads, transform.init(params), params)
    before, after = (jnp.linalg.svd(x.reshape(18, 4), compute_uv=False) for x in (kernel, updates["kernel"]))
    assert before.max() > 10 * before.min()
    assert after.max() < 2 * after.min()
    sizes = jnp.abs(updates["bias"])  # Adam's first step: all of one size
    np.testing.assert_allclose(sizes, jnp.full_like(sizes, sizes[0]), rtol=1e-4)


# -- time ------------------------------------------------------------------------------------------------------------


def test_steps_are_timed_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "_SECONDS", 1e-4)
    plan = PLAN._replace(folder=tmp_path, timed=True)
    (first,) = run_suite([ENTRY], [ADAM], plan)
    assert first.timing is not None
    assert first.timing.gradient > 0
    assert first.timing.step == first.timing.reference > 0
    compiled = []
    monkeypatch.setattr(tournament, "compile_run", lambda *arguments: compiled.append(arguments[1].name))
    (again,) = run_suite([ENTRY], [ADAM], plan)
    assert again.timing == first.timing
    assert not compiled
    with pytest.raises(ValueError, match="beside 'adam'"):
        run_suite([ENTRY], [ADAM._replace(name="other")], plan)


def test_turns_are_taken_by_all_in_each_round():
    order = []

    def loop(name, milliseconds):
        def seconds(number):
            order.append(name)
            return number * milliseconds / 1000

        return seconds

    found = timing.take_turns({"slow": loop("slow", 30.0), "quick": loop("quick", 2.0)}, rounds=2)
    assert found == pytest.approx({"slow": 30.0, "quick": 2.0})
    assert order == ["slow"] * 3 + ["quick"] * 3 + ["slow", "quick"] * 2


def test_jobs_run_on_every_device_and_an_error_ends_them():
    used = dict(tournament.on_devices(lambda job, device, go_on: (job * job, device), range(20)))
    assert {index: square for index, (square, _) in used.items()} == {i: i * i for i in range(20)}
    with pytest.raises(ZeroDivisionError):
        list(tournament.on_devices(lambda job, device, go_on: 1 / job, [1, 0, 2]))


@pytest.mark.skipif(jax.local_device_count() < 2, reason="two jobs at once want two devices")
def test_an_error_in_one_job_ends_those_that_run():
    started, steps = threading.Event(), []

    def work(job, device, go_on):
        if job:
            started.wait()
            raise ZeroDivisionError
        started.set()
        for step in range(1000):
            go_on()
            steps.append(step)
            time.sleep(0.01)

    with pytest.raises(ZeroDivisionError):
        list(tournament.on_devices(work, [0, 1]))
    assert len(steps) < 1000


def test_a_rate_that_went_on_and_diverged_is_not_chosen():
    """Where all three that went on diverge on the second tuning seed, the best on the first seed is as good as any."""

    class Fake:
        def losses(self, rates, seeds):
            later = np.nan if self.all_diverge else 5 - 2 * np.array(rates)
            valid = np.where(np.array(seeds) == 1_000_000, rates, later)
            return np.zeros((len(rates), 4)), valid

    contender, fake = Contender("x", None, (9.0, 1.0, 2.0, 3.5, 10.0)), Fake()
    for fake.all_diverge, rate in ((False, 3.5), (True, 1.0)):
        assert tournament._tune_and_report(fake, contender, Plan(4, 1), lambda: None)["rates"] == [rate]


def test_the_control_of_a_saved_rule_has_fresh_meta_parameters(tmp_path):
    rule = learned_opt.RULES["light"]()
    fresh = rule.init(jax.random.key(0))
    trained = jax.tree.map(lambda x: x + 0.5, fresh)
    learned_opt.save(tmp_path / "mine", "light", trained, kwargs={})
    params = {"w": jnp.ones((3, 2))}

    def first(make):
        tx = make(None, 10)
        return tx.update(params, tx.init(params), params)[0]["w"]

    for name, theta in (("mine", trained), ("mine:untrained", fresh)):
        found = contenders.pretrained(str(tmp_path / name))
        assert found.name == name
        expected = first(lambda rate, num_steps, theta=theta: rule.build(theta, num_steps=num_steps))
        np.testing.assert_allclose(first(found.make), expected, rtol=1e-6)
