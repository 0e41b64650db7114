"""How the optimizers of pretrained/ were meta-trained, stage by stage, and the command that does it again.

    python scripts/pretrain.py flagship-1 [--workdir runs/pretrain] [--seed 0] [--stages N]

Each stage goes on from the rule of the one before; a run that was cut off goes on where it was. Where a released rule
was stopped before the end that is planned here, its model card says so.
"""

import argparse
from pathlib import Path

import jax

import learned_opt
from learned_opt import store
from learned_opt.rules import scheduler
from meta_train import xla_flags
from meta_train.train import loop
from meta_train.train.config import Config, preset, replace

_CPU = replace(preset("cpu"), bench_suite="")
_PLAIN = {"rule_kwargs": {}, "suite": "standard", "measure": "relative"}
_SHORT = replace(_CPU, rule_kwargs={}, particles=4, outer_learning_rate=3e-3, meta_steps=800)
_SCHEDULER = replace(_SHORT, rule="scheduler", trainable=["scheduler"], told_length=0.7)
_AUTO = {"base": "celo2", "base_kwargs": {"orthogonalize": True}, "learning_rate": 0.005, "schedule": "cosine"}
_LOCAL = replace(
    _CPU,
    rule="outer",
    rule_kwargs={},
    learner="local_sgd",
    suite="local_sgd",
    particles=4,
    particle_clip=1.0,
    unroll=5,
    min_length=20,
    max_length=100,
    told_length=0.7,
    local_optimizers={"sgd": [0.05, 0.3]},
)
_CONTROL = Config(
    rule="control",
    trainable=["control"],
    suite="kinds",
    estimator="nres",
    meta_steps=100,
    particles=4,
    sigma=0.1,
    told_length=0.8,
    measure="log",
    outer_learning_rate=1e-2,
    judged_on="valid",
    judged_from=0.6,
    checkpoint_every=25,
    keep_checkpoints=6,  # `scripts/checkpoints.py` reads them all
    log_every=5,
    bench_suite="",
)
_LIGHT = replace(
    _CONTROL,
    rule="light",
    suite="networks",
    meta_steps=600,
    checkpoint_every=100,
)
_FEATURES = replace(preset("unsupervised"), outer_learning_rate=3e-3)

STAGES: dict[str, list[Config]] = {
    "flagship-1": [
        replace(_CPU, **_PLAIN, meta_steps=1490, max_length=1000, outer_learning_rate=1e-3, outer_schedule="constant"),
        replace(_CPU, **_PLAIN, meta_steps=8000),
        replace(_CPU, meta_steps=1400, suite="standard"),
        replace(_CPU, meta_steps=5000),
        # the same weights in SOAP's coordinates
        replace(_CPU, rule="celo2_soap", rule_kwargs={}, meta_steps=2000, outer_learning_rate=1.5e-3, seed=7),
    ],
    "flagship-1-auto": [
        replace(_SCHEDULER, rule_kwargs=_AUTO),
        replace(_SCHEDULER, rule_kwargs=_AUTO, max_length=3000, meta_steps=3000, outer_learning_rate=2e-3),
        replace(_SCHEDULER, rule_kwargs=_AUTO | {"base": "celo2_soap", "base_kwargs": {}}, meta_steps=0),
    ],
    "flagship": [_CONTROL],
    "flagship-light": [_LIGHT],
    "adafac-mlp": [replace(_SHORT, rule="adafac_mlp", meta_steps=1000)],
    "outer": [
        replace(_LOCAL, trainable=["length"], meta_steps=1500, outer_learning_rate=5e-3),
        replace(_LOCAL, meta_steps=1300, outer_learning_rate=2e-3, seed=1),
    ],
    "letters": [
        replace(_FEATURES, suite="letters_small", particles=4, meta_steps=700),
        replace(_FEATURES, suite="letters", meta_steps=1500),
        replace(_FEATURES, suite="letters", meta_steps=2000, max_length=500, outer_learning_rate=2e-3, seed=1),
    ],
}


def scheduled_flagship(folder: Path) -> Path:
    """A fresh scheduler over `flagship-1`'s weights, saved."""
    theta = learned_opt.load_rule("flagship-1").theta
    facts = {name: value for name, value in _AUTO.items() if name != "base"}
    kwargs, theta = scheduler.over(_AUTO["base"], theta, jax.random.key(0), **facts)
    return learned_opt.save(folder, "scheduler", theta, kwargs=kwargs)


def outer_flagship(folder: Path) -> Path:
    """A fresh length of steps beside `flagship-1`'s direction, saved."""
    theta = learned_opt.RULES["outer"]().init(jax.random.key(0))
    return learned_opt.save(
        folder, "outer", theta | {"direction": learned_opt.load_rule("flagship-1").theta}, kwargs={}
    )


def controlled_flagship(folder: Path) -> Path:
    """A fresh control layer over `flagship-1`'s direction, saved."""
    theta = learned_opt.RULES["control"]().init(jax.random.key(0))
    return learned_opt.save(folder, "control", theta | {"direction": learned_opt.load_rule("flagship-1").theta})


# the others start fresh
STARTS = {"flagship-1-auto": scheduled_flagship, "flagship": controlled_flagship, "outer": outer_flagship}


def main() -> None:
    """Run the stages of one rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(STAGES))
    parser.add_argument("--workdir", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--seed", type=int, default=0, help="added to every stage's")
    parser.add_argument("--stages", type=int, default=None, help="take only so many")
    options = parser.parse_args()
    xla_flags.one_thread_a_device()
    xla_flags.widest_vectors()
    jax.config.update("jax_num_cpu_devices", 2)
    workdir = options.workdir / f"seed-{options.seed}" if options.seed else options.workdir
    start = STARTS[options.name](workdir / f"{options.name}-start") if options.name in STARTS else None
    for number, config in enumerate(STAGES[options.name][: options.stages]):
        folder = workdir / f"{options.name}-{number}"
        if start is not None and number:  # the weights of another stage's rule may be those of other arguments
            theta = store.read(start).theta
            start = learned_opt.save(
                folder.with_name(f"{folder.name}-start"), config.rule, theta, kwargs=config.rule_kwargs
            )
        config = replace(config, init=None if start is None else str(start), seed=config.seed + options.seed)
        outcome = loop.run(config, folder, resume=(folder / "config.json").exists())
        if not outcome.finished:
            raise SystemExit(f"stopped at meta-step {outcome.step}; the same command goes on from there")
        start = folder / "rule"
    print(f"learned-opt export {folder} {options.name}")


if __name__ == "__main__":
    main()
