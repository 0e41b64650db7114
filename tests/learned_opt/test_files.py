"""Files are whole: the old contents or the new ones, whatever happens in between."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import ROOT

from learned_opt.files import write_atomically, write_folder_atomically


def full(file):
    raise OSError(28, "No space left on device")


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "new" / "file"
    for contents in (b"first", "zweite Fassung: ä"):
        write_atomically(path, contents)
        assert path.read_bytes() == (contents if isinstance(contents, bytes) else contents.encode())
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", b"old")
    write_folder_atomically(tmp_path / "folder", {"a": b"old"})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"new")
    with pytest.raises(OSError, match="No space left"):
        write_folder_atomically(tmp_path / "folder", {"a": b"new", "b": b"new"})
    assert (tmp_path / "file").read_bytes() == b"old"
    assert {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()} == {"a": b"old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_an_interrupt_between_the_two_renames_leaves_the_earlier_folder(tmp_path, monkeypatch):
    write_folder_atomically(tmp_path / "folder", {"a": b"old"})
    rename = Path.rename

    def interrupted(self, target):
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder_atomically(tmp_path / "folder", {"a": b"new"})
    assert (tmp_path / "folder" / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_replaces_another_whole(tmp_path):
    write_folder_atomically(tmp_path / "folder", {"a": b"1", "b": b"2"})
    write_folder_atomically(tmp_path / "folder", {"c": b"3"})
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["c"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_threads_that_write_one_file_leave_one_of_their_contents(tmp_path):
    contents = [bytes([i]) * 100_000 for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda one: write_atomically(tmp_path / "file", one), contents))
    assert (tmp_path / "file").read_bytes() in contents


def test_readers_of_a_file_whose_writer_is_killed_find_it_whole(tmp_path):
    program = """
import itertools, sys
from learned_opt.files import write_atomically
for i in itertools.count():
    write_atomically(sys.argv[1], bytes([i % 256]) * 1_000_000)
"""
    path = tmp_path / "file"
    for _ in range(3):
        command = [sys.executable, "-c", program, str(path)]
        writer = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
        end = time.monotonic() + 60
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.01)
        for _ in range(20):
            found = path.read_bytes()
            assert found == found[:1] * 1_000_000
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        found = path.read_bytes()
        assert found == found[:1] * 1_000_000
