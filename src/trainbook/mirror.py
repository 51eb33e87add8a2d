"""Copies a run to a second folder while it trains: Drive, a network share, any folder that outlives the machine.

Needs no torch. The copy is one that `handover` continues from.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path

from trainbook.checkpoints import MANIFEST_FILE, numbered
from trainbook.errors import UserError
from trainbook.files import file_sha256, read_json, sync_folder, write_atomic
from trainbook.handover import whole_checkpoint
from trainbook.records import RunFolder

logger = logging.getLogger("trainbook")

POLL_SECONDS = 2.0
RETRY_SECONDS = 30.0  # a mount that dropped may come back; asking it more often helps nobody
PATIENCE_SECONDS = 600.0  # that the end of a run waits for what is still to be copied
BLOCK_BYTES = 1 << 20


class Mirror:
    """Keeps a copy of a run folder up to date, in a thread of its own that training never waits for.

    A checkpoint appears there whole or not at all, verified, and after records that reach at least as far; run.json
    comes last. As many checkpoints are kept as in the run folder. A folder that is gone, full or slow is warned of,
    once, and tried again; the run goes on all the same.

    Args:
        folder: the run folder.
        root: the run's copy is made below it, under the run's id. It must exist: a share that is not mounted would
            otherwise be mistaken for an empty folder on this machine's disk.
        poll_seconds: time between two looks at the run folder.
        retry_seconds: time until a folder that could not be written is tried again.
    """

    def __init__(
        self, folder: RunFolder, root: Path, poll_seconds: float = POLL_SECONDS, retry_seconds: float = RETRY_SECONDS
    ) -> None:
        self.folder, self.root, self.target = folder, root, RunFolder(root / folder.path.name)
        self._poll_seconds, self._retry_seconds = poll_seconds, retry_seconds
        self._copied: dict[Path, tuple[int, int]] = {}
        self._ahead: int | None = None
        self._warned = ""
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to copy in the background, now and whenever something is finished."""
        self._ending.clear()
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)
        self._thread.start()

    def close(self, patience_seconds: float = PATIENCE_SECONDS) -> bool:
        """Copy what is left, and say whether all of it arrived; gives up waiting after the patience is spent."""
        if self._thread is None or not self._thread.is_alive():
            self.start()
        self._ending.set()
        self._thread.join(patience_seconds)
        if self._thread.is_alive():
            self._warn(f"{self.root} has not answered for {patience_seconds:.0f} s")
        return not self._thread.is_alive() and not self._warned

    def _follow(self) -> None:
        while True:
            ending = self._ending.is_set()
            began = time.monotonic()
            well = self._try_to_copy()
            if ending:
                return
            # At most half of the time is spent copying, however slow the folder is.
            pause = max(self._poll_seconds, time.monotonic() - began) if well else self._retry_seconds
            self._ending.wait(pause)

    def _try_to_copy(self) -> bool:
        try:
            step = self._copy()
        except UserError as error:  # another config's run has that name there
            self._warn(str(error).replace("\n  -> ", "; "))
        except (OSError, ValueError) as error:
            self._warn(f"{self.root} cannot be written: {getattr(error, 'strerror', None) or error}")
        else:
            if self._warned and step is not None:
                logger.info("the copy in %s is up to date again, at step %d", self.root, step)
                self._warned = ""
            return True
        return False

    def _warn(self, what: str) -> None:
        if what != self._warned:
            logger.warning(
                "%s. Training goes on, and the run is whole in %s; but it is not copied, and lost if this machine is.",
                what,
                self.folder.path,
            )
        self._warned = what

    def _copy(self) -> int | None:
        """Bring the copy up to date and return its step, or None where there is no checkpoint yet."""
        if not self.root.is_dir():
            raise FileNotFoundError(errno.ENOENT, "it is not there", str(self.root))
        if self._ahead is None:
            self._ahead = self._prepare()
        # Read first, copied last: it never says more than the files before it hold.
        state = self.folder.run_json.read_bytes() if self.folder.run_json.is_file() else b""
        newest = next(iter(numbered(self.folder.checkpoints)), None)
        step = int(newest.name) if newest else -1
        if step < self._ahead:
            raise UserError(
                f"{self.target.path} holds this run at step {self._ahead}, here it is at {step}: it is not overwritten by less",
                "to go on from there, delete the run folder here and run again",
            )
        for path in self._small_files():
            self._copy_changed(path)
        if newest is not None and not (self.target.checkpoints / newest.name).exists() and not self._copy_checkpoint(newest):
            return None  # it was replaced by a newer one meanwhile; the next look finds that
        for old in numbered(self.target.checkpoints)[max(1, len(numbered(self.folder.checkpoints))) :]:
            _forget(old)
        if state and (not self.target.run_json.is_file() or self.target.run_json.read_bytes() != state):
            write_atomic(self.target.run_json, state)
        return None if newest is None else step

    def _prepare(self) -> int:
        """Look at what an earlier session left there; drop what is torn; returns the step that it can go on from, or -1."""
        if self.target.config.is_file():
            self.target.check(read_json(self.folder.config))
        self.target.checkpoints.mkdir(parents=True, exist_ok=True)
        for partial in [*self.target.path.rglob(".*.partial"), *self.target.checkpoints.glob(".old-*")]:
            _forget(partial)
        step = whole_checkpoint(self.target)
        step = -1 if step is None else step
        for checkpoint in numbered(self.target.checkpoints):
            if int(checkpoint.name) > step:
                _forget(checkpoint)
        return step

    def _small_files(self) -> list[Path]:
        """All files but run.json, the checkpoints, hidden ones and the lock."""
        files = []
        for parent, folders, names in os.walk(self.folder.path):
            folders[:] = [name for name in folders if not name.startswith(".") and Path(parent, name) != self.folder.checkpoints]
            files += [Path(parent, name) for name in names if not name.startswith(".") and name not in ("lock", "run.json")]
        return sorted(files)

    def _copy_changed(self, path: Path) -> None:
        try:
            status = path.stat()
            if self._copied.get(path) == (status.st_mtime_ns, status.st_size):
                return
            target = self.target.path / path.relative_to(self.folder.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.partial")
            _copy_file(path, partial)
            partial.replace(target)
        except FileNotFoundError:
            if path.exists():
                raise
            return  # a picture or an export that is being made anew
        self._copied[path] = (status.st_mtime_ns, status.st_size)

    def _copy_checkpoint(self, source: Path) -> bool:
        """Copy one checkpoint; False when the run dropped it meanwhile."""
        partial = self.target.checkpoints / f".{source.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            digests = {path.name: _copy_file(path, partial / path.name) for path in sorted(source.iterdir())}
            said = json.loads((partial / MANIFEST_FILE).read_bytes())["files"]
            if any(digests.get(name) != entry["sha256"] for name, entry in said.items()):
                raise OSError(errno.EIO, f"checkpoint {source.name} does not fit its checksums")
            sync_folder(partial)
            partial.rename(self.target.checkpoints / source.name)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            if source.exists():
                raise
            return False
        write_atomic(self.target.checkpoints / "latest", source.name.encode())
        return True


def _copy_file(source: Path, target: Path) -> str:
    """Copy what a file holds now, read it back, and return its SHA-256.

    Raises:
        OSError: when what is read back is something else.
    """
    digest = hashlib.sha256()
    try:
        with source.open("rb") as reading, target.open("wb") as writing:
            while block := reading.read(BLOCK_BYTES):
                digest.update(block)
                writing.write(block)
            writing.flush()
            os.fsync(writing.fileno())
        if file_sha256(target) != digest.hexdigest():
            raise OSError(errno.EIO, f"what was written to {target.name} is not what is read from it")
    except OSError:
        target.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def _forget(path: Path) -> None:
    """Delete what is no longer needed, emptied first: Drive keeps deleted files, at their size, for a month."""
    if path.is_dir():
        aside = path.with_name(f".old-{path.name}")
        path = path if path.name.startswith(".") else path.rename(aside)
        files = [file for file in path.rglob("*") if file.is_file()]
    else:
        files = [path]
    for file in files:
        os.truncate(file, 0)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
