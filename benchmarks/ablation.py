"""What the settings of meta-training are worth: short runs of equal cost, one setting changed at a time.

    python benchmarks/ablation.py [--inner-steps 400000] [--only NAME ...]

Each variant meta-trains a fresh rule for the same number of inner steps and is then run on the validation suite (other
data than the training and the held-out suites) under a cosine from three rates, the best of which counts. Its mark is
the geometric mean over tasks of its final training loss in units of the untrained rule's: below 1, meta-training
helped. Runs and results are kept, so that a cut-off study goes on. Writes reports/ablation/results.json and table.md.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import time
from pathlib import Path

import jax
import numpy as np

import learned_opt
from learned_opt.files import write_atomically
from meta_train.bench import execution
from meta_train.bench.contenders import learned
from meta_train.train import loop
from meta_train.train.config import Config, replace
from tasks import suites

BASE = Config(
    rule_kwargs={"orthogonalize": True},
    suite="quick",
    estimator="nres",
    particles=8,
    min_learning_rate=1e-3,
    max_learning_rate=3e-2,
    inner_schedule="cosine",
    outer_learning_rate=2e-3,
    max_length=1000,
    bench_suite="",
)
VARIANTS = {
    "base": {},
    "seed 1": {"seed": 1},
    "estimator pes": {"estimator": "pes"},
    "estimator truncated_es": {"estimator": "truncated_es"},
    "estimator truncated_bptt": {"estimator": "truncated_bptt", "particle_clip": 0.3},
    "particles 4": {"particles": 4},
    "particles 32": {"particles": 32},
    "unroll 20": {"unroll": 20},
    "unroll 100": {"unroll": 100},
    "sigma 0.003": {"sigma": 0.003},
    "sigma 0.03": {"sigma": 0.03},
    "outer rate 0.0005": {"outer_learning_rate": 5e-4},
    "outer rate 0.008": {"outer_learning_rate": 8e-3},
    "log measure": {"measure": "log"},
    "constant inner rate": {"inner_schedule": "constant"},
    "horizon 2000": {"max_length": 2000},
    "tasks standard": {"suite": "standard"},
    "tasks mixed": {"suite": "mixed"},
    "tasks broad, rescaled": {"suite": "broad"},
    "hidden 16": {"rule_kwargs": {"orthogonalize": True, "hidden_size": 16}},
    "no Newton-Schulz": {"rule_kwargs": {}},
}
RATES = (1e-3, 10**-2.5, 1e-2)
STEPS, FIRST_SEED, SEEDS = 500, 4_000_000, 2  # seeds of no other study


def config_of(name: str, inner_steps: int) -> Config:
    """The variant's settings, with as many meta-steps as the budget of inner steps allows."""
    config = replace(BASE, **VARIANTS[name])
    halves = 1 if "bptt" in config.estimator else 2
    of_one = halves * len(suites.suite(config.suite)) * config.particles * config.unroll
    return replace(config, meta_steps=max(inner_steps // of_one, 1))


def finals(rule, theta) -> np.ndarray:
    """``[tasks]``: mean final training losses at the best of the rates."""
    contender = learned("rule", rule, theta, rule.learning_rate)
    pairs = list(itertools.product(RATES, range(FIRST_SEED, FIRST_SEED + SEEDS)))
    best = []
    for entry in suites.suite("validation", held_out=True):
        run = execution.compile_run(entry, contender, STEPS, jax.devices()[0], 1)
        losses, _ = run.losses(*zip(*pairs, strict=True))
        ends = losses.reshape(len(RATES), SEEDS, -1)[:, :, -STEPS // 20 :].astype(float).mean((1, 2))
        best.append(np.nanmin(ends))
    return np.asarray(best)


@functools.cache
def fresh_finals(arguments: str, seed: int) -> np.ndarray:
    """Those of an untrained rule of these arguments, as JSON."""
    rule = learned_opt.RULES[BASE.rule](**json.loads(arguments))
    return finals(rule, rule.init(jax.random.PRNGKey(seed)))


def study(name: str, inner_steps: int, workdir: Path) -> dict:
    """Meta-trains a variant and evaluates it and its start."""
    config = config_of(name, inner_steps)
    folder = workdir / name.replace(" ", "_").replace(",", "")
    start = time.monotonic()
    outcome = loop.run(config, folder, resume=(folder / "config.json").exists())
    seconds = time.monotonic() - start
    rule = learned_opt.RULES[config.rule](**config.rule_kwargs)
    share = finals(rule, outcome.theta) / fresh_finals(json.dumps(config.rule_kwargs), config.seed)
    return {
        "changes": VARIANTS[name],
        "meta_steps": config.meta_steps,
        "seconds": round(seconds, 1),
        "mark": round(float(np.exp(np.mean(np.log(share)))), 4),
        "tasks": [round(float(x), 4) for x in share],
    }


def table(report: dict) -> str:
    """The results as Markdown, the best first."""
    heads = ["variant", "mark", *report["tasks"], "meta-steps", "minutes"]
    rows = [
        [
            name,
            f"{row['mark']:.3f}",
            *(f"{x:.3f}" for x in row["tasks"]),
            row["meta_steps"],
            f"{row['seconds'] / 60:.1f}",
        ]
        for name, row in sorted(report["variants"].items(), key=lambda item: item[1]["mark"])
    ]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines) + "\n"


def main() -> None:
    """Run what is missing, write what there is after every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inner-steps", type=int, default=400_000)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--workdir", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--out", type=Path, default=Path("reports/ablation"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    report = json.loads(path.read_text()) if path.exists() else {"variants": {}}
    if report["variants"] and report["inner_steps"] != options.inner_steps:
        parser.error(f"{path} holds variants of {report['inner_steps']} inner steps: name another --out")
    report |= {
        "inner_steps": options.inner_steps,
        "base": dataclasses.asdict(BASE),
        "rates": RATES,
        "steps": STEPS,
        "seeds": SEEDS,
        "jax": jax.__version__,
        "tasks": [entry.name for entry in suites.suite("validation", held_out=True)],
    }
    for name in options.only:
        if name not in report["variants"]:
            report["variants"][name] = study(name, options.inner_steps, options.workdir)
            jax.clear_caches()
            write_atomically(path, json.dumps(report, indent=1) + "\n")
            (options.out / "table.md").write_text(table(report))
            print(f"{name}: {report['variants'][name]['mark']}", flush=True)


if __name__ == "__main__":
    main()
