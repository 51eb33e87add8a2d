"""Files that survive a crash: synced, replaced in one move."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainbook.errors import UserError


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file so that a reader sees the old content or the new, never a part; of two writers the later one's stays."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_synced(partial, content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's own entries (new names, renames)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: when it is not one.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", "restore the file or delete the run folder") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file in one move, so that a reader never sees half of it."""
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False).encode())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a .jsonl file; a last line cut short by a crash is left out."""
    if path.is_file():
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError:
                if number < len(lines):
                    raise UserError(f"{path}, line {number} is damaged", "restore the file from a copy") from None


def last_line(path: Path) -> dict[str, Any]:
    """The last whole JSON object of a .jsonl file; {} where there is none yet."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        length = 4096
        while True:
            file.seek(max(0, size - length))
            lines = file.read(min(size, length)).rpartition(b"\n")[0].splitlines()
            if len(lines) > 1 or length >= size:
                return json.loads(lines[-1]) if lines else {}
            length *= 4


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
