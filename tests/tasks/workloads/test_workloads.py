"""Workloads: every network learns, every parameter gets a gradient, the split is what it says and stays so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.workload_data import write_tiny_sets

from tasks import data, suites
from tasks.workloads import SUITES, images, language, manifest, molecules, pronunciation, speech, suite, words
from tasks.workloads.base import attend, valid_keys

ALL = {workload.name: workload for workloads in SUITES.values() for workload in workloads}
TINY = {
    "gpt": functools.partial(language.gpt, "moby_dick", layers=2, heads=2, width=16, length=12, batch_size=4),
    "llama": functools.partial(language.llama, "sqlite", layers=2, heads=2, width=16, length=12, batch_size=4),
    "lstm": functools.partial(language.lstm, "kjv", width=16, embedding=8, length=12, batch_size=4),
    "resnet": functools.partial(images.resnet, "cifar10", channels=(8, 16), batch_size=8),
    "vit": functools.partial(images.vit, "cifar10", layers=1, heads=2, width=16, patch=8, batch_size=8),
    "seq2seq": functools.partial(pronunciation.seq2seq, layers=1, heads=2, width=16, batch_size=8),
    "message_passing": functools.partial(molecules.message_passing, layers=2, width=16, batch_size=8),
    "unet": functools.partial(speech.unet, channels=(8, 16), frames=16, batch_size=4),
    "embeddings": functools.partial(words.embeddings, embedding=8, width=16, batch_size=32),
}


@pytest.fixture(scope="module", autouse=True)
def tiny_sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    write_tiny_sets(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEARNED_OPT_DATA", str(folder))
        data.library._load.cache_clear()
        yield folder
    data.library._load.cache_clear()


@functools.cache
def trained(network):
    """Losses of some steps of Adam on one batch, the first gradient, and validation losses before them.

    The step is compiled once and by itself: XLA compiles convolutions in a loop slowly, and runs them slower.
    """
    family, optimizer = TINY[network](), optax.adam(3e-3)

    @jax.jit
    def start(arrays):
        params = family.task(arrays, {}).init(jax.random.key(0))
        return params, optimizer.init(params)

    @jax.jit
    def step(arrays, params, state):
        task = family.task(arrays, {})
        batch = task.batch(jax.random.key(1), "train")
        value, grads = jax.value_and_grad(lambda p: task.loss(p, jax.random.key(2), batch)[0])(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, grads

    @jax.jit
    def validate(arrays, params, key):
        task = family.task(arrays, {})
        return task.loss(params, key, task.batch(key, "valid"))[0]

    params, state = start(family.data)
    valid = [validate(family.data, params, key) for key in valid_keys(2)]
    losses, gradients = [], []
    for _ in range(12):
        params, state, value, grads = step(family.data, params, state)
        losses.append(value)
        gradients = gradients or [grads]
    return jax.tree.map(np.asarray, (jnp.stack(losses), gradients[0], jnp.stack(valid)))


def test_every_network_of_the_suites_is_tested():
    assert {workload.network for workload in ALL.values()} == set(TINY)


@pytest.mark.parametrize("network", TINY)
def test_loss_is_finite_and_falls(network):
    losses, _, valid = trained(network)
    assert np.isfinite(losses).all()
    assert np.isfinite(valid).all()
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("network", TINY)
def test_the_gradient_reaches_every_parameter(network):
    _, grads, _ = trained(network)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path


@pytest.mark.parametrize("network", TINY)
def test_batches_are_functions_of_the_key(network):
    family = TINY[network]()
    task = family.task(family.data, {})
    for name in ("train", "valid"):
        one, same, other = (task.batch(jax.random.key(seed), name) for seed in (1, 1, 2))
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, same))
        assert not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


def test_a_causal_network_does_not_see_what_comes_after():
    early = jnp.broadcast_to(jnp.arange(12) < 6, (4, 12))
    for network in ("gpt", "llama", "lstm"):
        family = TINY[network]()
        task = family.task(family.data, {})
        params = task.init(jax.random.key(0))
        batch = task.batch(jax.random.key(1), "train")

        def picked(x, task=task, params=params, y=batch["y"]):
            """The mean logit of the right characters in the first half, below each place's largest."""
            nothing = jnp.full_like(y, -1)  # no character: no logit is picked
            some, none = (task.loss(params, None, {"x": x, "y": y})[0] for y in (jnp.where(early, y, nothing), nothing))
            return some - none

        later = jnp.where(early, batch["x"], 3)
        np.testing.assert_allclose(picked(batch["x"]), picked(later), rtol=1e-5)
        assert abs(picked(batch["x"]) - picked(jnp.where(early, 3, batch["x"]))) > 1e-4


def test_attention_is_a_mean_of_values():
    q = jnp.zeros((1, 3, 1, 2))
    v = jnp.arange(6.0).reshape(1, 3, 1, 2)
    causal = jnp.tril(jnp.ones((3, 3), bool))[None, None]
    np.testing.assert_allclose(attend(q, q, v, causal)[0], [[0, 1], [1, 2], [2, 3]], atol=1e-6)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    turned_q, turned_k = (language.rotary(jnp.broadcast_to(x, (1, 10, 1, 8)))[0, :, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    np.testing.assert_allclose(jnp.diag(scores, 2), jnp.full(8, scores[0, 2]), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(turned_q, axis=1), jnp.full(10, jnp.linalg.norm(q)), rtol=1e-5)


def test_shifted_pictures_are_cut_from_the_padded_ones():
    pictures = jnp.ones((1000, 8, 8, 1))
    moved = images.shifted(pictures, jax.random.key(0))
    assert moved.shape == pictures.shape
    assert set(np.unique(moved)) <= {0.0, 1.0}
    share = moved.mean(axis=(1, 2, 3))
    assert float(share.min()) >= (4 / 8) ** 2
    assert float(share.max()) == 1.0


def test_molecules_do_not_depend_on_where_they_are_or_how_atoms_are_ordered():
    family = TINY["message_passing"]()
    task = family.task(family.data, {})
    params = task.init(jax.random.key(0))
    batch = task.batch(jax.random.key(1), "train")
    order = jax.random.permutation(jax.random.key(2), 29)
    same = batch | {"positions": batch["positions"][:, order] + 1.0, "elements": batch["elements"][:, order]}
    one, other = (task.loss(params, None, b)[0] for b in (batch, same))
    np.testing.assert_allclose(one, other, rtol=2e-4)


def test_pronunciations_count_up_to_the_end_of_the_word():
    family = TINY["seq2seq"]()
    task = family.task(family.data, {})
    params = task.init(jax.random.key(0))
    batch = {name: jnp.asarray(rows) for name, rows in task.batch(jax.random.key(1), "train").items()}
    short = batch["sounds"].at[:, 3:].set(0)
    one = task.loss(params, None, batch | {"sounds": short})[0]
    other = task.loss(params, None, batch | {"sounds": short, "said": batch["said"].at[:, 4:].set(5)})[0]
    np.testing.assert_allclose(one, other, rtol=1e-5)


# -- the split -------------------------------------------------------------------------------------------------------


def whole(name):
    return name.removesuffix("_small")


def test_validation_and_test_share_neither_data_nor_networks():
    chosen_by, judged_on = SUITES["workloads_validation"], SUITES["workloads_test"]
    assert not {w.dataset for w in chosen_by} & {w.dataset for w in judged_on}
    assert not {w.network for w in chosen_by} & {w.network for w in judged_on}
    assert set(SUITES["workloads_small"]) <= set(chosen_by)


def test_no_data_of_training_are_in_a_workload():
    trained_on = {whole(entry.dataset) for entries in suites.TRAIN.values() for entry in entries}
    assert not trained_on & {whole(workload.dataset) for workload in ALL.values()}


def test_no_data_of_the_test_workloads_are_in_any_other_suite():
    others = (*suites.TRAIN.values(), *suites.VALIDATION.values(), *suites.HELD_OUT.values())
    used = {whole(entry.dataset) for entries in others for entry in entries}
    assert not used & {whole(workload.dataset) for workload in SUITES["workloads_test"]}


def test_there_are_at_least_eight_with_fetched_and_hashed_data():
    assert len(ALL) >= 8
    for workload in ALL.values():
        known = data.SETS[workload.dataset]
        assert known.home == "fetched"
        assert len(known.sha256) == 64


def test_the_test_workloads_are_frozen():
    assert manifest.compute() == manifest.frozen()


def test_unknown_suites_are_named():
    with pytest.raises(ValueError, match="workloads_small"):
        suite("nonsense")


def test_validation_batches_are_the_same_for_all():
    keys = jax.random.key_data(valid_keys())
    assert keys.shape[0] == len(np.unique(keys, axis=0)) == 16
