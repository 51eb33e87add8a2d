"""What the launcher asks of a Colab machine: start, look, pack, stop. Runs there, in the session's kernel; standard library only.

The machine's disk is lost with the session. Every function can be called again at any time.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

ANSWER = "TRAINBOOK-ANSWER "  # before the JSON that the launcher reads; whatever else is printed is for nobody
PART_BYTES = 24 << 20  # a file goes up and down in pieces: each is one JSON message
LOG_CHARACTERS = 20_000


def answer(function: str, folder: str, **arguments: object) -> None:
    """Call a function of this module and print what it returns, or the error, as one line."""
    try:
        result = globals()[function](Path(folder).absolute(), **arguments)
    except Exception as error:  # the session's own exit code says nothing of it
        result = {"error": f"{type(error).__name__}: {error}"}
    print(ANSWER + json.dumps(result), flush=True)


def start(folder: Path, parts: list[str], sha256: str, keys: str = "") -> dict[str, object]:
    """Unpack the box that was uploaded and train in it, in a process of its own; nothing happens while one is training.

    Args:
        folder: holds the parts.
        parts: names of the pieces of the box's archive.
        sha256: of the archive.
        keys: name of a file of NAME=VALUE lines for the training process; it is deleted at once.
    """
    given = dict(line.partition("=")[::2] for line in (folder / keys).read_text().splitlines()) if keys else {}
    if keys:
        (folder / keys).unlink()
    if _alive(folder):
        return {"gpus": _gpus(), "already": True}
    content = b"".join((folder / part).read_bytes() for part in parts)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("the box arrived damaged")
    box = folder / "box"
    shutil.rmtree(box, ignore_errors=True)
    (folder / "box.tar.gz").write_bytes(content)
    with tarfile.open(folder / "box.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    for name in [*parts, "box.tar.gz"]:
        (folder / name).unlink()
    for line in (box / "SHA256SUMS").read_text().splitlines():
        digest, _, name = line.partition("  ")
        if hashlib.sha256((box / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{name} arrived damaged")
    with zipfile.ZipFile(next(box.glob("*.whl"))) as wheel:
        wheel.extractall(box / "kit")
    missing = [name for name in (box / "requirements.txt").read_text().split() if not _installed(name)]
    if missing:  # only what the image lacks: its own versions of torch and numpy stay
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True, capture_output=True)
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "trainbook", "run", "--spec", "run.toml"],
            cwd=box,
            env=os.environ | given | {"PYTHONPATH": str(box / "kit")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the kernel may be restarted or idle
        )
    (folder / "pid").write_text(str(process.pid))
    return {"gpus": _gpus(), "already": False}


def look(folder: Path, run_id: str, offset: int = 0) -> dict[str, object]:
    """Whether training goes on, what it printed since, what run.json says, and the newest checkpoint."""
    run, alive = folder / "box" / "runs" / run_id, _alive(folder)  # first: what it prints at its end is then read after it
    with (folder / "log").open("rb") as log:
        log.seek(offset)
        text = log.read(LOG_CHARACTERS)
    steps = [int(path.name) for path in run.glob("checkpoints/[0-9]*") if path.name.isdigit()]
    state = json.loads((run / "run.json").read_text()) if (run / "run.json").is_file() else {}
    return {
        "alive": alive,
        "log": text.decode(errors="replace"),
        "offset": offset + len(text),
        "run_id": state.get("run_id", ""),
        "status": state.get("status", ""),
        "checkpoint": max(steps, default=-1),
    }


def pack(folder: Path, run_id: str) -> dict[str, object]:
    """Make an archive, in pieces, of the run folder with its newest whole checkpoint; say which step that is of."""
    sys.path.insert(0, str(folder / "box" / "kit"))
    from trainbook.checkpoints import numbered
    from trainbook.handover import copy_run
    from trainbook.records import RunFolder

    source, copy = RunFolder(folder / "box" / "runs" / run_id), RunFolder(folder / "packed" / run_id)
    for attempt in range(3):
        shutil.rmtree(folder / "packed", ignore_errors=True)
        try:
            step = copy_run(source, copy.path)
            break
        except FileNotFoundError:  # training dropped a checkpoint while it was copied
            if attempt == 2:
                raise
    for old in numbered(copy.checkpoints)[1:]:
        shutil.rmtree(old)
    if step is None:  # nothing to go on from, but something to read
        leave = shutil.ignore_patterns("checkpoints", ".*", "lock")
        shutil.copytree(source.path, copy.path, ignore=leave, copy_function=shutil.copyfile)
    with tarfile.open(folder / "run.tar", "w") as archive:
        archive.add(copy.path, run_id)
    shutil.rmtree(folder / "packed")
    digest, parts = hashlib.sha256(), []
    with (folder / "run.tar").open("rb") as content:
        while piece := content.read(PART_BYTES):
            digest.update(piece)
            parts.append(f"run.tar.{len(parts):04d}")
            (folder / parts[-1]).write_bytes(piece)
    (folder / "run.tar").unlink()
    return {"step": -1 if step is None else step, "parts": parts, "sha256": digest.hexdigest()}


def stop(folder: Path) -> dict[str, object]:
    """Ask training to save and stop."""
    if _alive(folder):
        os.kill(int((folder / "pid").read_text()), signal.SIGTERM)
    return {}


def _alive(folder: Path) -> bool:
    try:
        process = int((folder / "pid").read_text())
        ended, _ = os.waitpid(process, os.WNOHANG)  # else what ended stays there as a zombie
        return not ended
    except FileNotFoundError:
        return False
    except ChildProcessError:  # another kernel started it
        try:
            return "trainbook" in Path(f"/proc/{process}/cmdline").read_text()
        except OSError:
            return False


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def _gpus() -> list[str]:
    """Product names of the machine's GPUs."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
