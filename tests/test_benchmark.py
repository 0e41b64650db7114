"""The benchmark's figures against runs by hand and closed forms."""

import dataclasses
import io

import jax
import numpy as np
import optax
import pytest
from PIL import Image
from rich.console import Console

from meta_train import benchmark, card, report
from meta_train.benchmark import Contender, Result
from meta_train.config import Config
from meta_train.trainer import make_mesh
from tasks.suites import Entry
from tasks.synthetic import quadratic

FAMILY = quadratic(dim=3, condition=(1.0, 10.0))
ENTRY = Entry("quadratic", "quadratic", "quadratic 1-10", lambda: FAMILY)
STEPS, SEEDS = 30, 3


def by_hand(transform, seed):
    k_cfg, k_init, k_train, _ = jax.random.split(jax.random.PRNGKey(seed), 4)
    task = FAMILY.task(FAMILY.data, FAMILY.sample(k_cfg))
    params = task.init(k_init)
    state, losses = transform.init(params), []
    for key in jax.random.split(k_train, STEPS):
        k_batch, k_loss = jax.random.split(key)
        batch = task.batch(k_batch, "train")
        loss, grads = jax.value_and_grad(lambda p, k=k_loss, b=batch: task.loss(p, k, b)[0])(params)
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return losses


@pytest.fixture(scope="module")
def results():
    contender = Contender(
        "sgd", lambda rate, num_steps: optax.sgd(rate), (1e-3, 0.3, 100.0), default=1e-3, baseline=True
    )
    adam = Contender("adam", lambda rate, num_steps: optax.adam(rate), (1e-2, 1e-1), baseline=True)
    shown = []
    found = benchmark.run_suite(
        [ENTRY], [adam, contender], steps=STEPS, seeds=SEEDS, tuning_seeds=2, show=lambda *told: shown.append(told)
    )
    assert [done for done, *_ in shown] == [0, 1, 2]
    return {result.contender: result for result in found}


def test_a_run_is_what_optax_does_by_hand(results):
    losses = np.mean([by_hand(optax.sgd(0.3), 2_000_000 + seed) for seed in range(SEEDS)], axis=0)
    np.testing.assert_allclose(results["sgd"].curve, benchmark.smooth(losses), rtol=1e-4)
    np.testing.assert_allclose(results["sgd"].initial, losses[0], rtol=1e-5)


def test_the_grid_is_searched_and_the_default_is_kept(results):
    assert results["sgd"].learning_rate == 0.3
    assert not results["sgd"].on_edge
    assert results["sgd@0.001"].learning_rate == 1e-3
    assert results["sgd@0.001"].final.mean() > results["sgd"].final.mean()
    assert results["adam"].on_edge


def test_a_diverging_rate_is_never_chosen_and_is_counted():
    wild = Contender("wild", lambda rate, num_steps: optax.sgd(rate), (100.0, 300.0))
    (result,) = benchmark.run_task(ENTRY, wild, steps=STEPS, seeds=SEEDS, tuning_seeds=1, mesh=make_mesh())
    assert result.diverged == SEEDS


def test_smooth_is_a_trailing_mean():
    curve = np.arange(200.0)
    smoothed = benchmark.smooth(curve)
    assert smoothed[0] == 0
    np.testing.assert_allclose(smoothed[10], (7 + 8 + 9 + 10) / 4)  # a fiftieth of 200
    np.testing.assert_allclose(smoothed[2], 1.0)


def test_speed_up():
    reference = np.linspace(1.0, 0.0, 101)
    assert benchmark.speed_up(reference, reference) == 1.0
    twice = np.maximum(1 - 2 * np.linspace(0.0, 1.0, 101), -1)
    assert benchmark.speed_up(twice, reference) == pytest.approx(101 / 51)
    assert benchmark.speed_up(reference + 0.01, reference) == 0.0
    assert benchmark.speed_up(np.full(101, np.nan), reference) == 0.0


def made(task, contender, final, baseline=True, curve=None):
    curve = np.linspace(2.0, final, 50) if curve is None else curve
    ends = np.full(3, final)
    return Result(task, contender, baseline, 1e-3, False, curve, 2.0, ends, ends, 0)


MADE = [
    made("easy", "adam", 1.0),
    made("easy", "mine", 0.5, baseline=False),
    made("hard", "adam", 1.0),
    made("hard", "mine", 1.5, baseline=False),
    made("wild", "adam", 1.0),
    made("wild", "mine", np.nan, baseline=False),
]


def test_progress_and_the_losing_tasks_first():
    figures = report.rows(MADE)
    assert [row["task"] for row in figures] == ["wild", "wild", "hard", "hard", "easy", "easy"]
    progress = {(row["task"], row["contender"]): row["progress"] for row in figures}
    assert progress["easy", "mine"] == 1.5
    assert progress["hard", "mine"] == 0.5
    assert progress["wild", "mine"] is None


def test_the_table_fits_eighty_columns():
    console = Console(width=80, file=io.StringIO())
    console.print(report.table(report.rows(MADE), "a title"))
    shown = console.file.getvalue()
    assert "diverged" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_files(tmp_path):
    report.write(tmp_path / "out", MADE, {"suite": "s"})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["curves.png", "results.csv", "results.json"]
    image = Image.open(tmp_path / "out" / "curves.png")
    assert image.width > 800
    image.close()


def test_the_card_tells_where_the_rule_loses():
    record = {
        "rule": "celo2",
        "theta": {"w": {"shape": [2, 3]}},
        "config": dataclasses.asdict(Config()),
        "learning_rate": 1e-3,
    }
    held_out = {"about": {"suite": "s", "steps": 50, "seeds": 3}, "figures": report.rows(MADE)}
    text = card.text("mine", record, held_out)
    assert "6 meta-parameters" in text
    assert "- hard, as mine: 0.500" in text
    assert "- wild, as mine: diverged" in text
    assert "- easy" not in text
    assert "No benchmark was run" in card.text("mine", record, None)
