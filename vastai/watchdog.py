"""Watches a run on a box: trains within a deadline, ends what makes no progress, and gives a rented box back.

Runs on the box, in the run's folder, with the standard library only. `onstart.sh` starts it and holds its lock.

    watchdog.py watch          start the job and watch it to its end
    watchdog.py status OFFSET  one line of JSON, then the job's log from that byte on
    watchdog.py sums           SHA-256 of every file of the run folder, as JSON
    watchdog.py end            ask the watchdog to let the job save and stop
"""

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

# Written by the launcher: run_id, price_per_hour, and the four durations that `watch` reads.
SETTINGS = Path("box.json")
LOCK, LOG, STARTED, ENDED, END, PULLED = (Path(name) for name in (".lock", "job.log", "started", "ended.json", "end", "pulled"))
INIT_ENVIRONMENT = Path("/proc/1/environ")  # an ssh session does not inherit the container's environment
LOG_BYTES = 200_000  # at most so much of the log in one answer
TICK_SECONDS = 0.5
PULLED_SECONDS = 60  # the launcher destroys the box itself, unless it dies between the two
API_SECONDS = 30


def watch() -> None:
    """Start the job, wait for its end or bring it about, then give the box back."""
    settings = json.loads(SETTINGS.read_text())
    if not STARTED.exists():
        STARTED.write_text(str(time.time()))
    deadline = float(STARTED.read_text()) + settings["deadline_seconds"]  # holds over restarts of the box
    if not ENDED.exists():
        reason, code = _train(settings, deadline)
        ENDED.write_text(json.dumps({"exit_code": code, "reason": reason}))
        say(f"the job ended with code {code}" + (f": {reason}" if reason else ""))
    if "CONTAINER_ID" not in _environment():
        return  # nobody's meter runs
    waiting = time.time() + settings["unpulled_seconds"]
    while not PULLED.exists() and time.time() < waiting:
        time.sleep(TICK_SECONDS)
    if PULLED.exists():
        time.sleep(PULLED_SECONDS)
    else:
        say("nobody has pulled the run: stopping the box keeps its disk, which still costs; destroy it when you have pulled")
    give_back(destroy=PULLED.exists())


def _train(settings: dict, deadline: float) -> tuple:
    """Run the job to its end; returns why it was made to end, or "", and its exit code."""
    environment = {name: value for name, value in os.environ.items() if name != "CONTAINER_API_KEY"}
    environment["TRAINBOOK_PRICE_PER_HOUR"] = str(settings["price_per_hour"] or "")
    if time.time() >= deadline:
        return "the deadline had passed", None
    END.unlink(missing_ok=True)
    changed = time.time()
    with LOG.open("ab") as log:
        job = subprocess.Popen(
            ["bash", "onstart.sh", "job"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    while job.poll() is None:
        time.sleep(TICK_SECONDS)
        now, reason = time.time(), ""
        if now - changed > settings["no_progress_seconds"]:
            changed = _newest_change(settings["run_id"])
        if END.exists():
            reason = END.read_text() or "the launcher asked for it"
        elif now > deadline:
            reason = "deadline"
        elif now - changed > settings["no_progress_seconds"]:
            reason = f"no progress for {now - changed:.0f} s"
        if reason:
            say(f"ending the job: {reason}")
            _end(job, settings["saving_seconds"])
            return reason, job.returncode
    return "", job.returncode


def _end(job: subprocess.Popen, saving_seconds: float) -> None:
    """Let the job save and stop; kill it when it does not."""
    job.terminate()
    try:
        job.wait(saving_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def _newest_change(run_id: str) -> float:
    """When the log or any file of the run was last written to."""
    times = [LOG.stat().st_mtime]
    for folder, _, names in os.walk(Path("runs", run_id)):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                times.append(Path(folder, name).stat().st_mtime)
    return max(times)


def give_back(destroy: bool) -> None:
    """Destroy this box, or stop it; with the key that the container was given, which is good for this box only."""
    environment = _environment()
    url = f"{environment.get('VAST_URL', 'https://console.vast.ai')}/api/v0/instances/{environment['CONTAINER_ID']}/"
    headers = {"Authorization": f"Bearer {environment.get('CONTAINER_API_KEY')}", "Content-Type": "application/json"}
    calls = [("DELETE", b"{}")] if destroy else []
    calls.append(("PUT", b'{"state": "stopped"}'))
    pause = 1.0
    while True:
        for method, body in calls:
            try:
                urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=API_SECONDS)
            except OSError as error:
                say(f"{method} of this box was refused: {error}")
                if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                    return  # it is gone
                continue
            say("destroyed this box" if method == "DELETE" else "stopped this box: its disk still costs")
            return
        time.sleep(pause)
        pause = min(2 * pause, 60)


def _environment() -> dict:
    """The container's own environment, wherever this process was started from."""
    if "CONTAINER_ID" in os.environ:
        return dict(os.environ)
    try:
        pairs = INIT_ENVIRONMENT.read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def status(offset: int) -> None:
    """Print what the launcher wants to know, in one line, then the log from `offset` on."""
    answer = {"watched": _watched(), "ended": ENDED.exists(), "exit_code": None, "reason": ""}
    if ENDED.exists():
        answer.update(json.loads(ENDED.read_text()))
    run = Path("runs", json.loads(SETTINGS.read_text())["run_id"])
    steps = [int(path.name) for path in run.glob("checkpoints/*") if path.name.isdigit()]
    answer.update(run=(run / "run.json").exists(), checkpoint=max(steps, default=None))
    log = b""
    if LOG.exists():
        with LOG.open("rb") as file:
            file.seek(offset)
            log = file.read(LOG_BYTES)
    sys.stdout.buffer.write(json.dumps({**answer, "offset": offset + len(log)}).encode() + b"\n" + log)


def _watched() -> bool:
    """Whether a watchdog, or the script that becomes one, is alive."""
    with LOCK.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def sums() -> None:
    """Print name to SHA-256 of the run folder's files, without hidden ones and the lock."""
    run = Path("runs", json.loads(SETTINGS.read_text())["run_id"])
    digests = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run)
        if path.is_file() and path.name != "lock" and not any(part.startswith(".") for part in name.parts):
            digest = hashlib.sha256()
            with path.open("rb") as file:
                for block in iter(lambda file=file: file.read(1 << 20), b""):
                    digest.update(block)
            digests[name.as_posix()] = digest.hexdigest()
    print(json.dumps(digests))


def say(text: str) -> None:
    """A line for whoever reads the log, there or at the launcher."""
    with LOG.open("a") as log:
        log.write(f"\n[watchdog] {text}\n")


if __name__ == "__main__":
    command = sys.argv[1]
    if command == "watch":
        watch()
    elif command == "status":
        status(int(sys.argv[2]))
    elif command == "sums":
        sums()
    elif command == "end":
        END.write_text(" ".join(sys.argv[2:]))
