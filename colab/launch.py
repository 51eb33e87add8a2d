"""Trains a workflow on Colab from the terminal, through Google's own command line (google-colab-cli), and brings the run back.

python colab/launch.py NAME --preset laptop     open a session, train, pull checkpoints, give the session back
The same command with --run-id ID goes on with what it finds: a session that still trains, or the last pulled checkpoint.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import remote

from trainbook.bundles import build_box
from trainbook.errors import RunFailed, UserError
from trainbook.handover import copy_run, whole_checkpoint
from trainbook.launching import add_run_options, exit_code, judge, say_verdict, spec_of, without
from trainbook.records import EXIT_CODES, RunFolder
from trainbook.runtime import parse_duration
from trainbook.spec import RunSpec

# The command line takes any other name for an A100 without a word.
ACCELERATORS = ("T4", "L4", "G4", "A100", "H100")
CALL_SECONDS, TRANSFER_SECONDS, START_SECONDS = 120, 900, 900
TRIES, PAUSE_SECONDS = 4, 5.0
MAX_FRUITLESS_SESSIONS = 3  # in a row, none of which brought a new checkpoint
GRACE_SECONDS = 180  # to save and stop when interrupted
LOST = ("not found.", "appears to be lost", "No active sessions")


class SessionLost(Exception):  # noqa: N818  (what happened, not whose fault)
    """The session is gone or no longer answers."""


class Session:
    """A Colab session, spoken to through the command line.

    Its exit code says nothing of what was run there (`colab exec` ends with 0 after an error): only `remote`'s answers count.

    Args:
        client: path of the `colab` program.
        name: of the session.
        run_id: the run it is for; its files lie in a folder of that name.
        secrets: never shown, whatever the client prints.
    """

    def __init__(self, client: str, name: str, run_id: str, secrets: list[str]) -> None:
        self.client, self.name, self.run_id, self._secrets = client, name, run_id, secrets
        self.folder = f"trainbook-{run_id}"

    def open(self, accelerator: str) -> None:
        """Ask Colab for a machine.

        Raises:
            RunFailed: when it gives none.
        """
        self._call("stop", "-s", self.name)  # one of that name that no longer answers would be lost sight of, and cost on
        gpu = [] if accelerator == "cpu" else ["--gpu", accelerator or "T4"]
        done = self._call("new", "-s", self.name, *gpu, seconds=START_SECONDS)
        if done.returncode != 0:
            raise RunFailed(f"Colab gave no machine: {self._said(done)}")
        self._exec(f"import os; os.makedirs({self.folder!r}, exist_ok=True)")
        self.put(Path(remote.__file__), "remote.py")

    def is_training(self) -> bool:
        """Whether a session of this name is there in which the run is being trained, or was to its end."""
        try:
            return bool(self.ask("look", run_id=self.run_id, tries=1)["run_id"])
        except (SessionLost, RunFailed):
            return False

    def ask(self, function: str, tries: int = TRIES, seconds: float = CALL_SECONDS, **arguments: Any) -> dict[str, Any]:
        """The answer of a function of `remote`.

        Raises:
            SessionLost: when the session is gone, or gave no answer in several tries.
            RunFailed: when the function itself failed.
        """
        call = ", ".join([repr(function), repr(self.folder), *(f"{name}={value!r}" for name, value in arguments.items())])
        path = f"import sys\nif {self.folder!r} not in sys.path:\n    sys.path.insert(0, {self.folder!r})"
        code = f"{path}\nimport remote\nremote.answer({call})\n"
        for attempt in range(tries):
            if attempt:
                time.sleep(PAUSE_SECONDS * attempt)
            done = self._exec(code, seconds)
            lines = [line for line in done.stdout.splitlines() if line.startswith(remote.ANSWER)]
            if lines:
                found = json.loads(lines[-1].removeprefix(remote.ANSWER))
                if "error" in found:
                    raise RunFailed(f"on the Colab machine, {function}: {without(found['error'], self._secrets)}")
                return found
            self._check_there(done)
        raise SessionLost(f"no answer to {function}: {self._said(done)}")

    def put(self, path: Path, name: str, descriptors: tuple[int, ...] = ()) -> None:
        """Upload a file into the run's folder."""
        self._transfer("upload", str(path), f"content/{self.folder}/{name}", descriptors)

    def get(self, name: str, path: Path) -> None:
        """Download a file from the run's folder."""
        self._transfer("download", f"content/{self.folder}/{name}", str(path))

    def close(self) -> None:
        """Give the machine back; what cannot be given back is said loudly, it may cost money."""
        done = self._call("stop", "-s", self.name)
        if done.returncode != 0:
            print(f"THE SESSION MAY STILL RUN: {self._said(done)}\n  -> colab stop -s {self.name}", file=sys.stderr)

    def _exec(self, code: str, seconds: float = CALL_SECONDS) -> subprocess.CompletedProcess:
        return self._call("exec", "-s", self.name, "--timeout", str(seconds), seconds=seconds + CALL_SECONDS, text=code)

    def _transfer(self, command: str, source: str, target: str, descriptors: tuple[int, ...] = ()) -> None:
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE_SECONDS * attempt)
            done = self._call(command, "-s", self.name, source, target, seconds=TRANSFER_SECONDS, descriptors=descriptors)
            if done.returncode == 0:
                return
            self._check_there(done)
        raise SessionLost(f"{command} failed: {self._said(done)}")

    def _check_there(self, done: subprocess.CompletedProcess) -> None:
        if done.returncode != 0 and any(mark in done.stdout + done.stderr for mark in LOST):
            raise SessionLost(self._said(done))

    def _call(
        self, *arguments: str, seconds: float = CALL_SECONDS, text: str = "", descriptors: tuple[int, ...] = ()
    ) -> subprocess.CompletedProcess:
        try:
            return subprocess.run(
                [self.client, *arguments], input=text, capture_output=True, text=True, timeout=seconds, pass_fds=descriptors
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(arguments, 124, "", f"no end after {seconds:.0f} s")

    def _said(self, done: subprocess.CompletedProcess) -> str:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return without(" / ".join(lines[-3:]), self._secrets) or f"exit code {done.returncode}"


def main(arguments: list[str]) -> int:
    """Check everything, then train; returns the kit's exit code, judged by the run.json that came back."""
    parser = argparse.ArgumentParser(prog="colab/launch.py", description=__doc__, allow_abbrev=False)
    add_run_options(parser, arguments, leave_out=("max_price_per_hour", "budget"))
    parser.add_argument(
        "--key", action="append", default=[], metavar="NAME", help="hand this environment variable to the training"
    )
    parser.add_argument("--pull-every", default="10m", help="bring the newest checkpoint here this often (default 10m)")
    parser.add_argument("--poll-seconds", type=float, default=15.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    spec = spec_of(options)
    pull_seconds = parse_duration(options.pull_every)
    if spec.accelerator not in ("", "cpu", *ACCELERATORS):
        raise UserError(f"Colab has no accelerator {spec.accelerator!r}", f"choose one of: {', '.join(ACCELERATORS)}, cpu")
    if absent := [name for name in options.key if not os.environ.get(name)]:
        raise UserError(f"{', '.join(absent)} is not set here", "export it, or leave out --key")
    client = shutil.which("colab")
    if client is None:
        raise UserError(
            "the Colab command line is not installed",
            "uv tool install google-colab-cli (it needs Python 3.12); then: colab usage",
        )
    run = RunFolder(options.out.absolute() / spec.run_id)
    if run.run_json.is_file() and (verdict := judge(run.path, spec.run_id)).code == EXIT_CODES["complete"]:
        return say_verdict(verdict, run)
    if run.config.is_file() and (process := run.training_process()) is not None:
        raise UserError(f"process {process} is training in {run.path}", "wait for it or stop it first")
    print(f"run {spec.run_id}, {spec.workflow} {spec.preset}, on Colab's {spec.accelerator or 'T4'}; lands in {run.path}")
    print("A paid account is charged compute units while the session is open; `colab usage` shows the rate.")
    keys = {name: os.environ[name] for name in options.key}
    session = Session(client, spec.run_id, spec.run_id, list(keys.values()))
    fruitless = 0
    while fruitless < MAX_FRUITLESS_SESSIONS:
        before = _pulled_step(run)
        try:
            train(session, spec, run, keys, pull_seconds, options.poll_seconds)
            break
        except SessionLost as error:
            fruitless = 0 if _pulled_step(run) > before else fruitless + 1
            print(f"the session is lost ({error}); the run goes on from step {max(0, _pulled_step(run))} in a new one")
    return say_verdict(judge(run.path, spec.run_id), run)


def train(
    session: Session, spec: RunSpec, run: RunFolder, keys: dict[str, str], pull_seconds: float, poll_seconds: float
) -> None:
    """Train in one session, from what is here to the end, and bring the run back; the session is given back in every case.

    Raises:
        SessionLost: when it went away; what was pulled before is whole.
        RunFailed: when Colab gives no machine, another one than was asked for, or the run cannot be started.
    """
    try:
        if session.is_training():
            print("a session of this run is there: following it")
        else:
            session.open(spec.accelerator)
            _start(session, spec, run, keys)
        offset, pulled, asked = 0, time.monotonic(), _pulled_step(run)
        while True:
            seen = session.ask("look", run_id=spec.run_id, offset=offset)
            offset = seen["offset"]
            if seen["log"]:
                print(seen["log"], end="", flush=True)
                continue
            if not seen["alive"]:
                break
            if seen["checkpoint"] > asked and time.monotonic() - pulled >= pull_seconds:
                try:
                    pull(session, run)
                except RunFailed as error:
                    print(f"nothing pulled this time: {error}", flush=True)
                pulled, asked = time.monotonic(), _pulled_step(run)
            time.sleep(poll_seconds)
        if not seen["run_id"]:
            raise RunFailed("the run did not begin; what it printed is above")
        pull(session, run)
    except KeyboardInterrupt:
        print("\ninterrupted: saving, bringing the run here, giving the session back", flush=True)
        with suppress(SessionLost, RunFailed):
            session.ask("stop", tries=1)
            ends = time.monotonic() + GRACE_SECONDS
            while session.ask("look", run_id=spec.run_id, tries=1)["alive"] and time.monotonic() < ends:
                time.sleep(1)
            pull(session, run)
    finally:
        session.close()


def pull(session: Session, run: RunFolder) -> None:
    """Bring the run folder here, whole and verified; what was here before stays until then."""
    packed = session.ask("pack", run_id=session.run_id, seconds=TRANSFER_SECONDS)
    run.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{run.path.name}-", dir=run.path.parent) as folder:
        archive, digest = Path(folder, "run.tar"), hashlib.sha256()
        with archive.open("wb") as whole:
            for name in packed["parts"]:
                session.get(name, Path(folder, name))
                piece = Path(folder, name).read_bytes()
                digest.update(piece)
                whole.write(piece)
                Path(folder, name).unlink()
        if digest.hexdigest() != packed["sha256"]:
            raise SessionLost("what was downloaded is not what was packed")
        with tarfile.open(archive) as content:
            content.extractall(folder, filter="data")
        fresh = RunFolder(Path(folder, session.run_id))
        if packed["step"] >= 0 and whole_checkpoint(fresh) != packed["step"]:
            raise SessionLost("the checkpoint that was downloaded is not whole")
        if packed["step"] < _pulled_step(run):
            return  # never less than what is here
        aside = Path(folder, "old")
        if run.path.exists():
            run.path.rename(aside)
        fresh.path.rename(run.path)
    if packed["step"] >= 0:
        print(f"pulled the checkpoint of step {packed['step']}", flush=True)


def _start(session: Session, spec: RunSpec, run: RunFolder, keys: dict[str, str]) -> None:
    """Upload the box, with the run so far, and let it train."""
    with tempfile.TemporaryDirectory() as folder:
        box = build_box(spec, Path(folder, "box"))
        if run.config.is_file() and copy_run(run, box / "runs" / spec.run_id) is not None:
            print(f"taking along the run so far, step {_pulled_step(run)}")
        archive = Path(folder, "box.tar.gz")
        with tarfile.open(archive, "w:gz", compresslevel=1) as content:
            content.add(box, "box")
        parts, digest = [], hashlib.sha256()
        with archive.open("rb") as content:
            while piece := content.read(remote.PART_BYTES):
                digest.update(piece)
                parts.append(f"box.{len(parts):04d}")
                Path(folder, parts[-1]).write_bytes(piece)
                session.put(Path(folder, parts[-1]), parts[-1])
    if keys:
        with _unnamed_file("".join(f"{name}={value}\n" for name, value in keys.items())) as (path, descriptor):
            session.put(path, "keys", (descriptor,))
    answer = session.ask("start", seconds=START_SECONDS, parts=parts, sha256=digest.hexdigest(), keys="keys" if keys else "")
    wanted = "" if spec.accelerator == "cpu" else spec.accelerator or "T4"
    if wanted and not any(wanted in name for name in answer["gpus"]):
        found = ", ".join(answer["gpus"]) or "no GPU"
        raise RunFailed(f"Colab gave {found} instead of {wanted}; the session is given back before it costs more")


@contextmanager
def _unnamed_file(text: str) -> Iterator[tuple[Path, int]]:
    """A file in memory that only this process and its child can open, so that a key is never on the disk."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("keys")
        try:
            os.write(descriptor, text.encode())
            yield Path(f"/proc/self/fd/{descriptor}"), descriptor
        finally:
            os.close(descriptor)
    else:  # macOS has none: a file that only its owner can read, for as long as the upload takes
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(text)
            file.flush()
            yield Path(file.name), file.fileno()


def _pulled_step(run: RunFolder) -> int:
    step = whole_checkpoint(run) if run.config.is_file() else None
    return -1 if step is None else step


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
