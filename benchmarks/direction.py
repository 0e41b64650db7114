"""What cheaper forms of `flagship-1`'s direction cost in loss, on a character transformer of 2 x 64.

Each form trains for 300 steps of 16 x 64 characters of Moby Dick at its rate, a linear warm-up over a
twentieth and then a cosine, three seeds, and is paired with the form as it is. Writes reports/direction/losses.csv:

    learned-opt data fetch moby_dick && python benchmarks/direction.py
"""

import argparse
import math
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tables

import learned_opt
from learned_opt import newton_schulz, precision
from tasks.workloads.base import valid_keys
from tasks.workloads.language import gpt

STEPS, RATE = 300, 5e-3
# Amsel et al., "The Polar Express", 2025, arXiv:2505.16932: a step's own coefficients, for singular values down to 1e-3
EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
)
QUINTIC = newton_schulz.COEFFICIENTS
FORMS = {
    "as it is": {},
    "Polar Express, 5 steps": {"coefficients": EXPRESS},
    "Polar Express, 4 steps": {"coefficients": EXPRESS[:4]},
    "Polar Express, 3 steps": {"coefficients": EXPRESS[:3]},
    "4 steps": {"coefficients": QUINTIC[:4]},
    "3 steps": {"coefficients": QUINTIC[:3]},
    "bases corrected every 5 steps": {"kwargs": {"every": 5}},
    "bases corrected every 20 steps": {"kwargs": {"every": 20}},
    "bases for long sides too": {"kwargs": {"max_ratio": math.inf}},
    "Newton-Schulz in bfloat16": {"products": jnp.dtype(jnp.bfloat16)},
    "state in bfloat16": {"bfloat16": True},
}


def losses(form: dict, seeds: int) -> list[float]:
    """The mean validation loss of a form at the end, one a seed."""
    saved, family = learned_opt.load_rule("flagship-1"), gpt("moby_dick", layers=2, width=64, length=64, batch_size=16)
    rule = learned_opt.RULES["celo2_soap"](**{**saved.kwargs, **form.get("kwargs", {})})
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, STEPS // 20, STEPS)
    tx = optax.chain(rule.build(saved.theta), optax.scale_by_learning_rate(schedule, flip_sign=False))
    tx = precision.bfloat16_state(tx) if "bfloat16" in form else tx

    @jax.jit
    def start(data, key):
        params = family.task(data, {}).init(key)
        return params, tx.init(params)

    @jax.jit
    def step(carry, data, key):
        (params, state), task = carry, family.task(data, {})
        batch = task.batch(key, "train")
        grads = jax.grad(lambda p: task.loss(p, key, batch)[0])(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def valid(params, data, key):
        task = family.task(data, {})
        return task.loss(params, key, task.batch(key, "valid"))[0]

    found = []
    for seed in range(seeds):
        key = jax.random.key(seed)
        carry = start(family.data, key)
        for number in range(STEPS):
            carry = step(carry, family.data, jax.random.fold_in(key, number))
        found.append(float(np.mean([valid(carry[0], family.data, k) for k in valid_keys()])))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("reports/direction/losses.csv"))
    arguments = parser.parse_args()
    rows, usual = [], None
    for name, form in FORMS.items():
        with (
            mock.patch.object(newton_schulz, "COEFFICIENTS", form.get("coefficients", QUINTIC)),
            mock.patch.object(newton_schulz, "products_dtype", lambda dtype, form=form: form.get("products", dtype)),
        ):
            found = np.array(losses(form, arguments.seeds))
        usual = found if usual is None else usual
        apart = found - usual
        error = apart.std(ddof=1) / np.sqrt(len(apart)) if len(apart) > 1 else 0.0
        rows.append(
            {
                "form": name,
                "valid_loss": f"{found.mean():.4f}",
                "difference": f"{apart.mean():.4f}",
                "standard_error": f"{error:.4f}",
                "losses": " ".join(f"{loss:.4f}" for loss in found),
            }
        )
        print(rows[-1], flush=True)
        tables.write(arguments.out, rows)


if __name__ == "__main__":
    main()
