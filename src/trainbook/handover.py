"""Continues a run that lies in a read-only folder: a Kaggle input, a Drive folder, what was pulled from a box.

Needs no torch, so a launcher can look for runs and check what it pulled.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trainbook.checkpoints import METADATA_FILE, numbered, read_checkpoint
from trainbook.errors import UserError
from trainbook.records import RunFolder, check_run_id

logger = logging.getLogger("trainbook")

# /kaggle/input/notebooks/OWNER/NAME/runs/RUN is five deep; a data set beside it may hold millions of files.
MAX_DEPTH = 7
MATCHING = ("workflow", "preset", "authentic", "config_sha256")


def run_folders(roots: Iterable[Path], max_depth: int = MAX_DEPTH) -> Iterator[RunFolder]:
    """Every run folder at or below some folders, known by its config.json and run.json, never by its path.

    Args:
        roots: folders to search; those that are not there are passed over.
        max_depth: how many folders deep.
    """
    for root in roots:
        if (root / "config.json").is_file() and (root / "run.json").is_file():
            if _is_run(RunFolder(root)):
                yield RunFolder(root)
        elif max_depth:
            try:
                with os.scandir(root) as entries:
                    below = sorted(Path(entry) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
            except OSError:  # not there, or not for us
                continue
            yield from run_folders(below, max_depth - 1)


def _is_run(folder: RunFolder) -> bool:
    """Whether run.json is one of ours, with a run id that cannot lead a copy out of the runs folder."""
    try:
        return bool(check_run_id(folder.summary()["run_id"]))
    except (UserError, KeyError, TypeError):
        return False


def whole_checkpoint(folder: RunFolder) -> int | None:
    """Step of the newest checkpoint from which the run can go on, every checksum verified; None when there is none.

    Its files must be whole, and the records must reach as far as it says: a copy taken while the run was training may
    hold a checkpoint newer than its records.
    """
    records = folder.metrics.stat().st_size if folder.metrics.is_file() else 0
    for checkpoint in numbered(folder.checkpoints):
        try:
            metadata = json.loads(read_checkpoint(checkpoint)[METADATA_FILE])
        except ValueError as error:
            logger.warning("%s: skipping checkpoint %s", folder.path, error)
            continue
        if metadata["records_bytes"] <= records:
            return metadata["step"]
        logger.warning("%s: skipping checkpoint %s: the records do not reach it", folder.path, checkpoint.name)
    return None


def copy_run(source: RunFolder, target: Path) -> int | None:
    """Copy a run folder, whole or not at all, and return the step it can go on from.

    Torn checkpoints stay behind. Modes are not copied: a read-only input becomes a folder one can train in.

    Args:
        source: the run folder; may be read-only, and may still be written to.
        target: the new run folder; must not exist.

    Returns:
        The step of the newest whole checkpoint, or None when there is none; nothing is copied then.

    Raises:
        OSError: when it cannot be written; nothing is left behind.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        # Checkpoints first: records that are still growing then reach at least as far.
        for path in sorted(_files(source.path), key=lambda path: (source.checkpoints not in path.parents, path)):
            copied = partial / path.relative_to(source.path)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
        copy = RunFolder(partial)
        step = whole_checkpoint(copy)
        if step is None:
            return None
        for checkpoint in numbered(copy.checkpoints):
            if int(checkpoint.name) > step:
                shutil.rmtree(checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(target)
        return step
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder, through links too; not the hidden ones (partial and torn checkpoints) nor the lock."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith(".") and name != "lock")


def take_over(roots: Iterable[Path], runs_folder: Path, identity: dict[str, Any], run_id: str = "") -> str:
    """Copy the run to continue from read-only folders to the runs folder, where it is not there already.

    Args:
        roots: folders to search.
        runs_folder: where run folders are made.
        identity: what config.json of the run must say.
        run_id: the run to look for. Empty: the unfinished run of this very config that got furthest.

    Returns:
        The run's id, or "" when there is none to continue.

    Raises:
        UserError: when the run of that id is another config's.
    """
    found = []
    for folder in run_folders(roots):
        summary = folder.summary()
        if run_id and summary["run_id"] == run_id:
            folder.check(identity)
        elif (
            run_id
            or summary.get("status") not in ("stopped", "running")
            or any(summary.get(key) != identity[key] for key in MATCHING)
            or (runs_folder / summary["run_id"]).exists()
        ):
            continue
        step = whole_checkpoint(folder)
        if step is not None:
            found.append((summary.get("status") == "complete", step, folder))
    for _, _, folder in sorted(found, key=lambda candidate: candidate[:2], reverse=True):
        name = folder.summary()["run_id"]
        step = copy_run(folder, runs_folder / name)
        if step is not None:
            logger.info("continuing %s at step %d from %s", name, step, folder.path)
            return name
    return ""
