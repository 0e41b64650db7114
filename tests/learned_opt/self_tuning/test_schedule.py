"""Schedules: arrays, JSON, Optax schedules, plots, and the replay of a run on its own and on another model."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest

from learned_opt import self_tuning as st

SPECS = {"a": [st.log(1.0, per_example=False), st.real(3.0, tuned=False)], "b": st.logit(0.5, per_example=False)}


def schedule():
    steps = np.array([0, 10, 30])
    mean = np.array([[0.0, 0.0], [1.0, -1.0], [2.0, 4.0]], np.float32)
    return st.Schedule(SPECS, steps, mean, np.full((3, 2), 0.1, np.float32))


def test_values_and_optax_schedules():
    made = schedule()
    found = made.values()
    assert list(found) == ["a/0", "b"]
    np.testing.assert_allclose(found["a/0"], np.exp([0.0, 1.0, 2.0]), rtol=1e-6)
    curves = st.optax_schedules(made)
    at = jnp.array([-5, 0, 5, 10, 20, 30, 99])
    expected = np.exp([0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.0])
    np.testing.assert_allclose(jax.jit(jax.vmap(curves["a/0"]))(at), expected, rtol=1e-6)
    optax.scale_by_schedule(curves["b"]).init(jnp.zeros(2))


def test_json_gives_back_the_last_bit():
    made = schedule()._replace(mean=np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32))
    back = st.schedule_from_json(st.schedule_to_json(made))
    assert back.specs == made.specs
    for a, b in zip(back[1:], made[1:], strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    with pytest.raises(ValueError, match="no text of schedule_to_json"):
        st.schedule_from_json(st.to_json(SPECS))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="needs mean and sigma of shape"):
        st.constant(SPECS, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="no cycles"):
        st.from_run(SPECS, [], 5)
    broken = st.schedule_to_json(schedule()).replace("[0, 10, 30]", "[0, 10, 10]")
    with pytest.raises(ValueError, match="must increase"):
        st.schedule_from_json(broken)
    with pytest.raises(ValueError, match="no text of schedule_to_json"):
        st.schedule_from_json(st.schedule_to_json(schedule()).replace('"specs"', '"spec"'))
    with pytest.raises(ValueError, match="not a hyperparameter"):
        st.from_json(st.to_json({"a": st.real(1.0)}).replace('"dict"', '"list"'))


def test_plot_draws_a_line_a_schedule():
    fig, axes = plt.subplots(1, 2)
    st.plot({"run": schedule(), "end": st.constant(SPECS, schedule().mean[-1])}, axes)
    assert [len(ax.lines) for ax in axes] == [2, 2]
    assert axes[0].get_title() == "a/0"
    plt.close(fig)


X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
T = jnp.asarray(np.random.default_rng(1).normal(size=8), jnp.float32)
RIDGE = {"l2": st.log(1.0, per_example=False)}


def ridge_loss(predict):
    def loss(params, hparams, key, batch):
        return jnp.mean((predict(params, batch[0]) - batch[1]) ** 2) + hparams["l2"] * st.squared_norm(params)

    return loss


def test_a_replayed_run_takes_the_same_steps():
    """Delta-STN's elementary parameters see the mean alone: replaying it, on the same batches, they are the same."""
    predict = st.dense_lift(lambda w, x: x @ w)
    everything = lambda data, key: data  # noqa: E731
    made = st.tuner(
        *(RIDGE, ridge_loss(predict), lambda w, b: jnp.mean((predict(w, b[0]) - b[1]) ** 2), everything, everything),
        weights=optax.adam(0.05),
        hyper=optax.adam(0.05),
        train_steps=1,
    )
    w = jnp.zeros(3)
    state = made.init(w, st.dense_response(w, 1))
    state, first = made.run(state, jax.random.key(0), (X, T), 20)
    state, second = made.run(state, jax.random.key(0), (X, T), 20)
    found = st.from_run(RIDGE, [first, second], train_steps=1)
    assert found.mean.shape == (40, 1)
    assert len(np.unique(found.mean)) == 40

    again = st.replay(found, ridge_loss(predict), everything, optax.adam(0.05))
    replayed, losses = again.run(again.init(w), jax.random.key(5), (X, T), 40)
    np.testing.assert_allclose(replayed.params, state.params, rtol=1e-4)
    np.testing.assert_allclose(losses, np.concatenate([first.train_loss, second.train_loss]), rtol=1e-4)

    held = st.replay(st.constant(RIDGE, found.mean[-1]), ridge_loss(predict), everything, optax.adam(0.05))
    assert not np.allclose(held.run(held.init(w), jax.random.key(5), (X, T), 40)[0].params, state.params, rtol=1e-3)


def test_replay_on_another_model_with_perturbations():
    def deeper(params, x):
        return jnp.tanh(x @ params["hidden"]) @ params["out"]

    params = {"hidden": jax.random.normal(jax.random.key(0), (3, 6)), "out": jnp.zeros(6)}
    found = st.Schedule(RIDGE, np.array([0, 50]), np.array([[-2.0], [-5.0]]), np.full((2, 1), 0.5))
    seen = []

    def loss(params, hparams, key, batch):
        seen.append(hparams["l2"].shape)
        return ridge_loss(deeper)(params, hparams, key, batch)

    results = []
    for perturb in (False, True):
        made = st.replay(found, loss, lambda data, key: data, optax.adam(0.05), perturb=perturb)
        state, losses = made.run(made.init(params), jax.random.key(1), (X, T), 60)
        assert losses[-1] < 0.7 * losses[0]
        results.append(np.asarray(losses))
    assert int(state.step) == 60
    assert set(seen) == {()}
    assert not np.allclose(results[0], results[1])
