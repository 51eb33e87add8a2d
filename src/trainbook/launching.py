"""What the launchers of all platforms share: their command line, and what is done with a run folder that was pulled.

Needs no torch.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from trainbook import catalog
from trainbook.config import allowed_values
from trainbook.errors import UserError
from trainbook.files import file_sha256
from trainbook.handover import whole_checkpoint
from trainbook.records import RunFolder
from trainbook.spec import RunSpec


def add_spec_options(parser: argparse.ArgumentParser, arguments: Sequence[str], without: Sequence[str] = ()) -> None:
    """Add NAME, --spec, --out, --[no-]wait and one option per field of the spec and of the named workflow's config.

    Args:
        parser: of a launcher; values stay text, the spec's class reads and checks them.
        arguments: of the command line, to see which workflow is named.
        without: fields of the spec that mean nothing on this platform.
    """
    names = catalog.names()
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"the workflow: {', '.join(names)}")
    parser.add_argument("--spec", type=Path, metavar="run.toml", help="run what this file says; the options below go before it")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder where the run folder lands (default runs)")
    parser.add_argument("--wait", action=argparse.BooleanOptionalAction, default=True, help="wait for the end of the run")
    parser.add_argument(
        "--authentic", action="store_true", default=argparse.SUPPRESS, help=RunSpec.model_fields["authentic"].description
    )
    shown = {
        name: field
        for name, field in RunSpec.model_fields.items()
        if name not in ("workflow", "overrides", "authentic", *without)
    }
    _add_fields(parser.add_argument_group("the run"), shown)
    for name in [argument for argument in arguments if argument in names][:1]:
        _add_fields(parser.add_argument_group(f"config of {name}"), catalog.load(name).Config.model_fields)


def spec_from_options(options: argparse.Namespace) -> RunSpec:
    """The spec that a launcher's command line describes, with a run id.

    Raises:
        UserError: for everything that is wrong with it.
    """
    given = {name: value for name, value in vars(options).items() if name in RunSpec.model_fields}
    if options.spec is not None:
        if options.name:
            raise UserError(f"{options.spec} says what to run, and so does {options.name}", "give one of the two")
        return RunSpec(**{**RunSpec.read(options.spec).model_dump(), **given}).named()
    if not options.name:
        raise UserError("launch what?", f"name a workflow ({', '.join(catalog.names())}) or give --spec run.toml")
    fields = catalog.load(options.name).Config.model_fields
    overrides = {name: value for name, value in vars(options).items() if name in fields}
    return RunSpec(workflow=options.name, overrides=overrides, **given).named()


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
    for name, digest in summary.get("files", {}).items():
        if not (folder.path / name).is_file() or file_sha256(folder.path / name) != digest:
            raise UserError(f"{name} of {spec.run_id} is missing or altered", "pull the run again: give the same command")
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


def _add_fields(group: Any, fields: dict[str, FieldInfo]) -> None:
    for name, field in fields.items():
        text = " ".join((field.description or "").split()).replace("%", "%%")
        allowed = allowed_values(field)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=text + (f" [{allowed}]" if allowed else ""),
        )
