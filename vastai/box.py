"""A box that ssh reaches: files go there and come back, commands run there, and a broken connection is made again."""

import json
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainbook.checkpoints import numbered
from trainbook.errors import UserError
from trainbook.handover import whole_checkpoint
from trainbook.launching import differing
from trainbook.records import RunFolder

CONNECTION_LOST = 255  # ssh's exit code for its own failures
RSYNC_AGAIN = {10, 11, 12, 20, 23, 30, 35, CONNECTION_LOST, -9, -15}  # cut off somewhere; what arrived stays
RSYNC_FINE = {0, 24}  # 24: a file went away meanwhile, such as an old checkpoint
COMMAND_SECONDS = 300
TRANSFER_SECONDS = 6 * 3600
KEPT_CHECKPOINTS = 2
SECRETS = ("VAST_API_KEY",)  # no child that talks to a box has it
FOREVER = ("Host key verification failed", "IDENTIFICATION HAS CHANGED", "Could not resolve hostname")


class BoxLost(Exception):  # noqa: N818  (the state of the box)
    """The box does not answer, or cannot train; its last words."""


@dataclass
class Box:
    """One machine, and the folder of one run on it.

    Args:
        target: user@host, or a name of ssh's own configuration.
        run_id: the run; its folder is `trainbook/<run_id>` in the home folder there.
        options: of ssh, such as port and identity.
        patience: for so many seconds a lost connection is made again.
        trusted: a box of one's own: its host key must be known, and a refused key ends it at once (a rented box may still
            be taking it up).
    """

    target: str
    run_id: str
    options: list[str]
    patience: float
    trusted: bool = False
    _private: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="tb-", dir="/tmp")))  # a socket's path is short
    _log_read: int = 0

    @property
    def folder(self) -> str:
        """The run's folder there, from the home folder."""
        return f"trainbook/{self.run_id}"

    def ssh_options(self) -> list[str]:
        """Keys only, the host's key checked, one connection for all commands, a dead one noticed in a minute."""
        given = {
            "BatchMode": "yes",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "ConnectTimeout": "15",
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "4",
            "ControlMaster": "auto",
            "ControlPath": f"{self._private}/%C",
            "ControlPersist": "60",
        }
        if not self.trusted:
            # The key of a rented box is not known beforehand: taken at the first contact, then it must stay the same.
            given |= {"StrictHostKeyChecking": "accept-new", "UserKnownHostsFile": f"{self._private}/known_hosts"}
        return [part for name, value in given.items() for part in ("-o", f"{name}={value}")] + self.options

    def run(self, command: str, patience: float | None = None) -> bytes:
        """Run a command there and return what it printed; a lost connection is made again for a while.

        Raises:
            BoxLost: when the box cannot be reached any more, or the command failed.
            UserError: when it does not let us in, or is not the machine it was.
        """
        done = self._persist(["ssh", *self.ssh_options(), self.target, command], {CONNECTION_LOST}, patience, COMMAND_SECONDS)
        if done.returncode:
            raise BoxLost(f"{self.target}: exit code {done.returncode}: {_last_words(done)}")
        return done.stdout

    def send(self, folder: Path) -> None:
        """Copy a folder's files into the run's folder there, going on where a broken transfer stopped."""
        self._rsync([f"{folder}/", f"{self.target}:{self.folder}/"])

    def _rsync(self, arguments: list[str]) -> None:
        shell = shlex.join(["ssh", *self.ssh_options()])
        # No owners and modes, links followed where they lie, the half of a file kept; 60 s without a byte is a break.
        command = ["rsync", "-rtL", "--partial-dir=.rsync-partial", "--timeout=60", "-e", shell, *arguments]
        done = self._persist(command, RSYNC_AGAIN, None, TRANSFER_SECONDS)
        if done.returncode not in RSYNC_FINE:
            raise BoxLost(f"{self.target}: rsync's exit code {done.returncode}: {_last_words(done)}")

    def _persist(
        self, command: list[str], again: set[int], patience: float | None, limit: float
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a local command until it ends otherwise than by a broken connection, or patience does."""
        environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
        patience = self.patience if patience is None else patience
        first, pause = time.monotonic(), 0.5
        while True:
            try:
                done = subprocess.run(
                    command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, start_new_session=True
                )
            except subprocess.TimeoutExpired:
                done = subprocess.CompletedProcess(command, CONNECTION_LOST, b"", b"no answer")
            if done.returncode not in again:
                return done
            self._refuse_what_will_not_change(done.stderr.decode(errors="replace"))
            if time.monotonic() - first > patience:
                raise BoxLost(f"{self.target} does not answer: {_last_words(done)}")
            time.sleep(pause)
            pause = min(2 * pause, 15)

    def _refuse_what_will_not_change(self, said: str) -> None:
        if any(words in said for words in FOREVER):
            if not self.trusted:
                raise BoxLost(f"{self.target}: {said.strip().splitlines()[-1]}")
            raise UserError(
                f"{self.target}: {said.strip().splitlines()[-1]}",
                f"log in once by hand and compare the fingerprint it shows: ssh {self.target}",
            )
        if self.trusted and "Permission denied" in said:
            raise UserError(
                f"{self.target} takes none of your keys", f"`ssh-copy-id {self.target}`, or name the right key with --identity"
            )

    # The protocol: what onstart.sh and watchdog.py understand

    def check(self) -> None:
        """Refuse a box that lacks what the protocol needs."""
        script = "for tool in bash rsync flock setsid sha256sum; do command -v $tool >/dev/null || echo $tool; done"
        missing = self.run(script).decode().split()
        if missing:
            raise UserError(f"{self.target} has no {', '.join(missing)}", f"on it: apt-get install {' '.join(missing)}")

    def furthest(self) -> int | None:
        """Step of the newest checkpoint that lies there, whole or not."""
        found = self.run(f"ls {self.folder}/runs/{self.run_id}/checkpoints 2>/dev/null || true").decode().split()
        return max((int(name) for name in found if name.isdigit()), default=None)

    def push(self, files: Path) -> None:
        """Bring the files there, check them against SHA256SUMS, and say that they are all there.

        Raises:
            BoxLost: when they cannot be brought there whole.
        """
        stale = "started pulled ended.json end pushed"
        self.run(
            f"mkdir -p {self.folder} && cd {self.folder} && rm -f {stale}"
            + (f" && rm -rf runs/{self.run_id}" if (files / "runs").exists() else "")
        )
        self.send(files)
        self.run(f"cd {self.folder} && sha256sum --quiet --check SHA256SUMS && touch pushed")

    def start(self) -> None:
        """Start the watchdog, which starts the job; does nothing where one is at work."""
        # The braces leave no shell behind that would hold the connection open until the run ends.
        self.run(f"cd {self.folder} && {{ setsid bash onstart.sh </dev/null >>onstart.log 2>&1 & }}; sleep 0.2")

    def status(self) -> tuple[dict[str, Any], str]:
        """What the watchdog's program says, and what is new in the job's log."""
        answer = self.run(f"cd {self.folder} && bash onstart.sh status {self._log_read}")
        line, _, log = answer.partition(b"\n")
        try:
            status = json.loads(line)
        except ValueError:
            raise BoxLost(f"{self.target} answers nonsense: {line[:200]!r}") from None
        self._log_read = status["offset"]
        return status, log.decode(errors="replace")

    def watched(self) -> bool:
        """Whether a watchdog is at work there on files that were pushed."""
        pushed = self.run(f"test -f {self.folder}/pushed && echo yes || true").decode().strip()
        if not pushed:
            return False
        watched = self.status()[0]["watched"]
        self._log_read = 0
        return watched

    def end(self, why: str) -> None:
        """Ask the watchdog to let the job save and stop."""
        self.run(f"cd {self.folder} && bash onstart.sh end {shlex.quote(why)}")

    def pull(self, run: RunFolder) -> None:
        """Bring the run folder here: checkpoints first, run.json last, so that what is here always fits together."""
        run.path.mkdir(parents=True, exist_ok=True)
        there = f"{self.target}:{self.folder}/runs/{self.run_id}/"
        common = ["--exclude=.*", "--exclude=/lock"]
        self._rsync([*common, "--include=/checkpoints/***", "--exclude=*", there, f"{run.path}/"])
        self._rsync([*common, "--exclude=/checkpoints/", "--exclude=/run.json", there, f"{run.path}/"])
        self._rsync([*common, "--include=/run.json", "--exclude=*", there, f"{run.path}/"])

    def pull_whole(self, run: RunFolder, attempts: int = 3) -> list[str]:
        """Pull a run that has ended and compare every file's SHA-256; returns the names that differ all the same."""
        damaged: list[str] = []
        for _ in range(attempts):
            self.pull(run)
            digests = json.loads(self.run(f"cd {self.folder} && bash onstart.sh sums"))
            damaged = differing(run.path, digests)
            if not damaged:
                break
            for name in damaged:  # same size and time, other content: rsync would leave it
                (run.path / name).unlink(missing_ok=True)
        drop_old_checkpoints(run)
        return damaged

    def say_pulled(self) -> None:
        """Tell the watchdog that the box holds nothing that is not here."""
        self.run(f"touch {self.folder}/pulled")

    def close(self) -> None:
        """End the connection."""
        subprocess.run(
            ["ssh", *self.ssh_options(), "-O", "exit", self.target], capture_output=True, timeout=30, stdin=subprocess.DEVNULL
        )
        shutil.rmtree(self._private, ignore_errors=True)


def drop_old_checkpoints(run: RunFolder) -> int | None:
    """Step of the newest whole checkpoint; of the older ones as many stay as a run keeps, for the box has dropped them too."""
    step = whole_checkpoint(run)
    if step is not None:
        older = [path for path in numbered(run.checkpoints) if int(path.name) <= step]
        for path in older[KEPT_CHECKPOINTS:]:
            shutil.rmtree(path)
    return step


def _last_words(done: subprocess.CompletedProcess[bytes]) -> str:
    said = done.stderr.decode(errors="replace").strip() or done.stdout.decode(errors="replace").strip()
    return said.splitlines()[-1] if said else "not a word"
