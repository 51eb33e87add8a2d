"""Trains a workflow on Kaggle: push, follow, pull, and the next session where this one ended.

    python kaggle/launch.py NAME --preset full

Exits 0 when the run is complete, 1 when it failed, 2 for a mistake, 3 when it is not finished and can go on: judged by
the run.json that came back, never by what the client says.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    from trainbook import bundles
except ImportError:
    sys.exit("run it with the kit's Python: .venv/bin/python kaggle/launch.py (`make .venv/ready` makes it)")
from trainbook.errors import UserError
from trainbook.files import write_json
from trainbook.handover import copy_run
from trainbook.launching import add_run_options, exit_code, keep_pulled, progress_of, read_pulled, say_end, spec_of
from trainbook.records import EXIT_CODES, RunFolder
from trainbook.runtime import KAGGLE_BUDGET_SECONDS, parse_duration
from trainbook.spec import RunSpec

HERE = Path(__file__).resolve().parent
INSTALL = "python3 -m venv kaggle/.venv && kaggle/.venv/bin/pip install kaggle six"

MACHINES = {"": "NvidiaTeslaT4", "T4": "NvidiaTeslaT4", "cpu": "None"}  # a T4 there means two of them
MAX_SLUG = 46  # of 50, so that -s01 has room
SESSION_SECONDS = 12 * 3600
AFTER_TRAINING_SECONDS = 3600  # to save, evaluate and draw
QUOTA_MARGIN_SECONDS = 600
POLL_SECONDS = 20.0
PATIENCE = 15  # polls: how long an answer that cannot be right, or none at all, is put up with
PUSH_ATTEMPTS = 5
ACTIVE = ("QUEUED", "RUNNING", "NEW_SCRIPT", "CANCEL_REQUESTED")

CONTINUES = """# This session continues an earlier one; without its files it would begin anew.
from pathlib import Path

from trainbook.handover import run_folders

if not any(folder.summary()["run_id"] == {run_id!r} for folder in run_folders([Path("/kaggle/input")])):
    raise FileNotFoundError("the earlier part of run {run_id} is not among the inputs")
"""


class Busy(Exception):  # noqa: N818  (a state of the server, not a mistake)
    """No answer, or one that is worth another try."""


class Unfinished(Exception):  # noqa: N818
    """The launcher stops here; the session may go on without it."""


class Client:
    """The Kaggle client in a process of its own.

    Args:
        python: interpreter of the environment that holds the client.
    """

    def __init__(self, python: Path) -> None:
        self._python = python
        self._process: subprocess.Popen[str] | None = None

    def call(self, name: str, within: float = 300, **arguments: Any) -> Any:
        """What one of `client.CALLS` returns.

        Raises:
            Busy: when it may work later.
            UserError: when Kaggle refuses, or does not know who asks.
        """
        timer = threading.Timer(within, self.stop)  # the client itself waits for ever
        timer.start()
        try:
            events = self.events(name, **arguments)
            while True:
                next(events)
        except StopIteration as end:
            return end.value
        finally:
            timer.cancel()

    def events(self, name: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """The events of a call that has some; returns its result."""
        try:
            if self._process is None or self._process.poll() is not None:
                # In a session of its own, so that Ctrl-C does not reach it.
                command = [self._python, "-P", HERE / "client.py"]
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
                )
            process = self._process
            process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                answer = json.loads(line)
                if "event" in answer:
                    yield answer["event"]
                elif "error" in answer:
                    raise self._explained(**answer)
                else:
                    return answer["result"]
        except (OSError, ValueError):  # stopped while it was asked
            pass
        raise Busy("the Kaggle client gave no answer")

    @staticmethod
    def _explained(error: str, kind: str) -> Exception:
        if kind == "busy":
            return Busy(error)
        if kind == "key":
            remedy = "make a token on kaggle.com/settings and put it into ~/.kaggle/access_token or KAGGLE_API_TOKEN"
            return UserError("Kaggle does not accept a key, or found none", remedy)
        return UserError(f"Kaggle says: {error}")

    def patiently(self, name: str, poll: float, **arguments: Any) -> Any:
        """`call`, tried again while the server is busy."""
        for attempt in range(PUSH_ATTEMPTS):
            try:
                return self.call(name, **arguments)
            except Busy:
                if attempt == PUSH_ATTEMPTS - 1:
                    raise
                time.sleep(poll)

    def stop(self) -> None:
        """End the process; the next call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):  # what was never sent
                    pipe.close()


def client_python() -> Path:
    """The interpreter of the Kaggle client: kaggle/.venv, or the one behind the `kaggle` command.

    Raises:
        UserError: when there is none, or it lacks a package that the client forgets to declare.
    """
    command = shutil.which("kaggle")
    with suppress(OSError, UnicodeDecodeError):
        first = Path(command or "").read_text().splitlines()[0] if command else ""
        command = first.removeprefix("#!").strip()
    candidates = [HERE / ".venv" / "bin" / "python", Path(command or "")]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise UserError("the Kaggle client is not installed", INSTALL)
    code = "import importlib.util as u, sys; sys.exit(' '.join(n for n in ('kaggle', 'six') if u.find_spec(n) is None) or 0)"
    done = subprocess.run([found, "-P", "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{found} lacks: {done.stderr.strip()}", INSTALL)
    return found


def slug_of(run_id: str) -> str:
    """What Kaggle calls a run: small letters, digits and hyphens, at most 46 of them, cut ones told apart by a digest."""
    slug = re.sub(r"[^a-z0-9]+", "-", run_id.lower()).strip("-")
    if len(slug) > MAX_SLUG or len(slug) < 6:
        slug = f"{slug[: MAX_SLUG - 9]}-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}".strip("-")
    return slug


def kernel_metadata(kernel: str, spec: RunSpec, internet: bool, sources: dict[str, list[str]]) -> dict[str, Any]:
    """Content of kernel-metadata.json. What the client or the server would choose differently is always written."""
    return {
        "id": kernel,
        "title": kernel.split("/")[1],  # Kaggle makes the name in the address from it
        "code_file": "notebook.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": spec.accelerator != "cpu",
        "enable_tpu": False,
        "enable_internet": internet,
        "machine_shape": MACHINES[spec.accelerator],
        "dataset_sources": sources.get("dataset", []),
        "competition_sources": sources.get("competition", []),
        "kernel_sources": sources.get("kernel", []),
        "model_sources": [],
        "keywords": [],
    }


def write_folder(
    folder: Path, kernel: str, spec: RunSpec, internet: bool, sources: dict[str, list[str]], carry_kit: bool = True
) -> None:
    """Write what `kaggle kernels push` takes: the notebook and its kernel-metadata.json.

    Args:
        folder: where to.
        kernel: OWNER/NAME.
        spec: what to run.
        internet: whether the session may use it.
        sources: of each kind (dataset, competition, kernel), the names of what is attached.
        carry_kit: False when the kit lies in an attached data set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notebook.ipynb").write_bytes(bundles.build_notebook("kaggle", spec, carry_kit))
    write_json(folder / "kernel-metadata.json", kernel_metadata(kernel, spec, internet, sources))


def insist_on_continuing(notebook: Path, run_id: str) -> None:
    """Let a notebook fail in its first seconds where the run that it shall continue is not among its inputs."""
    content = json.loads(notebook.read_text())
    tags = [cell["metadata"].get("tags", []) for cell in content["cells"]]
    cell = {
        "cell_type": "code",
        "execution_count": None,
        "id": "continues",
        "metadata": {},
        "outputs": [],
        "source": CONTINUES.format(run_id=run_id),
    }
    content["cells"].insert(next(index for index, names in enumerate(tags) if "bootstrap" in names) + 1, cell)
    notebook.write_text(json.dumps(content))


def starts(summary: dict[str, Any]) -> list[str]:
    """When the segments of a run began: a session's own one is not among those from before it."""
    return [segment["started"] for segment in summary["segments"]]


@dataclass
class Session:
    """One notebook on Kaggle that trains one part of the run.

    Attributes:
        number: counted from 1.
        version: of the notebook.
        seconds: after which Kaggle ends it.
        status: how it ended.
        continues: the name of the notebook or data set whose files it goes on from.
        is_here: whether the run folder here is what it left.
        was_seen_at_work: False for one that had ended before this launcher came.
    """

    number: int
    version: int
    seconds: float = SESSION_SECONDS
    status: str = ""
    continues: str = ""
    is_here: bool = False
    was_seen_at_work: bool = False


@dataclass
class Launch:
    """One run on Kaggle, from session to session.

    Attributes:
        spec: what to run, with a run id.
        out: the run folder lands here.
        client: the Kaggle client.
        internet: whether the sessions may use it.
        datasets: data sets to attach.
        competitions: competitions to attach.
        poll: seconds between two questions.
    """

    spec: RunSpec
    out: Path
    client: Client
    internet: bool = False
    datasets: list[str] = field(default_factory=list)
    competitions: list[str] = field(default_factory=list)
    poll: float = POLL_SECONDS
    owner: str = ""
    kernels_can_be_attached: bool = True

    @property
    def folder(self) -> RunFolder:
        """The run folder here."""
        return RunFolder(self.out / self.spec.run_id)

    def name(self, number: int) -> str:
        """OWNER/NAME of a session's notebook."""
        return f"{self.owner}/{slug_of(self.spec.run_id)}-s{number:02d}"

    def address(self, session: Session) -> str:
        """Where a session can be seen and stopped."""
        return f"https://www.kaggle.com/code/{self.name(session.number)}"

    def run(self, max_sessions: int, wait: bool) -> int:
        """Start or find the run's newest session and go on until the run is over; returns the exit code."""
        if (process := self.folder.training_process()) is not None:
            raise UserError(f"process {process} is training in {self.folder.path}", "wait for it or stop it first")
        if self.folder.run_json.is_file() and read_pulled(self.folder, self.spec)["status"] == "complete":
            return self._say_end()
        self.owner = self.client.patiently("account", self.poll)["user"]
        session = self._newest_session()
        if session is not None:
            print(f"found session {session.number} of {self.spec.run_id}: {self.address(session)}")
            if not wait:
                return EXIT_CODES["running"]
            if (code := self._finish(session, started_here=False)) is not None:
                return code
        for _ in range(max_sessions):
            session = self._start(session)
            if not wait:
                print(f"running; to follow it and pull its files: add --run-id {self.spec.run_id}")
                return EXIT_CODES["running"]
            if (code := self._finish(session, started_here=True)) is not None:
                return code
        print(f"{max_sessions} sessions are over; the same command with --run-id {self.spec.run_id} goes on")
        return self._say_end()

    def _newest_session(self) -> Session | None:
        """The newest session of this run that Kaggle knows."""
        found = None
        for number in range(1, 100):
            version = self.client.patiently("version", self.poll, kernel=self.name(number))
            if not version:
                break
            found = Session(number, version)
        return found

    def _start(self, last: Session | None) -> Session:
        """Push the next session, with what there is of the run attached."""
        budget = self._session_budget()
        step = progress_of(self.folder)[1]
        session = Session(last.number + 1 if last else 1, 0, min(SESSION_SECONDS, budget + AFTER_TRAINING_SECONDS))
        sources = {"dataset": list(self.datasets), "competition": self.competitions}
        if step >= 0 and last is not None and last.is_here and last.status == "COMPLETE" and self.kernels_can_be_attached:
            session.continues = self.name(last.number)
            sources["kernel"] = [session.continues]
        elif step >= 0:
            session.continues = self._upload_run(step)
            sources["dataset"].append(session.continues)
        spec = self.spec
        if budget < parse_duration(spec.time_budget or str(KAGGLE_BUDGET_SECONDS)):
            spec = spec.model_copy(update={"time_budget": f"{budget:.0f}s"})
        self._push(session, spec, sources)
        where = f" from step {step}" if step >= 0 else ""
        print(f"session {session.number}, version {session.version}{where}: {self.address(session)}")
        return session

    def _session_budget(self) -> float:
        """Seconds to train in the next session: what was asked for, a session's worth, or what the quota still gives."""
        budget = min(parse_duration(self.spec.time_budget or str(KAGGLE_BUDGET_SECONDS)), KAGGLE_BUDGET_SECONDS)
        quota = self.client.patiently("account", self.poll)["quota"]
        if quota is None:
            print("Kaggle does not say what is left of the weekly quota")
            return budget
        left = quota["total_seconds"] - quota["used_seconds"]
        print(
            f"GPU quota of {self.owner}: {left / 3600:.1f} h left of {quota['total_seconds'] / 3600:.0f} h a week, "
            f"renewed {quota['refresh'] or 'weekly'}; this session trains for {budget / 3600:.2g} h at most",
        )
        if self.spec.accelerator == "cpu" or left >= budget + QUOTA_MARGIN_SECONDS:
            return budget
        if left < 2 * QUOTA_MARGIN_SECONDS:
            raise UserError(
                f"the weekly GPU quota is used up until {quota['refresh'] or 'it is renewed'}",
                f"give the same command with --run-id {self.spec.run_id} then, or add --accelerator cpu",
            )
        print(f"it is cut to {(left - QUOTA_MARGIN_SECONDS) / 3600:.1f} h by the quota")
        return left - QUOTA_MARGIN_SECONDS

    def _push(self, session: Session, spec: RunSpec, sources: dict[str, list[str]]) -> None:
        """Push a session's notebook; the kit goes into a data set beside it where the notebook would be too large.

        Raises:
            UserError: when Kaggle refuses it.
        """
        kernel = self.name(session.number)
        with tempfile.TemporaryDirectory() as folder:
            try:
                write_folder(Path(folder), kernel, spec, self.internet, sources)
                answer = self._push_once(kernel, folder, session, spec)
                too_large = "megabyte" in answer["error"]
            except bundles.NotebookTooLarge:
                too_large = True
            if too_large:
                print("the notebook is too large for Kaggle: the kit goes into a private data set")
                sources = sources | {"dataset": [*sources["dataset"], self._upload_kit(spec)]}
                write_folder(Path(folder), kernel, spec, self.internet, sources, carry_kit=False)
                answer = self._push_once(kernel, folder, session, spec)
        if answer["error"]:
            raise UserError(f"Kaggle refused the notebook: {answer['error']}", f"it can be tried again: --run-id {spec.run_id}")
        session.version, session.was_seen_at_work = answer["version"], True
        refused = [name for names in answer["invalid"].values() for name in names]
        if set(refused) - {session.continues}:
            raise UserError(
                f"Kaggle cannot attach {', '.join(refused)}; it started {self.address(session)} without",
                "stop that session on its page, and check the names",
            )
        if refused:
            print(f"Kaggle could not attach {session.continues}")

    def _push_once(self, kernel: str, folder: str, session: Session, spec: RunSpec) -> dict[str, Any]:
        """Push, and after a broken connection look whether it arrived before it is pushed again: each push is a session."""
        if session.continues:
            insist_on_continuing(Path(folder) / "notebook.ipynb", spec.run_id)
        before = self.client.patiently("version", self.poll, kernel=kernel)
        for attempt in range(PUSH_ATTEMPTS):
            try:
                return self.client.call("push", folder=folder, seconds=round(session.seconds))
            except Busy:
                time.sleep(self.poll)
                version = self.client.patiently("version", self.poll, kernel=kernel)
                if version > before:
                    return {"error": "", "version": version, "invalid": {}}
                if attempt == PUSH_ATTEMPTS - 1:
                    raise
        raise AssertionError

    def _finish(self, session: Session, started_here: bool) -> int | None:
        """Wait for a session and pull its files; returns the exit code, or None when another session shall follow."""
        known = starts(self.folder.summary()) if self.folder.run_json.is_file() else []
        message = self._wait(session, known if started_here else None)
        found = self._pull(session)
        if found is None or (started_here and starts(found)[-1] in known):
            return self._without_result(session, message)
        if found["status"] == "stopped" and session.status == "COMPLETE":
            segment = found["segments"][-1]
            if segment["last_step"] > segment["first_step"]:
                steps = f"step {found['step']} of {found['total_steps']}"
                print(f"session {session.number} ended at {steps}: {found['why']}")
                return None
            print("the session trained nothing: give it a longer --time-budget", file=sys.stderr)
        elif message:
            print(f"session {session.number} ended with {session.status}: {message}", file=sys.stderr)
        if not session.was_seen_at_work and found["status"] != "complete":
            return None  # it was over before this launcher came: the person wants another
        return self._say_end()

    def _without_result(self, session: Session, message: str) -> int | None:
        """What to do after a session that brought nothing: go on in another way, or give up."""
        if session.continues == self.name(session.number - 1) and self.kernels_can_be_attached:
            self.kernels_can_be_attached = False
            print("the session could not use the earlier one's files; they go into a private data set now")
            return None
        if not session.was_seen_at_work:
            print(f"session {session.number} ended with {session.status} and brought nothing; another one starts")
            return None
        what = f"session {session.number} ended with {session.status} and wrote no run.json"
        print("\n".join(filter(None, [what, message, f"its log: {self.address(session)}"])), file=sys.stderr)
        return EXIT_CODES["failed"]

    def _wait(self, session: Session, known: list[str] | None) -> str:
        """Follow a session until it has ended; returns the server's message.

        A session that was just pushed may be said to have ended already: that is an older version's state. It counts
        only after this one was seen at work, or when its run.json has come.

        Args:
            session: its `status` is set.
            known: when the segments of the run began that are here already; None for a session that may have ended long ago.
        """
        kernel, log = self.name(session.number), Log(self)
        shown, at_work, began = "", known is None, None
        silent = doubted = 0
        try:
            while True:
                try:
                    answer = self.client.call("status", within=60, kernel=kernel, version=session.version)
                    silent = 0
                except Busy as error:
                    silent += 1
                    if silent > PATIENCE:
                        raise Unfinished(f"Kaggle has not answered for a while: {error}") from None
                    time.sleep(self.poll)
                    continue
                state = answer["status"]
                if state in ACTIVE:
                    at_work = session.was_seen_at_work = True
                    if state == "RUNNING":
                        began = began or time.monotonic()
                        log.follow(kernel)
                    if began and time.monotonic() - began > session.seconds + AFTER_TRAINING_SECONDS:
                        raise Unfinished("the session runs longer than it was given")
                elif at_work or self._has_result(session, known) or doubted >= PATIENCE:
                    session.status = state
                    log.finish(kernel)
                    return answer["message"]
                else:
                    doubted += 1
                    state = f"{state} before it began: an older session's; waiting"
                if state != shown:
                    print(f"[{time.strftime('%H:%M:%S')}] {state.lower()}")
                    shown = state
                time.sleep(self.poll)
        finally:
            log.stop()

    def _has_result(self, session: Session, known: list[str]) -> bool:
        """Whether the session's run.json is there and is not one from before."""
        name = f"runs/{self.spec.run_id}/run.json"
        with tempfile.TemporaryDirectory() as folder, suppress(Busy, UserError):
            self.client.call("pull", **self._pulled_from(session), folder=folder, prefix=name)
            summary = RunFolder(Path(folder) / "runs" / self.spec.run_id).summary()
            return summary.get("run_id") == self.spec.run_id and starts(summary)[-1] not in known
        return False

    def _pulled_from(self, session: Session) -> dict[str, Any]:
        return {"kernel": self.name(session.number), "version": session.version}

    def _pull(self, session: Session) -> dict[str, Any] | None:
        """Bring the session's run folder here, unless the one here got further; returns its summary, None when there is none."""
        partial = self.out / f".{self.spec.run_id}.kaggle"
        shutil.rmtree(partial, ignore_errors=True)
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            self.client.patiently(
                "pull",
                self.poll,
                **self._pulled_from(session),
                folder=str(partial.absolute()),
                prefix=f"runs/{self.spec.run_id}/",
                within=6 * 3600,
            )
            pulled = RunFolder(partial / "runs" / self.spec.run_id)
            if not pulled.run_json.is_file():
                return None
            (pulled.path / "lock").unlink(missing_ok=True)
            summary = read_pulled(pulled, self.spec)
            session.is_here = keep_pulled(pulled.path, self.folder.path)
            return summary
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _upload_run(self, step: int) -> str:
        """Put the run folder of here into a private data set; returns its name."""

        def fill(folder: Path) -> None:
            copy_run(self.folder, folder / self.spec.run_id)

        digest = hashlib.sha256(f"{self.spec.run_id} {step}".encode()).hexdigest()[:8]
        return self._upload(f"{slug_of(self.spec.run_id)[:32]}-{digest}", f"the run up to step {step}", fill)

    def _upload_kit(self, spec: RunSpec) -> str:
        """Put the kit into a private data set; returns its name."""
        wheel = bundles.kit_of(spec)

        def fill(folder: Path) -> None:
            (folder / bundles.WHEEL_NAME).write_bytes(wheel)

        return self._upload(f"trainbook-kit-{hashlib.sha256(wheel).hexdigest()[:12]}", "the kit", fill)

    def _upload(self, slug: str, what: str, fill: Callable[[Path], None]) -> str:
        """A private data set of this name, made where there is none, once Kaggle has it ready."""
        name = f"{self.owner}/{slug}"
        for _ in range(PUSH_ATTEMPTS):
            if self.client.patiently("dataset_status", self.poll, ref=name):
                break
            print(f"uploading {what} as the private data set {name}")
            self.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.out, prefix=".upload-") as folder:
                write_json(
                    Path(folder) / "dataset-metadata.json",
                    {"id": name, "title": slug, "licenses": [{"name": "other"}]},
                )
                fill(Path(folder))
                try:
                    said = self.client.call("dataset", folder=folder, within=6 * 3600)
                except Busy as error:
                    said = str(error)
            if not said:
                break
            time.sleep(self.poll)
        else:
            raise UserError(f"the private data set {name} could not be made: {said}", "try again later")
        for _ in range(20 * PATIENCE):
            state = self.client.patiently("dataset_status", self.poll, ref=name)
            if state == "ready":
                return name
            if state == "failed":
                raise UserError(f"Kaggle could not process the data set {name}", "delete it there and try again")
            time.sleep(self.poll)
        raise Unfinished(f"the data set {name} is still being processed")

    def _say_end(self) -> int:
        """Print what the run folder here says, and return the exit code."""
        summary = self.folder.summary()
        say_end(self.folder, f"{summary['status']}: {summary['why']}", resumable=summary["status"] != "complete")
        return EXIT_CODES.get(summary["status"], EXIT_CODES["failed"])


class Log:
    """A session's log, printed as it comes; a stream that breaks is taken up again where it broke."""

    def __init__(self, launch: Launch) -> None:
        self._client, self._poll = Client(launch.client._python), launch.poll
        self._seen = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, kernel: str) -> None:
        """Print from now on, beside whatever else goes on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._print_until_over, args=(kernel,), daemon=True)
            self._thread.start()

    def finish(self, kernel: str) -> None:
        """Print what is still missing of a session that has ended."""
        self.stop()
        timer = threading.Timer(60, self._client.stop)
        timer.start()
        self._print(kernel)
        timer.cancel()
        self.stop()

    def stop(self) -> None:
        """Print no more."""
        self._over.set()
        self._client.stop()
        if self._thread is not None:
            self._thread.join(5)

    def _print_until_over(self, kernel: str) -> None:
        while not self._over.is_set():
            self._print(kernel)
            self._over.wait(self._poll)

    def _print(self, kernel: str) -> None:
        with suppress(Busy, UserError):
            for event in self._client.events("follow", kernel=kernel, seen=self._seen):
                self._seen += 1
                sys.stdout.write(event["data"] if event["data"].endswith("\n") else event["data"] + "\n")
                sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Launch what the command line says and return the exit code."""
    return exit_code(lambda: command(sys.argv[1:] if arguments is None else arguments))


def command(arguments: list[str]) -> int:
    """`main` without what becomes of a mistake.

    Raises:
        UserError: for a mistake, before anything is pushed.
    """
    parser = argparse.ArgumentParser(prog="kaggle/launch.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add_run_options(parser, arguments, leave_out=("max_price_per_hour", "budget"))
    kaggle = parser.add_argument_group("Kaggle")
    kaggle.add_argument("--wait", action=argparse.BooleanOptionalAction, default=True, help="wait for the end of the run")
    kaggle.add_argument("--internet", action="store_true", help="let the session use it (needs a verified telephone number)")
    kaggle.add_argument("--attach", action="append", default=[], metavar="OWNER/DATASET", help="a data set, under /kaggle/input")
    kaggle.add_argument("--attach-competition", action="append", default=[], metavar="NAME", help="a competition's data")
    kaggle.add_argument("--max-sessions", type=int, default=10, help="at most so many, one after the other (default 10)")
    kaggle.add_argument("--write", type=Path, metavar="DIR", help="only write the folder for `kaggle kernels push -p DIR`")
    kaggle.add_argument("--poll", type=float, default=POLL_SECONDS, help="seconds between two questions to Kaggle (default 20)")
    options = parser.parse_args(arguments)
    spec = spec_of(options)
    if spec.accelerator not in MACHINES:
        raise UserError(f"Kaggle has no accelerator {spec.accelerator!r} for everyone", "choose T4 (there are two) or cpu")
    if options.write:
        sources = {"dataset": options.attach, "competition": options.attach_competition}
        write_folder(options.write, f"OWNER/{slug_of(spec.run_id)}-s01", spec, options.internet, sources)
        print(f"{options.write}: put your user name for OWNER into kernel-metadata.json, then push it")
        return 0
    client = Client(client_python())
    launch = Launch(spec, options.out, client, options.internet, options.attach, options.attach_competition, options.poll)
    print(f"run {spec.run_id}")
    try:
        return launch.run(options.max_sessions, options.wait)
    except (Busy, Unfinished, KeyboardInterrupt) as error:
        print(
            f"\n{error or 'interrupted'}\n  -> a session that was started goes on at kaggle.com, where it can be stopped too; "
            f"the same command with --run-id {spec.run_id} follows it and pulls its files",
            file=sys.stderr,
        )
        return EXIT_CODES["running"]
    finally:
        client.stop()


if __name__ == "__main__":
    sys.exit(main())
