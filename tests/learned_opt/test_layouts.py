"""Layouts: of real attention in Flax and NNX, of real Equinox layers, and there and back for any."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers

import learned_opt
from learned_opt.layouts import fan_in, is_table, name_of, outputs_first, outputs_last, seen, stacked, unseen, view_of


def shapes_seen(layout, params):
    return {name_of(path): view_of(layout, path, leaf).shape for path, leaf in jax.tree.leaves_with_path(params)}


def test_flax_s_attention_is_seen_as_its_matrices():
    linen = nn.MultiHeadDotProductAttention(num_heads=2).init(jax.random.key(0), jnp.ones((1, 3, 8)))["params"]
    module = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0))
    for params, end in ((linen, ""), (nnx.state(module, nnx.Param), "/value")):
        found = shapes_seen(outputs_last, params)
        for name in ("query", "key", "value", "out"):
            assert found[f"{name}/kernel{end}"] == ((2, 4, 8) if name == "out" else (8, 8))
            assert found[f"{name}/bias{end}"] == (8,)
    scanned = {"query": {"kernel": jnp.zeros((5, 8, 2, 4)), "bias": jnp.zeros((5, 2, 4))}}
    layout = stacked(lambda path: True)
    assert shapes_seen(layout, scanned) == {"query/kernel": (5, 8, 8), "query/bias": (5, 8)}
    assert view_of(layout, *jax.tree.leaves_with_path(scanned)[1]).layers == 1


def test_what_is_no_attention_keeps_its_shape():
    params = {"conv": {"w": (3, 3, 2, 4)}, "linear": {"w": (4, 6), "b": (6,)}, "scale": (), "query": {"w": (2, 3, 4)}}
    params |= {"attention": {"query": {"kernel": (1, 1, 64, 8), "bias": (8,)}, "key": {"kernel": (64, 8)}}}
    params = jax.tree.map(jnp.zeros, params, is_leaf=lambda x: isinstance(x, tuple))
    for path, leaf in jax.tree.leaves_with_path(params):
        assert view_of(outputs_last, path, leaf) == (tuple(range(leaf.ndim)), 0, leaf.shape, leaf.shape, False)


def tables_of(layout, params):
    return {
        name_of(path)
        for path, leaf in jax.tree.leaves_with_path(params)
        if view_of(layout, path, jnp.asarray(leaf)).table
    }


def test_tables_are_known_in_every_library():
    """Of the embeddings of tokens and positions, and of no other layer that is called so."""
    key, codes = jax.random.key(0), jnp.zeros((1, 9), jnp.int32)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, codes):
            positions = self.param("positions", nn.initializers.normal(), (9, 4))
            return nn.Dense(4, name="embed")(nn.Embed(7, 4)(codes) + positions[None])

    def haiku(codes):
        positions = hk.get_parameter("position_table", (9, 4), init=jnp.zeros)
        return hk.Linear(4, name="embed")(hk.Embed(7, 4)(codes) + positions[None])

    equinox = {"token_embedding": eqx.nn.Embedding(7, 4, key=key), "unembed": eqx.nn.Linear(4, 7, key=key)}
    equinox |= {"patch_embed": eqx.nn.Conv2d(3, 4, 2, key=key)}
    assert tables_of(outputs_last, Linen().init(key, codes)["params"]) == {"Embed_0/embedding", "positions"}
    assert tables_of(outputs_last, hk.transform(haiku).init(key, codes)) == {"embed_1/embeddings", "~/position_table"}
    assert tables_of(outputs_first, eqx.filter(equinox, eqx.is_array)) == {"token_embedding/weight"}
    rngs = nnx.Rngs(0)
    layers = {"tokens": nnx.Embed(7, 4, rngs=rngs), "embed": nnx.Linear(4, 4, rngs=rngs)}
    scanned = {"embed": {"embedding": jnp.zeros((3, 7, 4))}}
    assert tables_of(outputs_last, nnx.state(layers, nnx.Param)) == {"tokens/embedding/value"}
    assert tables_of(stacked(lambda path: True), scanned) == {"embed/embedding"}


@pytest.mark.parametrize("name", ["pos_embed", "a/embeddings", "position_table", "embedding_matrix", "wte/embedding"])
def test_names_of_tables(name):
    assert is_table(name, (7, 4))
    assert is_table(name, (1, 7, 4))
    assert not is_table(name, (7, 1, 4))
    assert not is_table(name, (4,))


@pytest.mark.parametrize("name", ["unembed", "W_unembed", "embed_proj", "embedding_lora_a", "decomposition", "embed/w"])
def test_names_that_only_look_like_a_table_s(name):
    assert not is_table(name, (7, 4))


def test_equinox_s_layers_have_their_outputs_last():
    key = jax.random.key(0)
    model = {
        "linear": eqx.nn.Linear(3, 4, key=key),
        "conv": eqx.nn.Conv2d(3, 4, 5, key=key),
        "cell": eqx.nn.LSTMCell(3, 2, key=key),
        "embedding": eqx.nn.Embedding(7, 4, key=key),
        "pos_embed": jnp.zeros((9, 4)),
        "patch_embed": {"proj": eqx.nn.Conv2d(3, 4, 2, key=key)},
        "time_embed": eqx.nn.MLP(2, 3, 5, 1, key=key),
    }
    assert shapes_seen(outputs_first, eqx.filter(model, eqx.is_array)) == {
        "linear/weight": (3, 4),
        "linear/bias": (4,),
        "conv/weight": (5, 5, 3, 4),
        "conv/bias": (4,),
        "cell/weight_ih": (3, 8),
        "cell/weight_hh": (2, 8),
        "cell/bias": (8,),
        "embedding/weight": (7, 4),
        "pos_embed": (9, 4),
        "patch_embed/proj/weight": (2, 2, 3, 4),
        "patch_embed/proj/bias": (4,),
        "time_embed/layers/0/weight": (2, 5),
        "time_embed/layers/0/bias": (5,),
        "time_embed/layers/1/weight": (5, 3),
        "time_embed/layers/1/bias": (3,),
    }


def test_a_loaded_rule_takes_equinox_s_layers_for_what_they_are():
    """The same network gets the same update in both layouts; its weights are small, so that the fan-in counts."""
    w, b = 0.01 * jax.random.normal(jax.random.key(0), (6, 4)), jnp.ones(4)
    g = jnp.cos(3 * w)
    ours, theirs = {"weight": w, "bias": b}, {"weight": w.T, "bias": b}
    plain, first = learned_opt.load("flagship"), learned_opt.load("flagship", layout=outputs_first)
    wanted, _ = plain.update({"weight": g, "bias": b}, plain.init(ours), ours)
    found, _ = first.update({"weight": g.T, "bias": b}, first.init(theirs), theirs)
    np.testing.assert_allclose(found["weight"].T, wanted["weight"], rtol=1e-5)
    np.testing.assert_allclose(found["bias"], wanted["bias"], rtol=1e-5)
    missed, _ = plain.update({"weight": g.T, "bias": b}, plain.init(theirs), theirs)
    assert np.abs(missed["weight"].T - wanted["weight"]).max() > 0.1 * np.abs(wanted["weight"]).max()


@given(st.data())
def test_there_and_back(data):
    shape = data.draw(st.lists(st.integers(1, 4), max_size=5).map(tuple))
    axes = data.draw(st.permutations(range(len(shape))))
    ends = sorted(data.draw(st.tuples(*[st.integers(0, len(shape))] * 2)))
    numbers = MuonDimensionNumbers(tuple(axes[: ends[0]]), tuple(axes[ends[0] : ends[1]]))
    x = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    view = view_of(lambda path, shape: numbers, (), x)
    there = seen(x, view)
    assert there.shape == view.shape
    assert view.layers == len(shape) - ends[1]
    assert fan_in(view.shape[view.layers :]) == np.prod([shape[a] for a in numbers.reduction_axis], dtype=int) or (
        not numbers.output_axis
    )
    np.testing.assert_array_equal(unseen(there, view), x)


@pytest.mark.parametrize("given", [((0,), (2,)), ((0,), (0,)), (("a",), ()), 3, None, ((0,),)])
def test_axes_that_are_none_are_told(given):
    with pytest.raises(ValueError, match=r"the layout gives .* for 'layer/w' of shape \(2, 3\)"):
        learned_opt.load("flagship", layout=lambda path, shape: given).init({"layer": {"w": jnp.ones((2, 3))}})


def test_a_stack_has_the_layout_of_its_layers():
    layout = stacked(lambda path: "blocks" in path, outputs_first)
    assert layout("blocks/weight", (5, 4, 3)) == ((2,), (1,))
    assert layout("blocks/bias", (5, 4)) == ((), (1,))
    assert layout("head/weight", (4, 3)) == ((1,), (0,))
