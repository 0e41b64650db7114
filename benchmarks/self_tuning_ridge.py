"""Self-tuning of ridge regression's weight decay, against its closed form.

    L_T = 1/2 mean (x w - t)^2 + 1/2 e^l |w|^2,    L_V = 1/2 mean (x w - t)^2 on other rows

40 training and 40 validation rows, 20 features; the noise of the targets is set so that the best l is -1.91. Weights,
response and l all take Adam's steps of size lr, decayed to 0 by a cosine over the run's second half. Every setting of
lr x sigma x start runs with each form of the tuner, three times with other perturbations. The predicted end at a finite
sigma is the zero of L_V'(w)' J, with (w, J) the closed form of what is fitted at that sigma.

    python benchmarks/self_tuning_ridge.py        # writes reports/self_tuning/ridge{.csv,_paths.npz,.png}
"""

import argparse
import csv
import functools
import itertools
import time
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import matplotlib
import tables

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.optimize

from learned_opt import self_tuning as st

REPORT = Path(__file__).parents[1] / "reports" / "self_tuning"
N, D, OPTIMUM = 40, 20, -1.91
RATES, SIGMAS, STARTS, SEEDS = (0.005, 0.01, 0.05), (0.05, 0.1, 0.5), (-5.0, 3.0), (0, 1, 2)
SPECS = {"l2": st.log(1.0, per_example=False)}
DELTA = {"method": "delta_stn"}
ORIGINAL = {"method": "stn", "trust": None, "guard": None}
FORMS = {  # name -> (tuner's options, whether sigma is annealed to a tenth)
    "Delta-STN": (DELTA, False),
    "Delta-STN, annealed": (DELTA, True),
    "Delta-STN, corrected": (DELTA | {"correct_bias": True}, False),
    "Delta-STN, no guard": (DELTA | {"trust": None, "guard": None}, False),
    "STN": (ORIGINAL, False),
    "STN, guarded": ({"method": "stn"}, False),
}


SETTINGS = list(itertools.product(RATES, SIGMAS, STARTS, SEEDS))
POINTS = 100  # of each path that are kept


def moments(x, t):
    return x.T @ x / len(t), x.T @ t / len(t)


def expected_end(train, valid, sigma, centred=True):
    """Return the l where the validation gradient is zero through the response that oracle 3 predicts at sigma."""
    A, b = moments(*train)

    def slope(level):
        r, m = np.exp(level), np.exp(sigma**2 / 2)
        K = np.linalg.inv(A + r * m * (1 + sigma**2) * np.eye(D))
        if centred:
            w = np.linalg.solve(A + r * np.eye(D), b)
        else:
            w = np.linalg.solve(A + r * m * np.eye(D) - (r * sigma * m) ** 2 * K, b)
        return (valid[0] @ w - valid[1]) @ valid[0] @ (-r * m * K @ w) / N

    grid = np.linspace(-8.0, 5.0, 400)
    near = grid[int(np.argmin([valid_loss_at(train, valid, level) for level in grid]))]
    return scipy.optimize.brentq(slope, near - 0.5, near + 0.5, xtol=1e-12)


def valid_loss_at(train, valid, level):
    A, b = moments(*train)
    return 0.5 * np.mean((valid[0] @ np.linalg.solve(A + np.exp(level) * np.eye(D), b) - valid[1]) ** 2)


def make_data():
    """Return (x, t) of training and validation with the wanted optimum."""
    rng = np.random.default_rng(1)
    x, w, noise = rng.normal(size=(2, N, D)), rng.normal(size=D) / np.sqrt(D), rng.normal(size=(2, N))

    def data(level):
        t = x @ w + np.exp(level) * noise
        return (x[0], t[0]), (x[1], t[1])

    level = scipy.optimize.brentq(lambda level: expected_end(*data(level), 0.0) - OPTIMUM, -1.5, 0.5)
    return data(level)


def make_runs(data, cycles, options, annealed):
    """Return a function of (lr, sigma, start, key) to the trajectory of l and what the guard did."""
    net = st.lift(hk.without_apply_rng(hk.transform(lambda x: hk.Linear(1, with_bias=False)(x)[:, 0])))

    def train_loss(params, hparams, key, batch):
        return 0.5 * (net.apply(params, batch[0]) - batch[1]) ** 2 + 0.5 * hparams["l2"] * st.squared_norm(params)

    def valid_loss(params, batch):
        return 0.5 * (net.apply(params, batch[0]) - batch[1]) ** 2

    def run(rate, sigma, start, key):
        k_params, k_response, k_run = jax.random.split(key, 3)
        half = cycles // 2

        def adam(steps):  # steps a cycle
            decay = optax.cosine_decay_schedule(1.0, half * steps)
            schedule = optax.join_schedules([optax.constant_schedule(1.0), decay], [half * steps])
            return optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(schedule), optax.scale(-rate))

        tuned = st.tuner(
            *(SPECS, train_loss, valid_loss, lambda data, key: data[0], lambda data, key: data[1]),
            weights=adam(5),
            hyper=adam(1),
            warmup=cycles // 20,
            tune_scale=False,
            entropy=0.0,
            anneal=optax.cosine_decay_schedule(1.0, cycles * 3 // 4, alpha=0.1) if annealed else None,
            **options,
        )
        params = jax.tree.map(jnp.zeros_like, net.init(k_params, data[0][0]))
        state = tuned.init(params, net.init_response(k_response, 1, data[0][0]))
        state = state._replace(hyper=st.Hyper(start[None], jnp.log(jnp.expm1(sigma))[None]))
        _, info = tuned.run(state, k_run, data, cycles)
        return info.mean[:, 0], jnp.sum(info.rolled_back), jnp.sum(info.skipped)

    return jax.jit(jax.vmap(run))


def study(form, cycles):
    """Return a row of results for each setting of a form, and the paths of l, [settings, POINTS + 1]."""
    train, valid = make_data()
    data = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (train, valid))
    options, annealed = FORMS[form]
    rates, sigmas, starts, seeds = (jnp.asarray(column) for column in zip(*SETTINGS, strict=True))
    begin = time.time()
    paths, back, skipped = map(np.asarray, make_runs(data, cycles, options, annealed)(
        rates, sigmas, starts, jax.vmap(jax.random.key)(seeds)
    ))  # fmt: skip
    print(f"{form}: {time.time() - begin:.0f} s", flush=True)
    rows = []
    for path, (rate, sigma, start, seed), rolled, skips in zip(paths, SETTINGS, back, skipped, strict=True):
        target, end = predicted(form, sigma), float(path[-1])
        if not np.isfinite(path).all():
            verdict = "not finite"
        else:
            verdict = "stuck" if abs(end - OPTIMUM) > 0.25 * abs(start - OPTIMUM) else "converged"
        rows.append({
            "form": form, "lr": rate, "sigma": sigma, "start": start, "seed": seed, "cycles": cycles,
            "end": round(end, 4), "optimum": OPTIMUM, "predicted": round(target, 4), "verdict": verdict,
            "within_0.01_of_predicted": abs(end - target) <= 0.01, "rolled_back": int(rolled), "skipped": int(skips),
        })  # fmt: skip
    return rows, paths[:, np.linspace(0, cycles - 1, POINTS + 1).astype(int)]


@functools.cache
def predicted(form, sigma):
    options, annealed = FORMS[form]
    unbiased = annealed or options.get("correct_bias")
    return expected_end(*make_data(), 0.0 if unbiased else sigma, centred=options["method"] == "delta_stn")


def summary(rows):
    """Print what each form did, a line each sigma."""
    print(f"{'form':22s} sigma  runs  not finite  stuck  within .01   end, mean and range")
    for form, sigma in itertools.product(FORMS, SIGMAS):
        chosen = [r for r in rows if r["form"] == form and r["sigma"] == sigma]
        count = lambda what, chosen=chosen: sum(r["verdict"] == what for r in chosen)  # noqa: E731
        ends = [r["end"] for r in chosen if r["verdict"] == "converged"]
        text = f"{np.mean(ends):.3f} [{min(ends):.3f}, {max(ends):.3f}]" if ends else "-"
        close = sum(r["within_0.01_of_predicted"] for r in chosen)
        counts = f"{len(chosen):5d} {count('not finite'):11d} {count('stuck'):6d} {close:11d}"
        print(f"{form:22s} {sigma:5.2f} {counts}   {text} (predicted {chosen[0]['predicted']:.3f})")


def plot(rows, paths):
    fig, axes = plt.subplots(len(FORMS), len(SIGMAS), figsize=(13, 2.5 * len(FORMS)), sharex=True, sharey=True)
    colours = dict(zip(RATES, plt.cm.viridis([0.0, 0.45, 0.85]), strict=True))
    for line, form in zip(axes, FORMS, strict=True):
        for ax, sigma in zip(line, SIGMAS, strict=True):
            chosen = [r for r in rows if r["form"] == form and r["sigma"] == sigma]
            cycles = np.linspace(0, chosen[0]["cycles"], POINTS + 1)
            for path, (rate, own, start, seed) in zip(paths[form], SETTINGS, strict=True):
                if own == sigma:
                    label = f"lr {rate}" if start == STARTS[0] and seed == 0 else None
                    ax.plot(cycles, np.clip(path, -12, 12), lw=0.8, color=colours[rate], label=label)
            ax.axhline(OPTIMUM, color="k", lw=0.8, ls="--", label=f"optimum {OPTIMUM}")
            end = chosen[0]["predicted"]
            if abs(end - OPTIMUM) > 0.005:
                ax.axhline(end, color="r", lw=0.8, ls=":", label=f"predicted {end:.3f}")
            bad = {what: sum(r["verdict"] == what for r in chosen) for what in ("not finite", "stuck")}
            told = ", ".join(f"{count} {what}" for what, count in bad.items() if count) or "none stuck"
            ax.set_title(f"{form}, sigma {sigma}: {told}", fontsize=9)
            ax.set_ylim(-8, 6)
        line[0].set_ylabel("l")
        line[-1].legend(fontsize=7, loc="upper right")
    for ax in axes[-1]:
        ax.set_xlabel("cycle (5 training steps, 1 validation step)")
        ax.set_xticks([0, cycles[-1] / 2, cycles[-1]])
    fig.tight_layout()
    fig.savefig(REPORT / "ridge.png", dpi=90)


def typed(row):
    """Return a row of the CSV file with its numbers as numbers."""
    number = {name: float(row[name]) for name in ("lr", "sigma", "start", "end", "optimum", "predicted")}
    whole = {name: int(row[name]) for name in ("seed", "cycles", "rolled_back", "skipped")}
    return row | number | whole | {"within_0.01_of_predicted": row["within_0.01_of_predicted"] == "True"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=20000)
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=list(FORMS), help="run these only")
    args = parser.parse_args()
    REPORT.mkdir(parents=True, exist_ok=True)
    table, paths = {}, {}
    if len(args.forms) < len(FORMS) and (REPORT / "ridge.csv").exists():
        with open(REPORT / "ridge.csv", newline="") as file:
            for row in csv.DictReader(file):
                table.setdefault(row["form"], []).append(typed(row))
        paths = dict(np.load(REPORT / "ridge_paths.npz"))
    for form in args.forms:
        table[form], paths[form] = study(form, args.cycles)
    rows = [row for form in FORMS for row in table.get(form, [])]
    tables.write(REPORT / "ridge.csv", rows)
    np.savez_compressed(REPORT / "ridge_paths.npz", **{k: v.astype(np.float32) for k, v in paths.items()})
    if set(table) == set(FORMS):
        summary(rows)
        plot(rows, paths)


if __name__ == "__main__":
    main()
