"""The learner of learned outer steps against the transform that users run, and a short meta-training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import learned_opt
from learned_opt.local_sgd import map_workers, spread_workers, worker_axes
from meta_train.train import estimators
from meta_train.train.learners.local_sgd import local_sgd_learner
from meta_train.train.trainer import make_mesh, make_trainer
from tasks.base import Task, only


def regression(dim=3):
    """Noisy least squares: each batch has its own rows."""

    def loss(params, key, batch):
        x, noise = batch
        return 0.5 * jnp.mean((x @ (params["w"] - jnp.arange(1.0, dim + 1)) + noise) ** 2), {}

    def batch(key, split):
        k_x, k_noise = jax.random.split(key)
        return jax.random.normal(k_x, (4, dim)), 0.1 * jax.random.normal(k_noise, (4,))

    return only(Task(init=lambda key: {"w": jnp.zeros(dim)}, batch=batch, loss=loss))


@pytest.mark.parametrize(
    ("workers", "delay", "name"), [(1, 1, "sgd"), (3, 4, "adamw"), (2, 3, "muon"), (2, 2, "flagship")]
)
@pytest.mark.parametrize("falls", [False, True])
def test_a_round_is_the_transform_s_round(workers, delay, name, falls):
    family, rule = regression(), learned_opt.RULES["sgdm"](learning_rate=0.7, momentum=0.5)
    theta = rule.init(jax.random.key(0))
    names = ["flagship"] if name == "flagship" else ["muon", "sgd", "adamw"]
    rates = dict.fromkeys(names, (0.1, 0.1))
    learner = local_sgd_learner(rule, family, max_workers=5, delays=(delay, delay), local_optimizers=rates)
    state = learner.init(theta, jax.random.key(1))
    number = names.index(name)
    state = state._replace(workers=jnp.asarray(workers), optimizer=jnp.asarray(number), falls=jnp.asarray(falls))
    task = family.task((), {})

    def rate(count):
        return 0.1 * (0.5 * (1 + jnp.cos(jnp.pi * (count // delay) / state.num_rounds)) if falls else 1.0)

    inner = {
        "sgd": optax.sgd(rate),
        "adamw": optax.adamw(rate, b2=0.99, weight_decay=0.05),
        "muon": optax.contrib.muon(rate, consistent_rms=0.2, weight_decay=0.05),
        "flagship": optax.chain(
            learned_opt.load("flagship", num_steps=state.num_rounds * delay), optax.scale_by_schedule(rate)
        ),
    }
    transform = learned_opt.local_sgd.local_sgd(inner[name], rule.build(theta), sync_every=delay)
    opt_state = transform.init(state.anchor)
    axes = worker_axes(opt_state)

    def local(params, opt_state, key):
        k_batch, k_loss = jax.random.split(key)
        grads = jax.grad(lambda p: task.loss(p, k_loss, task.batch(k_batch, "train"))[0])(params)
        updates, opt_state = transform.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    local = jax.jit(map_workers(local, in_axes=(0, axes, 0), out_axes=(0, axes)))
    params, opt_state = spread_workers(state.anchor, workers), spread_workers(opt_state, workers, axes)
    step = jax.jit(learner.step)
    for round_ in range(3):
        key = jax.random.fold_in(jax.random.key(2), round_)
        state, _ = step(theta, state, key)
        keys = jax.random.split(key, 5)[:workers]
        for i in range(delay):
            params, opt_state = local(params, opt_state, jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys))
        np.testing.assert_allclose(params["w"][0], state.anchor["w"], rtol=1e-5, atol=1e-6)
    assert int(opt_state.round) == 3


def test_absent_workers_count_for_nothing_even_when_they_diverge():
    rule = learned_opt.RULES["sgd"](learning_rate=1.0)
    theta = rule.init(jax.random.key(0))
    learner = local_sgd_learner(
        rule, regression(), max_workers=4, delays=(30, 30), local_optimizers={"sgd": (1e3, 1e3)}
    )
    state = learner.init(theta, jax.random.key(1))._replace(workers=jnp.asarray(1))
    calm = state._replace(delay=jnp.asarray(1), local_rate=jnp.asarray(0.1))
    assert np.all(np.isfinite(jax.jit(learner.step)(theta, calm, jax.random.key(3))[0].anchor["w"]))
    _, loss = jax.jit(learner.step)(theta, state, jax.random.key(3))
    assert np.isfinite(loss)


def test_workers_delays_and_rounds_are_drawn():
    rule = learned_opt.RULES["sgd"]()
    rates = {"sgd": (0.1, 0.4), "adamw": (0.001, 0.01)}
    learner = local_sgd_learner(
        rule, regression(), max_workers=4, delays=(2, 16), rounds=(10, 50), multiple_of=10, local_optimizers=rates
    )
    keys = jax.random.split(jax.random.key(0), 200)
    states = jax.jit(jax.vmap(learner.init, (None, 0)))(rule.init(keys[0]), keys)
    assert set(np.asarray(states.workers)) == {1, 2, 3, 4}
    assert (states.delay.min(), states.delay.max()) == (2, 16)
    for number, (low, high) in enumerate(rates.values()):
        drawn = states.local_rate[states.optimizer == number]
        assert 60 < drawn.size < 140  # of 200 coins: 5.7 standard errors
        assert low <= drawn.min() < 1.2 * low
        assert high / 1.2 < drawn.max() <= high
    assert 60 < states.falls.sum() < 140
    assert set(np.asarray(states.num_rounds)) == {10, 20, 30, 40, 50}
    np.testing.assert_array_equal(jax.vmap(learner.remaining)(states), states.num_rounds)


def test_meta_training_finds_a_better_outer_step():
    family, rule = regression(), learned_opt.RULES["sgdm"](learning_rate=0.1, momentum=0.1)

    def build(data):
        learner = local_sgd_learner(
            rule,
            family._replace(data=data),
            delays=(2, 4),
            local_optimizers={"sgd": (0.03, 0.1)},
            rounds=(10, 20),
            multiple_of=5,
        )
        return [estimators.pes(learner, unroll=5, sigma=0.1)]

    trainer = make_trainer(rule.init, build, optax.adam(0.1), particles=16, mesh=make_mesh(jax.devices()[:1]))
    state = trainer.init(jax.random.key(0), ())
    losses = []
    for _ in range(40):
        state, info = trainer.meta_step(state, ())
        losses.append(float(info.loss))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    assert jnp.exp(state.theta["log_learning_rate"]) > 0.2
