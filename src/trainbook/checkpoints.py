"""Checkpoint folders: written whole or not at all, read only when every checksum fits. Needs no torch."""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from trainbook.files import sync_folder, write_atomic, write_synced

logger = logging.getLogger("trainbook")

STATE_FILE, METADATA_FILE, MANIFEST_FILE = "state.pt", "metadata.json", "manifest.json"


def write_checkpoint(folder: Path, step: int, files: dict[str, bytes], keep: int) -> Path:
    """Write `folder/<step>` so that it is either whole or not there, then drop all but the `keep` newest.

    Files are written to a folder beside it and fsynced, the manifest with every file's SHA-256 last, then the folder
    is renamed. A crash or a full disk at any moment leaves the checkpoints before it as they were.

    Args:
        folder: the run's `checkpoints` folder.
        step: names the checkpoint.
        files: from `state.snapshot`.
        keep: how many checkpoints stay, at least 1.

    Raises:
        OSError: when writing fails; nothing is left behind.
    """
    entries = {name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)} for name, content in files.items()}
    manifest = _compact({"files": entries, "sha256": _digest(entries)})
    final = folder / f"{step:010d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, content in {**files, MANIFEST_FILE: manifest}.items():
            write_synced(partial / name, content)
        sync_folder(partial)
        if final.exists():  # the same step again, after a resume that trained nothing
            shutil.rmtree(final)
        partial.rename(final)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    write_atomic(folder / "latest", final.name.encode())
    sync_folder(folder)
    for old in numbered(folder)[keep:]:
        shutil.rmtree(old)
    return final


def read_checkpoint(checkpoint: Path) -> dict[str, bytes]:
    """The files of one checkpoint, each checked against the manifest.

    Raises:
        ValueError: naming the file that is missing, cut short or altered.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_bytes())
        entries, digest = manifest["files"], manifest["sha256"]
        intact = digest == _digest(entries) and entries.keys() == {STATE_FILE, METADATA_FILE}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint.name}: {MANIFEST_FILE} cannot be read ({error})") from None
    if not intact:
        raise ValueError(f"{checkpoint.name}: {MANIFEST_FILE} was altered")
    contents = {}
    for name, entry in entries.items():
        try:
            contents[name] = (checkpoint / name).read_bytes()
        except OSError as error:
            raise ValueError(f"{checkpoint.name}: {name} cannot be read ({error})") from None
        if hashlib.sha256(contents[name]).hexdigest() != entry["sha256"]:
            raise ValueError(f"{checkpoint.name}: {name} was cut short or altered")
    return contents


def newest_whole(folder: Path) -> dict[str, bytes] | None:
    """The files of the newest whole checkpoint in a run's `checkpoints` folder; None when there is none.

    A torn or altered checkpoint is skipped with a warning.
    """
    for checkpoint in numbered(folder):
        try:
            return read_checkpoint(checkpoint)
        except ValueError as error:
            logger.warning("skipping checkpoint %s", error)
    return None


def set_aside_after(folder: Path, step: int) -> None:
    """Rename checkpoints later than `step` to `.torn-...`: a resumed run writes those steps anew, and pruning goes by number."""
    for checkpoint in numbered(folder):
        if int(checkpoint.name) > step:
            aside = folder / f".torn-{checkpoint.name}"
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps there are checkpoints of, in order."""
    return sorted(int(path.name) for path in numbered(folder))


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a run's `checkpoints` folder, whole or not, newest first."""
    return sorted((path for path in folder.glob("*") if path.is_dir() and path.name.isdigit()), reverse=True)


def _compact(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _digest(entries: dict[str, Any]) -> str:
    return hashlib.sha256(_compact(entries)).hexdigest()
