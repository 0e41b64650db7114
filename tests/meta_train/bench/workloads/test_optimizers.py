"""The optimizers on workloads: schedule, what is decayed and orthogonalised, controls, one program for all settings."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import learned_opt
from meta_train.bench.workloads import optimizers
from meta_train.bench.workloads.baselines import baselines, cautious, normuon_direction, soap_direction
from meta_train.bench.workloads.optimizers import schedule

PARAMS = {
    "~": {"embed": jnp.ones((5, 4))},
    "layer": {"w": jnp.ones((4, 6)), "b": jnp.ones(6)},
    "output": {"w": jnp.ones((6, 3))},
}
GRADS = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), PARAMS)


def test_the_schedule_rises_to_the_rate_and_falls_to_nothing():
    rate = schedule({"learning_rate": 2.0, "warmup": 0.1}, 100)
    values = np.array([float(rate(count)) for count in range(101)])
    np.testing.assert_allclose(values[:10], 2.0 * np.arange(1, 11) / 10)
    assert values.argmax() in (9, 10)
    np.testing.assert_allclose(values[55], 1.0, atol=1e-6)  # half way down
    assert values[100] == pytest.approx(0.0, abs=1e-6)
    assert (np.diff(values[10:]) <= 0).all()


@pytest.mark.parametrize("optimizer", baselines(), ids=lambda optimizer: optimizer.name)
def test_baselines_take_traced_settings_and_go_downhill(optimizer):
    assert set(optimizer.space) <= set(optimizer.setting)
    for name, bounds in optimizer.space.items():
        assert bounds.low <= optimizer.setting[name] <= bounds.high, name
    assert optimizer.source

    @jax.jit
    def update(settings):
        transform = optax.with_extra_args_support(optimizer.make(settings, 100))
        state = transform.init(PARAMS)
        for _ in range(3):
            updates, state = transform.update(GRADS, state, PARAMS, value=jnp.float32(1.0))
        return updates

    settings = {name: jnp.float32(value) for name, value in optimizer.setting.items()}
    updates = update(settings)
    slope = sum(jnp.vdot(u, g) for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(GRADS), strict=True))
    assert slope < 0
    assert update._cache_size() == 1
    update({name: value * 0.9 for name, value in settings.items()})
    assert update._cache_size() == 1


def test_weight_decay_spares_vectors():
    nadamw = baselines()[0]
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    transform = nadamw.make({**nadamw.setting, "weight_decay": 0.5}, 100)
    updates, _ = transform.update(zero, transform.init(PARAMS), PARAMS)
    rate = float(schedule(nadamw.setting, 100)(0))
    np.testing.assert_allclose(updates["layer"]["w"], -0.5 * rate, rtol=1e-5)
    assert not updates["layer"]["b"].any()


def test_muon_orthogonalises_hidden_matrices_alone():
    muon = next(optimizer for optimizer in baselines() if optimizer.name == "muon")
    transform = muon.make({**muon.setting, "weight_decay": 0.0}, 100)
    updates, _ = transform.update(GRADS, transform.init(PARAMS), PARAMS)
    sizes = np.linalg.svd(updates["layer"]["w"], compute_uv=False)
    assert sizes.max() < 2.5 * sizes.min()
    raw = np.linalg.svd(updates["output"]["w"], compute_uv=False)  # Adam's signs
    np.testing.assert_allclose(np.abs(updates["output"]["w"]), np.abs(updates["output"]["w"]).max(), rtol=1e-3)
    assert raw.max() > 0


def test_cautious_keeps_what_agrees_with_the_gradient():
    transform = cautious(optax.stateless(lambda u, p: jnp.array([1.0, -2.0, 3.0, 4.0])))
    updates, _ = transform.update(jnp.array([1.0, 1.0, 1.0, -1.0]), transform.init(jnp.ones(4)))
    np.testing.assert_allclose(updates, [2.0, 0.0, 6.0, 0.0])  # half of them agree


def test_the_identity_control_is_soap_orthogonalised_at_unit_rms():
    control = optimizers.identity("control", 0.1, {"max_ratio": math.inf})
    settings = {**control.setting, "warmup": 0.01}
    transform = control.make(settings, 1000)
    _, state = transform.update(GRADS, transform.init(PARAMS), PARAMS)  # SOAP's first update moves nothing
    updates, _ = transform.update(GRADS, state, PARAMS)
    rate = float(schedule(settings, 1000)(1))
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(leaf**2)), rate, rtol=1e-4)
    direction = soap_direction({"one_minus_b1": 0.05, "one_minus_b2": 0.05})
    _, state = direction.update(GRADS, direction.init(PARAMS), PARAMS)
    plain, _ = direction.update(GRADS, state, PARAMS)
    left, _, right = np.linalg.svd(plain["layer"]["w"], full_matrices=False)
    found = updates["layer"]["w"] / np.linalg.norm(updates["layer"]["w"])
    nearest = -(left @ right) / np.linalg.norm(left @ right)
    assert (found * nearest).sum() > 0.95


def test_a_flagship_brings_its_controls():
    names = [optimizer.name for optimizer in optimizers.pretrained("flagship-1")]
    assert names == ["flagship-1", "flagship-1:identity", "flagship-1:untrained", "flagship-1:no-newton-schulz"]
    kinds = [optimizer.kind for optimizer in optimizers.pretrained("flagship-1")]
    assert kinds == ["learned", "control", "control", "control"]


def test_a_light_rule_brings_its_control():
    assert [optimizer.name for optimizer in optimizers.pretrained("flagship-light")][1:] == ["flagship-light:untrained"]


def test_a_control_layer_brings_itself_with_nothing_trained():
    trained, fresh = optimizers.pretrained("flagship")
    assert (fresh.name, fresh.kind, fresh.setting) == ("flagship:untrained", "control", {})

    def first(optimizer):
        transform = optimizer.make({}, 100)
        return transform.update(GRADS, transform.init(PARAMS), PARAMS)[0]

    ours, theirs = first(trained), first(fresh)
    for u, v in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert not np.allclose(u, v)
        np.testing.assert_allclose(np.linalg.norm(u), np.linalg.norm(v), rtol=0.05)  # steps of the same size


def test_a_learned_schedule_brings_itself_over_soap():
    _, control = optimizers.pretrained("flagship-1-auto")
    assert (control.name, control.kind, control.setting) == ("flagship-1-auto:over-soap", "control", {})
    transform, soap = control.make({}, 100), learned_opt.directions.scale_by_soap()
    state, plain = transform.init(PARAMS), soap.init(PARAMS)
    for _ in range(2):  # SOAP's first update moves nothing
        updates, state = transform.update(GRADS, state, PARAMS, value=jnp.float32(2.0))
        direction, plain = soap.update(GRADS, plain, PARAMS)
    ratios = [u / d for u, d in zip(jax.tree.leaves(updates), jax.tree.leaves(direction), strict=True)]
    rate = float(ratios[0].reshape(-1)[0])
    assert 3e-4 < rate < 3e-2  # within a factor of ten of SOAP's own
    for ratio in ratios:
        np.testing.assert_allclose(ratio, rate, rtol=1e-4)


def test_a_rule_that_sets_its_own_step_size_has_nothing_to_search():
    (adafac,) = optimizers.pretrained("adafac-mlp")
    assert adafac.setting == {}
    assert adafac.space == {}


def test_a_learned_rule_follows_the_schedule():
    rule = learned_opt.RULES["celo2"]()
    theta = rule.init(jax.random.key(0))
    optimizer = optimizers.learned("mine", rule, theta, 0.01)
    settings = {**optimizer.setting, "weight_decay": 0.1}
    transform = optimizer.make(settings, 10)
    updates, _ = transform.update(GRADS, transform.init(PARAMS), PARAMS)
    plain = rule.build(theta)
    direction, _ = plain.update(GRADS, plain.init(PARAMS), PARAMS)
    rate = float(schedule(settings, 10)(0))
    np.testing.assert_allclose(updates["layer"]["w"], rate * (direction["layer"]["w"] - 0.1), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(updates["layer"]["b"], rate * direction["layer"]["b"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["soap-muon", "normuon"])
def test_orthogonalised_updates_have_adams_rms_and_spare_the_rest(name):
    found = next(optimizer for optimizer in baselines() if optimizer.name == name)
    settings = {**found.setting, "weight_decay": 0.0, "warmup": 0.01}
    transform = found.make(settings, 1000)
    _, state = transform.update(GRADS, transform.init(PARAMS), PARAMS)  # SOAP's first update moves nothing
    updates, _ = transform.update(GRADS, state, PARAMS)
    rate = float(schedule(settings, 1000)(1))
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(updates["layer"]["w"] ** 2)), 0.2 * rate, rtol=1e-3)
    for part in (updates["~"]["embed"], updates["layer"]["b"], updates["output"]["w"]):
        np.testing.assert_allclose(jnp.abs(part), rate, rtol=1e-3)  # Adam's signs, the gradient being the same twice


def test_normuon_moves_every_output_alike():
    gradient = GRADS["layer"]["w"] * jnp.array([[100.0, 1, 1, 1, 1, 1]])
    params = {"layer": {"w": PARAMS["layer"]["w"]}}
    direction = normuon_direction({"one_minus_b1": 0.05, "one_minus_b2": 0.05})
    updates, _ = direction.update({"layer": {"w": gradient}}, direction.init(params), params)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(updates["layer"]["w"] ** 2, 0)), 0.2, rtol=1e-3)
