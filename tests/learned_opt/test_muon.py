"""What Muon orthogonalises: hidden matrices and kernels, by name and by what comes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt import hidden_matrices
from meta_train.train.learners.local_sgd import LOCAL_OPTIMIZERS

PARAMS = {
    "~": {"embed": jnp.ones((5, 4)), "positions": jnp.ones((3, 4))},
    "conv": {"w": jnp.ones((3, 3, 2, 4)), "b": jnp.ones(4)},
    "layer": {"w": jnp.ones((4, 6)), "b": jnp.ones(6)},
    "output": {"w": jnp.ones((6, 3))},
}


def test_hidden_matrices_are_what_lies_between_layers():
    numbers = hidden_matrices(PARAMS)
    found = {(part, name): n for part, leaves in numbers.items() for name, n in leaves.items() if n is not None}
    assert found.keys() == {("conv", "w"), ("layer", "w")}
    assert (found["conv", "w"].reduction_axis, found["conv", "w"].output_axis) == ((0, 1, 2), (3,))


@pytest.mark.parametrize(
    ("path", "hidden"),
    [
        ("mlp/~/linear_0/w", True),  # Haiku's, made in a constructor
        ("~/table", False),  # and outside of any layer
        ("multi_head_attention/query/w", True),
        ("params/MultiHeadDotProductAttention_0/query/kernel", True),  # Flax's
        ("word_embedding/w", False),
        ("lm_head/w", False),
        ("decoder/output/w", False),
        ("output", False),
        ("encoder/attention/output/dense/kernel", True),  # BERT's blocks have outputs
        ("params/MultiHeadDotProductAttention_0/query/bias", False),  # [heads, size]
        ("throughput/w", True),
    ],
)
def test_names_say_what_lies_between_layers(path, hidden):
    tree = jnp.ones((2, 3))
    for key in reversed(path.split("/")):
        tree = {key: tree}
    assert (jax.tree.leaves(hidden_matrices(tree), is_leaf=lambda x: x is None)[0] is not None) == hidden


def test_heads_of_flax_s_attention_are_outputs_of_queries_and_inputs_of_the_last_matrix():
    attention = {"query": {"kernel": jnp.ones((64, 4, 16))}, "out": {"kernel": jnp.ones((4, 16, 64))}}
    numbers = hidden_matrices(attention)
    assert numbers["query"]["kernel"] == ((0,), (1, 2))
    assert numbers["out"]["kernel"] == ((0, 1), (2,))


@pytest.mark.parametrize(
    "muon",
    [
        LOCAL_OPTIMIZERS["muon"](None),
        optax.contrib.muon(1.0, muon_weight_dimension_numbers=hidden_matrices, consistent_rms=0.2),
    ],
    ids=["workers'", "optax's"],
)
def test_muon_orthogonalises_kernels_and_leaves_embeddings_and_the_last_layer(muon):
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(PARAMS)))
    grads = jax.tree.map(
        lambda key, p: jax.random.normal(key, p.shape), jax.tree.unflatten(jax.tree.structure(PARAMS), keys), PARAMS
    )
    updates, _ = jax.jit(muon.update)(grads, muon.init(PARAMS), jax.tree.map(jnp.zeros_like, PARAMS))
    for part, flat in {"conv": updates["conv"]["w"].reshape(18, 4), "layer": updates["layer"]["w"]}.items():
        sizes = np.linalg.svd(flat, compute_uv=False)
        assert sizes.max() < 2 * sizes.min(), part
    for update in (updates["~"]["embed"], updates["output"]["w"]):  # Adam's first step: signs of one size
        np.testing.assert_allclose(jnp.abs(update), jnp.abs(update).mean(), rtol=1e-4)
