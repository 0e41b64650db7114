"""A user's own task and optimizer in the benchmark: the example files, and every mistake told in one line."""

import csv
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorboardX  # noqa: F401  (imported here: its deprecation warnings are not the command line's)
from support import ROOT

from meta_train import cli
from meta_train.bench import user_code
from meta_train.bench.contenders import GRID, around
from meta_train.commands import shared

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(shared, "use_cores", lambda *_: None)
    monkeypatch.setenv("LEARNED_OPT_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


def write(text, name="mine.py"):
    Path(name).write_text("import jax, jax.numpy as jnp, optax\nfrom tasks import Task, TaskFamily\n" + text)
    return f"{name}:make"


def test_the_examples_meet(capsys):
    task, optimizer = f"{EXAMPLES / 'my_task.py'}:make", f"{EXAMPLES / 'my_optimizer.py'}:make"
    command = [
        "bench",
        "--task",
        task,
        "--optimizer",
        optimizer,
        "--baselines",
        "adam",
        "--steps",
        "40",
        "--seeds",
        "2",
    ]
    assert cli.main([*command, "--out", "out", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["task"] for row in result["figures"]} == {"my_task"}
    found = {row["contender"]: row for row in result["figures"]}
    assert list(found) == ["adam", "adam@0.001", "my_optimizer", "my_optimizer@0.001"]
    assert not found["my_optimizer"]["baseline"]
    assert found["my_optimizer"]["milliseconds"] > 0
    assert found["my_optimizer"]["final_loss"] < found["my_optimizer"]["initial_loss"]
    with Path("out/results.csv").open() as file:
        assert [row["contender"] for row in csv.DictReader(file)] == list(found)
    page = Path("out/report.html").read_text()
    assert "my_optimizer" in page
    assert result["about"]["manifest"] is None
    assert any(Path("data/bench").iterdir())


def test_a_task_that_draws_nothing():
    spec = write(
        "def make():\n"
        "    return Task(lambda key: {'x': jnp.ones(3)}, lambda key, split: {},\n"
        "                lambda params, key, batch: (jnp.sum(params['x'] ** 2), {}))\n"
    )
    entry = user_code.task(spec)
    assert entry.name == "mine"
    family = entry.make()
    task = family.task(family.data, family.sample(jax.random.key(0)))
    assert float(task.loss(task.init(jax.random.key(0)), None, {})[0]) == 3.0


@pytest.mark.parametrize(
    ("parameters", "grid", "default"),
    [
        ("learning_rate=0.1", around(0.1), 0.1),
        ("learning_rate", GRID, None),
        ("learning_rate, num_steps", GRID, None),
        ("num_steps=None", (), None),
        ("", (), None),
    ],
)
def test_an_optimizers_parameters_say_how_it_is_tuned(parameters, grid, default):
    rate = "learning_rate" if "learning_rate" in parameters else "0.1"
    contender = user_code.optimizer(write(f"def make({parameters}):\n    return optax.sgd({rate})\n"))
    assert (contender.name, contender.grid, contender.default, contender.baseline) == ("mine", grid, default, False)
    transform = contender.make(0.25, 10)
    updates, _ = transform.update({"w": jnp.ones(2)}, transform.init({"w": jnp.ones(2)}))
    np.testing.assert_allclose(updates["w"], -0.25 if "learning_rate" in parameters else -0.1)


def test_another_function_gives_another_name():
    write("def make():\n    return optax.sgd(0.1)\ndef faster():\n    return optax.sgd(1.0)\n")
    assert user_code.optimizer("mine.py:faster").name == "mine:faster"


TASK, OPTIMIZER = "--task", "--optimizer"


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        (TASK, None, "there is no file mine.py"),
        (TASK, "def other(): pass", "has no function make"),
        (TASK, "def make(:", "SyntaxError"),
        (TASK, "import nonesuch", "mine.py:make, line 3: ModuleNotFoundError: No module named 'nonesuch'"),
        (TASK, "def make():\n    return 1 / 0", "mine.py:make, line 4: ZeroDivisionError"),
        (TASK, "def make(): return 3", "returned int, not a tasks.Task"),
        (TASK, "def make(): return Task(lambda k: {'x': jnp.ones(2)}, lambda k, s: {}, lambda p, k, b: (p['x'], {}))",
         "the loss is float32[2], not a float scalar"),
        (TASK, "def make(): return Task(lambda k: {'x': jnp.ones(2)}, lambda k, s: {}, lambda p, k, b: (p['y'], {}))",
         "KeyError: 'y'"),
        (TASK, "def make(): return Task(lambda k: {'x': jnp.ones(2)}, lambda k, s: {}, lambda p, k, b: p['x'].sum())",
         "the loss function returns the loss and a dict, as in `return loss, {}`"),
        (TASK, "def make(): return Task(lambda k: jnp.ones(2, int), lambda *_: {}, lambda p, *_: (1.0 * p.sum(), {}))",
         "TypeError: grad requires real- or complex-valued inputs"),
        (OPTIMIZER, None, "there is no file mine.py"),
        (OPTIMIZER, "def make(momentum): return optax.sgd(0.1)", "its parameter 'momentum' is none of learning_rate"),
        (OPTIMIZER, "def make(learning_rate): return optax.sgd", "returned function, not an Optax transform"),
        (OPTIMIZER, "def make(learning_rate): return optax.sgd(float(learning_rate))", "3: ConcretizationTypeError"),
        (OPTIMIZER, "def make(learning_rate=-1.0): return optax.sgd(learning_rate)", "is a positive number, not -1.0"),
        (OPTIMIZER, "def make(num_steps):\n    assert num_steps != 5\n    return optax.sgd(0.1)", "line 4: Ass"),
        (OPTIMIZER, "def make(): return optax.GradientTransformation(lambda p: 0, lambda g, s, p=None: (g, s + 0.5))",
         "an update changes the structure, shapes or dtypes of the state"),
        (OPTIMIZER, "def make(): return optax.masked(optax.sgd(0.1), {'nonesuch': True})", "mine.py:make"),
    ],
)  # fmt: skip
def test_mistakes(option, text, message, capsys):
    if text is not None:
        write(text + "\n")
    assert cli.main(["bench", option, "mine.py:make", "--steps", "5", "--out", "out"]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert len(told.splitlines()) == 1
    assert told.startswith("learned-opt: ")
    assert not Path("out").exists()


def test_an_optimizer_is_tried_on_the_task_that_it_is_for():
    spec = write("def make(): return optax.multi_transform({'a': optax.sgd(0.1)}, {'x': 'a'})\n")
    with pytest.raises(user_code.UserCodeError):
        user_code.optimizer(spec)
    assert user_code.optimizer(spec, params={"x": jax.ShapeDtypeStruct((2,), jnp.float32)}).name == "mine"


@pytest.mark.parametrize("target", ["'low'", "float('nan')"])
def test_a_workload_s_target_is_a_number(target):
    spec = write(f"from tasks import Workload\ndef make(): return Workload(None, 2, target={target})\n")
    with pytest.raises(user_code.UserCodeError, match="target is a finite number or None"):
        user_code.task(spec)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "mine.py"], "give a file and a function in it"),
        (["--task", "mine.py:make", "--task", "mine.py:make"], "two tasks are called 'mine'"),
        (["--optimizer", "mine.py:adam"], "mine.py has no function adam"),
        (["--baselines", "adam,nonesuch"], "unknown baseline 'nonesuch'; baselines: adam, sgdm"),
    ],
)
def test_other_mistakes(arguments, message, capsys):
    write(
        "def make():\n"
        "    return Task(lambda key: jnp.ones(3), lambda key, split: {}, lambda p, key, batch: (p.sum(), {}))\n"
    )
    assert cli.main(["bench", *arguments, "--out", "out"]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert len(told.splitlines()) == 1
