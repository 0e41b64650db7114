"""Every rule with a reference implementation against that implementation's trajectory."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import ROOT

from learned_opt import reference

HERE = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared" / "golden"  # made from published weights: not part of the repository

GOLDEN = {
    "AdafacMLPLOpt_h32": ("adafac_mlp", {}, 1e-5),
    "AdafacMLPLOpt_h4": ("adafac_mlp", {}, 1e-5),
    "Celo": ("celo", {}, 1e-5),
    "CeloAdam": ("celo_adam", {}, 1e-5),
    "Celo2Base": ("celo2", {}, 1e-5),
    "Celo2Ortho": ("celo2", {"orthogonalize": True}, 1e-5),
    "HyperV2_bugged": ("velo", {}, 1e-5),
    "HyperV2_buggedlstm": ("velo", {"loss_horizon": None, "recurrent_memory": False}, 1e-5),
    "HyperV2_fixed": ("velo", {"loss_horizon": None}, 1e-5),
    "MLPLOpt": ("mlp", {}, 1e-5),
    "NNAdam": ("nn_adam", {}, 1e-5),
    "RNNMLPLOpt": ("rnn_mlp", {}, 1e-5),
}


def read(name):
    path = HERE / f"{name}.npz"
    path = path if path.exists() else SHARED / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{name}.npz is made from published weights and lies outside the repository")
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def part(golden, prefix):
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


# what is written otherwise for accelerators; the arithmetic is tested here, on a CPU
OTHERWISE = ("AdafacMLPLOpt_h32", "AdafacMLPLOpt_h4", "Celo", "Celo2Base", "HyperV2_fixed", "MLPLOpt")


@pytest.mark.parametrize(("name", "accelerator"), [*((x, False) for x in GOLDEN), *((x, True) for x in OTHERWISE)])
def test_trajectory_is_the_reference_s(name, accelerator, accelerate):
    if accelerator:
        accelerate()
    rule_name, kwargs, tolerance = GOLDEN[name]
    golden = read(name)
    meta = json.loads(str(golden["meta"]))
    rule, theta = reference.from_reference(rule_name, part(golden, "theta/"), **kwargs)
    tx = rule.build(theta, num_steps=meta["num_steps"])
    tx = optax.chain(tx, optax.scale(meta["learning_rate"] or 1.0))

    def step(carry, inputs):
        params, state = carry
        grads, loss = inputs
        updates, state = tx.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    start = part(golden, "params0/")
    params = jax.tree.map(jnp.asarray, start)
    _, got = jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs))(
        (params, tx.init(params)), (part(golden, "grads/"), golden["losses"])
    )
    for key, expected in part(golden, "params/").items():
        gap = np.abs(np.asarray(got[key], np.float64) - expected)
        rms = np.sqrt(np.mean(np.square(expected), tuple(range(1, expected.ndim)), keepdims=True))
        assert np.max(gap / np.maximum(np.abs(expected), rms)) <= tolerance, key
        assert np.max(gap) <= 1e-3 * np.max(np.abs(expected - start[key])), key
