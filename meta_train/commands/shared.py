"""What several commands share: devices, the cache of compiled programs, JSON."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from learned_opt.kinds import KNOWN
from tasks.data import DataError, data_dir

from .. import xla_flags
from ..errors import UsageError

_COMPILED = 1 << 30  # bytes of compiled programs that are kept, the latest used


def use(rule: str, folder: Path) -> str:
    """The call that loads a saved rule."""
    return KNOWN[rule].use.format(str(folder))


def pairs(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The names and values of ``--set KEY=VALUE``."""
    for text in texts:
        name, found, value = text.partition("=")
        if not found:
            raise UsageError(f"--set takes KEY=VALUE, not {text!r}")
        yield name.strip(), value.strip()


def read_json(path: Path) -> Any:
    """The contents of a JSON file."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None


def use_cores(devices: int | None, particles: int | None = None) -> None:
    """One CPU device a core, the most that divide the particles: XLA leaves cores idle otherwise."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") and devices is None:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if devices is not None and devices < 1:
        raise UsageError(f"--devices must be at least 1, not {devices}")
    number = devices or max(n for n in range(1, cores + 1) if (particles or cores) % n == 0)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads would fight the devices' for the cores
    if number >= cores:
        xla_flags.one_thread_a_device()
    jax.config.update("jax_num_cpu_devices", number)


def cache(name: str, own: Path | None = None) -> Path:
    """The user's own folder, or one in that of the data sets; made if missing.

    Raises:
        DataError: it cannot be made.
    """
    folder = own or data_dir() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "name another folder" if own else "set LEARNED_OPT_DATA to another folder"
        raise DataError(f"cannot make {folder} ({error.strerror}): {remedy}") from None
    return folder


def keep_compiled() -> None:
    """What one command has compiled, the next one reads: most of the time before a run's first step."""
    if jax.config.values["jax_compilation_cache_dir"] is None:  # JAX_COMPILATION_CACHE_DIR says where
        try:
            folder = cache("compiled")
        except DataError as error:
            print(f"learned-opt: what is compiled is not kept: {error}", file=sys.stderr)
            return
        jax.config.update("jax_compilation_cache_max_size", _COMPILED)
        jax.config.update("jax_compilation_cache_dir", str(folder))


def print_json(value: Any) -> None:
    """Prints a result as JSON."""
    print(json.dumps(value, indent=1, default=str))
