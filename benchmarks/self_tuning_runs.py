"""Runs of self-tuning and of plain training that have a number of steps, for the studies of self_tuning_*.py."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from self_tuning_peers import at_steps, draw
from self_tuning_search import CHUNK, Lab, Watch, interval, load_optuna, load_results, missing

from learned_opt import self_tuning as st
from learned_opt.self_tuning.objectives import Hyper, leading_size
from meta_train.train.problems import make_tuner

CYCLE = 5  # training steps of a cycle of the tuner
HYPER_RATES = 0.1, 0.1  # Adam's for l and for sigma, as self_tuning_drawn.py chose them
JUDGED = 1000  # validation examples, at most, that a population is judged by after a round
TRIALS = 4  # of a search, in as many training steps as a run has
MEMBERS, ROUNDS = 4, 12  # of population-based training, in which each takes half of the steps of a run
OWN = "Delta-STN"
METHODS = (
    *("untuned defaults", "untuned defaults, twice as long", "untuned draw", OWN, "Delta-STN, from the defaults"),
    *("PBT", "ASHA", "search", "search's best, trained anew", "replay"),
)


def within(specs, bounds=None):
    """Specs between other bounds, by name; rates of dropout, which have none, lie between 0 and 0.8."""
    bounds = {name: (0.0, 0.8) for name in specs if name.startswith("dropout")} | (bounds or {})
    return {
        name: dataclasses.replace(spec, kind="interval", low=bounds[name][0], high=bounds[name][1])
        if name in bounds
        else spec
        for name, spec in specs.items()
    }


def cosine(share):
    """From 1 to 0 while ``share`` goes from 0 to 1."""
    return (1 + jnp.cos(jnp.pi * jnp.minimum(share, 1))) / 2


class Runs(Lab):
    """A Lab whose runs have a number of steps: Adam's rate rises over the first ``rise``, and falls to 0 by a cosine.

    All are looked at every ``look`` steps. Rates and lengths are arguments of what is compiled, once a problem.
    """

    def __init__(self, problem, rows, rate, look, rise=200):
        super().__init__(problem, rows)
        self.rate, self.look, self.rise, self.moments = rate, look, rise, optax.scale_by_adam()

    def self_tuner(self, hyper_rate, scale_rate, total):
        hyper = optax.stateless(lambda updates, _: Hyper(hyper_rate * updates.mean, scale_rate * updates.scale))
        weights = optax.scale_by_schedule(lambda i: -self.rate_at(i, total))
        fall = optax.scale_by_schedule(lambda i: -cosine(i * CYCLE / total))
        return make_tuner(
            self.problem, train_steps=CYCLE, warmup=CHUNK // CYCLE,
            weights=optax.chain(self.moments, weights), hyper=optax.chain(self.moments, hyper, fall),
        )  # fmt: skip

    def rate_at(self, step, total):
        rise = jnp.minimum(self.rise, total / 4)  # trials may be shorter
        return self.rate * jnp.minimum(1, (step + 1) / rise) * cosine(step / total)

    @functools.partial(jax.jit, static_argnums=(0, 6))
    def tuned_part(self, state, key, hyper_rate, scale_rate, total, cycles):
        return self.self_tuner(hyper_rate, scale_rate, total).run(state, key, self.data, cycles)

    def tuned(self, level, k_init, k_run, total, hyper_rate, scale_rate):
        """A run of Delta-STN from l; return its watch, its schedule, and how often the guard was needed."""
        state = self.self_tuner(hyper_rate, scale_rate, total).init(*self.start(k_init))
        hyper = state.hyper._replace(mean=level)
        state = state._replace(hyper=hyper, best=state.best._replace(hyper=hyper))
        watch, infos = Watch(self, np.inf), []
        for _ in range(0, total, self.look):
            state, info = self.tuned_part(state, k_run, hyper_rate, scale_rate, total, self.look // CYCLE)
            watch.look(state.params, info.mean[-1], self.look)
            infos.append(info)
        guarded = {name: int(sum(getattr(info, name).sum() for info in infos)) for name in ("skipped", "rolled_back")}
        return watch, st.from_run(self.specs, infos, CYCLE), guarded

    @functools.partial(jax.jit, static_argnums=0)
    def plain_part(self, carry, path, key, begin, total):
        def step(carry, own):
            level, index = own
            grads = jax.grad(self.loss)(carry[0], level, jax.random.fold_in(key, index))
            updates, state = self.moments.update(grads, carry[1])
            rate = self.rate_at(index, total)
            return (jax.tree.map(lambda p, u: p - rate * u, carry[0], updates), state), None

        return jax.lax.scan(step, carry, (path, begin + jnp.arange(self.look)))[0]

    def plain(self, watch, path, k_init, k_run, total, stop=lambda loss, look: False):
        """Train at l, or at a path of them [total, H], until the steps are done; return the least validation loss."""
        path = np.broadcast_to(np.asarray(path, np.float32), (total, len(st.names(self.specs))))
        params, best = self.start(k_init)[0], np.inf
        carry = params, self.moments.init(params)
        for begin in range(0, total, self.look):
            own = path[begin : begin + self.look]
            carry = self.plain_part(carry, own, k_run, begin, total)
            loss = watch.look(carry[0], own[-1], self.look)
            best = min(best, loss)
            if stop(loss, begin // self.look + 1):
                break
        return best

    def compile(self):
        """Compile both, outside of any run's time."""
        key = jax.random.key(0)
        self.plain(Watch(self, np.inf), self.level, key, key, self.look)
        self.tuned(self.level, key, key, self.look, 0.1, 0.0)

    def named(self, level):
        """The values at l, by name."""
        values = jax.device_get(st.values(self.specs, jnp.asarray(level, jnp.float32)))
        return {name: float(f"{float(x):.3g}") for name, x in values.items()}

    def level_of(self, values):
        """The l of values by name."""
        specs = {name: dataclasses.replace(spec, start=values[name]) for name, spec in self.specs.items()}
        return st.start(specs)[0]

    def result(self, watch, **columns):
        """What is kept of a run."""
        test = jax.device_get(self.judge(watch.params, self.data["test"]))
        return columns | {
            "processor_s": watch.curve[-1][0], "trained": watch.steps, "valid": round(watch.best, 4),
            **{f"test_{name}": round(float(x), 4) for name, x in test.items()}, "chosen": self.named(watch.level),
        }  # fmt: skip


class Comparison:
    """Methods by equal compute, each as ``(seed) -> watch, trials``.

    Args:
        name: of the study's files.
        lab: :class:`Runs`.
        steps: of a run.
        rates: Adam's for l and for sigma.
        drawn: whether Delta-STN and the searches start at a draw of the seed's own, as PBT does, or at the defaults.
    """

    def __init__(self, name, lab, steps, rates, drawn):
        self.name, self.lab, self.steps, self.rates, self.drawn = name, lab, steps, rates, drawn
        self.each = steps // (2 * ROUNDS)  # steps of a member in a round
        self.methods = {
            "untuned defaults": lambda seed: self.constant(seed, lab.level),
            "untuned defaults, twice as long": lambda seed: self.constant(seed, lab.level, 2 * steps),
            "untuned draw": lambda seed: self.constant(seed, draw(lab, seed)),
            OWN: lambda seed: (self.tuned(seed, drawn)[0], 1),
            "Delta-STN, from the defaults": lambda seed: (self.tuned(seed, False)[0], 1),
            "PBT": self.population,
            "ASHA": functools.partial(self.search, trial=steps // 2, sampler="random", pruned=True),
            "search": functools.partial(self.search, trial=steps // TRIALS, sampler="tpe", pruned=False),
            "search's best, trained anew": self.best_anew,
            "replay": self.replay,
        }

    def keys(self, seed):
        return jax.random.split(jax.random.key(seed))

    def kept(self, method, seed):
        own = [run for run in load_results(self.name)[0] if (run["method"], run["seed"]) == (method, seed)]
        if not own:
            raise SystemExit(f"{method} of seed {seed} has to run first")
        return own[0]

    def constant(self, seed, path, steps=None):
        watch = Watch(self.lab, np.inf)
        self.lab.plain(watch, path, *self.keys(seed), steps or self.steps)
        return watch, 1

    @functools.cache  # noqa: B019
    def tuned(self, seed, drawn):
        start = draw(self.lab, seed) if drawn else self.lab.level
        return self.lab.tuned(start, *self.keys(seed), self.steps, *self.rates)

    @functools.cached_property
    def members(self):
        lab = self.lab

        def judged(data, key):
            count = leading_size(data["valid"])
            rows = jax.random.choice(key, count, (min(JUDGED, count),), replace=False)
            return jax.tree.map(lambda x: x[rows], data["valid"])

        return st.population(
            lab.specs, lab.problem.train_loss, lab.problem.valid_loss,
            lambda data, key: lab.problem.batch(data["train"], key), judged,
            weights=optax.chain(lab.moments, optax.scale_by_schedule(lambda i: -lab.rate_at(i, self.steps // 2))),
            members=MEMBERS, train_steps=self.each,
        )  # fmt: skip

    def population(self, seed):
        """MEMBERS that train for half of a run each: about the processor time of Delta-STN, whose steps are dearer."""
        lab, (k_init, k_run) = self.lab, self.keys(seed)
        state = self.members.init(k_init, lambda key: lab.problem.init(key)[0])
        jax.block_until_ready(self.members.run(state, k_run, lab.data, 1))  # compiled
        watch = Watch(lab, np.inf)
        for _ in range(ROUNDS):
            state, _ = self.members.run(state, k_run, lab.data, 1)
            watch.look(*self.members.best(state), MEMBERS * self.each)
        return watch, MEMBERS

    def search(self, seed, trial, sampler, pruned):
        """Trials of so many steps, the last begun in Delta-STN's processor time; the first is at its start.

        The others are TPE's, the first three of them drawn, or all are drawn. With ``pruned`` two thirds of them end at
        the first look, the third, the ninth and so on (asynchronous successive halving).
        """
        optuna = load_optuna()
        samplers = {
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed, n_startup_trials=4),
            "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        }
        pruner = optuna.pruners.SuccessiveHalvingPruner(1, 3) if pruned else optuna.pruners.NopPruner()
        study = optuna.create_study(sampler=samplers[sampler](), pruner=pruner)
        first = jax.nn.sigmoid(draw(self.lab, seed) if self.drawn else self.lab.level)
        study.enqueue_trial(dict(zip(st.names(self.lab.specs), map(float, first), strict=True)))
        watch, keys = Watch(self.lab, self.kept(OWN, seed)["processor_s"]), self.keys(seed)
        for number in itertools.count():
            if not watch.left():
                return watch, number
            asked = study.ask()
            # uniform between the bounds, or their logarithms: what self_tuning.draw draws
            share = np.asarray([asked.suggest_float(name, 0.0067, 0.9933) for name in st.names(self.lab.specs)])
            level, own = np.log(share) - np.log1p(-share), jax.random.fold_in(keys[1], number)

            def stop(loss, look, asked=asked):
                asked.report(loss, look)
                return pruned and asked.should_prune()

            study.tell(asked, self.lab.plain(watch, level, keys[0], own, trial, stop))

    def best_anew(self, seed):
        return self.constant(seed, self.lab.level_of(self.kept("search", seed)["chosen"]))

    def replay(self, seed):
        """The schedule of the seed's run on a network of other initial weights, batches and masks."""
        path, _ = jax.vmap(functools.partial(st.interpolate, self.tuned(seed, self.drawn)[1]))(np.arange(self.steps))
        return self.constant(100 + seed, path)

    def run(self, method, seed):
        watch, trials = self.methods[method](seed)
        end = jax.device_get(self.lab.judge(watch.last, self.lab.data["test"]))
        columns = {"method": method, "seed": seed, "steps": self.steps, "trials": trials}
        columns |= {f"end_{name}": round(float(x), 4) for name, x in end.items()}
        if method.startswith(OWN):
            columns |= self.tuned(seed, self.drawn and method == OWN)[2]
        return self.lab.result(watch, **columns), watch.curve

    def missing(self, seeds, methods):
        return missing(self.name, self.run, seeds, [m for m in self.methods if m in methods], self.steps, unit="steps")


def less(runs, method, name):
    """The differences, seed by seed: Delta-STN's less another method's."""
    own, other = ({run["seed"]: run[name] for run in runs if run["method"] == m} for m in (OWN, method))
    return np.asarray([own[seed] - other[seed] for seed in own.keys() & other.keys()])


def by_test(runs, name):
    """The methods' runs, the best test figure first."""
    found = {m: [run for run in runs if run["method"] == m] for m in dict.fromkeys(run["method"] for run in runs)}
    return dict(sorted(found.items(), key=lambda item: np.mean([run[name] for run in item[1]])))


def summary(runs, curves, name, title, unit, digits):
    """Print the table, the method that is furthest ahead of Delta-STN first; figures are divided by ``unit``."""
    steps = runs[0]["steps"]
    print(f"| method | trials | steps | processor time, s | validation loss | after {steps} steps | {title} |"
          f" {OWN}'s less its |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    shown = lambda values, digits: "{:.{d}f} ± {:.{d}f}".format(*interval(values), d=digits)  # noqa: E731
    for method, own in by_test(runs, name).items():
        counts = [f"{np.mean([run[column] for run in own]):.{d}f}" for column, d in (("trials", 1), ("trained", 0))]
        early = [at_steps(curves[method, run["seed"]], steps) for run in own]
        cells = [*counts, f"{np.mean([run['processor_s'] for run in own]):.1f}"]
        cells += [shown([run["valid"] for run in own], 3), shown(early, 3)]
        cells.append(shown(np.asarray([run[name] for run in own]) / unit, digits))
        mean, half = interval(less(runs, method, name) / unit)
        cells.append("" if method == OWN else f"{mean:+.{digits}f} ± {half:.{digits}f}")
        print(f"| {method} | " + " | ".join(cells) + " |")


def strips(ax, rows, colours, title):
    """A line for each label of ``rows``: the mean of its values with the 95 % interval, and below it the values."""
    for place, (values, colour) in enumerate(zip(rows.values(), colours, strict=True)):
        mean, half = interval(values)
        ax.errorbar(mean, -place, xerr=half, fmt="o", color=colour, capsize=3)
        ax.plot(values, np.full(len(values), -place - 0.25), "|", color=colour)
    ax.set_yticks(-np.arange(len(rows)), rows)
    ax.set_xlabel(f"{title}; mean, 95 % interval, runs")


def plot(axes, runs, curves, name, title, unit):
    """The course of the validation loss, and the test figures, on two axes."""
    left, right = axes
    found = by_test(runs, name)
    colours = dict(zip(sorted(found), plt.cm.tab10.colors, strict=False))
    for method, own in found.items():
        paths = [np.asarray(curves[method, run["seed"]]) for run in own]
        length = min(map(len, paths))
        seconds, _, best = np.mean([path[:length] for path in paths], 0).T
        left.plot(seconds, best, color=colours[method], lw=2.4 if method == OWN else 1.2, label=method)
    left.set(xlabel="processor time, s", ylabel="best validation loss so far, mean", yscale="log")
    left.yaxis.set_major_formatter("{x:.2g}")
    left.yaxis.set_minor_formatter("{x:.2g}")
    tests = {method: [run[name] / unit for run in own] for method, own in found.items()}
    strips(right, tests, [colours[method] for method in found], title)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
