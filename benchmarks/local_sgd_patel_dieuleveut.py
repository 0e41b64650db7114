"""Patel and Dieuleveut's trade-off: what a delay costs near the optimum, and what an adaptive one gains far from it.

P = 16 workers, d = 5, fresh samples at every step. Logistic regression with x ~ N(0, I) and labels from w*, |w*| set so
that mu, the smallest eigenvalue of the Hessian at w*, is 1/13.75; least squares beside it, with the same mu and M = 0.

stationary: from w*, constant step eta, T = 8192: E|w - w*|^2 relative to a delay of N = 1, for the mean over workers
and steps (Polyak-Ruppert, the paper's) and for the last mean of the workers. The knee is predicted at 1/(eta mu P).

far: from |w - w*| = 10, T = 512: the error of the last mean against rounds for constant delays, and for the adaptive
rules at several scales c; constant and decaying steps. The distance that the distance-aware rule reads is the true one
(an oracle). It is shown with and without a cap of 1/(eta mu), the time in which the distance shrinks e-fold.

    python benchmarks/local_sgd_patel_dieuleveut.py     # writes reports/local_sgd/patel_dieuleveut_*.csv and .png
"""

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import tables

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.optimize

from learned_opt import schedules
from learned_opt.local_sgd import local_sgd, map_workers, spread_workers, worker_axes

REPORT = Path(__file__).parents[1] / "reports" / "local_sgd"
P, D, MU = 16, 5, 1 / 13.75
STATIONARY_STEPS, STATIONARY_DELAYS = 8192, (1, 2, 4, 8, 16, 32, 64, 256, 1024, 8192)
RATES = (0.5, 0.1, 0.02)
FAR_STEPS, DISTANCE = 512, 10.0
FAR_DELAYS = (
    1,
    2,
    3,
    4,
    5,
    6,
    8,
    10,
    13,
    17,
    20,
    24,
    27,
    32,
    40,
    52,
    64,
    86,
    128,
    256,
    512,
)  # fine: rivals of equal rounds
SCALES = tuple(2.0**i for i in range(-3, 8))
REPEATS = 96


def gaussian_mean(fn):
    """E fn(z) of a standard normal z."""
    z, weights = np.polynomial.hermite_e.hermegauss(120)
    return float(np.sum(weights * fn(z)) / np.sqrt(2 * np.pi))


def curvature(size):
    """Smallest eigenvalue of E[s'(x w) x x'], |w| = size: along w it is E[s'(size z) z^2]."""
    slope = lambda z: 1 / (4 * np.cosh(size * z / 2) ** 2)  # noqa: E731
    return gaussian_mean(lambda z: slope(z) * z**2), gaussian_mean(slope)


SIZE = scipy.optimize.brentq(lambda size: curvature(size)[0] - MU, 0.1, 10)
OPTIMUM = jnp.full(D, SIZE / np.sqrt(D), jnp.float32)
# trace of one gradient's covariance at w*: tr E[s' x x'] for logistic, 1 times tr E[x x'] for least squares
NOISE = {"logistic": curvature(SIZE)[0] + (D - 1) * curvature(SIZE)[1], "least squares": D * MU}


def gradient(problem, w, key):
    x_key, y_key = jax.random.split(key)
    x = jax.random.normal(x_key, (D,))
    if problem == "least squares":
        x = x * np.sqrt(MU)
        return (x @ (w - OPTIMUM) - jax.random.normal(y_key)) * x
    label = jax.random.uniform(y_key) < jax.nn.sigmoid(x @ OPTIMUM)
    return (jax.nn.sigmoid(x @ w) - label) * x


@functools.partial(jax.jit, static_argnames=("problem", "schedule_of", "rate", "steps"))
def errors(problem, schedule_of, settings, rate, start, steps, key):
    """Return |w - w*|^2 for the average and the last iterate, and the rounds: [settings, REPEATS] each."""

    def one_run(setting, key):
        distance = lambda anchor: jnp.sum((anchor - OPTIMUM) ** 2)  # noqa: E731
        opt = local_sgd(optax.sgd(rate), sync_every=schedule_of(setting, problem, rate), statistic=distance)
        state = opt.init(start)
        axes = worker_axes(state)

        def one(w, state, key):
            updates, state = opt.update(gradient(problem, w, key), state, w)
            return optax.apply_updates(w, updates), state

        step = map_workers(one, in_axes=(0, axes, 0), out_axes=(0, axes))

        def body(t, carry):
            (w, state), total = carry
            w, state = step(w, state, jax.random.split(jax.random.fold_in(key, t), P))
            return (w, state), total + jnp.mean(w, axis=0)

        carry = (spread_workers(start, P), spread_workers(state, P, axes)), jnp.zeros(D)
        (w, state), total = jax.lax.fori_loop(0, steps, body, carry)
        square = lambda w: jnp.sum((w - OPTIMUM) ** 2)  # noqa: E731
        return square(total / steps), square(jnp.mean(w, axis=0)), state.round + (state.since_sync > 0)

    keys = jax.random.split(key, REPEATS)  # the same for all settings
    return jax.vmap(lambda setting: jax.vmap(lambda key: one_run(setting, key))(keys))(settings)


def constant(setting, problem, rate):
    return schedules.constant(setting)


def distance_aware(setting, problem, rate):
    return schedules.distance_aware(rate, MU, P, NOISE[problem], scale=setting, maximum=2**20)


def capped(setting, problem, rate):
    return schedules.distance_aware(rate, MU, P, NOISE[problem], scale=setting)


def near_rule(setting, problem, rate):
    return schedules.patel_dieuleveut(rate, MU, P, scale=setting)


def decaying(step):
    return 0.5 / jnp.sqrt(1 + step / 64)


def ratio(values, base):
    """Return mean(values) / mean(base), and its standard error for paired repeats."""
    value = values.mean() / base.mean()
    return float(value), float(np.std(values - value * base) / base.mean() / np.sqrt(len(base)))


def stationary():
    rows = []
    for problem in NOISE:
        for rate in RATES:
            began = time.time()
            delays = jnp.asarray(STATIONARY_DELAYS, jnp.int32)
            found = errors(problem, constant, delays, rate, OPTIMUM, STATIONARY_STEPS, jax.random.key(0))
            average, last, _ = map(np.asarray, found)
            for i, delay in enumerate(STATIONARY_DELAYS):
                row = {"problem": problem, "eta": rate, "predicted_knee": round(1 / (rate * MU * P), 2), "N": delay}
                row["average"], row["average_se"] = ratio(average[i], average[0])
                row["last"], row["last_se"] = ratio(last[i], last[0])
                rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
            shown = {r["N"]: r["average"] for r in rows[-len(STATIONARY_DELAYS) :]}
            print(f"{problem}, eta {rate}: {shown} {time.time() - began:.0f} s", flush=True)
    return rows


def far():
    rows = []
    direction = np.random.default_rng(0).normal(size=D)
    start = OPTIMUM + jnp.asarray(DISTANCE * direction / np.linalg.norm(direction), jnp.float32)
    for problem in NOISE:
        for steps_name, rate in (("constant", 0.5), ("decaying", decaying)):
            rules = [("constant", constant, jnp.asarray(FAR_DELAYS, jnp.int32))]
            rules.append(("distance-aware", distance_aware, jnp.asarray(SCALES, jnp.float32)))
            rules.append(("distance-aware, capped", capped, jnp.asarray(SCALES, jnp.float32)))
            if steps_name == "decaying":  # with a constant step it is a constant delay
                rules.append(("1 / (eta mu P)", near_rule, jnp.asarray(SCALES, jnp.float32)))
            fixed, begin = [], len(rows)
            for name, rule, settings in rules:
                found = errors(problem, rule, settings, rate, start, FAR_STEPS, jax.random.key(1))
                _, last, rounds = map(np.asarray, found)
                for i, setting in enumerate(np.asarray(settings)):
                    if rule is constant:
                        fixed.append((float(rounds[i].mean()), int(setting), last[i]))
                    rows.append(
                        {
                            "problem": problem, "steps": steps_name, "rule": name, "setting": float(setting),
                            "rounds": float(rounds[i].mean()), "error": float(last[i].mean()),
                        }
                        | against_constant(float(rounds[i].mean()), last[i], fixed)
                    )  # fmt: skip
            for row in rows[begin:]:
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return rows


def against_constant(rounds, values, fixed):
    """Compare with N = 1 and with the best constant delay that has no more rounds; errors of paired repeats."""
    _, delay, best = min((f for f in fixed if f[0] <= rounds + 0.5), key=lambda f: f[2].mean())
    to_one, one_se = ratio(values, fixed[0][2])
    to_best, best_se = ratio(values, best)
    return {
        "relative_to_N_1": to_one, "relative_to_N_1_se": one_se,
        "best_constant_N": delay, "relative_to_it": to_best, "relative_to_it_se": best_se,
    }  # fmt: skip


def write(name, rows):
    tables.write(REPORT / f"patel_dieuleveut_{name}.csv", tables.shortened(rows, 6))


def plot_stationary(rows):
    fig, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained", sharey=True)
    for ax, problem in zip(axes, NOISE, strict=True):
        for color, rate in zip(("C3", "C0", "C2"), RATES, strict=True):
            mine = [r for r in rows if r["problem"] == problem and r["eta"] == rate]
            n, y, se = (np.array([r[k] for r in mine]) for k in ("N", "average", "average_se"))
            ax.errorbar(n, y, 2 * se, fmt="o-", ms=4, color=color, label=f"eta {rate}, mean over steps")
            ax.plot(n, [r["last"] for r in mine], ":", color=color, lw=1, label=f"eta {rate}, last")
            ax.axvline(1 / (rate * MU * P), color=color, ls="--", lw=0.8)
        ax.axhline(1, color="k", lw=0.5)
        ax.set(xscale="log", yscale="log", xlabel="delay N", title=f"{problem}")
    axes[0].set_ylabel("E|w - w*|² relative to N = 1")
    axes[1].legend(fontsize=8)
    fig.suptitle(f"From the optimum, P = {P}, T = {STATIONARY_STEPS}; dashed: 1/(eta mu P)")
    fig.savefig(REPORT / "patel_dieuleveut_stationary.png", dpi=110)
    plt.close(fig)


def plot_far(rows):
    fig, grid = plt.subplots(2, 2, figsize=(10.5, 8), layout="constrained", sharex=True)
    styles = {"constant": "ko-", "distance-aware": "C1s", "distance-aware, capped": "C3D", "1 / (eta mu P)": "C0^"}
    for line, problem in zip(grid, NOISE, strict=True):
        for ax, steps in zip(line, ("constant", "decaying"), strict=True):
            for rule, style in styles.items():
                mine = [r for r in rows if (r["problem"], r["steps"], r["rule"]) == (problem, steps, rule)]
                if mine:
                    x, y, se = (
                        np.array([r[k] for r in mine]) for k in ("rounds", "relative_to_N_1", "relative_to_N_1_se")
                    )
                    ax.errorbar(
                        x, y, 2 * se, fmt=style, ms=4, lw=1, label=f"{rule} delay" if rule == "constant" else rule
                    )
            ax.axhline(1, color="k", lw=0.5)
            ax.set(xscale="log", title=f"{problem}, {steps} step")
            ax.legend(fontsize=8)
    for ax in grid[1]:
        ax.set_xlabel("rounds of communication")
    for line in grid:
        line[0].set_ylabel("E|w - w*|² of the last mean, relative to N = 1")
    fig.suptitle(
        f"From |w - w*| = {DISTANCE:g}, P = {P}, T = {FAR_STEPS} steps: error against rounds, bars of 2 standard errors"
    )
    fig.savefig(REPORT / "patel_dieuleveut_far.png", dpi=110)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["stationary", "far"])
    only = parser.parse_args().only
    REPORT.mkdir(parents=True, exist_ok=True)
    print(f"|w*| = {SIZE:.3f}, mu = {MU:.4f}, noise {NOISE}")
    if only != "far":
        rows = stationary()
        write("stationary", rows)
        plot_stationary(rows)
    if only != "stationary":
        rows = far()
        write("far", rows)
        plot_far(rows)


if __name__ == "__main__":
    main()
