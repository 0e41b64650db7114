"""What XLA is told of the machine: ``XLA_FLAGS``, to be set before JAX's first use of a device."""

import os
from pathlib import Path


def prefer(name: str, value: str) -> None:
    """Sets one of XLA's flags, unless the user has.

    Args:
        name: without the dashes.
        value: as XLA reads it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{name}={value}".strip()


def one_thread_a_device() -> None:
    """No threads inside single operations: with one device a core they would fight the devices' for the cores."""
    prefer("xla_cpu_multi_thread_eigen", "false")


def no_softmax_kernels() -> None:
    """No search for a softmax, around which a GPU's compiler would make one kernel of all that is near.

    It sees one wherever something is normalised; in an unrolled rule that normalises everywhere it tries for minutes.
    (See :func:`learned_opt.features.fenced` for rules by themselves.)
    """
    prefer("xla_disable_hlo_passes", "triton-softmax-rewriter")


def widest_vectors(cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """The full width of AVX-512 where the processor has it, of which XLA takes half unless told.

    Meta-training of small networks makes a tenth to a fifth more steps a second with it
    (``benchmarks/meta_training.py``, AMD Zen 5).

    Args:
        cpuinfo: where Linux lists what the processor can do; without it nothing is changed.
    """
    if cpuinfo.is_file() and "avx512f" in cpuinfo.read_text().split():
        prefer("xla_cpu_prefer_vector_width", "512")
