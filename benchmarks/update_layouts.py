"""What the layout of `celo2` is worth: its update of one 1024 x 1024 matrix, written in three plain ways.

- "features x parameters": all thirty features as a `[parameters, features]` array, the network as matrix products;
- "array a feature": every feature an array of the matrix's shape, the network as sums of scalar x array;
- "blocks of 16 rows": the same by blocks, features that are constant along an axis as biases;
- "celo2": as this package does it.

All give the same update to 1e-6 of its largest entry, which is checked. Each takes turns with optax.adam as in
`update.py`. Writes reports/update_layouts/all_cores_1.json:

    python benchmarks/update_layouts.py [--rounds 9] [--out FILE]
"""

import argparse
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from update import measure

import learned_opt
from learned_opt import features as ft
from learned_opt.rules import celo2

SIDE = 1024
ROWS = 16  # of a block
EPS = celo2.EPS

RULE = learned_opt.RULES["celo2"]()
THETA = RULE.init(jax.random.key(0))


def accumulate(gradient, state):
    """The clean gradient, and the state after it."""
    g = ft.clean(gradient, celo2.CLIP, jnp.float32)
    m = tuple(ft.ema(x, g, b) for x, b in zip(state.m, celo2.MOMENTUM, strict=True))
    row, col = ft.factored_update(state.row, state.col, g, celo2.FACTORED)
    return g, celo2.Celo2State(m, ft.ema(state.r, g * g, celo2.RMS), row, col)


def columns(g, p, m, r, *stacks):
    """The features; `stacks` are what `factored_scales` gives and the factored moments, constant along an axis each."""
    return ft.factored_columns(g, p, list(m), r, *(list(x) for x in stacks), eps=celo2._ROOT_EPS)


def columns_of_matrix(g, p, state):
    scales = ft.factored_scales(state.row, state.col, g.shape)
    return columns(g, p, state.m, state.r, *scales, state.row, state.col)


def weighted_sums(w, xs, units):
    """`x W + units` for lists of arrays."""
    for i, x in enumerate(xs):
        units = [unit + w[i, j] * x for j, unit in enumerate(units)]
    return units


def network_of_sums(xs, first, units):
    h = [jnp.maximum(x, 0) for x in weighted_sums(first, xs, units)]
    h = [jnp.maximum(x, 0) for x in weighted_sums(THETA["w1"], h, list(THETA["b1"]))]
    return weighted_sums(THETA["w2"][:, :1], h, [THETA["b2"][0]])[0]


def features_by_parameters(g, p, state):
    xs = [jnp.broadcast_to(x, g.shape).reshape(-1) for x in columns_of_matrix(g, p, state)]
    x = jnp.stack(xs, -1)
    h = x * jax.lax.rsqrt(EPS + jnp.mean(x * x, 0))
    for i in (0, 1):
        h = jax.nn.relu(h @ THETA[f"w{i}"] + THETA[f"b{i}"])
    return (h @ THETA["w2"] + THETA["b2"])[:, 0].reshape(g.shape)


def array_a_feature(g, p, state):
    xs = [jnp.broadcast_to(x, g.shape) for x in columns_of_matrix(g, p, state)]
    folded = THETA["w0"] * jnp.stack([jax.lax.rsqrt(EPS + jnp.mean(x * x)) for x in xs])[:, None]
    return network_of_sums(xs, folded, list(THETA["b0"]))


def blocks_of_rows(g, p, state):
    def by_block(x):  # a matrix, or a stack of them
        return jnp.moveaxis(x.reshape(*x.shape[:-2], -1, ROWS, x.shape[-1]), -3, 0)

    R, C = ft.factored_scales(state.row, state.col, g.shape)
    inputs = jax.tree.map(by_block, (g, p, state.m, state.r, R, state.row))

    def block_columns(block):
        g, p, m, r, R, row = block
        return columns(g, p, m, r, R, C, row, state.col)

    whole = columns_of_matrix(g, p, state)
    full = [i for i, x in enumerate(whole) if x.shape == g.shape]
    others = [(w, x) for w, x in zip(THETA["w0"], whole, strict=True) if x.shape != g.shape]
    parts = [(w * jax.lax.rsqrt(EPS + jnp.mean(x * x)))[:, None, None] * x for w, x in others]
    by_column = sum(x for x in parts if x.shape[1] == 1)
    by_row = sum(x for x in parts if x.shape[1] != 1)

    def add(total, block):
        xs = block_columns(block)
        return total + jnp.stack([jnp.sum(xs[i] * xs[i]) for i in full]), None

    total, _ = jax.lax.scan(add, jnp.zeros(len(full)), inputs)
    first = THETA["w0"][np.array(full)] * jax.lax.rsqrt(EPS + total / g.size)[:, None]

    def direction(block):
        inputs, by_row = block
        xs = block_columns(inputs)
        units = [b + x + y for b, x, y in zip(THETA["b0"], by_row, by_column, strict=True)]
        return network_of_sums([xs[i] for i in full], first, units)

    return jax.lax.map(direction, (inputs, by_block(by_row))).reshape(g.shape)


def transform(direction):
    """celo2 for the tree `{"w": matrix}`, its direction computed by `direction`."""

    def update(updates, state, params):
        only = celo2.Celo2State(tuple(m["w"] for m in state.m), state.r["w"], state.row["w"], state.col["w"])
        g, only = accumulate(updates["w"], only)
        d = direction(g, params["w"], only)
        u = -ft.unit_rms(d, EPS, (0, 1))
        m, *others = only
        return {"w": u}, celo2.Celo2State(tuple({"w": x} for x in m), *({"w": x} for x in others))

    return optax.chain(optax.GradientTransformation(RULE.build(THETA).init, update), optax.scale(RULE.learning_rate))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("reports/update_layouts/all_cores_1.json"))
    arguments = parser.parse_args()
    transforms = {
        "features x parameters": transform(features_by_parameters),
        "array a feature": transform(array_a_feature),
        "blocks of 16 rows": transform(blocks_of_rows),
        "celo2": optax.chain(RULE.build(THETA), optax.scale(RULE.learning_rate)),
    }
    params = {"w": jax.random.normal(jax.random.key(0), (SIDE, SIDE))}
    updates = {name: jax.jit(tx.update)(params, tx.init(params), params)[0]["w"] for name, tx in transforms.items()}
    for name, update in updates.items():
        np.testing.assert_allclose(update, updates["celo2"], atol=1e-6 * np.abs(update).max(), err_msg=name)
    rows = measure(transforms, {"w": (SIDE, SIDE)}, arguments.rounds)
    for name, row in rows.items():
        print(
            f"{name:22} {row['times_adam_cold']:7.2f} x adam cold, {row['times_adam_hot']:7.2f} hot;",
            f"temporaries {row['temporary_bytes_per_parameter']:.1f} bytes a parameter",
        )
    report = {"jax": jax.__version__, "cores": len(os.sched_getaffinity(0)), "layouts": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
