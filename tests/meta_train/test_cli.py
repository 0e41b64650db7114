"""The command line: the whole path on a small suite, and every mistake one line on stderr with exit code 2."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorboardX  # noqa: F401  (imported here: its deprecation warnings are not the command line's)
from support import ROOT
from support.claims import held

import learned_opt
from meta_train import cli, xla_flags
from meta_train.commands import shared
from meta_train.train import config as configs
from tasks import suites
from tasks.families.synthetic import quadratic, rosenbrock


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Suites of one tiny task, the devices that the tests have already, and a folder to work in."""
    train = suites.Entry("quadratic", "quadratic", "quadratic 1-10", lambda: quadratic(dim=3, condition=(1.0, 10.0)))
    held_out = (
        suites.Entry("steeper", "quadratic", "quadratic 20-30", lambda: quadratic(dim=3, condition=(20.0, 30.0))),
        suites.Entry("rosenbrock", "rosenbrock", "rosenbrock", lambda: rosenbrock(dim=2)),
    )
    monkeypatch.setitem(suites.TRAIN, "small", (train,))
    monkeypatch.setitem(suites.HELD_OUT, "small", held_out)
    monkeypatch.setattr(shared, "use_cores", lambda *_: None)
    monkeypatch.setenv("LEARNED_OPT_DATA", str(tmp_path / "no-data"))
    monkeypatch.chdir(tmp_path)


RUN = ["train", "--rule", "adam", "--suite", "small", "--particles", "8", "--unroll", "5", "--meta-steps", "4"]
for setting in ("bench_suite=small", "bench_steps=20", "bench_seeds=2", "min_length=10", "log_every=2"):
    RUN += ["--set", setting]


def test_train_export_info_bench(capsys):
    assert cli.main([*RUN, "--workdir", "run"]) == 0
    shown = capsys.readouterr().out
    assert "steeper" in shown
    assert "score" in shown
    for name in ("report.html", "results.csv", "results.json", "curves.png"):
        assert (Path("run/bench") / name).stat().st_size > 100

    assert cli.main(["export", "run", "mine", "--to", "kept"]) == 0
    record = learned_opt.store.read_record("kept/mine")
    assert record["config"]["meta_steps"] == 4
    assert {row["task"] for row in record["held_out"]["figures"]} == {"steeper", "rosenbrock"}
    card = Path("kept/mine/README.md").read_text()
    assert "# mine" in card
    assert "| steeper |" in card
    trained, exported = (learned_opt.load_rule(path)[1] for path in ("run/rule", "kept/mine"))
    jax.tree.map(np.testing.assert_array_equal, trained, exported)

    capsys.readouterr()
    assert cli.main(["info", "kept/mine", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["rule"] == "adam"
    assert cli.main(["info", "celo2"]) == 0
    assert "347" in capsys.readouterr().out

    command = ["bench", "kept/mine", "--suite", "small", "--steps", "20", "--seeds", "2", "--out", "b", "--json"]
    command += ["--baselines", "adamw-cosine"]
    assert cli.main(command) == 0
    result = json.loads(capsys.readouterr().out)
    by_name = {(row["task"], row["contender"]): row for row in result["figures"]}
    assert by_name["steeper", "adam"]["progress"] == 1.0
    assert by_name["steeper", "adam"]["speed_up"] == 1.0
    assert by_name["steeper", "mine"]["baseline"] is False
    assert (Path("b") / "results.csv").read_text().count("\n") == len(result["figures"]) + 1


def test_list(capsys):
    assert cli.main(["list", "--json"]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert set(everything["rules"]) == set(learned_opt.RULES)
    assert "pes" in everything["estimators"]
    assert "small" in everything["suites"]["train"]
    assert cli.main(["list", "presets"]) == 0
    assert capsys.readouterr().out == "presets: quick, cpu, accelerator, unsupervised\n"


@pytest.mark.parametrize(
    "command", [["list"], ["list", "--json"], ["info", "celo2"], ["--version"], ["bench", "--help"]], ids=" ".join
)
def test_a_full_disk_behind_the_output(command, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "meta_train.cli", *command],
            stdout=full, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=120, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "learned-opt: cannot write: No space left on device\n")


def test_a_reader_that_leaves_is_no_mistake():
    command = f"{sys.executable} -m meta_train.cli list | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "command", [["data", "list"], ["data", "path"], ["data", "fetch", "mnist"], ["bench"]], ids=str
)
def test_without_a_home_folder(command, capsys, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    for name in ("LEARNED_OPT_DATA", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(command) == 2
    assert "set LEARNED_OPT_DATA" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_of_data_that_cannot_be_made(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LEARNED_OPT_DATA", str(tmp_path / "file" / "data"))
    assert cli.main(["bench", "--suite", "small"]) == 2
    assert "set LEARNED_OPT_DATA to another folder" in capsys.readouterr().err.splitlines()[-1]


def test_data(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LEARNED_OPT_DATA", str(tmp_path / "data"))
    assert cli.main(["data", "list"]) == 0
    assert "fashion_mnist_small" in capsys.readouterr().out
    assert cli.main(["data", "path"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "data")
    assert cli.main(["data", "path", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / "data")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*RUN, "--rule", "nonesuch"], "unknown rule 'nonesuch'"),
        ([*RUN, "--suite", "nonesuch"], "unknown training suite 'nonesuch'"),
        ([*RUN, "--estimator", "nonesuch"], "unknown estimator 'nonesuch'"),
        ([*RUN, "--particles", "0"], "particles must be positive"),
        ([*RUN, "--seed", "4294967296"], "seed must be within 0 to 4294967295, not 4294967296"),
        ([*RUN, "--seed", "-1"], "seed must be within 0 to 4294967295, not -1"),
        ([*RUN, "--set", "seed=4294967296"], "seed must be within"),
        (["tune", "char-lstm", "--seed", "4294967296"], "seed must be within"),
        ([*RUN, "--num-processes", "0"], "--num-processes must be at least 1, not 0"),
        ([*RUN, "--num-processes", "2", "--process-id", "2"], "--process-id must be within 0 to 1, not 2"),
        ([*RUN, "--process-id", "-1"], "--process-id must be within 0"),
        ([*RUN, "--coordinator", "localhost", "--num-processes", "1", "--process-id", "0"], "takes HOST:PORT"),
        ([*RUN, "--distributed", "--coordinator", "localhost:port"], "takes HOST:PORT"),
        ([*RUN, "--coordinator", ":123456"], "takes HOST:PORT"),
        ([*RUN, "--num-processes", "1", "--workdir", "a"], "cannot join the other processes"),
        ([*RUN, "--num-processes", "1"], "name it by --workdir"),
        ([*RUN, "--particles", "3"], "multiple of the number of devices"),
        ([*RUN, "--set", "nonesuch=1"], "unknown field 'nonesuch'"),
        ([*RUN, "--set", "sigma=much"], "sigma must be float or int"),
        ([*RUN, "--set", "sigma"], "KEY=VALUE"),
        ([*RUN, "--set", 'local_optimizers={"sgd": [0.5, 0.1]}'], "sgd must have two positive numbers in order"),
        ([*RUN, "--set", 'local_optimizers={"muon": [1, "x"]}'], "muon must have two positive numbers in order"),
        (
            [*RUN, "--set", 'local_optimizers={"lion": [0.1, 1]}'],
            "local_optimizers must have some of adamw, flagship, muon, sgd",
        ),
        ([*RUN, "--set", "bench_suite=nonesuch"], "unknown held-out suite"),
        ([*RUN, "--set", "bench_suite=fetched_small"], "learned-opt data fetch"),
        ([*RUN, "--rule", "outer"], "'outer' is no optimizer, so there is nothing to benchmark"),
        (["train", "--preset", "nonesuch"], "unknown preset 'nonesuch'"),
        (["train", "--resume"], "--resume needs --workdir"),
        (["train", "--resume", "--workdir", "nothing"], "cannot read nothing/config.json"),
        (["export", "nothing", "x"], "holds no rule"),
        (["info", "nonesuch"], "nonesuch"),
        (["bench", "nonesuch"], "no pretrained rule or folder named 'nonesuch'"),
        (["bench", "--suite", "nonesuch"], "unknown held-out suite 'nonesuch'"),
        (["bench", "--suite", "fetched"], "learned-opt data fetch mnist"),
        (["bench", "--suite", "workloads_test"], "learned-opt data fetch sqlite"),
        (["bench", "--steps", "0"], "--steps must be at least 1"),
        (["data", "fetch"], "name the data set"),
        (["data", "fetch", "nonesuch"], "nonesuch"),
        (["data", "fetch", "mnist", "--from", "nowhere"], "nowhere"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    line = shown.err.strip().splitlines()[-1]
    assert line.startswith("learned-opt: ")
    assert "Traceback" not in shown.err
    assert not Path("runs").exists() or not any(Path("runs").iterdir())


@pytest.mark.parametrize(
    "flags", [["--coordinator", "localhost:9876"], ["--num-processes", "2"], ["--process-id", "0"], ["--distributed"]]
)
def test_any_flag_of_several_processes_means_several(flags, monkeypatch, capsys):
    def initialize(*arguments):
        raise RuntimeError(str(arguments))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert cli.main([*RUN, *flags, "--workdir", "a"]) == 2
    assert "cannot join the other processes" in capsys.readouterr().err


def test_a_port_in_use(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert cli.main([*RUN, "--coordinator", address, "--num-processes", "2", "--process-id", "0"]) == 2
    assert "is in use on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        [*RUN, "--workdir", "held"],
        ["train", "--resume", "--workdir", "held"],
        ["bench", "--suite", "small", "--steps", "5", "--out", "held"],
        ["tune", "char-lstm", "--out", "held"],
    ],
    ids=["train", "resume", "bench", "tune"],
)
def test_a_folder_that_another_process_holds(command, tmp_path, capsys):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "config.json").write_text(configs.to_json(configs.PRESETS["quick"]))
    with held(tmp_path / "held") as holder:
        assert cli.main(command) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith(f"learned-opt: held is in use by process {holder.pid} on ")


def test_another_runs_folder(capsys):
    assert cli.main([*RUN, "--set", "bench_suite=", "--workdir", "run"]) == 0
    before = sorted(str(path) for path in Path("run").rglob("*"))
    assert cli.main([*RUN, "--workdir", "run"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert sorted(str(path) for path in Path("run").rglob("*")) == before


def run(*arguments, cwd, **more):
    environment = {**os.environ, **more, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_package_is_a_command(tmp_path):
    done = run("-m", "learned_opt", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"learned-opt {learned_opt.__version__}\n"), done.stderr
    done = run("-m", "learned_opt", "info", "nonesuch", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("learned-opt: no pretrained rule or folder named 'nonesuch'")


def test_somebody_elses_tasks_package(tmp_path):
    (tmp_path / "tasks.py").write_text("chores = ['dishes']\n")
    found = run("-c", "import learned_opt; learned_opt.available(); print('fine')", cwd=tmp_path)
    assert found.stdout == "fine\n", found.stderr
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "tasks.py", tmp_path / "elsewhere")
    found = run("-m", "meta_train.cli", "list", cwd=tmp_path / "elsewhere")
    assert found.returncode == 2
    assert "`tasks` that Python finds is not learned-opt's" in found.stderr
    assert found.stderr.count("\n") == 1


def test_without_the_extra_train(tmp_path):
    """The core's dependencies alone: list and info work, the others name the extra."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "for name in ('rich', 'jinja2', 'matplotlib', 'orbax', 'sklearn', 'tensorboardX', 'tensorflow_datasets'):\n"
        "    sys.modules[name] = None\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    call = lambda *more: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "meta_train.cli", *more],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    for command in (["list"], ["info", "celo2"]):
        found = call(*command)
        assert found.returncode == 0, found.stderr
    for command in (["train"], ["bench"]):
        found = call(*command)
        assert found.returncode == 2, found.stderr
        assert "of the extra `train`: pip install 'learned-opt[train]'" in found.stderr
        assert found.stderr.count("\n") == 1


def test_what_one_command_compiled_the_next_reads(tmp_path):
    program = """
import jax, logging
from meta_train.commands import shared
shared.keep_compiled()
logging.basicConfig(level=logging.DEBUG)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: x * 3)(2.0))
"""
    ours = {"LEARNED_OPT_DATA": str(tmp_path / "data")}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION_CACHE", "JAX_PERSISTENT"))}

    def run():
        done = subprocess.run(
            [sys.executable, "-c", program], env=clean | ours, cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout == "6.0\n"
        return "Persistent compilation cache hit" in done.stderr

    assert [run(), run()] == [False, True]
    assert list((tmp_path / "data" / "compiled").iterdir())


@pytest.mark.parametrize(
    ("flags", "cpu", "wanted"),
    [
        ("", "flags : fpu avx512f avx2", "--xla_cpu_prefer_vector_width=512"),
        ("--other", "flags : fpu avx512f", "--other --xla_cpu_prefer_vector_width=512"),
        ("--xla_cpu_prefer_vector_width=128", "flags : avx512f", "--xla_cpu_prefer_vector_width=128"),
        ("--other", "flags : avx2 avx512fp16", "--other"),
        ("--other", None, "--other"),
    ],
)
def test_the_widest_vectors_are_used_where_they_are_there(flags, cpu, wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    if cpu is not None:
        (tmp_path / "cpuinfo").write_text(cpu)
    xla_flags.widest_vectors(tmp_path / "cpuinfo")
    assert os.environ["XLA_FLAGS"] == wanted


@pytest.mark.parametrize("flags", ["", "--xla_disable_hlo_passes=dce"])
def test_the_user_s_choice_of_passes_stands(flags, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    xla_flags.no_softmax_kernels()
    assert os.environ["XLA_FLAGS"] == (flags or "--xla_disable_hlo_passes=triton-softmax-rewriter")
