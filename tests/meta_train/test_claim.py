"""One run a folder: real processes that hold it, are suspended, killed, and lose it."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from support.claims import held

from meta_train import claim
from meta_train.claim import ClaimError


def refused(folder: Path, by: subprocess.Popen) -> None:
    began = time.monotonic()
    with pytest.raises(ClaimError, match=f"in use by process {by.pid} on ") as raised, claim.claim(folder):
        pass
    assert "\n" not in str(raised.value)
    assert time.monotonic() - began < 10  # at once, without waiting for its end


def of_another_machine(folder: Path) -> None:
    path = folder / claim.FILE
    kept, lines = path.stat().st_mtime_ns, path.read_text().splitlines()
    path.write_text("\n".join("host=elsewhere" if line.startswith("host=") else line for line in lines) + "\n")
    os.utime(path, ns=(kept, kept))


def test_the_folder_comes_and_goes(tmp_path):
    folder = tmp_path / "runs" / "a"
    with claim.claim(folder):
        assert [path.name for path in folder.iterdir()] == [claim.FILE]
    assert not (tmp_path / "runs").exists()
    with claim.claim(folder):
        (folder / "result").write_text("kept")
    assert [path.name for path in folder.iterdir()] == ["result"]
    with pytest.raises(KeyError), claim.claim(folder):
        raise KeyError
    with claim.claim(folder):  # free again
        pass
    (tmp_path / "there").mkdir()
    with claim.claim(tmp_path / "there"):
        pass
    assert (tmp_path / "there").is_dir()  # it was before


def test_a_live_run_is_respected_and_a_killed_one_is_not(tmp_path):
    with held(tmp_path / "run") as holder:
        refused(tmp_path / "run", holder)
        holder.send_signal(signal.SIGSTOP)
        refused(tmp_path / "run", holder)
        holder.send_signal(signal.SIGCONT)
        holder.kill()
        holder.wait()
        assert (tmp_path / "run" / claim.FILE).exists()
        with claim.claim(tmp_path / "run"):
            pass


def test_a_run_that_ends_frees_the_folder(tmp_path):
    with held(tmp_path / "run") as holder:
        holder.stdin.close()
        assert holder.wait(timeout=60) == 0
    assert not (tmp_path / "run").exists()


def test_one_of_several_that_begin_at_once(tmp_path):
    won, barrier = [], threading.Barrier(8)

    def begin():
        barrier.wait()
        with contextlib.suppress(ClaimError), claim.claim(tmp_path / "run"):
            won.append(threading.get_ident())
            done.wait()

    done = threading.Event()
    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    while sum(thread.is_alive() for thread in threads) > 1:
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_another_machine_s_claim_is_taken_over_once_it_is_no_longer_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "LEASE", 1.5)
    with held(tmp_path, lease=1.5) as holder:
        of_another_machine(tmp_path)
        with pytest.raises(ClaimError, match="on elsewhere"), claim.claim(tmp_path):  # it is renewed
            pass
        holder.kill()
        holder.wait()
        began = time.monotonic()
        with claim.claim(tmp_path):
            assert time.monotonic() - began > 1


def test_a_run_that_has_lost_its_folder_ends(tmp_path):
    with held(tmp_path, lease=0.6) as holder:
        (tmp_path / claim.FILE).unlink()
        assert holder.wait(timeout=60) == claim.LOST_EXIT_CODE
        assert holder.stderr.read() == f"learned-opt: another run has taken {tmp_path}; this one ends\n"


def test_a_folder_that_cannot_be_made_or_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ClaimError, match="cannot make the folder"), claim.claim(tmp_path / "file" / "run"):
        pass
    if os.getuid():  # root may write everywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(ClaimError, match="cannot write in"), claim.claim(tmp_path / "closed"):
            pass
