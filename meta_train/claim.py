"""One run a folder: an exclusive claim for as long as the run lives."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from .errors import UserError

FILE = ".running"  # in the claimed folder, while a run lives
LEASE = 60.0  # seconds; a claim of another machine that was not renewed for so long is taken over
LOST_EXIT_CODE = 75  # EX_TEMPFAIL: going on with --resume may help


class ClaimError(UserError):
    """Another run holds the folder, or it cannot be written."""


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Holds a folder for this process alone, on any file system: locks of the kernel do not reach over all of them.

    The claim is the file ``.running``, made by an exclusive create and renewed by a thread. It names machine, process
    and the process's start, so that what a killed run of this machine left behind is told from a live one at once. What
    one of another machine left is known by waiting: it is taken over when it was not renewed for a minute. A run that
    finds its claim taken (it was suspended for longer, say) ends with exit code 75 before it writes anything more.

    Args:
        folder: made if missing, and removed at the end if it was and nothing else came into it.

    Raises:
        ClaimError: another process holds it, or it cannot be written.
    """
    made = _make(folder)
    lease = filelock.SoftFileLease(folder / FILE, lease_duration=LEASE, on_compromise=lambda lost: _end(folder))
    try:
        _acquire(lease, folder)
        try:
            yield
        finally:
            lease.release()
    finally:
        with contextlib.suppress(OSError):  # not empty
            for new in made:
                new.rmdir()


def _make(folder: Path) -> list[Path]:
    """Makes the folder and those above it; returns what was missing, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClaimError(f"cannot make the folder {folder}: {error.strerror}") from None
    return missing


def _acquire(lease: filelock.SoftFileLease, folder: Path) -> None:
    try:
        for patience in (0.0, 2.0):  # the second time for a claim that is being written or given back just now
            try:
                lease.acquire(timeout=patience)
                return
            except filelock.Timeout:
                if _here(lease):
                    raise
        lease.acquire(timeout=1.2 * LEASE)  # of another machine: watch whether it is renewed
    except filelock.Timeout:
        owner = lease.owner
        who = f"process {owner.pid} on {owner.hostname}" if owner else "another process"
        raise ClaimError(f"{folder} is in use by {who}: wait for its end, or name another folder") from None
    except OSError as error:
        raise ClaimError(f"cannot write in {folder}: {error.strerror}") from None


def _here(lease: filelock.SoftFileLease) -> bool:
    """Whether the holder runs on this machine (and in this container), where a dead one would have been found out."""
    with tempfile.TemporaryDirectory() as folder, filelock.SoftFileLease(Path(folder) / FILE) as own:
        ours, theirs = own.owner, lease.owner
        return ours is not None and theirs is not None and ours.hostname == theirs.hostname


def _end(folder: Path) -> None:
    print(f"learned-opt: another run has taken {folder}; this one ends", file=sys.stderr, flush=True)
    os._exit(LOST_EXIT_CODE)  # from the thread that renews: whatever the main one is at, it must write no more
