"""Whose a folder is: one run at a time writes to a run's folder, and to nobody else's.

The lock is a file that names its holder and is touched while the run lasts. Who looks at it from the same machine asks
whether that process lives, so a run that was killed holds nothing. From elsewhere, where the file system may be all
that is in common, a lock that was not touched for :data:`SILENCE` seconds holds nothing either. No ``flock``: network
and FUSE mounts often have none.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import uuid
from pathlib import Path
from typing import Any

LOCK_FILE = ".running.json"
CONFIG_FILE, RECIPE_FILE, INPUTS_FILE, CHECKPOINTS = "config.yaml", "recipe.yaml", "inputs.json", "checkpoints"
# seconds between two touches of a lock, and without one until it holds nothing
BEAT, SILENCE = 15.0, 120.0


class FolderLock:
    """Holds a run's folder for this process.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK_FILE
        self._own: str | None = None
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Makes the folder if need be, and holds it.

        Raises:
            ValueError: another run writes to it.
            OSError: no lock can be written there.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        own = json.dumps({**_identity(), "token": uuid.uuid4().hex})
        while not _write_new(self.path, own):
            with contextlib.suppress(FileNotFoundError):
                left = self.path.read_text()
                self.check()
                # its holder is gone; of two runs that see that, one takes it away, the other may find the first one's
                aside = self.path.with_name(f"{LOCK_FILE}.{uuid.uuid4().hex}")
                os.rename(self.path, aside)
                if aside.read_text() == left:
                    aside.unlink()
                else:
                    os.rename(aside, self.path)
        # of runs that were killed while they took a lock away; one that holds this run's own is about to come back
        for aside in self.path.parent.glob(f"{LOCK_FILE}.*"):
            with contextlib.suppress(OSError):
                if aside.read_text() != own:
                    aside.unlink()
        self._own, self._ended = own, threading.Event()
        threading.Thread(target=_touch, args=(self.path, self._ended), name="run folder", daemon=True).start()

    def check(self) -> None:
        """Returns if no other run writes to the folder.

        Raises:
            ValueError: one does.
        """
        with contextlib.suppress(FileNotFoundError):
            if self._own is not None and self.path.read_text() == self._own:
                return
        other = holder(self.path.parent)
        if other is not None:
            raise ValueError(
                f"run.output_dir: {self.path.parent} is written to by another run ({other}), expected a folder of its "
                "own for each; wait for that one to end, or choose another folder (one that was killed on another "
                f"machine holds it for {SILENCE:.0f} s)"
            )

    def release(self) -> None:
        """Lets the folder go; another's lock is left alone."""
        self._ended.set()
        with contextlib.suppress(OSError):
            if self._own is not None and self.path.read_text() == self._own:
                self.path.unlink()
        self._own = None


def holder(folder: Path) -> str | None:
    """Who writes to a run's folder, in words; None where nobody does."""
    path = folder / LOCK_FILE
    try:
        text, touched = path.read_text(), path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        other = json.loads(text)
        known = {name: other[name] for name in ("host", "boot", "pid", "started", "space")}
    except (ValueError, KeyError, TypeError):
        # half-written, by a run that begins or one that was killed then
        known = {}
    own = _identity()
    if known and all(known[name] == own[name] for name in ("host", "boot", "space")):
        # one's own process may hold it in another trainer
        lives = known["started"] is not None and _started(known["pid"]) == known["started"]
    else:
        lives = _now(folder, touched) - touched < SILENCE
    return f"process {known.get('pid', '?')} on {known.get('host', '?')}" if lives else None


def check_ours(folder: Path) -> None:
    """Returns if a run may begin in ``folder``: it is new, empty, a run's, or has nothing that a run would replace.

    Raises:
        ValueError: it has files of the names of a run's, which no run wrote.
    """
    if (folder / CHECKPOINTS).is_dir():
        return
    there = [name for name in (CONFIG_FILE, RECIPE_FILE, INPUTS_FILE) if (folder / name).exists()]
    if there:
        raise ValueError(
            f"run.output_dir: {folder} has {', '.join(there)}, which no run wrote and a run would replace, expected a "
            "new folder; choose one below it"
        )


def check_elsewhere(folder: Path, name: str) -> None:
    """Returns if ``folder`` is neither a run's nor among its checkpoints, so that results may be written there.

    Raises:
        ValueError: it is, in the words of the setting ``name``.
    """
    place = folder.expanduser().absolute()
    run = next((p.parent for p in (place / CHECKPOINTS, place, *place.parents) if _is_checkpoints(p)), None)
    if run is not None:
        raise ValueError(
            f"{name}: got {folder}, which the run in {run} writes to, expected another folder, such as {run / 'export'}"
        )


def _is_checkpoints(folder: Path) -> bool:
    return folder.name == CHECKPOINTS and (folder.parent / CONFIG_FILE).is_file() and folder.is_dir()


def _write_new(path: Path, text: str) -> bool:
    """Whether there was no such file before."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "w") as file:
            file.write(text)
    except OSError:
        path.unlink()
        raise
    return True


def _touch(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _now(folder: Path, otherwise: float) -> float:
    """The time by the clock that stamps files in ``folder``; ``otherwise`` where none can be written."""
    probe = folder / f"{LOCK_FILE}.{uuid.uuid4().hex}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        return otherwise
    return now


def _identity() -> dict[str, Any]:
    """This process: machine, start of the machine, number space, number and start of the process."""
    boot = space = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    pid = os.getpid()
    return {"host": platform.node(), "boot": boot, "space": space, "pid": pid, "started": _started(pid)}


def _started(pid: int) -> str | None:
    """When the living process ``pid`` started, as far as the system says; None for one that is gone."""
    try:
        # the name in brackets may have blanks
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "alive"
