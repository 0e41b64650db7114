"""One worker: AdamW and Muon as they are, with a hand-made or learned outer step every 30 steps, and looking ahead.

A character transformer on Moby Dick (in no training suite), 900 steps, the rate falling by a half cosine. `lookahead`
and `ema_nesterov` keep the constants of their papers (0.7, momentum 0.6, every 30 steps; decay .99) and, where there is
none to take, a share of 0.5; the learned outer steps are the pretrained `outer` as it is, and beside Nesterov's. The
rate of every one of the ten is tuned on the same grid, by the validation loss on two seeds; the losses shown are those
of five others, each on the same start and batches with and without the wrapper.

    python benchmarks/local_sgd_one_worker.py    # ten minutes of one core; writes reports/local_sgd/one_worker.csv
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tables

import learned_opt
from learned_opt.local_sgd import add_nesterov, ema_nesterov, lookahead
from tasks.base import num_params
from tasks.families.sequence import char_transformer

REPORT = Path(__file__).parents[1] / "reports" / "local_sgd"
STEPS, EVERY, LAST = 900, 30, 32  # of training, between two outer steps; batches that are validated on
RATES = tuple(float(r) for r in 1e-3 * 2.0 ** np.arange(9))
TUNING, SEEDS = (100, 101), range(200, 205)
OPTIMIZERS = {
    "AdamW": lambda rate: optax.adamw(rate, weight_decay=1e-2),
    "Muon": lambda rate: optax.contrib.muon(
        rate, weight_decay=1e-2, consistent_rms=0.2, muon_weight_dimension_numbers=learned_opt.hidden_matrices
    ),
}


def learned():
    return learned_opt.load("outer", num_steps=STEPS // EVERY)


WRAPPERS = {
    "as it is": lambda tx: tx,
    "lookahead": lambda tx: lookahead(tx, every=EVERY),
    "ema_nesterov": ema_nesterov,
    "lookahead, outer": lambda tx: lookahead(tx, learned(), every=EVERY),
    "lookahead, Nesterov + outer": lambda tx: lookahead(tx, add_nesterov(learned()), every=EVERY),
}


def trained(params, state):
    """The parameters to evaluate: not those looked ahead to."""
    return optax.tree.add_scale(params, -state.share, state.mean) if hasattr(state, "share") else params


def runner(family, optimizer, wrapper):
    """``(data, rate, seed) -> validation loss`` at the end, for vectors of rates and seeds."""

    def run(data, rate, seed):
        k_cfg, k_init, k_run, k_valid = jax.random.split(jax.random.PRNGKey(seed), 4)
        task = family.task(data, family.sample(k_cfg))
        params = task.init(k_init)
        tx = optax.with_extra_args_support(wrapper(optimizer(optax.cosine_decay_schedule(rate, STEPS))))

        def step(carry, key):
            params, state = carry
            grads = jax.grad(lambda p: task.loss(p, key, task.batch(key, "train"))[0])(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(k_run, STEPS))
        params = trained(params, state)
        return jnp.mean(jax.lax.map(lambda k: task.loss(params, k, task.batch(k, "valid"))[0],
                                    jax.random.split(k_valid, LAST)))  # fmt: skip

    return jax.jit(jax.vmap(run, (None, 0, 0)))


def losses(run, data, rates, seeds):
    """``[rates, seeds]``; what is not finite counts as infinite."""
    lanes = [(rate, seed) for rate in rates for seed in seeds]
    found = np.asarray(run(data, jnp.asarray([r for r, _ in lanes]), jnp.asarray([s for _, s in lanes], jnp.uint32)))
    return np.nan_to_num(found, nan=np.inf).reshape(len(rates), len(seeds))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPORT / "one_worker.csv")
    args = parser.parse_args()
    family = char_transformer("moby_dick_small", layers=1, width=24, length=12, batch_size=16)
    print(f"{num_params(family)} parameters, {STEPS} steps")
    rows = []
    for name, optimizer in OPTIMIZERS.items():
        for wrapping, wrapper in WRAPPERS.items():
            began, run = time.time(), runner(family, optimizer, wrapper)
            tuned = losses(run, family.data, RATES, TUNING).mean(1)
            best = int(np.argmin(tuned))
            final = losses(run, family.data, RATES[best : best + 1], SEEDS)[0]
            plain = final if wrapping == "as it is" else np.asarray(rows[-1]["plain"])
            difference = final - plain
            rows.append(
                {
                    "optimizer": name,
                    "wrapper": wrapping,
                    "rate": RATES[best],
                    "interior": 0 < best < len(RATES) - 1,
                    **{f"loss_{seed}": round(float(x), 5) for seed, x in zip(SEEDS, final, strict=True)},
                    "mean": round(float(final.mean()), 5),
                    "paired_difference": round(float(difference.mean()), 5),
                    "standard_error": round(float(difference.std(ddof=1) / len(SEEDS) ** 0.5), 5),
                    "tuning": " ".join(f"{x:.4g}" for x in tuned),
                    "plain": plain,
                }
            )
            print(*(v for k, v in rows[-1].items() if k != "plain"), f"{time.time() - began:.0f} s", flush=True)
    tables.write(args.out, rows, without={"plain"})


if __name__ == "__main__":
    main()
