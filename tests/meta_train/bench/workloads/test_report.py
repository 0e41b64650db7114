"""From runs to figures and files: targets, time to them, what was spent, losses first, a page that stands alone."""

import csv
import json
import re

import numpy as np
import pytest

from meta_train.bench.workloads import comparison, report, search
from meta_train.bench.workloads.optimizers import Optimizer
from meta_train.bench.workloads.protocol import Result, comparable
from meta_train.bench.workloads.training import Curves
from tasks import Workload

ABOUT = {"suite": "made up", "ruleset": "tuned", "seeds": 2, "incomplete": None, "sources": {"nadamw": "a <paper>"}}


def optimizer(name, kind="baseline"):
    return Optimizer(name, lambda s, n: None, {"learning_rate": 0.1}, {}, "somewhere", kind)


def curves(valid, train=1.0):
    looks = np.arange(1, len(valid) + 1) * 10
    return Curves(np.full(10 * len(valid), train), looks, np.array(valid, float), 5.0, 2.0, 8_000, 1_000)


def result(workload, who, valids, milliseconds=10.0, trials=(), edges=None, target=None):
    made = Workload(lambda: None, steps=30, target=target, name=workload, dataset=workload.split("/")[0])
    spent = 30 * (len(trials) + 1)
    runs = [curves(valid) for valid in valids]
    return Result(made, who, {"learning_rate": 0.1}, runs, list(trials), edges or {}, spent, milliseconds)


NADAMW, MINE = optimizer("nadamw"), optimizer("mine", "learned")
TRIALS = [search.Trial({"learning_rate": 0.1}, 1.0)] * 12
RESULTS = [
    result("a/net", NADAMW, [[0.9, 0.5, 0.4], [0.9, 0.6, 0.4]], trials=TRIALS),
    result("a/net", MINE, [[0.8, 0.4, 0.3], [0.8, 0.39, 0.3]], milliseconds=20.0),
    result("b/net", NADAMW, [[0.9, 0.8, 0.7], [0.9, 0.8, 0.7]]),
    result("b/net", MINE, [[0.9, 0.9, 0.8], [0.9, 0.9, 0.8]], milliseconds=20.0),
]


def by_name(table, **wanted):
    (row,) = [row for row in table if all(row[key] == value for key, value in wanted.items())]
    return row


def test_the_target_is_the_references_end_unless_one_is_set():
    assert comparison.targets(RESULTS, RESULTS[1]) == pytest.approx([0.4, 0.4])
    fixed = result("c/net", NADAMW, [[1.0]], target=0.25)
    assert comparison.targets([fixed], fixed) == [0.25]


def test_the_reference_reaches_its_target_however_many_seeds():
    """It is each seed's own: at the mean of all the worse half would never be there."""
    ends = [1.0, 1.2, 1.3]
    both = [result("a/net", NADAMW, [[2.0, 1.5, end] for end in ends]), result("a/net", MINE, [[2.0, 1.5, 1.25]] * 3)]
    nadamw, mine = (by_name(comparison.rows(both), optimizer=name) for name in ("nadamw", "mine"))
    assert (nadamw["steps_to_target"], mine["steps_to_target"]) == (30, None)
    assert nadamw["target"] == pytest.approx(3.5 / 3, rel=1e-5)


def test_steps_and_seconds_to_the_target():
    rows = comparison.rows(RESULTS)
    mine = by_name(rows, workload="a/net", optimizer="mine")
    assert mine["steps_to_target"] == 20
    assert mine["seconds_to_target"] == pytest.approx(20 * 0.02)
    lost = by_name(rows, workload="b/net", optimizer="mine")
    assert lost["steps_to_target"] is None
    assert lost["seconds_to_target"] is None
    assert by_name(rows, workload="a/net", optimizer="nadamw")["steps_to_target"] == 30


def test_lost_workloads_come_first():
    assert [row["workload"] for row in comparison.rows(RESULTS)] == ["b/net", "b/net", "a/net", "a/net"]


def test_the_mean_over_data_sets_and_what_was_spent():
    summary = comparison.summary(RESULTS)
    mine, reference = by_name(summary, optimizer="mine"), by_name(summary, optimizer="nadamw")
    assert mine["ratio"] == pytest.approx(np.sqrt(0.3 / 0.4 * 0.8 / 0.7), rel=1e-5)
    assert mine["verdict"] == "level"
    assert reference["ratio"] == 1.0
    assert mine["step_time"] == pytest.approx(2.0)
    assert reference["seconds_spent"] == pytest.approx((13 * 30 + 30) * 0.01)
    assert (mine["reached"], mine["workloads"]) == (1, 2)


def test_a_run_that_diverged_is_counted_and_has_no_number():
    broken = [*RESULTS[:2], RESULTS[2], result("b/net", MINE, [[0.9, np.inf, np.inf]] * 2)]
    row = by_name(comparison.rows(broken), workload="b/net", optimizer="mine")
    assert row["valid_loss"] is None
    assert row["diverged"] == 2
    assert row["verdict"] == "worse"
    assert by_name(comparison.summary(broken), optimizer="mine")["ratio"] is None
    assert "diverged" in report.sentence({"summary": comparison.summary(broken)})


def test_files_hold_the_same_figures_and_the_page_stands_alone(tmp_path):
    document = report.write(tmp_path, RESULTS, ABOUT)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept == json.loads(json.dumps(document))
    with (tmp_path / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4
    assert float(table[0]["valid_loss"]) == document["figures"][0]["valid_loss"]
    page = (tmp_path / "report.html").read_text()
    assert page.index('href="#w1">b/net') < page.index('href="#w2">a/net')
    assert page.count("<svg") == 1 + 2 * 2
    assert not re.search(r"<script|<link|@import|url\((?!#)|src=", page)
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert "a &lt;paper&gt;" in page
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_can_be_made_again_from_its_results(tmp_path):
    document = report.write(tmp_path / "once", RESULTS, ABOUT)
    report.write_document(tmp_path / "again", document)
    for name in ("results.json", "results.csv", "report.html"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_untimed_results_have_no_seconds(tmp_path):
    untimed = [one._replace(milliseconds=float("nan")) for one in RESULTS]
    document = report.write(tmp_path, untimed, {**ABOUT, "incomplete": "half of it"})
    assert document["summary"][0]["seconds_spent"] is None
    page = (tmp_path / "report.html").read_text()
    assert "half of it" in page
    assert "seconds to target" not in page


def test_the_sentence_tells_losses_first():
    other = optimizer("other", "learned")
    both = [
        *RESULTS,
        result("a/net", other, [[1.0, 0.9, 0.9]] * 2),
        result("b/net", other, [[1.0, 0.9, 0.9]] * 2),
    ]
    text = report.sentence({"summary": comparison.summary(both)})
    assert text.index("other") < text.index("mine")


def test_of_unfinished_results_only_what_all_have_done_is_compared():
    assert comparable(RESULTS) == RESULTS
    assert comparable([]) == []
    begun = [*RESULTS[:2], RESULTS[2]]  # on the second workload only the reference is done
    assert [(r.workload.name, r.optimizer.name) for r in comparable(begun)] == [("a/net", "nadamw"), ("a/net", "mine")]
    assert comparison.summary(comparable(begun))[0]["workloads"] == 1
