"""Who may import whom; what comes in with `import learned_opt`; what the wheel holds."""

import ast
import os
import subprocess
import sys
import venv
import zipfile
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
    for name in promised:
        assert getattr(learned_opt, name) is not None


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
