"""Another process that holds a folder."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from . import ROOT

HOLDER = """
import sys
from pathlib import Path
from meta_train import claim
claim.LEASE = float(sys.argv[2])
with claim.claim(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held(folder: Path, lease: float = 60.0):
    """Another process that holds the folder, and ends when its input does."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), str(lease)], env=environment, **pipes) as process:
        assert process.stdout.readline() == "held\n", process.stderr.read()
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
