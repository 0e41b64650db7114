"""What the benchmark shows: tables, files, the page, the model card; all from made-up results."""

import csv
import dataclasses
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from support import ROOT

from meta_train.bench import comparison, glossary, measures
from meta_train.bench.report import card, charts, files, terminal
from meta_train.bench.report.page import render
from meta_train.bench.timing import Timing
from meta_train.bench.tournament import Result
from meta_train.train.config import Config, ConfigError

STEPS = 50


def made(task, contender, final, *, baseline=True, faster=1.0, slower=1.0):
    """Three seeds whose loss falls linearly from 2 to ``final``, or is at once not finite."""
    curve = np.maximum(np.linspace(2.0, 2.0 + faster * (final - 2.0), STEPS), final)
    curves = np.stack([curve, curve, curve])
    timing = Timing(0.2 * slower, 0.2, 0.1)
    ends = np.full(3, final)
    return Result(task, contender, baseline, 1e-3, False, curves, np.full(3, 2.0), ends, ends / 2, 40, 5, timing)


MADE = [
    *(made(task, "adam", 1.0) for task in ("easy", "hard", "wild")),
    made("easy", "sgd", 0.9, faster=1.2),
    made("hard", "sgd", 1.2),
    made("wild", "sgd", 1.0),
    made("easy", "mine", 0.5, baseline=False, slower=2.0),
    made("hard", "mine", 1.5, baseline=False, slower=2.0),
    made("wild", "mine", np.nan, baseline=False, slower=2.0),
    made("easy", "mine@0.01", 1.0, baseline=False, slower=2.0),
    made("hard", "mine@0.01", 1.0, baseline=False, slower=2.0),
    made("wild", "mine@0.01", 1.0, baseline=False, slower=2.0),
]
ABOUT = {"suite": "held_out", "steps": STEPS, "seeds": 3, "tuning_seeds": 2, "contenders": {"mine": "<b>&"}}


def figures_of(results):
    return {(row["task"], row["contender"]): row for row in comparison.rows(results)}


def test_progress_and_the_losing_tasks_first():
    figures = comparison.rows(MADE)
    assert list(dict.fromkeys(row["task"] for row in figures)) == ["wild", "hard", "easy"]
    found = figures_of(MADE)
    assert found["easy", "mine"]["progress"] == 1.5
    assert found["hard", "mine"]["progress"] == 0.5
    assert found["wild", "mine"]["progress"] is None
    assert found["wild", "mine"]["diverged"] == 3
    assert found["hard", "mine"]["diverged"] == 0


def test_speed_ups_by_steps_and_by_the_clock():
    row = figures_of(MADE)["easy", "mine"]
    # 2 - 1.5 s and 2 - s at the share s of the steps: at Adam's last loss, 1, after two thirds of them
    assert row["speed_up"] == pytest.approx(1.5, rel=0.05)
    assert row["speed_up_time"] == pytest.approx(row["speed_up"] / 2, rel=1e-4)
    assert row["milliseconds"] == 0.4
    assert row["gradient_milliseconds"] == 0.1
    assert figures_of(MADE)["hard", "mine"]["speed_up"] == 0


def test_untimed_results_have_no_clock():
    results = [result._replace(timing=None) for result in MADE]
    assert all(row["speed_up_time"] is None for row in comparison.rows(results))
    assert all("time" not in row for row in comparison.summary(results))
    page = render(results, comparison.rows(results), comparison.summary(results), ABOUT)
    assert "score by clock" not in page


def test_summary():
    rows = {row["contender"]: row for row in comparison.summary(MADE)}
    assert rows["adam"]["loss"] == [1.0, 1.0, 1.0]
    assert rows["adam"]["steps"] == [1.0, 1.0, 1.0]
    assert rows["adam"]["step_time"] == 1.0
    assert rows["mine"]["step_time"] == 2.0
    assert rows["mine"]["at_least_adam"] == pytest.approx(1 / 3, rel=1e-4)
    assert rows["mine"]["worst"] == ["wild", None]
    assert rows["mine"]["diverged"] == 3
    assert rows["mine"]["runs"] == 9
    assert rows["mine"]["state_bytes_per_param"] == 8
    # a run that diverged counts as -1: 9 values of which the lowest and the highest two are left out
    assert rows["mine"]["loss"][0] == pytest.approx(np.mean([-1, 0.5, 0.5, 0.5, 1.5]))
    low, high = rows["mine"]["loss"][1:]
    assert low <= rows["mine"]["loss"][0] <= high


def test_profiles_by_steps_and_by_the_clock():
    names = ["adam", "sgd", "mine", "mine@0.01"]
    steps = dict(zip(names, comparison.profiles(MADE), strict=True))
    clock = dict(zip(names, comparison.profiles(MADE, by_clock=True), strict=True))
    assert np.isinf(steps["mine"]).sum() == 2  # hard and wild
    assert steps["mine"][0] == 1.0  # the fastest on the easy task
    assert clock["mine"][0] > 1.0  # but not by the clock
    np.testing.assert_array_equal(clock["sgd"], np.sort(clock["sgd"]))
    scores = {row["contender"]: row["score"] for row in comparison.summary(MADE)}
    assert scores["mine"] == pytest.approx(1 / 3, rel=1e-4)
    assert [row["contender"] for row in comparison.summary(MADE)] == sorted(scores, key=scores.get, reverse=True)


def test_the_best_baseline():
    found = [row for row in comparison.rows(MADE) if row["task"] == "easy"]
    assert measures.best_baseline(found)["contender"] == "sgd"
    found = [row for row in comparison.rows(MADE) if row["task"] == "hard"]
    assert measures.best_baseline(found)["contender"] == "adam"
    assert measures.best_baseline([row for row in found if not row["baseline"]]) is None


def test_the_tables_fit_eighty_columns():
    console = Console(width=80, file=io.StringIO())
    console.print(terminal.tables(comparison.rows(MADE), comparison.summary(MADE), "a title"))
    shown = console.file.getvalue()
    assert "diverged" in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.index("wild") < shown.index("hard") < shown.index("easy")


def test_files(tmp_path):
    files.write(tmp_path / "out", MADE, ABOUT)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["curves.png", "results.csv", "results.json"]
    with Image.open(tmp_path / "out" / "curves.png") as image:
        assert image.width > 800
    with (tmp_path / "out" / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(table) == len(document["figures"]) == len(MADE)
    assert document["about"] == ABOUT
    assert [row["contender"] for row in document["summary"]] == [row["contender"] for row in comparison.summary(MADE)]


# -- the page --------------------------------------------------------------------------------------------------------


class Outline(html.parser.HTMLParser):
    """Every tag closed in order, every link to an anchor that is there, nothing from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.texts = [], [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        assert "src" not in attributes
        assert tag not in ("script", "link", "img", "iframe")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ("g", "path", "rect", "use"), tag

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_and_needs_nothing_else():
    page = render(MADE, comparison.rows(MADE), comparison.summary(MADE), ABOUT)
    outline = Outline()
    outline.feed(page)
    assert not outline.open
    assert len(set(outline.ids)) == len(outline.ids)
    assert {link.removeprefix("#") for link in outline.links} <= set(outline.ids)
    assert {"task-easy", "task-hard", "task-wild", "losing", "overall", "reading"} <= set(outline.ids)
    assert "@import" not in page
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert "<b>&" in outline.texts  # what a contender says of itself is text
    for colour in set(re.findall(r"var\(--([a-z]+\d*)\)", page)) - {"c", "s"}:
        assert f"--{colour}: #" in page, colour


def test_the_page_tells_the_losses_first():
    page = render(MADE, comparison.rows(MADE), comparison.summary(MADE), ABOUT)
    first = page[: page.index('id="overall"')]
    assert "<b>mine</b> lost 2 of 3 tasks; 3 of its runs diverged" in first
    assert first.index("#task-wild") < first.index("#task-hard")
    assert "#task-easy" not in first
    assert "<b>mine@0.01</b> lost no task; no run diverged" in first


def test_a_page_without_learned_rules_or_finite_curves():
    results = [made("wild", "adam", 1.0), made("wild", "sgd", np.nan)]
    for chosen in (results, results[:1]):
        page = render(chosen, comparison.rows(chosen), comparison.summary(chosen), ABOUT)
        assert "No learned rule took part" in page
        assert "nan" not in page.lower().replace("nandata", "")


def test_long_curves_are_thinned():
    steps, values = charts.thin(np.arange(10_000.0))
    assert len(steps) <= 150
    assert (steps[0], steps[-1], values[-1]) == (1.0, 10_000.0, 9_999.0)
    np.testing.assert_array_equal(values, steps - 1)


def test_charts_take_their_colours_from_the_page_and_name_their_lines():
    styles = charts.styles(comparison.summary(MADE))
    chart = charts.profile(MADE, styles)
    assert "<title>mine</title>" in chart
    assert not any(light in chart for light, _ in charts.PALETTE.values())
    assert f"var(--{styles['mine'].colour})" in chart


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_curves_of_any_scale_and_with_gaps_are_drawn(scale):
    results = [result._replace(curves=result.curves * scale) for result in MADE if result.task == "wild"]
    curves = charts.curves(results, charts.styles(comparison.summary(MADE)))
    assert curves.count("<title>") == len(results)


def test_the_words_mean_the_same_on_the_page_and_in_the_documentation():
    documentation = (ROOT / "docs" / "benchmark.md").read_text()
    assert " ".join(glossary.markdown().split()) in " ".join(documentation.split())  # the page wraps its lines
    page = render(MADE, comparison.rows(MADE), comparison.summary(MADE), ABOUT)
    for term in glossary.TERMS:
        assert term.full in html.unescape(page)


# -- the model card --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    return {"about": ABOUT, "summary": comparison.summary(MADE), "figures": comparison.rows(MADE)}


RECORD = {
    "rule": "celo2",
    "theta": {"w": {"shape": [2, 3]}},
    "config": dataclasses.asdict(Config()),
    "learning_rate": 1e-3,
}


def test_the_card_tells_where_the_rule_loses(results):
    text = card.text("mine", RECORD, card.own_results(results, "mine"))
    assert "6 meta-parameters" in text
    assert "- hard: 0.500 (–)" in text
    assert "- wild: diverged, 3 of 3 seeds diverged" in text
    assert "- easy" not in text
    assert "At its default rate, mine@0.01, it did on 0 of 3 tasks" in text
    assert "| **mine** |" in text
    assert re.search(r"\| wild \| diverged \| 1\.000 \(1\.00x\) \| (adam|sgd) 1\.000 \(1\.00x\) \|", text)
    assert "No benchmark was run" in card.text("mine", RECORD, None)


def test_a_runs_own_benchmark_calls_the_rule_by_its_new_name(results):
    renamed = json.loads(json.dumps(results).replace("mine", "rule"))
    assert card.own_results(renamed, "mine") == card.own_results(results, "mine")
    other = json.loads(json.dumps(results).replace("mine", "other"))  # the only learned one
    assert card.own_results(other, "mine") == card.own_results(results, "mine")


def test_results_of_another_rule_are_refused(results):
    two = {**results, "summary": [*results["summary"], {**results["summary"][0], "contender": "x", "baseline": False}]}
    with pytest.raises(ConfigError, match=r"no rule 'nonesuch'; it has .*mine"):
        card.own_results(two, "nonesuch")
    with pytest.raises(ConfigError, match="earlier version"):
        card.own_results({"about": ABOUT, "figures": []}, "mine")
    with pytest.raises(ConfigError, match="this one is on workloads"):
        card.own_results({"about": ABOUT, "summary": [{"optimizer": "mine"}], "figures": []}, "mine")


def test_no_target_lies_below_adams_validation_loss():
    adam = made("t", "adam", 0.01)._replace(valid=np.full(3, 0.5))
    deeper = made("t", "deeper", 1e-6, faster=2.0)._replace(valid=np.full(3, 1.0))
    figures = figures_of([adam, deeper])
    assert comparison.floor_of(adam) == 0.5
    assert figures["t", "deeper"]["progress"] == 1.0
    assert figures["t", "deeper"]["valid_ratio"] == 2.0
    # from 2 down to 0.5, twice as fast: not to Adam's own 0.01
    assert figures["t", "deeper"]["speed_up"] == pytest.approx(2.0, rel=0.1)
    assert figures["t", "adam"]["speed_up"] == 1.0
    (overall,) = [row for row in comparison.summary([adam, deeper]) if row["contender"] == "deeper"]
    assert overall["valid"] == 2.0


def test_who_diverged_on_one_task_has_no_mean_over_all():
    adam = [made(task, "adam", 0.01)._replace(valid=np.full(3, 0.5)) for task in "tu"]
    other = [made(task, "other", 0.01)._replace(valid=np.full(3, v)) for task, v in (("t", 0.4), ("u", np.nan))]
    found = {row["contender"]: row["valid"] for row in comparison.summary([*adam, *other])}
    assert found == {"adam": 1.0, "other": None}


def test_synthetic_functions_have_no_floor_and_no_validation():
    adam = made("t", "adam", 0.01)._replace(has_data=False)
    assert comparison.floor_of(adam) == -np.inf
    assert figures_of([adam])["t", "adam"]["valid_ratio"] is None
    assert comparison.floor_of(adam._replace(has_data=True, valid=np.full(3, np.nan))) == -np.inf
