"""``learned-opt bench`` on workloads, from the command line to the files."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from support import ROOT

from meta_train import cli
from meta_train.bench import user_code
from meta_train.bench.workloads import command
from meta_train.commands import shared
from meta_train.errors import UserError
from tasks import Workload


def bench(tmp_path, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LEARNED_OPT_DATA": str(tmp_path / "data")}
    line = [sys.executable, "-m", "meta_train.cli", "bench", *map(str, arguments), "--devices", "1"]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=600, cwd=tmp_path)


OWN = """
import jax.numpy as jnp, jax
from tasks import Task, Workload

def make():
    task = Task(
        lambda key: {"w": jax.random.normal(key, (4, 3)), "b": jnp.zeros((1, 3))},
        lambda key, split: jax.random.normal(key, (8, 4)),
        lambda params, key, x: (jnp.mean((x @ params["w"] + params["b"] - x[:, :3]) ** 2), {}),
    )
    return Workload(lambda: task, steps=20, every=10, target=0.5)

def bad():
    return Workload(lambda: 3, steps=20)

def none():
    return Workload(make, steps=0)

def lost():
    task = Task(lambda key: 0.01 * jnp.ones(3), lambda key, split: (), lambda w, key, x: (jnp.mean(jnp.sqrt(w)), {}))
    return Workload(lambda: task, steps=20)

def below():
    task = Task(lambda key: jnp.ones(3), lambda key, split: (), lambda w, key, x: (jnp.mean(w**2) - 100, {}))
    return Workload(lambda: task, steps=20)
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


@pytest.fixture
def mistake(tmp_path, monkeypatch, capsys):
    """A function from arguments of ``bench`` to what it says on stderr as it ends with exit code 2, in this process."""

    def said(*arguments):
        monkeypatch.setattr(shared, "use_cores", lambda *_: None)  # this process has chosen its devices
        monkeypatch.setenv("LEARNED_OPT_DATA", str(tmp_path / "data"))
        monkeypatch.chdir(tmp_path)
        try:
            code = cli.main(["bench", *map(str, arguments)])
        except SystemExit as ended:
            code = ended.code
        assert code == 2
        return capsys.readouterr().err

    return said


def test_a_users_workload_from_nothing_and_again_from_what_is_kept(tmp_path, own):
    arguments = ("adafac-mlp", "--task", f"{own}:make", "--baselines", "adamw")
    out = tmp_path / "out"
    nothing = bench(tmp_path, *arguments, "--out", out, "--finished")
    assert nothing.returncode == 2
    assert nothing.stderr.strip().splitlines()[-1].startswith("learned-opt: nothing is finished yet")
    assert not out.exists()
    done = bench(tmp_path, *arguments, "--out", out, "--ruleset", "tuned", "--trials", "2", "--seeds", "2", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {row["optimizer"] for row in document["summary"]} == {"nadamw", "adamw", "adafac-mlp"}
    row = next(row for row in document["figures"] if row["optimizer"] == "nadamw")
    assert row["target"] == 0.5
    assert row["trials"] >= 2
    assert row["seeds"] == 2
    assert row["milliseconds"] > 0
    assert (out / "report.html").is_file()
    kept, other = tmp_path / "kept", tmp_path / "another machine"
    other.mkdir()
    shutil.copytree(tmp_path / "data" / "bench", kept)
    again = ("--out", tmp_path / "b", "--ruleset", "tuned", "--trials", "2", "--seeds", "2", "--runs", kept)
    again = bench(other, *arguments, *again)
    assert again.returncode == 0, again.stderr
    assert "step" not in again.stderr
    figures = json.loads((tmp_path / "b" / "results.json").read_text())["figures"]
    assert figures == document["figures"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--suite", "workloads_small", "--ruleset", "guessed"), "guessed"),
        (("--suite", "workloads_small", "--baselines", "nonsense"), "nonsense"),
        (("--suite", "workloads_small", "--steps", "5"), "--steps"),
        (("--suite", "workloads_small", "--seeds", "0"), "--seeds must be at least 1"),
        (("--suite", "workloads_small", "--trials", "0"), "--trials must be at least 1"),
        (("--suite", "workloads_small", "--trials", "3"), "--trials is for --ruleset tuned"),
        (("outer", "--suite", "workloads_small"), "outer is an outer step of local SGD"),
        (("outer", "--quick"), "outer is an outer step of local SGD"),
        (("--suite", "quick", "--ruleset", "tuned"), "--ruleset"),
        (("--suite", "workloads_small", "--baselines", "muon"), "data fetch moby_dick"),
        (("--suite", "workloads_small", "--baselines", "muon", "--runs", __file__), "name another folder"),
    ],
)
def test_mistakes_are_one_line(arguments, said, mistake):
    said_by_it = mistake("adafac-mlp", *arguments)
    line = said_by_it.strip().splitlines()[-1]
    assert line.startswith("learned-opt: ")
    assert said in line
    assert "Traceback" not in said_by_it


def test_workloads_and_tasks_are_not_mixed(own, mistake):
    assert "one after the other" in mistake("adafac-mlp", "--task", f"{own}:make", "--suite", "quick")


def test_a_users_workload_is_checked(own):
    assert isinstance(user_code.task(f"{own}:make"), Workload)
    assert user_code.task(f"{own}:make").name == "own"
    for function in ("bad", "none"):
        with pytest.raises(UserError, match=function):
            user_code.task(f"{own}:{function}")


def test_a_workload_on_which_the_reference_diverges_is_one_line(own, mistake):
    line = mistake("--task", f"{own}:lost", "--baselines", "nadamw").strip().splitlines()[-1]
    assert "nadamw, the reference, diverged on own" in line


def test_the_other_workloads_are_reported_where_the_reference_diverges_on_one(own, mistake, tmp_path, capsys):
    mistake("--task", f"{own}:lost", "--baselines", "nadamw")  # for its environment
    own_and_lost = ["--task", f"{own}:make", "--task", f"{own}:lost"]
    assert cli.main(["bench", "adafac-mlp", *own_and_lost, "--baselines", "nadamw", "--out", "out", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {row["workload"] for row in document["figures"]} == {"own"}
    assert "nadamw, the reference, diverged on own:lost" in document["about"]["incomplete"]


def test_losses_that_have_no_ratio_are_one_line(own, mistake):
    line = mistake("--task", f"{own}:below", "--baselines", "nadamw").strip().splitlines()[-1]
    assert "must be above 0" in line


def test_a_baseline_of_a_missing_package_is_refused_before_anything_runs(own, mistake, monkeypatch):
    monkeypatch.setitem(sys.modules, "rollfast.optim.psgd", None)
    said = mistake("adafac-mlp", "--task", f"{own}:make", "--baselines", "kron")
    assert said.strip().splitlines() == ["learned-opt: the baseline kron needs rollfast: pip install rollfast"]


def test_a_users_optimizer_takes_part(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import optax\n\ndef make(learning_rate=0.1):\n    return optax.sgd(learning_rate)\n")
    chosen = command.choose_optimizers(["adamw"], [], [f"{path}:make"])
    assert [optimizer.name for optimizer in chosen] == ["nadamw", "adamw", "mine"]
    assert chosen[-1].setting == {"learning_rate": 0.1}


def test_the_example_is_a_workload_of_at_most_thirty_lines():
    path = ROOT / "examples" / "my_workload.py"
    assert isinstance(user_code.task(f"{path}:make"), Workload)
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    assert len(lines) <= 22
