"""Strict settings for all tests, and eight CPU devices, so that meshes of 1 to 8 are tested in one process."""

import os
import shutil
import tempfile
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation is most of the tests' time: this makes it five times faster, and what one process compiled the others
# need not. The workers and the processes that tests start inherit it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # JAX 0.12 knows the first no more, and ends at a flag that it does not know. A program is compiled in one piece,
    # since the workers use all cores.
    + (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        if metadata.version("jaxlib").startswith("0.10.")
        else ""
    ),
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="learned-opt-tests-")
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": _cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05"}
else:
    _cache = None

import jax
import matplotlib
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
matplotlib.use("Agg")


@pytest.fixture
def accelerate(monkeypatch):
    """A function from whose call on rules are written as for accelerators; they run where they did."""
    return lambda: monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def pytest_unconfigure():
    """The cache goes with the process that made it."""
    if _cache:
        shutil.rmtree(_cache, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Files stay on one worker, which shares what they compile; the contract suite splits by rule."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        rule = f"/{params['rule']}" if "rule" in params and item.path.name == "test_contract.py" else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path}{rule}"))
