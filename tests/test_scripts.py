"""Every script of benchmarks/ and scripts/ runs from its first line to its last, made small, and writes its files."""

import csv
import dataclasses
import functools
import importlib
import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from support import ROOT
from support.workload_data import write_tiny_sets

from meta_train.bench.workloads import baselines, protocol, search, training
from meta_train.train import loop, trainer
from meta_train.train.config import Config
from tasks import data, suites
from tasks.data import sources
from tasks.families import tabular
from tasks.workloads import Workload

SCRIPTS = sorted(path for folder in ("benchmarks", "scripts") for path in (ROOT / folder).glob("*.py"))
RUNNABLE = {str(path.relative_to(ROOT)) for path in SCRIPTS if '__name__ == "__main__"' in path.read_text()}


class Case(NamedTuple):
    """How a script is run at its smallest.

    Attributes:
        arguments: as they are typed.
        patches: new values of its constants by name, ``module.NAME`` for those of a module that it imports; a function
            is given the old value.
        writes: the files it must write; a table must have the columns of the committed one.
        same: those of them that must be the committed ones again, letter by letter.
        before: writes into the working folder what it reads.
        processes: it starts processes of its own file, which must be small too; its patches are literals.
    """

    arguments: str = ""
    patches: Mapping[str, Any] = {}
    writes: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    before: Callable[[Path], None] = lambda folder: None
    processes: bool = False


def reports(folder, *names):
    return tuple(f"reports/{folder}/{name}" for name in names)


def only(*names):
    return lambda old: {name: old[name] for name in names}


def first(number):
    return lambda old: old[:number]


def few_images(make):
    """The self-tuning network's problem with the fewest channels and rows."""

    def made(**sizes):
        problem = make(**sizes | {"width": 1, "batch_size": 4})
        return problem._replace(data=jax.tree.map(lambda x: x[:100], problem.data))

    return made


def few_blocks(make):
    """The self-tuning residual network with the fewest channels, on few embedded images."""

    def made():
        problem = make("fashion_mnist_small", channels=(1, 1, 1), batch_size=4)
        return problem._replace(data=jax.tree.map(lambda x: x[:100], problem.data))

    return made


def few_characters(make):
    """The self-tuning model of characters with the narrowest layers, on an embedded text."""

    def made(_, **sizes):
        return make("sotu_small", **dict.fromkeys(sizes, 4) | {"batch_size": 4})

    return made


def wine(*_, **sizes):
    """In place of any family of tasks: one matrix and one vector, quick to compile under every rule."""
    return tabular.logistic_regression("wine", batch_size=4)


QUADRATIC = suites.VALIDATION["validation"][-1:]
TINY_ENTRY = suites.Entry("wine/tiny", "logistic_regression", "wine", wine)
TINY = (Workload(wine, 2, None, name="wine/tiny"),)


def committed(*names):
    def copy(folder):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)

    return copy


def a_trial(folder):
    """The first trial of the tuned ruleset, kept."""
    nadamw = baselines.baselines()[0]
    setting, runs = search.settings(nadamw)[0], folder / "reports" / "workloads" / "runs"
    training.run(training.program(TINY[0], nadamw), TINY[0], setting, protocol.TUNING_SEED, runs)


def a_run(folder):
    """Three meta-steps of a rule, with their checkpoints."""
    settings = Config(
        rule="light", suite="small", estimator="nres", meta_steps=3, particles=1, unroll=2, bench_suite=""
    )
    loop.run(dataclasses.replace(settings, checkpoint_every=1), folder / "run")


EMBEDDED = "tasks/data/embedded"
TEXTS = tuple(f"{EMBEDDED}/{name}_small.txt" for name in ("kjv", "moby_dick", "sotu"))


def originals(folder):
    """Packages' files that hold no more than what ships, so that the same is made of them again."""
    for split, stem in (("train", "train"), ("valid", "t10k")):
        for field, kind in (("image", "images-idx3"), ("label", "labels-idx1")):
            array = data.load("fashion_mnist_small")[split][field]
            header = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes()
            (folder / f"{stem}-{kind}-ubyte").write_bytes(header + array.tobytes())
    kjv, moby_dick, sotu = ((ROOT / name).read_text().splitlines() for name in TEXTS)
    (folder / "verses-1769.json").write_text(json.dumps({f"Genesis {i}:1": text for i, text in enumerate(kjv)}))
    for i, text in enumerate(moby_dick):
        (folder / f"chapter_{i}.json").write_text(json.dumps({"chapter": i, "text": text}))
    for year, text in enumerate(sotu, 1800):
        (folder / f"{year}_president_party.json").write_text(json.dumps({"year": year, "text": text}))


def repository(folder):
    """A repository whose benchmark gives the committed figures, under the names that the rules had before."""
    before = {"flagship-1": "flagship@0.005", "flagship-1-auto": "flagship-auto"}
    figures = json.loads((ROOT / "reports" / "validation" / "results.json").read_text())["figures"]
    renamed = [row | {"contender": before.get(row["contender"], row["contender"])} for row in figures]
    (folder / "meta_train").mkdir()
    (folder / "meta_train" / "__init__.py").touch()
    (folder / "meta_train" / "results.json").write_text(json.dumps({"figures": renamed}))
    (folder / "meta_train" / "cli.py").write_text(
        "import shutil, sys\nshutil.copytree('meta_train', sys.argv[sys.argv.index('--out') + 1])\n"
    )
    (folder / "reports" / "validation").mkdir(parents=True)
    for command in ("init -q", "add meta_train", "-c user.name=A -c user.email=a@b commit -q -m figures"):
        subprocess.run(["git", *command.split()], check=True)


CASES = {
    "benchmarks/ablation.py": Case(
        "--inner-steps 1 --only 'hidden 16'",
        {
            "BASE": lambda base: dataclasses.replace(base, suite="small", particles=1, unroll=2, max_length=100),
            "suites.TRAIN": {"small": QUADRATIC},
            "suites.VALIDATION": {"validation": QUADRATIC},
            "RATES": (1e-3,),
            "STEPS": 2,
            "SEEDS": 1,
        },
        reports("ablation", "results.json", "table.md"),
    ),
    "benchmarks/calibrate_adamw.py": Case(
        "--suite small --steps 2 --seeds 1 --out best.json", {"RATES": first(2)}, ("best.json",)
    ),
    "benchmarks/clock.py": Case(
        "",
        {
            "suite": lambda suite: lambda name: [TINY[0]._replace(name="mail/embeddings-96-384")],
            "OPTIMIZERS": ("nadamw",),
        },
        reports("workloads", "clock.csv"),
        before=committed("reports/workloads/test/results.json"),
    ),
    "benchmarks/compile.py": Case("--optimizers adam --layers 1", {}, reports("compile", "run_1.json")),
    "benchmarks/control.py": Case(
        "",
        {
            "NETWORKS": lambda networks: dict.fromkeys(networks, (wine, 2)),
            "SETTINGS": only("no decay"),
        },
        reports("control", "losses.csv"),
    ),
    "benchmarks/direction.py": Case(
        "--seeds 2",
        {"gpt": lambda gpt: wine, "STEPS": 2, "FORMS": only("as it is", "Polar Express, 3 steps")},
        reports("direction", "losses.csv"),
    ),
    "benchmarks/embeddings.py": Case(
        "",
        {"NETWORKS": lambda networks: dict.fromkeys(networks, wine), "LENGTHS": {"gpt-2x64": (2,)}, "LONG": 2},
        reports("control", "embeddings.csv"),
    ),
    "benchmarks/horizon.py": Case(
        "",
        {"NETWORKS": lambda networks: dict.fromkeys(networks, (wine, 2)), "STEPS": {2: (0.5, 1.0), 4: (1.0,)}}
        | {"TOLD": {"gpt-2x64": (2,)}},
        reports("control", "horizon.csv", "horizon.png", "untold.csv"),
    ),
    "benchmarks/large_update.py": Case(
        "--rounds 1 --models 'transformer 4 x 128'",
        {
            "transformer": lambda make: lambda *_, **sizes: make(1, 8, length=8, batch_size=2),
            "COMPARED": ("adam", "muon"),
            "TURN": 1,
        },
        reports("large_update", "run_1.json"),
    ),
    "benchmarks/local_sgd_batches.py": Case(
        "",
        {
            "SAMPLES": 128,
            "STRETCH": 64,
            "SIZES": (32, 64),
            "STARTS": (32,),
            "GRID": ((0.1, "constant"), (0.2, "cosine")),
            "TUNING": (100, 101),
            "REPORTING": (10, 11),
        },
        reports("local_sgd", "batches.csv", "batches_curves.csv", "batches.png"),
    ),
    "benchmarks/local_sgd_communication.py": Case(
        "--repeats 1",
        {"PROCESSES": (2, 3), "SIZES": (1000, 100_000), "DELAYS": (1, 2), "RUN_STEPS": 4},
        reports("local_sgd", "communication.json", "communication.csv", "communication.png"),
        processes=True,
    ),
    "benchmarks/local_sgd_compressed.py": Case(
        "",
        {
            "TASKS": lambda tasks: {"conv": tasks["conv"]._replace(family=wine, rounds={64: 1})},
            "METHODS": only("DiLoCo (AdamW)", "Nesterov + outer, AdamW"),
            "SEEDS": (200, 201),
        },
        reports("local_sgd", "compressed.json", "compressed.csv"),
        before=committed("reports/local_sgd/peers.json"),
    ),
    "benchmarks/local_sgd_faults.py": Case(
        "--processes 2 --faults 1", {"ROUNDS": 10, "SHRINKING": (2, 1)}, reports("local_sgd", "faults.json")
    ),
    "benchmarks/local_sgd_one_worker.py": Case(
        "",
        {
            "char_transformer": lambda family: wine,
            "STEPS": 2,
            "EVERY": 1,
            "LAST": 1,
            "RATES": (1e-3, 1e-2),
            "TUNING": (100,),
        },
        reports("local_sgd", "one_worker.csv"),
    ),
    "benchmarks/local_sgd_outer.py": Case(
        "--rounds 5",
        {
            "TASKS": {"wine": wine},
            "WORKERS": 2,
            "DELAYS": (1, 2),
            "LOCAL": (0.1, 0.3),
            "METHODS": lambda methods: {name: (make, tried[:2], post) for name, (make, tried, post) in methods.items()},
        },
        reports("local_sgd", "outer.json", "outer.csv", "outer.png"),
    ),
    "benchmarks/local_sgd_overlap.py": Case(
        "--repeats 1 --delays 0.01",
        {"STEPS": 4, "EVERY": 2, "WORKERS": 2, "ROUNDS": 5, "OVERLAPS": (0, 1)},
        reports("local_sgd", "overlap.csv", "overlap_loss.csv", "overlap.png"),
        processes=True,
    ),
    "benchmarks/local_sgd_patel_dieuleveut.py": Case(
        "",
        {
            "STATIONARY_STEPS": 8,
            "STATIONARY_DELAYS": (1, 2, 8),
            "FAR_STEPS": 8,
            "FAR_DELAYS": (1, 2, 8),
            "SCALES": (0.5, 2.0),
            "REPEATS": 2,
        },
        reports(
            "local_sgd",
            *("patel_dieuleveut_stationary.csv", "patel_dieuleveut_stationary.png"),
            *("patel_dieuleveut_far.csv", "patel_dieuleveut_far.png"),
        ),
    ),
    "benchmarks/local_sgd_peers.py": Case(
        "",
        {
            "TASKS": lambda tasks: {
                "wine": tasks["conv"]._replace(family=wine, rounds={1: 2, 2: 1}, trials=2),
                "few": tasks["ResNet"]._replace(family=wine, rounds={1: 2}, trials=2),
            },
            "WORKERS": 2,
            "SEEDS": (200, 201),
            "VALIDATION": 1,
            "methods": lambda methods: (
                lambda names: only(
                    *("averaging, AdamW", "SparseLoCo (AdamW)", "SlowMo (AdamW)"),
                    *("post-local (AdamW)", "outer, AdamW", "DiLoCo (AdamW)"),
                )(methods(names))
            ),
        },
        reports("local_sgd", "peers.json", "peers.csv", "peers.png"),
    ),
    "benchmarks/local_sgd_stich.py": Case(
        "--seeds 1 --data breast_cancer",
        {"WORKERS": (1, 2), "DELAYS": (1, 2), "RATES": ((1.0, 300.0), (4.0, 300.0))},
        reports("local_sgd", "stich.csv", "stich_breast_cancer.png"),
    ),
    "benchmarks/local_sgd_when.py": Case(
        "",
        {},
        reports("local_sgd", "when.csv", "when.png"),
        reports("local_sgd", "when.csv"),
        committed("reports/local_sgd/stich.csv"),
    ),
    "benchmarks/memory.py": Case("", {"SIZES": ((1, 8),)}, reports("memory", "memory.csv")),
    "benchmarks/meta_training.py": Case(
        "--rounds 1", {"UNROLL": 2, "BATCHES": (4,), "PARTICLES": (2,)}, reports("meta_training", "run_1.json")
    ),
    "benchmarks/precision.py": Case(
        "--steps 10 --seeds 2 --tasks digits/logistic",
        {
            "RATES": (1e-3, 1e-2),
            "VARIANTS": only("float32", "both, stochastic"),
            "SIDE": 8,
            "SIZE": 8,
        },
        reports("precision", "precision.csv", "precision.png", "second_moment.csv", "cost.csv"),
    ),
    "benchmarks/self_tuning_cost.py": Case(
        "--networks mlp --batch 4 --rounds 1", {}, reports("self_tuning", "cost_cpu.csv")
    ),
    "benchmarks/self_tuning_cifar.py": Case(
        "--steps 40 --seeds 2 --methods 'untuned defaults' 'untuned defaults, twice as long' Delta-STN",
        {"cifar_cnn": few_images, "LOOK": 10},
        reports("self_tuning", "cifar.json", "cifar.csv", "cifar.png"),
    ),
    "benchmarks/self_tuning_drawn.py": Case(
        "--steps 20",
        {"fashion_cnn": few_images, "LOOK": 10, "STARTS": 2, "CHOICE": 1, "OTHERS": 2, "RATES": only("0.1")},
        reports("self_tuning", *(f"drawn{part}" for part in (".json", ".csv", ".png", "_choice.json", "_choice.csv"))),
    ),
    "benchmarks/self_tuning_language.py": Case(
        "--steps 40 --seeds 2 --methods 'untuned draw' Delta-STN replay",
        {"char_lstm": few_characters, "char_transformer": few_characters, "LOOK": 10}
        | dict.fromkeys(("TRAIN", "VALID", "TEST"), 100),
        reports(
            "self_tuning",
            "language.png",
            *(f"language_{model}.{end}" for model in ("lstm", "transformer") for end in ("json", "csv")),
        ),
    ),
    "benchmarks/self_tuning_meta.py": Case(
        "--cycles 2 --seeds 2",
        {
            "FINE_TUNING": lambda old: dataclasses.replace(
                old, meta_steps=2, particles=1, unroll=1, min_length=2, max_length=2, log_every=1
            ),
            "loop.problems.SUITES": lambda old: {"self_tuned": old["self_tuned"][1:]},
            "char_lstm": few_characters,
            "char_transformer": few_characters,
            "FACTORS": (1.0, 2.0),
            "CHOICE": 1,
            "LOOK": 1,
        },
        reports(
            "self_tuning",
            *("meta.json", "meta.csv", "meta.png", "meta_choice.json", "meta_choice.csv", "meta_training.csv"),
        ),
    ),
    "benchmarks/self_tuning_peers.py": Case(
        "--budget 2 --seeds 1 --methods 'untuned draw' Delta-STN 'PBT, 4'",
        {"fashion_cnn": few_images, "SECONDS": 0.5},
        reports("self_tuning", "peers_2x.json", "peers_2x.csv", "peers_2x.png"),
    ),
    "benchmarks/self_tuning_resnet.py": Case(
        "--budget 2 --seeds 2 --methods 'untuned defaults, twice as long' Delta-STN PBT",
        {"fashion_resnet": few_blocks, "STEPS": 12, "LOOK": 6},
        reports("self_tuning", "resnet_2x.json", "resnet_2x.csv", "resnet_2x.png"),
    ),
    "benchmarks/self_tuning_ridge.py": Case(
        "--cycles 40",
        {},
        reports("self_tuning", "ridge.csv", "ridge_paths.npz", "ridge.png"),
    ),
    "benchmarks/self_tuning_schedules.py": Case(
        "--steps 20",
        {
            "GRID": (0.1, 0.5),
            "HYPER_GRID": (0.1, 0.2),
            "STARTS": (0.1, 0.5),
            "SEEDS": (0, 1),
            "GRID_SEEDS": (100,),
            "VALID": 100,
            "TEST": 100,
            "LOOKS": 2,
            "MODELS": lambda models: {name: sizes | {"width": 4} for name, sizes in models.items()},
        },
        reports(
            "self_tuning",
            *("schedules.csv", "schedules.png", "schedules.npz", "grid.csv"),
            *("starts.csv", "starts.png", "replay.csv", "replay.png"),
        ),
    ),
    "benchmarks/self_tuning_search.py": Case(
        "--seconds 1 --seeds 1 --methods Delta-STN random implicit",
        {"fashion_cnn": few_images},
        reports("self_tuning", "search.json", "search.csv", "search.png"),
    ),
    "benchmarks/sizes.py": Case(
        "",
        {
            "gpt": lambda gpt: wine,
            "USUAL": {"width": 8, "layers": 1, "batch_size": 2, "steps": 2},
            "AXES": {"width": (8,), "layers": (1,), "batch_size": (2,), "steps": (2,)},
        },
        reports("sizes", "losses.csv", "seeds.csv", "sizes.png"),
    ),
    "benchmarks/step_times.py": Case(
        "--steps 2 --optimizers nadamw,adamw --workloads wine/tiny",
        {"SUITES": {"tiny": TINY}},
        reports("workloads", "step_times.csv"),
    ),
    "benchmarks/unsupervised_cost.py": Case(
        "--out reports/unsupervised/cost.json",
        {
            "suite": lambda suite: lambda name: [entry._replace(units=(4,)) for entry in suite(name)],
            "STEPS": 2,
            "REPEATS": 1,
            "UNROLLS": (2,),
        },
        reports("unsupervised", "cost.json"),
    ),
    "benchmarks/unsupervised_features.py": Case(
        "--datasets 'digits 8x8' --seeds 2",
        {
            "DATASETS": {"digits 8x8": ("digits", 8, (8, 8))},
            "TUNING_SEEDS": (1000,),
            "grid": lambda grid: lambda **choices: grid(**choices)[:1],
            "_NO_RULE": lambda old: {name: (method, settings[:1]) for name, (method, settings) in old.items()},
        },
        reports("unsupervised", "results.json", "results.csv", "tables.md", "table.png"),
    ),
    "benchmarks/update.py": Case(
        "--rounds 1",
        {"MODELS": {"mlp_1m": lambda: {"w": (8, 8)}}, "LARGER_THAN_CACHES": 8},
        reports("update", "one_core.json"),
    ),
    "scripts/choose_rates.py": Case(
        "nadamw", {"workloads.SUITES": {"workloads_small": TINY}}, reports("workloads", "rates.csv")
    ),
    "scripts/make_embedded_data.py": Case(
        "--fashion-mnist . --sotu . --moby-dick . --kjv . --to tasks/data/embedded",
        {
            "EVERY": 1,
            "sources.read_mnist_like": functools.partial(
                sources.read_mnist_like, counts={"train": 6000, "valid": 1000}
            ),
        },
        (f"{EMBEDDED}/fashion_mnist_small.npz", *TEXTS),
        TEXTS,
        originals,
    ),
    "scripts/pretrain.py": Case(
        "flagship-1-auto --workdir own",
        {
            "STAGES": lambda stages: {
                name: [
                    dataclasses.replace(
                        config,
                        meta_steps=min(config.meta_steps, 1),
                        particles=1,
                        suite="small",
                        unroll=2,
                        max_length=100,
                    )
                    for config in configs[::2]
                ]
                for name, configs in stages.items()
            }
        },
        ("own/flagship-1-auto-1/rule/rule.json",),
    ),
    "scripts/reports.py": Case(
        "--index", {}, ("reports/README.md",), before=lambda folder: (folder / "reports").mkdir()
    ),
    "scripts/validation_forms.py": Case(
        "reports/validation/forms.csv",
        {"FORMS": {"before": "HEAD", "after": "HEAD~0"}},
        reports("validation", "forms.csv"),
        before=repository,
    ),
    "scripts/validation_losses.py": Case(
        "reports/held_out",
        {},
        reports("held_out", "validation.csv"),
        reports("held_out", "validation.csv"),
        committed("reports/held_out/results.json"),
    ),
    "scripts/workload_seeds.py": Case(
        "",
        {"suite": lambda suite: lambda name: [TINY[0]._replace(name="mail/embeddings-96-384")]},
        reports("workloads", "seeds.csv"),
        before=committed("reports/workloads/test/results.json"),
    ),
    "scripts/workload_trials.py": Case(
        "", {"suite": lambda suite: lambda name: [TINY[0]]}, reports("workloads", "trials.csv"), before=a_trial
    ),
    "scripts/workload_sizes.py": Case("", {}, reports("workloads", "sizes.csv")),
    "scripts/workload_clock.py": Case(
        "",
        {},
        reports("workloads", "clock_tuned.csv", "clock.png"),
        reports("workloads", "clock_tuned.csv"),
        committed(*reports("workloads", "clock.csv", "test/results.json", "tuned/results.json")),
    ),
    "scripts/checkpoints.py": Case(
        "reports/light run",
        {"STEPS": lambda _: 2, "SEEDS": lambda seeds: seeds[:1], "suites.VALIDATION": {"validation": (TINY_ENTRY,)}},
        reports("light", "checkpoints.csv", "checkpoints.png"),
        before=a_run,
    ),
}


SEARCHES = {
    "benchmarks/self_tuning_cifar.py": "--steps 40 --seeds 1 --methods Delta-STN search",
    "benchmarks/self_tuning_language.py": "--steps 40 --seeds 1 --methods Delta-STN search",
    "benchmarks/self_tuning_peers.py": "--budget 2 --seeds 1 --methods Delta-STN 'TPE, 8' 'Hyperband, TPE'",
    "benchmarks/self_tuning_resnet.py": "--budget 2 --seeds 1 --methods Delta-STN ASHA search",
    "benchmarks/self_tuning_search.py": "--seconds 1 --seeds 1 --methods implicit TPE Hyperband",
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder of data sets, each a few rows."""
    folder = tmp_path_factory.mktemp("sets")
    write_tiny_sets(folder, rows=800)  # half of them validate, and the longest text of an example has 257 letters
    data.library._load.cache_clear()
    yield folder
    data.library._load.cache_clear()


@pytest.fixture
def plain(sets, tmp_path, monkeypatch):
    """What a script that is started by hand finds, in a folder of its own: one device, no strict settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEARNED_OPT_DATA", str(sets))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # scripts add to them, until the test ends
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):  # in a hook of this repository they name it
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    make_mesh = trainer.make_mesh
    for module in (loop, trainer):
        monkeypatch.setattr(module, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
    update = jax.config.update
    monkeypatch.setattr(jax.config, "update", lambda n, v: None if n == "jax_num_cpu_devices" else update(n, v))
    with jax.numpy_rank_promotion("allow"):
        yield
    plt.close("all")
    for path in SCRIPTS:
        sys.modules.pop(path.stem, None)


def run(script, case, folder, monkeypatch):
    path = ROOT / script
    monkeypatch.syspath_prepend(path.parent)
    module = importlib.import_module(path.stem)
    for imported in [sys.modules[other.stem] for other in SCRIPTS if other.stem in sys.modules]:
        for name, value in list(vars(imported).items()):
            if isinstance(value, Path) and value.is_relative_to(ROOT / "reports"):
                monkeypatch.setattr(imported, name, folder / value.relative_to(ROOT))
    for name, value in case.patches.items():
        *owners, name = name.split(".")
        owner = functools.reduce(getattr, owners, module)
        new = value(getattr(owner, name)) if isinstance(value, types.FunctionType) else value
        monkeypatch.setattr(owner, name, new)
    if case.processes:
        small = folder / f"small_{path.name}"
        small.write_text(f"import {path.stem} as script\nvars(script).update({case.patches})\nscript.main()\n")
        monkeypatch.setattr(module, "__file__", str(small))
    arguments = shlex.split(case.arguments)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    given = map(Path, arguments) if inspect.signature(module.main).parameters else ()
    assert not module.main(*given)


SETTINGS = {"base", "changes"}  # entries of a report that a later version may have more or others of


def fields(value) -> set[str]:
    """The names of what is no record itself, as the names of models and methods are; and is no setting."""
    if isinstance(value, list):
        return set().union(*map(fields, value))
    if not isinstance(value, dict):
        return set()
    found = {name: x for name, x in value.items() if name not in SETTINGS}
    return set().union(*map(fields, found.values()), {name for name, x in found.items() if not isinstance(x, dict)})


def columns(path):
    """What a file that can be read holds: a table's columns, a JSON file's fields, the names of arrays; else none."""
    assert path.stat().st_size, path
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows, path
        assert all(None not in row and None not in row.values() for row in rows), path
        return list(rows[0])
    if path.suffix == ".json":
        return fields(json.loads(path.read_text()))
    if path.suffix == ".npz":
        return set(np.load(path))
    if path.suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return set()


def files(folder):
    return {str(path.relative_to(folder)) for path in (folder / "reports").rglob("*") if path.is_file()}


def check(script, case, folder, monkeypatch):
    kept = {name: (ROOT / name).stat().st_mtime_ns for name in case.writes if (ROOT / name).exists()}
    case.before(folder)
    given = files(folder)
    run(script, case, folder, monkeypatch)
    assert files(folder) - given == {name for name in case.writes if name.startswith("reports/")}
    for name in case.writes:
        found = columns(folder / name)
        if name in kept:
            assert found == columns(ROOT / name), name
            assert (ROOT / name).stat().st_mtime_ns == kept[name], name
    for name in case.same:
        assert (folder / name).read_text() == (ROOT / name).read_text(), name


@pytest.mark.slow
@pytest.mark.parametrize("script", CASES)
def test_a_script_runs(script, plain, tmp_path, monkeypatch):
    check(script, CASES[script], tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("script", SEARCHES)
def test_a_search_with_optuna_runs(script, plain, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    check(script, CASES[script]._replace(arguments=SEARCHES[script]), tmp_path, monkeypatch)


def test_every_script_has_a_case():
    assert set(CASES) == RUNNABLE
