"""What a long command shows while it runs: a live bar on a terminal, a plain line now and then elsewhere."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

import tensorboardX
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from learned_opt.files import write_atomically

from ..errors import UserError

_LINE_SECONDS = 10.0  # between plain lines when the output is no terminal


class Report(Protocol):
    """What a step's end is told to."""

    def __call__(self, done: int, text: str = "") -> None:
        """Shows the number of steps done and a short text."""


@contextlib.contextmanager
def progress(console: Console, label: str, total: int, start: int = 0) -> Iterator[Report]:
    """A progress bar, or plain lines when the console is no terminal.

    Args:
        console: where to show it.
        label: what is under way.
        total: number of steps.
        start: steps done before.

    Yields:
        A function of ``(steps done, text)``.
    """
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        more = (TextColumn("{task.fields[text]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, *more, console=console) as bar:
            task = bar.add_task(label, total=total, completed=start, text="")
            yield lambda done, text="": bar.update(task, completed=done, text=text)
        return

    began = last = time.monotonic()
    first: tuple[int, float] | None = None  # the rate is taken from there on: compiling comes before

    def line(done: int, text: str = "") -> None:
        nonlocal first, last
        now = time.monotonic()
        if first is None and done > start:
            first = (done, now)
        elif now - last < _LINE_SECONDS and done < total:
            return
        last = now
        left = ""
        if first and done > first[0]:
            left = f", {(now - first[1]) / (done - first[0]) * (total - done):.0f} s left"
        console.print(f"{label} {done}/{total}  {text}  {now - began:.0f} s{left}", highlight=False, soft_wrap=True)

    yield line


class Metrics:
    """Scalars of a run: ``metrics.jsonl`` (one JSON object a line) and TensorBoard event files."""

    def __init__(self, workdir: Path, first_step: int):
        """Opens the files; lines at or after ``first_step``, of a run that was cut off, are dropped.

        Raises:
            UserError: they cannot be written.
        """
        self._path = workdir / "metrics.jsonl"
        with self._writing():
            kept = [line for line in _lines(self._path) if json.loads(line)["step"] < first_step]
            write_atomically(self._path, "".join(line + "\n" for line in kept))
            self._file: TextIO = self._path.open("a")
            self._events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step or None)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one line of scalars; what is not finite is null.

        Raises:
            UserError: it cannot be written.
        """
        with self._writing():
            told = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._file.write(json.dumps({"step": step} | told) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from None

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        self._events.close()


def _lines(path: Path) -> Iterator[str]:
    """The whole lines of a file: the last one may have been cut off."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            json.loads(line)
            yield line
