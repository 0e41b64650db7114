"""Are self-tuning schedules worth more than constants? MacKay et al.'s experiment, and a schedule's replay elsewhere.

A character LSTM on few windows of text, dropout of its outputs the one hyperparameter. Arms of equal training steps:

    fixed        the best constant rate: a grid on other seeds, trained as long; and the best for the loss at the end
    Gaussian     that rate plus normal noise of .05, drawn every step
    sinusoid     that rate plus .1 sin, four periods a run
    Delta-STN    tunes the rate from .05 while it trains; Adam's rate for l by a grid on the same other seeds,
                 decayed to 0 by a cosine over the run's second half
    replay       the Delta-STN's schedule of the same seed, from the same initial weights with other batches and masks
    final value  that schedule's last rate, held constant

Then the schedules of five other starts; and the schedules replayed on an LSTM twice as wide and on two layers of it,
against the best constant of a grid there. An arm is judged by the least loss on the validation windows, looked at LOOKS
times a run, and the test loss of those weights; and by the validation loss at the end. In nats a character.

    python benchmarks/self_tuning_schedules.py    # writes reports/self_tuning/{schedules,starts,replay}{.csv,.png}
    (and schedules.npz, which the other parts read, and grid.csv, the constants')
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
from self_tuning_search import interval

from learned_opt import self_tuning as st
from meta_train.train.problems import char_lstm, make_tuner

REPORT = Path(__file__).parents[1] / "reports" / "self_tuning"
NAME, START, RATE, CYCLE = "dropout_output", 0.05, 1e-2, 5
GRID = (0.01, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9)
HYPER_GRID = (0.025, 0.05, 0.1, 0.2, 0.4)  # Adam's rates for l
STARTS = (0.02, 0.1, 0.3, 0.5, 0.7)
SEEDS, GRID_SEEDS = tuple(range(5)), (100, 101)
TRAIN, VALID, TEST, LOOKS = 100, 500, 1000, 20  # windows; looks at the validation windows
PARTS = ("schedules", "starts", "replay")
MODELS = {"small": {"width": 48}, "twice as wide": {"width": 96}, "two layers": {"width": 48, "layers": 2}}


def logit(rate):
    rate = np.clip(rate, 1e-3, 0.95)
    return np.log(rate / (1 - rate))


def sigmoid(level):
    return 1 / (1 + np.exp(-np.asarray(level)))


class Lab:
    """A model with its compiled runs; runs of several seeds and rates are one batch."""

    def __init__(self, model, steps):
        self.problem = char_lstm(length=24, embedding=16, batch_size=16, tuned=(NAME,), **MODELS[model])
        kept = {"train": TRAIN, "valid": VALID, "test": TEST}
        self.data = jax.device_put({k: {"text": self.problem.data[k]["text"][:n]} for k, n in kept.items()})
        self.steps, self.adam = steps, optax.adam(RATE)

    def mean_loss(self, params, split):
        rows = self.data[split]["text"].reshape(-1, 100, 25)
        return jnp.mean(jax.lax.map(lambda text: self.problem.valid_loss(params, {"text": text}), rows))

    def watched(self, advance, carry, weights_of, inputs):
        """Scan ``advance`` over LOOKS parts; return the carry, its outputs and the validation and test losses."""

        def part(both, own):
            carry, best, kept = both
            carry, out = advance(carry, own)
            loss = self.mean_loss(weights_of(carry), "valid")
            kept = jax.tree.map(lambda a, b: jnp.where(loss < best, a, b), weights_of(carry), kept)
            return (carry, jnp.minimum(loss, best), kept), (out, loss)

        (carry, best, kept), (out, curve) = jax.lax.scan(part, (carry, jnp.inf, weights_of(carry)), inputs)
        losses = {"valid": best, "test": self.mean_loss(kept, "test"), "last_valid": curve[-1], "curve": curve}
        return carry, out, losses

    @functools.partial(jax.jit, static_argnums=0)
    def train(self, seeds, paths):
        """Train at l of [runs, steps]; return the losses by name."""

        def one(seed, path):
            k_init, _, k_run = jax.random.split(jax.random.key(seed), 3)
            params = self.problem.init(k_init)[0]

            def loss(params, level, key):
                k_batch, k_loss = jax.random.split(key)
                batch = self.problem.batch(self.data["train"], k_batch)
                hparams = st.values(self.problem.specs, level[None])
                return jnp.mean(self.problem.train_loss(params, hparams, k_loss, batch))

            def step(carry, own):
                level, index = own
                grads = jax.grad(loss)(carry[0], level, jax.random.fold_in(k_run, index))
                updates, state = self.adam.update(grads, carry[1])
                return (optax.apply_updates(carry[0], updates), state), None

            inputs = (path.reshape(LOOKS, -1), jnp.arange(path.size).reshape(LOOKS, -1))
            advance = lambda carry, own: jax.lax.scan(step, carry, own)  # noqa: E731
            return self.watched(advance, (params, self.adam.init(params)), lambda carry: carry[0], inputs)[2]

        return jax.vmap(one)(seeds, paths)

    @functools.partial(jax.jit, static_argnums=0)
    def tune(self, seeds, starts, hyper_rates):
        """Tune from l of [runs]; return the losses, l and sigma of [runs, cycles]."""

        def one(seed, start, hyper_rate):
            half = self.steps // CYCLE // 2
            decay = optax.join_schedules([optax.constant_schedule(1.0), optax.cosine_decay_schedule(1.0, half)], [half])
            hyper = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(decay), optax.scale(-hyper_rate))
            tuner = make_tuner(self.problem, weights=self.adam, hyper=hyper, train_steps=CYCLE, warmup=10)
            k_init, k_run, _ = jax.random.split(jax.random.key(seed), 3)
            state = tuner.init(*self.problem.init(k_init))
            state = state._replace(hyper=state.hyper._replace(mean=start[None]))
            cycles = self.steps // CYCLE // LOOKS
            advance = lambda state, _: tuner.run(state, k_run, self.data, cycles)  # noqa: E731
            _, info, losses = self.watched(advance, state, lambda state: state.params, jnp.arange(LOOKS))
            return losses, info.mean.reshape(-1), info.sigma.reshape(-1)

        return jax.vmap(one)(seeds, starts, hyper_rates)

    def at(self, seeds, rates):
        """Train at constant rates or at paths of them, one a seed."""
        rates = np.asarray(rates, float)
        paths = np.broadcast_to(rates if rates.ndim == 2 else rates[:, None], (len(seeds), self.steps))
        seeds, levels = jnp.asarray(seeds), jnp.asarray(logit(paths), jnp.float32)
        size = len(SEEDS)  # of every call: one compilation a model
        parts = [self.train(seeds[i : i + size], levels[i : i + size]) for i in range(0, len(seeds), size)]
        return jax.tree.map(lambda *x: np.concatenate(x), *jax.device_get(parts))

    def tuned(self, seeds, starts, hyper_rates):
        """Tune from rates of dropout; as :meth:`tune`."""
        starts = logit(np.broadcast_to(starts, len(seeds)))
        arguments = (starts, np.broadcast_to(hyper_rates, len(seeds)))
        return jax.device_get(self.tune(jnp.asarray(seeds), *(jnp.asarray(x, jnp.float32) for x in arguments)))

    def best_hyper_rate(self):
        """Return Adam's rate for l with the least validation loss on the grid's seeds, and all of them."""
        found = [self.tuned(np.full(len(HYPER_GRID), seed), START, HYPER_GRID)[0]["valid"] for seed in GRID_SEEDS]
        found = np.mean(found, axis=0)
        return HYPER_GRID[int(np.argmin(found))], dict(zip(HYPER_GRID, found.tolist(), strict=True))

    def grid_of_constants(self):
        """Return rows of rate, least validation loss and that at the end, means over the grid's seeds."""
        seeds, rates = np.repeat(GRID_SEEDS, len(GRID)), np.tile(GRID, len(GRID_SEEDS))
        found = self.at(seeds, rates)
        means = [found[name].reshape(len(GRID_SEEDS), len(GRID)).mean(0) for name in ("valid", "last_valid")]
        grid = np.stack([GRID, *means], 1)
        print(f"grid of constants: rate, least validation loss, at the end\n{grid}", flush=True)
        return grid


def best_rate(grid, column):
    """The rate of the row that is least in a column: 1 the least loss, 2 the loss at the end."""
    return float(grid[grid[:, column].argmin(), 0])


def shown(values):
    return "{:.4f} ± {:.4f}".format(*interval(values))


def table(results, baseline):
    """Print the arms' losses and their differences to the baseline's, seed by seed."""
    print(f"| arm | validation | test | test less {baseline}'s | validation at the end |\n|---|---|---|---|---|")
    for arm, own in results.items():
        less = "" if arm == baseline else shown(own["test"] - results[baseline]["test"])
        print(f"| {arm} | {shown(own['valid'])} | {shown(own['test'])} | {less} | {shown(own['last_valid'])} |")


def write(name, rows):
    tables.write(REPORT / f"{name}.csv", rows)


def rows_of(results, rates, **columns):
    """The rows of a CSV file, a run each; rates are the arm's paths [seeds, steps] or its constant."""
    return [
        {
            **columns, "arm": arm, "seed": seed, "first_rate": round(float(rates[arm][i][0]), 4),
            "last_rate": round(float(rates[arm][i][-1]), 4),
            **{name: round(float(own[name][i]), 5) for name in ("valid", "test", "last_valid")},
        }
        for arm, own in results.items() for i, seed in enumerate(SEEDS)
    ]  # fmt: skip


def grid_rows(grids):
    names = ("rate", "valid", "last_valid")
    return [
        {"model": model} | dict(zip(names, (round(float(x), 5) for x in row), strict=True))
        for model, found in grids.items()
        for row in found
    ]


def schedule_arms(lab):
    """The arms; return results, rates by arm, and the schedules as rates [seeds, steps]."""
    grid = lab.grid_of_constants()
    best, best_end = best_rate(grid, 1), best_rate(grid, 2)
    seeds, steps = np.asarray(SEEDS), np.arange(lab.steps)
    hyper_rate, hyper_grid = lab.best_hyper_rate()
    print(f"grid of Delta-STN's rates for l, validation loss: {hyper_grid}; best {hyper_rate}", flush=True)
    tuned, mean, sigma = lab.tuned(seeds, START, hyper_rate)
    specs = lab.problem.specs
    found = [
        st.Schedule(specs, CYCLE * np.arange(mean.shape[1]), mean[i][:, None], sigma[i][:, None])
        for i in range(len(seeds))
    ]
    replayed = np.stack([sigmoid(jax.vmap(functools.partial(st.interpolate, s))(steps)[0])[:, 0] for s in found])
    noise = np.random.default_rng(0).normal(size=replayed.shape)
    rates = {
        "fixed": np.full_like(replayed, best),
        "fixed, by the end": np.full_like(replayed, best_end),
        "Gaussian": np.clip(best + 0.05 * noise, 1e-3, 0.95),
        "sinusoid": np.broadcast_to(
            np.clip(best + 0.1 * np.sin(8 * np.pi * steps / lab.steps), 1e-3, 0.95), noise.shape
        ),
        "replay": replayed,
        "final value": np.repeat(replayed[:, -1:], lab.steps, axis=1),
    }
    results = {arm: lab.at(seeds, paths) for arm, paths in rates.items()}
    order = ("fixed", "fixed, by the end", "Gaussian", "sinusoid", "Delta-STN", "replay", "final value")
    results, rates = results | {"Delta-STN": tuned}, rates | {"Delta-STN": replayed}
    return {arm: results[arm] for arm in order}, {arm: rates[arm] for arm in order}, grid, hyper_rate


def starts_of(lab):
    """Tune from five starts; return losses and the schedules' rates [starts, cycles]."""
    tuned, mean, _ = lab.tuned(np.zeros(len(STARTS), int), np.asarray(STARTS), saved(lab.steps)["hyper_rate"])
    return tuned, sigmoid(mean)


def elsewhere(model, steps, schedule, small_best):
    """The replay on another model against constants."""
    lab, seeds = Lab(model, steps), np.asarray(SEEDS)
    grid = lab.grid_of_constants()
    rates = {
        "best constant there": np.full_like(schedule, best_rate(grid, 1)),
        "best there by the end": np.full_like(schedule, best_rate(grid, 2)),
        "replay": schedule,
        "best constant of the small model": np.full_like(schedule, small_best),
    }
    return {arm: lab.at(seeds, paths) for arm, paths in rates.items()}, rates, grid


def study_schedules(steps):
    lab = small_lab(steps)
    results, rates, grid, hyper_rate = schedule_arms(lab)
    rows = rows_of(results, rates)
    write("schedules", rows)
    paths = rates["Delta-STN"].astype(np.float32)
    np.savez_compressed(REPORT / "schedules.npz", rates=paths, grid=grid, hyper_rate=hyper_rate)
    table(results, "fixed")
    plot_schedules(results, rates, steps)


def study_starts(steps):
    tuned, paths = starts_of(small_lab(steps))
    write("starts", [
        {"start": start, "test": round(float(test), 5), "step": CYCLE * cycle, "rate": round(float(path[cycle]), 4)}
        for start, path, test in zip(STARTS, paths, tuned["test"], strict=True) for cycle in range(0, len(path), 4)
    ])  # fmt: skip
    plot_starts(tuned, paths, steps)
    for share in (0, 0.25, 0.5, 0.75, 1):
        column = paths[:, min(int(share * paths.shape[1]), paths.shape[1] - 1)]
        print(f"at {share:.0%} of the run the rates lie in [{column.min():.3f}, {column.max():.3f}]")


def study_replay(steps):
    schedule, grid = (saved(steps)[name] for name in ("rates", "grid"))
    moved, rows, grids = {}, [], {"small": grid}
    for model in ("twice as wide", "two layers"):
        moved[model], rates, grids[model] = elsewhere(model, steps, schedule, best_rate(grid, 1))
        rows += rows_of(moved[model], rates, model=model)
        write("replay", rows)
        write("grid", grid_rows(grids))
        print(model)
        table(moved[model], "best constant there")
    plot_replay(moved)


def saved(steps):
    """What the part ``schedules`` has written."""
    if not (REPORT / "schedules.npz").exists():
        raise SystemExit("starts and replay need the schedules: run --parts schedules first")
    found = dict(np.load(REPORT / "schedules.npz"))
    if found["rates"].shape[1] != steps:
        raise SystemExit(f"the saved schedules are of {found['rates'].shape[1]} steps, not {steps}")
    return found


@functools.cache
def small_lab(steps):
    return Lab("small", steps)


def dots(ax, results, colours):
    for place, (arm, own) in enumerate(results.items()):
        mean, half = interval(own["test"])
        ax.errorbar(mean, -place, xerr=half, fmt="o", capsize=3, color=colours[arm])
        ax.plot(own["test"], np.full(len(own["test"]), -place - 0.25), "|", color=colours[arm])
    ax.set_yticks(-np.arange(len(results)), results)
    ax.set_xlabel("test loss; mean, 95 % interval, runs")


def tidy(fig, name):
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(REPORT / f"{name}.png", dpi=110)
    plt.close(fig)


def plot_schedules(results, rates, steps):
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    colours = dict(zip(results, plt.cm.tab10.colors, strict=False))
    at = steps // LOOKS * (1 + np.arange(LOOKS))
    for arm, own in results.items():
        left.plot(at, own["curve"].mean(0), color=colours[arm], label=arm, ls="--" if arm == "replay" else "-")
    lowest = min(own["curve"].mean(0).min() for own in results.values())
    left.set(xlabel="training step", ylabel="validation loss, mean of 5 seeds", ylim=(lowest - 0.02, lowest + 0.3))
    left.legend(frameon=False, fontsize=8)
    for i, path in enumerate(rates["Delta-STN"]):
        label = "Delta-STN's schedules" if i == 0 else None
        middle.plot(path, color=colours["Delta-STN"], lw=1, label=label)
    middle.axhline(rates["fixed"][0][0], color=colours["fixed"], label="best constant")
    middle.set(xlabel="training step", ylabel="rate of dropout", ylim=(0, 1))
    middle.legend(frameon=False, fontsize=8)
    dots(right, results, colours)
    tidy(fig, "schedules")


def plot_starts(tuned, rates, steps):
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for start, path, test in zip(STARTS, rates, tuned["test"], strict=True):
        ax.plot(CYCLE * np.arange(len(path)), path, label=f"from {start}: test loss {test:.3f}")
    ax.set(xlabel="training step", ylabel="rate of dropout", ylim=(0, 1), xlim=(0, steps))
    ax.legend(frameon=False, fontsize=8)
    tidy(fig, "starts")


def plot_replay(results):
    fig, axes = plt.subplots(1, len(results), figsize=(12, 3.6), layout="constrained")
    for ax, (model, own) in zip(axes, results.items(), strict=True):
        dots(ax, own, dict(zip(own, plt.cm.tab10.colors, strict=False)))
        ax.set_title(model)
    axes[1].set_yticklabels([])
    tidy(fig, "replay")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the others read what schedules wrote")
    parser.add_argument("--steps", type=int, default=2400, help=f"a multiple of {CYCLE * LOOKS}")
    args = parser.parse_args()
    if args.steps % (CYCLE * LOOKS):
        parser.error(f"--steps must be a multiple of {CYCLE * LOOKS}")
    REPORT.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if part in args.parts:
            begin = time.process_time()
            {"schedules": study_schedules, "starts": study_starts, "replay": study_replay}[part](args.steps)
            print(f"{part}: {time.process_time() - begin:.0f} s of processor time\n", flush=True)


if __name__ == "__main__":
    main()
