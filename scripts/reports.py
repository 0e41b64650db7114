"""The committed reports: what each holds, the commands that make it again, and the index in ``reports/README.md``.

python scripts/reports.py                  # lists the reports and their commands
python scripts/reports.py --remake NAME    # removes the results of one and runs its commands; many take hours.
                                           # What `bench` keeps in the data folder is used: remove it for new runs.
python scripts/reports.py --index          # writes reports/README.md, with the date and commit of each result
"""

import argparse
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "reports" / "README.md"
CELO = "learned-opt import celo celo.theta.state --to runs/celo  # the published file, which is not in this repository"


class Report(NamedTuple):
    """A folder of committed results.

    Attributes:
        claims: what they are the evidence for.
        commands: what makes them again, from the root of the repository.
    """

    claims: str
    commands: tuple[str, ...]


def bench(name: str, rules: str, options: str) -> tuple[str, ...]:
    """The commands of a benchmark's folder."""
    return (
        f"learned-opt bench {rules} {options} --out reports/{name}",
        f"python scripts/validation_losses.py reports/{name}",
    )


REPORTS = {
    "ablation": Report("what each setting of meta-training is worth", ("python benchmarks/ablation.py",)),
    "accelerator": Report(
        "what updates, compilation and meta-training take on one H100",
        (
            "python benchmarks/update.py --out h100_updates.json  # on a machine with the GPU; beside these times the "
            "report holds others of that machine, which were added by hand",
        ),
    ),
    "compile": Report("how long optimizers compile, by depth", ("python benchmarks/compile.py",)),
    "control": Report(
        "what parts of `flagship` are worth: the brake on growing weights in longer runs of two small networks that it "
        "was chosen on, SOAP's rotation on twelve networks (`rotation.csv`, put together by hand from two reports "
        "and the second command's losses), meta-training its control layer (`checkpoints.csv`), steps by the length "
        "of a run (`horizon.csv`) and without it (`untold.csv`), and the floor of embeddings' size (`embeddings.csv`)",
        (
            *(f"learned-opt data fetch {name}" for name in ("moby_dick", "kjv", "cifar10")),
            "python benchmarks/horizon.py",
            "python benchmarks/embeddings.py",
            "python benchmarks/control.py --steps 1600 --networks gpt-2x64 lstm-1x128 --settings 'as it is' 'no brake'",
            "python benchmarks/control.py --settings 'as it is' 'no rotation'",
            *(f"python scripts/pretrain.py flagship --seed {seed}" for seed in range(3)),
            "python scripts/checkpoints.py reports/control runs/pretrain/flagship-0 runs/pretrain/seed-[12]/flagship-0",
        ),
    ),
    "direction": Report(
        "what cheaper forms of `flagship-1`'s direction cost in loss",
        ("learned-opt data fetch moby_dick", "python benchmarks/direction.py"),
    ),
    "fetched_small": Report(
        "pretrained rules on whole MNIST and CIFAR-10",
        (
            "learned-opt data fetch mnist",
            "learned-opt data fetch cifar10",
            *bench(
                "fetched_small",
                "flagship-1 flagship-1-auto",
                "--suite fetched_small --steps 1000 --seeds 5 --baselines adamw-cosine,muon,soap,prodigy",
            ),
        ),
    ),
    "held_out": Report(
        "pretrained rules on 18 small tasks, a suite for development",
        (
            CELO,
            *bench(
                "held_out",
                "flagship-1 flagship-1-auto adafac-mlp runs/celo",
                "--suite held_out --steps 1000 --seeds 5",
            ),
        ),
    ),
    "light": Report(
        "`flagship-light` on the 18 small tasks, beside tuned optimizers and itself untrained; `checkpoints.csv`: what "
        "meta-training made of it",
        (
            *bench(
                "light",
                "flagship-light flagship-light:untrained",
                "--suite held_out --baselines "
                "adamw-cosine,nadamw,schedule-free-adamw,muon,prodigy,sgdm,lion,adamw-calibrated",
            ),
            "taskset -c 1 python benchmarks/update.py --rounds 7 --rules light --out reports/light/update.json",
            *(f"python scripts/pretrain.py flagship-light --seed {seed}" for seed in range(3)),
            "python scripts/checkpoints.py reports/light runs/pretrain/flagship-light-0 "
            "runs/pretrain/seed-[12]/flagship-light-0",
        ),
    ),
    "local_sgd": Report(
        "local SGD: delays, growing batches, outer steps, one worker, the cost of communication, faults",
        (
            *(f"learned-opt data fetch {name}" for name in ("fashion_mnist", "moby_dick", "kjv", "cifar10", "sqlite")),
            *(
                f"python benchmarks/local_sgd_{study}.py"
                for study in (
                    *("stich", "patel_dieuleveut", "batches", "communication", "faults", "outer", "overlap", "peers"),
                    *("compressed", "one_worker", "when"),
                )
            ),
        ),
    ),
    "large_update": Report(
        "whole training steps of transformers and a ResNet under learned rules, SOAP, Muon and Adam",
        (
            'python benchmarks/large_update.py --rounds 4 --models "transformer 4 x 128" "transformer 4 x 256"',
            "python benchmarks/large_update.py --rounds 3 --models resnet --out reports/large_update/resnet.json",
        ),
    ),
    "memory": Report("bytes a parameter of states and of updates' temporaries", ("python benchmarks/memory.py",)),
    "meta_training": Report(
        "throughput of meta-training beside a bare loop of Adam; `before_*.json`: in turns, at commit 54debc2",
        tuple(
            f"python benchmarks/meta_training.py --rounds 8 --out reports/meta_training/run_{run}.json"
            for run in (1, 2)
        ),
    ),
    "precision": Report("what states and parameters in bfloat16 cost and save", ("python benchmarks/precision.py",)),
    "quick_5000": Report(
        "pretrained rules over 5,000 steps of five small tasks",
        bench(
            "quick_5000",
            "flagship-1 flagship-1-auto",
            "--suite quick --steps 5000 --baselines adamw-cosine,muon,soap",
        ),
    ),
    "self_tuning": Report(
        "self-tuning networks: against a closed form, searches and population-based training, from drawn starts, on a "
        "residual network, text and photographs, as schedules, in meta-training, costs",
        (
            *(f"learned-opt data fetch {name}" for name in ("fashion_mnist", "cifar10", "sotu")),
            *(
                f"python benchmarks/self_tuning_{study}.py"
                for study in ("ridge", "search", "peers", "drawn", "resnet", "cifar", "meta", "schedules", "cost")
            ),
            "python benchmarks/self_tuning_resnet.py --budget 4",
            "python benchmarks/self_tuning_cifar.py --name cifar_2400 --steps 2400",
            "python benchmarks/self_tuning_language.py",
            "learned-opt tune cifar-cnn --out runs/cifar-cnn",
            "cp runs/cifar-cnn/result.json reports/self_tuning/cifar_cnn.json",
            "cp runs/cifar-cnn/curves.png reports/self_tuning/cifar_cnn.png",
        ),
    ),
    "sizes": Report(
        "one setting of `flagship` at every width, depth, batch and length, beside NAdamW, Muon and SOAP, whose "
        "rates were tuned",
        ("learned-opt data fetch moby_dick", "python benchmarks/sizes.py"),
    ),
    "unsupervised": Report(
        "features without labels beside baselines",
        ("python benchmarks/unsupervised_features.py --rule letters --out reports/unsupervised",),
    ),
    "update": Report(
        "what one update costs on one core of a CPU",
        ("taskset -c 1 python benchmarks/update.py --rounds 7 --rules celo2 adafac_mlp velo mlp celo2_soap",),
    ),
    "validation": Report(
        "the suite that settings are chosen on; `forms.csv`: what changes of `flagship-1`'s arithmetic cost there",
        (
            *bench("validation", "flagship-1 flagship-1-auto", "--suite validation --baselines soap --devices 1"),
            "python scripts/validation_forms.py reports/validation/forms.csv",
        ),
    ),
    "workloads": Report(
        "networks as people train them: validation losses, the rates that were tried, sizes, step times",
        (
            *(
                f"learned-opt data fetch {name}"
                for name in ("moby_dick", "kjv", "cifar10", "sqlite", "cmudict", "qm9", "speech", "mail")
            ),
            "python scripts/choose_rates.py nadamw muon soap",
            *(
                f"learned-opt bench {rules} --out reports/workloads/{name}"
                for name, rules in (
                    ("small", "flagship --suite workloads_small --runs runs/small"),
                    ("test", "flagship flagship-1 --suite workloads_test --baselines muon,soap"),
                )
            ),
            "learned-opt bench flagship --suite workloads_test --ruleset tuned --baselines nadamw,muon"
            " --runs reports/workloads/runs --out reports/workloads/tuned",
            "python scripts/workload_sizes.py",
            "python scripts/workload_seeds.py",
            "python scripts/workload_trials.py",
            "python benchmarks/step_times.py",
            "python benchmarks/clock.py",
            "python scripts/workload_clock.py",
        ),
    ),
}


def last_change(name: str) -> str:
    """The date and the commit in which the results of a folder last changed, be it a name in them."""
    command = ["git", "log", "-1", "--diff-filter=AM", "--format=%ad, %h", "--date=short", "--", f"reports/{name}"]
    command += [f":(exclude)*/{derived}" for derived in ("README.md", "validation.csv", "celo2_soap_*")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return found or "not committed yet"


def index() -> str:
    """The page that lists them all."""
    lines = [
        "# Reports",
        "",
        "The committed results that claims in this repository cite, and the commands that make such results again "
        "(some are of earlier code or of an earlier protocol, as their pages say); "
        "`python scripts/reports.py --remake NAME` removes a report's results and runs them.",
        "This page: `python scripts/reports.py --index`.",
        "",
        "Before commit e00fe36 `flagship-1` was called `flagship`, `flagship-1-auto` `flagship-auto`, and `flagship` "
        "`flagship-2`. Before commit 10fb643 the steps of today's `flagship` did not depend on the length of the run. "
        "At 600 updates, the length in `workloads/test` and `workloads/tuned`, nothing changed; `workloads/small`, of "
        "500, `local_sgd`, of 256 to 768, and `rotation.csv` and `checkpoints.csv` of `control` are of the earlier "
        "steps. Before commit 4462574 tables of embeddings had the floor of other matrices at every length: in runs "
        "of more than 600 updates `horizon.csv` of `control` is of that form.",
        "",
        "| folder | is the evidence for | last change |",
        "|---|---|---|",
    ]
    lines += [f"| [{name}]({name}) | {report.claims} | {last_change(name)} |" for name, report in REPORTS.items()]
    for name, report in REPORTS.items():
        lines += ["", f"## {name}", "", "```", *report.commands, "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Lists, remakes or indexes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remake", choices=[name for name in REPORTS if name != "accelerator"], metavar="NAME")
    parser.add_argument("--index", action="store_true")
    options = parser.parse_args()
    if options.index:
        INDEX.write_text(index())
        print(f"wrote {INDEX}")
    elif options.remake:
        folder = ROOT / "reports" / options.remake
        for path in sorted([*folder.rglob("*.csv"), *folder.rglob("*.json")]):
            if not path.name.startswith("before_"):  # of code that is no more; Git has the others
                path.unlink()  # or a study would skip what it finds there
        for command in REPORTS[options.remake].commands:
            print(f"$ {command}", flush=True)
            subprocess.run(["bash", "-c", command], cwd=ROOT, check=True)
    else:
        for name, report in REPORTS.items():
            print(f"{name}: {report.claims}", *(f"  {command}" for command in report.commands), sep="\n")


if __name__ == "__main__":
    main()
