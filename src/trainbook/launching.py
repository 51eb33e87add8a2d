"""What every platform's launcher needs: the command line, the spec it says, and the verdict on what came back. Needs no torch."""

import argparse
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic.fields import FieldInfo

from trainbook import catalog
from trainbook.config import allowed_values
from trainbook.errors import RunFailed, UserError
from trainbook.files import file_sha256
from trainbook.handover import whole_checkpoint
from trainbook.records import BAD_INPUT, EXIT_CODES, RunFolder
from trainbook.spec import RunSpec

HIDDEN = "hidden from a launcher's text"


@dataclass(frozen=True)
class Verdict:
    """How a run ended.

    Attributes:
        code: 0 complete, 1 failed, 2 bad input, 3 stopped and resumable.
        text: one line for a person.
    """

    code: int
    text: str


def add_run_options(
    parser: argparse.ArgumentParser,
    arguments: list[str],
    leave_out: tuple[str, ...] = (),
    also: dict[str, str] | None = None,
) -> None:
    """Add NAME, --spec, --out, and one option for each field of the run spec and of the workflow's config.

    Args:
        parser: gets the options; those not given are absent from what it parses.
        arguments: the command line; its workflow decides which config fields there are.
        leave_out: fields of the spec that mean nothing on this platform.
        also: field of the spec to a second, shorter spelling, such as {"max_price_per_hour": "--max-price"}.
    """
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"workflow: {', '.join(catalog.names())}")
    parser.add_argument("--spec", type=Path, metavar="run.toml", help="what to run, instead of NAME; options given beside it win")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="where the run folder lands (default runs)")
    parser.add_argument(
        "--authentic",
        action="store_true",
        default=argparse.SUPPRESS,
        help=_help(RunSpec.model_fields["authentic"]),
    )
    elsewhere = ("workflow", "overrides", "authentic", *leave_out)
    for name, field in RunSpec.model_fields.items():
        if name not in elsewhere:
            _add_option(parser, name, field, (also or {}).get(name))
    workflow = _workflow_of(arguments)
    if workflow is not None:
        group = parser.add_argument_group(f"fields of {workflow.name}")
        for name, field in workflow.Config.model_fields.items():
            _add_option(group, name, field)


def spec_of(options: argparse.Namespace) -> RunSpec:
    """The run spec that a command line says, with a run id.

    Raises:
        UserError: when it names no workflow or two, or a value is out of range.
    """
    if bool(options.name) == bool(options.spec):
        raise UserError("run what?", "give either a workflow's NAME or --spec run.toml")
    values = RunSpec.read(options.spec).model_dump() if options.spec else {"workflow": options.name}
    fields = catalog.load(values["workflow"]).Config.model_fields
    given = vars(options)
    values |= {name: given[name] for name in RunSpec.model_fields if name in given}
    values["overrides"] = values.get("overrides", {}) | {name: given[name] for name in fields if name in given}
    return RunSpec(**values).named()


def judge(folder: Path, run_id: str) -> Verdict:
    """What a run folder that was pulled from a platform says of the run, which alone counts.

    Every file of a complete run is compared with its checksum in run.json, a checkpoint of an unfinished one with its
    manifest. A run.json of another run counts as none.
    """
    run = RunFolder(folder)
    try:
        summary = run.summary()
    except UserError:
        return Verdict(EXIT_CODES["failed"], f"failed: nothing came back of {run_id}")
    if summary.get("run_id") != run_id:
        return Verdict(EXIT_CODES["failed"], f"failed: {folder} holds {summary.get('run_id')}, not {run_id}")
    status = summary.get("status", "")
    if status == "complete":
        damaged = differing(folder, summary.get("files", {}))
        if damaged:
            return Verdict(EXIT_CODES["failed"], f"failed: complete, but damaged on the way here: {', '.join(damaged)}")
        return Verdict(EXIT_CODES["complete"], f"complete: {summary.get('why')}; every checksum of run.json fits")
    if status in ("stopped", "running"):
        step = whole_checkpoint(run)
        why = summary.get("why") or "cut off"
        there = "there is no checkpoint to resume from" if step is None else f"it can go on from step {step}"
        return Verdict(EXIT_CODES["stopped"], f"stopped: {why}; {there}")
    return Verdict(EXIT_CODES["failed"], f"failed: {summary.get('why')}")


def say_end(folder: RunFolder, ending: str, resumable: bool, launched: bool = True) -> None:
    """Print how a run ended, where it lies, and what continues it.

    Args:
        folder: of the run; a line about what is not there is left out.
        ending: one line.
        resumable: whether to say how it goes on.
        launched: on a platform: the command that did so goes on there.
    """
    print(f"\n{ending}")
    if folder.path.is_dir():
        print(f"run     {folder.path}")
    if folder.report.is_file():
        print(f"report  {folder.report}")
    if resumable:
        name = folder.path.name
        here = f"trainbook resume {folder.path if launched else name}"
        print(f"resume  the same command with --run-id {name}; or here: {here}" if launched else f"resume  {here}")


def say_verdict(verdict: Verdict, folder: RunFolder) -> int:
    """Print how a run on a platform ended, and return its exit code."""
    say_end(folder, verdict.text, resumable=verdict.code == EXIT_CODES["stopped"])
    return verdict.code


def differing(folder: Path, digests: dict[str, str]) -> list[str]:
    """Names of the files in a folder that are missing or whose SHA-256 is not the one given."""
    return [name for name, digest in digests.items() if not (folder / name).is_file() or file_sha256(folder / name) != digest]


def without(text: str, secrets: list[str]) -> str:
    """A text in which no secret stands, for what a platform's client says."""
    for secret in secrets:
        if len(secret) > 3:
            text = text.replace(secret, f"[{HIDDEN}]")
    return text


@contextmanager
def stopping_by_signal() -> Iterator[None]:
    """SIGTERM and a closed terminal interrupt like Ctrl-C, so that `finally` gives back what was rented."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No signal interrupts what gives back what was rented."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_code(command: Callable[[], int]) -> int:
    """Run a launcher's command and return its exit code; a mistake of the user's is said in a line, without a traceback."""
    sys.stdout.reconfigure(line_buffering=True)  # progress shows in a pipe too
    try:
        with stopping_by_signal():
            return command()
    except UserError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except RunFailed as error:
        print(error, file=sys.stderr)
        return EXIT_CODES["failed"]
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_CODES["stopped"]


def _workflow_of(arguments: list[str]) -> catalog.Workflow | None:
    """The workflow that a command line is about, or None: then it asks for help, or is wrong, which `spec_of` says."""
    for at, argument in enumerate(arguments):
        if argument == "--spec" or argument.startswith("--spec="):
            path = argument.partition("=")[2] or "".join(arguments[at + 1 : at + 2])
            return catalog.load(RunSpec.read(Path(path)).workflow)
    return next((catalog.load(argument) for argument in arguments if argument in catalog.names()), None)


def _add_option(parser: Any, name: str, field: FieldInfo, also: str | None = None) -> None:
    """One option; its value stays text, the class reads and checks it."""
    flags = [f"--{name.replace('_', '-')}", *([also] if also else [])]
    parser.add_argument(*flags, dest=name, default=argparse.SUPPRESS, metavar="VALUE", help=_help(field))


def _help(field: FieldInfo) -> str:
    allowed = allowed_values(field)
    return " ".join((field.description or "").split()).replace("%", "%%") + (f" [{allowed}]" if allowed else "")


def read_pulled(folder: RunFolder, spec: RunSpec) -> dict[str, Any]:
    """The summary of a run folder that came back, after it was found to be this very run's and whole.

    Args:
        folder: what was pulled.
        spec: what was launched.

    Returns:
        The content of run.json.

    Raises:
        UserError: when it is another run's, or a file of a complete run is missing or altered.
    """
    summary = folder.summary()
    if summary.get("run_id") != spec.run_id:
        raise UserError(f"{folder.path} is run {summary.get('run_id')}, not {spec.run_id}", "choose another --run-id")
    if (found := summary.get("config_sha256")) != (wanted := spec.config().sha256()):
        raise UserError(
            f"run {spec.run_id} was started with another config: SHA-256 {str(found)[:12]}..., now {wanted[:12]}...",
            "give the options it was started with, or choose another --run-id",
        )
    if damaged := differing(folder.path, summary.get("files", {})):
        raise UserError(f"damaged on the way here: {', '.join(damaged)} of {spec.run_id}", "give the same command again")
    return summary


def progress_of(folder: RunFolder) -> tuple[bool, int]:
    """How far a run folder got, to compare two of the same run: whether complete, and the step it can go on from (-1: none)."""
    if not folder.run_json.is_file():
        return False, -1
    step = whole_checkpoint(folder)
    return folder.summary().get("status") == "complete", -1 if step is None else step


def keep_pulled(pulled: Path, target: Path) -> bool:
    """Put a run folder that was pulled in the place of the one that is there, unless that one got further.

    Args:
        pulled: the new folder, on the same disk; gone afterwards.
        target: where the run's folder lies; replaced in one move.

    Returns:
        Whether the pulled folder was kept.
    """
    if target.exists() and progress_of(RunFolder(target)) > progress_of(RunFolder(pulled)):
        shutil.rmtree(pulled)
        return False
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    target.parent.mkdir(parents=True, exist_ok=True)
    pulled.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return True
