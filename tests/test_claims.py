"""Figures of README, documentation and model cards against the committed results files.

Tables are compared cell by cell. A number in prose must be in a file that its section links to, which finds a slip of
the pen and no more: among thousands of committed numbers almost any of two digits is there.
"""

import bisect
import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from support import ROOT

HELD_OUT = json.loads((ROOT / "reports/held_out/results.json").read_text())
SUMMARY = {row["contender"]: row for row in HELD_OUT["summary"]}
with (ROOT / "reports/held_out/validation.csv").open() as _file:
    VALIDATION = {row["contender"]: row for row in csv.DictReader(_file)}
LABELS = {  # of the table of held_out
    "SOAP, tuned": "soap",
    "flagship-1 at its default rate": "flagship-1@0.005",
    "schedule-free AdamW, tuned": "schedule-free-adamw",
    "SGD with momentum, tuned": "sgdm",
    "AdamW with cosine, tuned": "adamw-cosine",
    "AdamW at one setting for all": "adamw-calibrated",
    "Adam at 1e-3": "adam@0.001",
}
_NUMBER = r"-?\d+\.\d+"


def contender(label: str) -> str:
    plain = label.strip().strip("*").replace("`", "").strip("*")
    return LABELS.get(plain, plain.split(",")[0].lower().replace(" ", "-"))


def table_after(text: str, head: str) -> list[list[str]]:
    """The rows of the Markdown table whose head begins so."""
    lines = text[text.index(head) :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def interval(values, digits=2) -> str:
    value, low, high = values
    return f"{value:.{digits}f} ({low:.2f}–{high:.2f})"


def test_the_table_of_held_out_is_the_committed_one():
    rows = table_after((ROOT / "docs/benchmark.md").read_text(), "| | by the clock | validation loss |")
    shown = {}
    for label, clock, valid, share, steps, score in rows:
        name = contender(label)
        found = SUMMARY[name]
        assert clock == f"{found['time'][0]:.2f}", name
        assert valid == f"{float(VALIDATION[name]['times_adam']):.2f}", name
        assert share == f"{found['at_least_adam']:.0%} of tasks", name
        assert steps == interval(found["steps"]), name
        assert score == f"{found['score']:.2f}", name
        shown[name] = found
    # no row is left out but Celo's, whose weights are not in the repository
    assert set(SUMMARY) - set(shown) == {"celo"}


@pytest.mark.parametrize("path", sorted((ROOT / "pretrained").glob("*/README.md")), ids=lambda path: path.parent.name)
def test_cards_tables_are_the_committed_ones(path):
    text = path.read_text()
    head = "| | final loss | ≥ Adam |"
    if head not in text:
        pytest.skip("no benchmark of an optimizer")
    for label, loss, share, steps, clock, score, diverged in table_after(text, head):
        found = SUMMARY[label.strip("*")]
        assert loss == interval(found["loss"], 3)
        assert share == f"{found['at_least_adam']:.0%}"
        assert steps == interval(found["steps"])
        assert clock == interval(found["time"])
        assert score == f"{found['score']:.2f}"
        assert diverged == f"{found['diverged']} of {found['runs']}"


def test_the_table_of_flagship_light_is_the_committed_one():
    folder = ROOT / "reports/light"
    summary = json.loads((folder / "results.json").read_text())["summary"]
    with (folder / "validation.csv").open() as file:
        valid = {row["contender"]: f"{float(row['times_adam']):.2f}" for row in csv.DictReader(file)}
    rows = table_after((ROOT / "docs/benchmark.md").read_text(), "| row | by the clock |")
    assert len(rows) == len(summary)
    for (label, *cells), found in zip(rows, summary, strict=True):
        name = {"`flagship-light`, untrained, nothing set": "flagship-light:untrained"}.get(label, contender(label))
        assert name == found["contender"]
        share, steps = f"{found['at_least_adam']:.0%} of tasks", interval(found["steps"])
        scores = f"{found['score']:.2f}", f"{found['score_time']:.2f}"
        assert cells == [f"{found['time'][0]:.2f}", valid[name], share, steps, *scores]


@pytest.mark.parametrize(
    ("report", "page", "errors"), [("light", "docs/benchmark.md", 1), ("control", "pretrained/flagship/README.md", 1.7)]
)
def test_the_line_through_the_checkpoints_is_the_committed_one(report, page, errors):
    with (ROOT / "reports" / report / "checkpoints.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == "geometric mean"]
    steps, ratios = (np.array([float(row[column]) for row in rows]) for column in ("meta_steps", "ratio"))
    (slope, _), covariance = np.polyfit(np.log10(steps), np.log(ratios), 1, cov=True)
    assert abs(slope) < errors * covariance[0, 0] ** 0.5
    assert f"{math.exp(slope):.3f} times for ten times the meta-steps" in " ".join((ROOT / page).read_text().split())


def committed_clock():
    """``(workload, optimizer)`` to a row of clock.csv."""
    with (ROOT / "reports/workloads/clock.csv").open() as file:
        return {(row["workload"], row["optimizer"]): row for row in csv.DictReader(file)}


NETWORKS = {
    "mail/embeddings-96-384": "word embeddings, mail",
    "speech/unet-32-64-128": "U-Net, speech",
    "cmudict/seq2seq-3x128": "encoder and decoder, pronunciations",
    "qm9/message-passing-4x160": "message passing, molecules",
    "sqlite/llama-4x128": "transformer, C source",
}


def test_readmes_losses_are_the_committed_ones():
    test, tuned = (
        json.loads((ROOT / "reports/workloads" / folder / "results.json").read_text()) for folder in ("test", "tuned")
    )
    head = "| validation loss | **`flagship`** | `flagship-1` | Muon | Muon, tuned | SOAP | NAdamW | NAdamW, tuned | "
    rows = table_after((ROOT / "README.md").read_text(), head + "`flagship:untrained` |")
    columns = [(test, "flagship"), (test, "flagship-1"), (test, "muon"), (tuned, "muon"), (test, "soap")]
    columns += [(test, "nadamw"), (tuned, "nadamw"), (test, "flagship:untrained")]
    *networks, means = rows
    assert [label for label, *_ in networks] == list(NETWORKS.values())
    for (_, *cells), workload in zip(networks, NETWORKS, strict=True):
        for cell, (results, name) in zip(cells, columns, strict=True):
            (row,) = [r for r in results["figures"] if (r["workload"], r["optimizer"]) == (workload, name)]
            assert cell == f"{row['valid_loss']:.{len(cell.partition('.')[2])}f}", (workload, name)
    for cell, (results, name) in zip(means[1:], columns, strict=True):
        (row,) = [r for r in results["summary"] if r["optimizer"] == name]
        ratio = "1.00" if name == "nadamw" else interval([row["ratio"], row["ratio_low"], row["ratio_high"]])
        assert cell == (ratio if results is test else "")


def test_readmes_times_are_the_committed_ones():
    head = "| time to NAdamW's loss, times NAdamW's | **`flagship`** | `flagship-1` | Muon | SOAP |"
    rows, clock = table_after((ROOT / "README.md").read_text(), head), committed_clock()
    assert [label for label, *_ in rows] == list(NETWORKS.values())
    for (_, *cells), workload in zip(rows, NETWORKS, strict=True):
        for cell, name in zip(cells, ("flagship", "flagship-1", "muon", "soap"), strict=True):
            row = clock[workload, name]
            times = (float(row[column]) for column in ("seconds_over_nadamw", "with_compiling_over_nadamw"))
            assert cell == "{:.2f} ({:.2f})".format(*times)


def test_the_clocks_steps_are_those_of_the_report():
    figures = json.loads((ROOT / "reports/workloads/test/results.json").read_text())["figures"]
    steps = {(row["workload"], row["optimizer"]): row["steps_to_target"] for row in figures}
    assert all(float(row["steps_to_target"]) == steps[key] for key, row in committed_clock().items())


DATASETS = [workload.split("/")[0] for workload in NETWORKS]
TABLES = [
    ("test", "**To judge by**", "| | word embeddings, mail |", DATASETS, 6),
    ("tuned", "**Under `tuned`**", "| | word embeddings, mail |", DATASETS, 4),
    ("small", "**To choose by**", "| | character transformer, Moby Dick |", ["moby_dick", "kjv", "cifar10"], 6),
]


@pytest.mark.parametrize(("folder", "after", "head", "datasets", "count"), TABLES)
def test_the_tables_of_the_workloads_are_the_committed_ones(folder, after, head, datasets, count):
    results = json.loads((ROOT / "reports/workloads" / folder / "results.json").read_text())
    found = {(row["dataset"], row["optimizer"]): row for row in results["figures"]}
    rows = table_after((ROOT / "docs/benchmark.md").read_text().split(after)[1], head)
    shown = {label.strip("*").split(",")[0].strip("`"): cells for label, *cells in rows if "one setting" not in label}
    assert len(shown) == count
    for name, cells in shown.items():
        for dataset, cell in zip(datasets, cells, strict=True):
            row, (loss, steps) = found[dataset, name], cell.split(", ")
            assert float(loss) == float(f"{row['valid_loss']:.{len(loss.partition('.')[2])}f}"), (name, dataset)
            assert (None if steps == "–" else float(steps)) == row["steps_to_target"], (name, dataset)


def test_the_clock_of_the_workloads_is_the_committed_one():
    text = (ROOT / "docs/benchmark.md").read_text().split("**By the clock**")[1]
    rows, clock = table_after(text, "| | word embeddings, mail | U-Net, speech |"), committed_clock()
    assert len(rows) == 5
    for label, *cells in rows:
        times = [clock[workload, label.strip("*`")] for workload in NETWORKS]
        shown = [cell.split(", ") for cell in cells]
        assert [cell[0] for cell in shown] == [f"{float(t['milliseconds']):.0f}" for t in times]
        assert [float(cell[1]) for cell in shown] == [float(t["seconds_over_nadamw"]) for t in times]
        assert [cell[2] for cell in shown] == [f"{float(t['compile_seconds']):.0f}" for t in times]


@pytest.mark.parametrize(
    ("head", "methods"),
    [
        (
            "| | H | AdamW: DiLoCo | Muon: averaging |",
            [
                *("DiLoCo (AdamW)", "averaging, Muon", "MuLoCo (Muon)", "Nesterov + outer, Muon"),
                *("averaging, flagship", "DiLoCo's step, flagship", "Nesterov + outer, flagship"),
            ],
        ),
        (
            "| | H | AdamW: DiLoCo | Muon: MuLoCo |",
            ["DiLoCo (AdamW)", "MuLoCo (Muon)", "DiLoCo's step, flagship", "Nesterov + outer, flagship"],
        ),
        (
            "| | H | AdamW: averaging |",
            [
                *("averaging, AdamW", "DiLoCo (AdamW)", "Streaming DiLoCo (AdamW)", "SlowMo (AdamW)"),
                *("post-local (AdamW)", "SparseLoCo (AdamW)", "outer, AdamW", "Nesterov + outer, AdamW", "outer, Muon"),
            ],
        ),
    ],
)
def test_local_sgds_losses_are_the_committed_ones(head, methods):
    with (ROOT / "reports/local_sgd/peers.csv").open() as file:
        found = {(r["task"], r["H"], r["method"]): f"{float(r['valid_loss']):.3f}" for r in csv.DictReader(file)}
    rows = table_after((ROOT / "reports/local_sgd/README.md").read_text(), head)
    assert len(rows) >= 3
    for task, delay, *cells in rows:
        assert [cell.strip("*") for cell in cells] == [found.get((task, delay, method), "") for method in methods]


def test_validation_csv_is_of_the_committed_results():
    for folder in ("held_out", "fetched_small", "quick_5000", "validation"):
        figures = json.loads((ROOT / "reports" / folder / "results.json").read_text())["figures"]
        found = {(row["task"], row["contender"]): row["valid_loss"] for row in figures}
        tasks = [task for task in dict.fromkeys(row["task"] for row in figures) if "(" not in task]
        with (ROOT / "reports" / folder / "validation.csv").open() as file:
            for row in csv.DictReader(file):
                ratios = [found[task, row["contender"]] / found[task, "adam"] for task in tasks]
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                assert float(row["times_adam"]) == pytest.approx(mean, abs=0.0051)
                assert int(row["higher_on"]) == sum(ratio > 1 for ratio in ratios)


# -- everything else: a decimal number in a section is in the reports that the section links to ----------------------


def sections(path: Path) -> list[tuple[str, str]]:
    """A document's sections, ``(heading, text)``."""
    parts = re.split(r"^(#+ .*)$", path.read_text(), flags=re.MULTILINE)
    return list(zip(["", *parts[1::2]], [parts[0], *parts[2::2]], strict=True))


def linked(path: Path, text: str) -> list[Path]:
    """The folders of reports that a text names, or else those that the pages name to which it links."""
    names = re.findall(r"reports/([a-z0-9_]+)", text)
    if not names:
        pages = [path.parent / page for page in re.findall(r"\]\(([a-z_]+\.md)", text)]
        names = [name for page in pages for name in re.findall(r"reports/([a-z0-9_]+)", page.read_text())]
    return [ROOT / "reports" / name for name in dict.fromkeys(names) if (ROOT / "reports" / name).is_dir()]


def numbers_in(folder: Path) -> list[float]:
    """All numbers of a report's files, sorted."""
    found = set()
    for file in folder.rglob("*"):
        if file.suffix in (".json", ".csv", ".md"):
            text = file.read_text()
            found |= {abs(float(n)) for n in re.findall(r"-?\d+\.?\d*(?:e[-+]?\d+)?", text)}
    return sorted(found)


def is_there(shown: str, known: list[float]) -> bool:
    """Whether a committed number rounds to what is shown: as it is, in percent, as a change of so many percent, times
    a thousand or a thousandth."""
    half = 0.501 * 10 ** -len(shown.partition(".")[2])
    value = abs(float(shown))
    near = [(value / unit, half / unit) for unit in (1.0, 100.0, 1000.0, 1e-3)]
    near += [(1 + value / 100, half / 100), (1 - value / 100, half / 100)]
    for middle, radius in near:
        at = bisect.bisect_left(known, middle - radius)
        if at < len(known) and known[at] <= middle + radius:
            return True
    return False


README_WORTH = "## What they are worth"
BENCHMARK_FOUND = (
    "### What was found on held_out",
    "### What flagship-light is worth on held_out",
    "### Whole MNIST and CIFAR-10",
)


def test_other_numbers_of_readme_and_benchmark_are_in_the_reports_that_it_links_to():
    wanted = [("README.md", README_WORTH), *(("docs/benchmark.md", head) for head in BENCHMARK_FOUND)]
    texts = [text for path, head in wanted for found, text in sections(ROOT / path) if found == head]
    assert len(texts) == len(wanted)
    text = "\n".join(texts)
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    known = sorted(number for folder in linked(ROOT, text) for number in numbers_in(folder))
    # how many times longer than Adam is one over what the table has
    for longer, (folder, name) in {
        "three times as long": ("held_out", "flagship-1-auto"),
        "1.4 times": ("held_out", "soap"),
        "SOAP 2.2 times": ("fetched_small", "soap"),
        "Muon 1.6 times": ("fetched_small", "muon"),
    }.items():
        assert longer in prose
        summary = json.loads((ROOT / "reports" / folder / "results.json").read_text())["summary"]
        (clock,) = [row["time"][0] for row in summary if row["contender"] == name]
        said = {"three times as long": 3}.get(longer) or float(re.search(_NUMBER, longer)[0])
        assert 1 / clock == pytest.approx(said, abs=0.5 if said == 3 else 0.06)
        prose = prose.replace(longer, "")
    for shown in re.findall(_NUMBER, re.sub(r"`[^`]*`|\([^)]*\.csv\)", "", prose)):
        assert is_there(shown, known), shown


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_numbers_of_documentations_tables_are_in_the_reports_that_they_link_to(path):
    for heading, text in sections(path):
        shown = re.findall(_NUMBER, "\n".join(line for line in text.splitlines() if line.startswith("|")))
        if not shown:
            continue
        folders = linked(path, text)
        assert folders, f"{heading}: numbers, and no report is named"
        known = sorted(number for folder in folders for number in numbers_in(folder))
        missing = [number for number in shown if not is_there(number, known)]
        assert not missing, f"{heading}: {missing}"


def test_what_is_said_of_updates_and_gradients():
    rows = {(row["task"], row["contender"]): row for row in HELD_OUT["figures"]}
    tasks = list(dict.fromkeys(task for task, _ in rows))

    def update_over_gradient(task, name):
        row = rows[task, name]
        return (row["milliseconds"] - row["gradient_milliseconds"]) / row["gradient_milliseconds"]

    learned = [update_over_gradient(task, "flagship-1-auto") for task in tasks]
    assert f"takes {min(learned):.1f} to {max(learned):.0f} times as long as the gradient" in (
        (ROOT / "docs/benchmark.md").read_text().replace("\n", " ").replace("  ", " ")
    )
    assert sum(update_over_gradient(task, "adam") < 1 for task in tasks) == 17
