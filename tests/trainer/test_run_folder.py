"""One run writes to a folder at a time, and to nobody else's: locks, what a kill leaves of them, folders of others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from flowdppo_fast.trainer import run_folder as folders
from flowdppo_fast.trainer.run_folder import LOCK_FILE, FolderLock, check_elsewhere, check_ours, holder

HOLD = """
import sys, time
from pathlib import Path
from flowdppo_fast.trainer.run_folder import FolderLock
FolderLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds ``tmp_path``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_who_holds_a_folder(tmp_path, other):
    with pytest.raises(
        ValueError, match=rf"is written to by another run \(process {other.pid} on .*\), expected a fol"
    ):
        FolderLock(tmp_path).acquire()
    assert holder(tmp_path) == f"process {other.pid} on {os.uname().nodename}"


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_process_holds_nothing(tmp_path, other, reaped):
    other.kill()
    if reaped:
        other.wait()
    else:
        # gone, and still listed by the system until its parent asks for it
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert holder(tmp_path) == f"process {os.getpid()} on {os.uname().nodename}"
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_second_holder_in_one_process_is_refused_and_a_third_after_the_first(tmp_path):
    first = FolderLock(tmp_path / "run")
    first.acquire()
    first.check()
    second = FolderLock(tmp_path / "run")
    for attempt in (second.acquire, second.check):
        with pytest.raises(ValueError, match="another run"):
            attempt()
    # nor does the one that was refused let go what it has not
    second.release()
    assert holder(tmp_path / "run")
    first.release()
    second.acquire()
    second.release()


def elsewhere(path, age: float, **changes) -> None:
    """A lock of another machine that was last touched ``age`` seconds ago."""
    written = {**folders._identity(), "host": "node7", "boot": "b", "pid": 41, "token": "t", **changes}
    path.write_text(json.dumps(written))
    os.utime(path, (time.time() - age,) * 2)


def test_a_lock_from_elsewhere_lasts_while_it_is_touched(tmp_path):
    path = tmp_path / LOCK_FILE
    elsewhere(path, folders.SILENCE / 2)
    with pytest.raises(ValueError, match=r"process 41 on node7"):
        FolderLock(tmp_path).acquire()
    elsewhere(path, folders.SILENCE + 5)
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.release()


def test_a_process_number_of_another_container_says_nothing(tmp_path):
    """Containers of one machine have numbers of their own: number 1 lives in all of them."""
    elsewhere(tmp_path / LOCK_FILE, 1, **{**folders._identity(), "space": "pid:[1]", "pid": 999999})
    assert holder(tmp_path)


def test_a_number_that_another_process_has_by_now_holds_nothing(tmp_path):
    (tmp_path / LOCK_FILE).write_text(json.dumps({**folders._identity(), "started": "1", "token": "t"}))
    assert holder(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '{"host": 3}', '"x"'])
def test_a_torn_lock_lasts_as_one_from_elsewhere(tmp_path, text):
    path = tmp_path / LOCK_FILE
    path.write_text(text)
    assert holder(tmp_path) == "process ? on ?"
    os.utime(path, (time.time() - folders.SILENCE - 5,) * 2)
    assert holder(tmp_path) is None


def test_a_lock_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "BEAT", 0.01)
    lock = FolderLock(tmp_path)
    lock.acquire()
    os.utime(lock.path, (0, 0))
    ends = time.monotonic() + 10
    while lock.path.stat().st_mtime < 1 and time.monotonic() < ends:
        time.sleep(0.01)
    assert lock.path.stat().st_mtime > 1
    lock.release()


def test_a_run_that_was_taken_for_dead_finds_out(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    elsewhere(lock.path, 1)
    with pytest.raises(ValueError, match="node7"):
        lock.check()
    lock.release()
    assert holder(tmp_path) == "process 41 on node7"


def test_of_two_that_see_a_dead_lock_one_gets_the_folder(tmp_path, monkeypatch):
    """The second renames the lock when the first has just made its own."""
    elsewhere(tmp_path / LOCK_FILE, folders.SILENCE + 5)
    first, second, rename = FolderLock(tmp_path), FolderLock(tmp_path), os.rename

    def late(source, target):
        monkeypatch.setattr(os, "rename", rename)
        first.acquire()
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(ValueError, match="another run"):
        second.acquire()
    first.check()
    first.release()


@pytest.mark.parametrize("name", ["config.yaml", "recipe.yaml", "inputs.json"])
def test_files_that_no_run_wrote_are_not_replaced(tmp_path, name):
    (tmp_path / "notes.txt").touch()
    check_ours(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"has {name}, which no run wrote and a run would replace"):
        check_ours(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    check_ours(tmp_path)


def test_results_go_beside_a_runs_files_not_among_them(tmp_path, monkeypatch):
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    (checkpoints / "iteration-000001").mkdir(parents=True)
    check_elsewhere(run, "folder")
    (run / "config.yaml").touch()
    monkeypatch.chdir(checkpoints)
    for refused in (run, checkpoints, checkpoints / "iteration-000001", checkpoints / "new" / "er"):
        with pytest.raises(ValueError, match=rf"folder: got {refused}, which the run in {run} writes to"):
            check_elsewhere(refused, "folder")
    with pytest.raises(ValueError, match=r"got x, which the run in"):
        check_elsewhere(type(run)("x"), "folder")
    for free in (run / "export", run / "export" / "more", tmp_path, tmp_path / "new"):
        check_elsewhere(free, "folder")


def test_what_a_kill_left_of_taking_a_lock_away_goes_with_the_next_run(tmp_path):
    (tmp_path / f"{LOCK_FILE}.0123").write_text("another's")
    (tmp_path / f"{LOCK_FILE}.4567").write_text("")
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    lock.release()
    assert list(tmp_path.iterdir()) == []
