"""Who may import whom; what comes in with `import learned_opt`; what the wheel holds."""

import ast
import os
import runpy
import subprocess
import sys
import venv
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from support import ROOT

import learned_opt

PACKAGES = ("learned_opt", "tasks", "meta_train")
ALLOWED = {"learned_opt": {"learned_opt"}, "tasks": {"tasks"}, "meta_train": set(PACKAGES)}


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports absolutely."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_who_imports_whom(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        foreign = imported(path) & set(PACKAGES) - ALLOWED[package]
        assert not foreign, f"{path} imports {foreign}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules of ours that a file imports when it is imported itself: what stands inside functions comes later."""
    name, found = module_name(path), set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    inside = {node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if node in inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return (found & known) - {name}


def test_no_import_cycle():
    """A package counts as importing what its ``__init__`` imports."""
    paths = {module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    graph = {name: imports(path, set(paths)) for name, path in paths.items()}
    graph["learned_opt.rules.scheduler"].discard("learned_opt.rules")  # the rule over rules: it reads the registry late
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the cycle


def test_no_test_imports_a_test():
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(part.startswith("test_") for name in names for part in name.split(".")), path


def test_nothing_is_ever_unpickled():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert not imported(path) & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}, path
            assert "allow_pickle=True" not in path.read_text(), path


def test_importing_the_package_is_light():
    heavy = ("haiku", "chex", "flax", "orbax", "matplotlib", "sklearn", "rich", "tensorflow", "tensorflow_datasets")
    code = f"import sys, learned_opt; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_public_names_are_there():
    promised = {"load", "load_rule", "save", "available", "from_reference", "local_sgd", "schedules", "RULES"}
    assert promised <= set(learned_opt.__all__)
    for name in learned_opt.__all__:
        assert getattr(learned_opt, name) is not None
    assert callable(learned_opt.local_sgd.local_sgd)  # the package, not the function of its name
    assert callable(learned_opt.local_sgd.map_workers)


def test_every_report_is_listed_with_what_makes_it_again():
    reports = runpy.run_path(str(ROOT / "scripts" / "reports.py"))["REPORTS"]
    folders = {path.name for path in (ROOT / "reports").iterdir() if path.is_dir()}
    assert set(reports) == folders, "list it in scripts/reports.py, then `python scripts/reports.py --index`"
    index = (ROOT / "reports" / "README.md").read_text()
    for name, report in reports.items():
        assert f"| [{name}]({name}) | {report.claims} |" in index
        for command in report.commands:
            assert command in index
            script = next((word for word in command.split() if word.endswith(".py")), "scripts/reports.py")
            assert (ROOT / script).is_file(), command


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, installed without its dependencies in an environment that sees those of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True, timeout=300)
    # Our environment's packages, but not the checkout: an editable install is a .pth file, which PYTHONPATH ignores.
    path = os.pathsep.join(entry for entry in sys.path if entry.endswith("site-packages"))
    return wheel, python, {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}


def test_the_wheel_holds_the_packages_the_data_and_the_pretrained_rules(installed):
    names = zipfile.ZipFile(installed[0]).namelist()
    for rule in (ROOT / "pretrained").glob("*/rule.json"):
        for file in ("rule.json", "weights.safetensors", "README.md"):
            assert f"learned_opt/pretrained/{rule.parent.name}/{file}" in names
    assert any(name.startswith("tasks/data/embedded/") for name in names)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert {f"meta_train/bench/report/{file}" for file in ("report.html.j2", "style.css")} <= set(names)
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in names)


def test_every_pretrained_rule_loads_outside_the_checkout(installed, tmp_path):
    code = """
import pathlib, jax.numpy as jnp, learned_opt
print(pathlib.Path(learned_opt.__file__).parent)
for name in learned_opt.available():
    optimizer = learned_opt.load(name, num_steps=10)
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    updates, _ = optimizer.update(params, optimizer.init(params), params, value=jnp.ones(()))
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in updates.values()), name
    print(name)
"""
    _, python, environment = installed
    found = subprocess.run([python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    where, *names = found.stdout.split()
    assert not Path(where).is_relative_to(ROOT)
    assert tuple(names) == learned_opt.available()
    assert names
