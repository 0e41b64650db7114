"""The frozen description of ``workloads_test``: every workload in full, and the hash of it all.

``frozen.json`` was written before anything was run on them; a test recomputes it. To freeze anew, which makes results
before and after incomparable: ``python -m tasks.workloads.manifest``.
"""

import json
from pathlib import Path
from typing import Any

from .. import data
from ..manifest import arguments, digest
from . import SUITES, VALID_BATCHES, Workload

PATH = Path(__file__).parent / "frozen.json"
SUITE = "workloads_test"


def compute() -> dict[str, Any]:
    """Describe the suite as it is now.

    Returns:
        ``{"sha256": hash of the rest, "suite": name, "workloads": {name: description}}``, JSON values.
    """
    contents = {"suite": SUITE, "workloads": {workload.name: describe(workload) for workload in SUITES[SUITE]}}
    return {"sha256": digest(contents), **contents}


def frozen() -> dict[str, Any]:
    """The committed description."""
    return json.loads(PATH.read_text())


def describe(workload: Workload) -> dict[str, Any]:
    """A workload's network with all arguments, its data's hash, its budget and how it is validated; not its target."""
    return {
        "network": workload.network,
        "dataset": workload.dataset,
        "data_sha256": data.SETS[workload.dataset].sha256,
        "arguments": arguments(workload.make),
        "steps": workload.steps,
        "every": workload.every,
        "valid_batches": VALID_BATCHES,
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps(compute(), indent=1) + "\n")
    print(f"wrote {PATH}")
