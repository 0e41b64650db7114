"""The Pallas kernels against the plain form: interpreted, and lowered for a GPU that is not there."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from learned_opt import RULES, kernels
from learned_opt.features import column_inputs, factored_columns, factored_squares, moments_after, no_moments
from learned_opt.rules import adafac_mlp, celo2, mlp
from learned_opt.rules.networks import network, without_factors

pallas_kernels = pytest.importorskip("learned_opt.pallas_kernels", exc_type=ImportError)

NETWORKS = ("celo2", "adafac_mlp", "mlp")
SHAPES = [(7,), (33, 5), (128, 65), (64, 64)]


def gradients(shape):
    """Ordinary ones, zeros, the smallest and largest, and such as have all sizes at once."""
    g = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    sizes = 10.0 ** np.random.default_rng(1).uniform(-12, 6, shape)
    return {"ordinary": g, "zero": 0 * g, "tiny": 1e-12 * g, "huge": 1e6 * g, "mixed": np.float32(sizes) * g}


def arguments(name, g):
    """What a rule calls ``column_mlp`` with: ``(columns_of, keywords)`` and ``(inputs, layers)``."""
    p = jnp.asarray(np.random.default_rng(2).normal(size=g.shape), jnp.float32)
    moments = moments_after(no_moments(p), jnp.asarray(g), momentum=(0.9, 0.99, 0.999), rms=0.95, factored=(0.9,) * 3)
    *inputs, row, col = column_inputs(jnp.asarray(g), p, moments)
    theta = RULES[name]().init(jax.random.key(0))
    theta = {k: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape) for k, x in theta.items()}
    layers, matrix = network(theta), g.ndim >= 2
    if name == "celo2":
        columns, squares = (functools.partial(f, eps=1e-8) for f in (factored_columns, factored_squares))
        w, b = layers.first
        layers = layers._replace(first=(w if matrix else w[: celo2.VECTOR_INPUTS], b))
        factors = (row, col) if matrix else ([], [])
        return (columns, {"eps": celo2.EPS, "squares_of": squares}), ((*inputs, *factors), layers)
    keywords = {"eps": 1e-5, "outputs": 2, "finish": mlp.step_of}
    if name == "mlp":
        w, b = layers.first
        layers = layers._replace(first=(w[: mlp.COLUMNS], b))
        return (mlp.columns, keywords), ((jnp.asarray(g), p, [*moments.m, *(2 * m for m in moments.m)]), layers)
    w, b = layers.first
    layers = layers._replace(first=(w[: adafac_mlp.COLUMNS], b))
    layers = layers if matrix else without_factors(layers, 13)
    keywords["squares_of"] = adafac_mlp.matrix_squares if matrix else None
    return (adafac_mlp.columns, keywords), ((*inputs, row, col), layers)


def both(name, g):
    """The kernels and the plain form as functions of ``(inputs, layers)``, and those."""
    (columns_of, keywords), operands = arguments(name, g)

    def of(form):
        return lambda inputs, layers: form(columns_of, inputs, layers, **keywords)[0]

    return of(pallas_kernels.column_mlp), of(kernels.plain_column_mlp), operands


def assert_same(ours, plain):
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_kernels_are_equal_to_the_plain_form(name, shape):
    ours, plain, _ = both(name, np.ones(shape, np.float32))
    ours, plain = jax.jit(ours), jax.jit(plain)
    for g in gradients(shape).values():
        _, operands = arguments(name, g)
        assert_same(ours(*operands), plain(*operands))


@pytest.mark.parametrize("shape", [(), (1, 9), (3, 3, 20, 40), (2100,)])
def test_of_any_rank(shape):
    """Also where rows and columns are those of inner axes, and where a row fills several blocks."""
    ours, plain, operands = both("adafac_mlp", gradients(shape)["ordinary"])
    assert_same(jax.jit(ours)(*operands), jax.jit(plain)(*operands))


def test_stacks_of_tensors_and_of_networks():
    ours, plain, operands = both("adafac_mlp", gradients((33, 5))["ordinary"])
    stacks = jax.tree.map(lambda x: jnp.stack([x, x[::-1], 2 * x]), operands)
    for axes in ((0, 0), (0, None)):
        given = stacks if axes == (0, 0) else (stacks[0], operands[1])
        assert_same(jax.jit(jax.vmap(ours, axes))(*given), jax.jit(jax.vmap(plain, axes))(*given))


def test_derivatives_are_those_of_the_plain_form():
    ours, plain, operands = both("adafac_mlp", gradients((33, 5))["ordinary"])

    def gradient(form):
        return jax.jit(jax.grad(lambda *operands: jnp.sum(jnp.sin(1e3 * form(*operands))), argnums=(0, 1)))(*operands)

    for a, b in zip(*(jax.tree.leaves(gradient(form)) for form in (ours, plain)), strict=True):
        assert_same(a, b)
    tangents = jax.tree.map(jnp.ones_like, operands)
    assert_same(*(jax.jit(functools.partial(jax.jvp, form))(operands, tangents)[1] for form in (ours, plain)))


def updates(rule, steps=2):
    """Of a matrix twice and a vector."""
    made = RULES[rule]()
    tx = made.build(made.init(jax.random.key(0)))
    params = {"u": jnp.ones((33, 5)), "v": jnp.linspace(-1, 1, 165).reshape(33, 5), "b": jnp.arange(7.0)}
    state, all_updates = tx.init(params), []
    for i in range(steps):
        update, state = tx.update(jax.tree.map(lambda p: jnp.sin(p + i), params), state, params)  # noqa: B023
        all_updates.append(update)
    return jax.tree.leaves(all_updates)


def test_a_rule_takes_the_same_steps(monkeypatch):
    plain = updates("celo2")
    monkeypatch.setattr(kernels, "_PALLAS", True)
    taken = []
    monkeypatch.setattr(pallas_kernels, "column_mlp", spy(pallas_kernels.column_mlp, taken))
    for a, b in zip(updates("celo2"), plain, strict=True):
        assert_same(a, b)
    assert taken


def spy(f, calls):
    def called(*args, **kwargs):
        calls.append(args)
        return f(*args, **kwargs)

    return called


# --- who gets them


def test_they_are_had_by_asking_for_them_only():
    code = (
        "import jax.numpy as jnp; from learned_opt import kernels; "
        "w, b = jnp.eye(2), jnp.zeros(2); print(kernels.in_pallas(w, kernels.Layers((w, b), (), (w, b))))"
    )
    asked = {}
    for value in (None, "1"):
        env = {k: v for k, v in os.environ.items() if k != "LEARNED_OPT_PALLAS"}
        env |= {"LEARNED_OPT_PALLAS": value} if value else {}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        asked[value] = done.stdout.strip()
    assert asked == {None: "False", "1": "True"}


def test_what_the_kernels_are_not_for(monkeypatch):
    monkeypatch.setattr(kernels, "_PALLAS", True)

    def layers(h):
        return kernels.Layers((jnp.ones((2, h)), jnp.ones(h)), (), (jnp.ones((h, 1)), jnp.ones(1)))

    x = jnp.ones((8, 2))
    assert kernels.in_pallas(x, layers(32))
    assert not kernels.in_pallas(x, layers(33))
    mesh, rows = Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x")
    sharded = jax.shard_map(lambda x: x * kernels.in_pallas(x, layers(2)), mesh=mesh, in_specs=rows, out_specs=rows)
    assert not np.any(sharded(x))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert not kernels.in_pallas(x, layers(32))


# --- GPUs


def lowered(f, *operands):
    """The text of what XLA is given for an NVIDIA GPU."""
    try:
        return jax.jit(f).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    except jax.errors.JaxRuntimeError as error:  # after jaxlib 0.10.2 Triton's code is compiled here, by CUDA's plugin
        pytest.skip(f"this jaxlib lowers no Triton kernels: {error}")


@pytest.mark.parametrize(("name", "shape"), [("celo2", (128, 65)), ("adafac_mlp", (7,)), ("mlp", (33, 5))])
def test_they_lower_for_a_gpu(accelerate, name, shape):
    ours, _, operands = both(name, gradients(shape)["ordinary"])
    accelerate()
    assert lowered(ours, *operands).count("triton") == 2
    stacks = jax.tree.map(lambda x: jnp.stack([x] * 3), operands)
    assert lowered(jax.vmap(ours), *stacks).count("triton") == 2
