"""A run without a person: all that can be checked first, then its notebook, then how it ended."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainbook import catalog, runtime
from trainbook.errors import UserError
from trainbook.launching import say_end
from trainbook.records import RunFolder, check_run_id, check_unchanged, identity, new_run_id


def execute(
    name: str,
    preset: str,
    overrides: dict[str, Any],
    run_id: str = "",
    authentic: bool = False,
    notebook: Path | None = None,
    stop: threading.Event | None = None,
    ends_early: Callable[[], bool] | None = None,
) -> int:
    """Check everything that can be checked before a kernel is started, then run the notebook.

    Args:
        name: of the workflow.
        preset, overrides, run_id, authentic: as `run.start` takes them.
        notebook: the file, where it is not the one in the source tree.
        stop: set when a signal asked for an end, whether or not the run came to its own before.
        ends_early: asked while the run goes on; True lets it save and stop.

    Returns:
        0 complete, 1 failed, 2 bad input, 3 stopped and resumable.

    Raises:
        UserError: for what `run.start` refuses without looking at the device, or a folder in which a process is training.
    """
    if runtime.group_size() > 1:
        from trainbook.worker import train_in_group

        code, run_id = train_in_group(name, preset, overrides, run_id, authentic)
        if code is not None:
            return code
        runtime.leave_group()
    from trainbook.execution import run_notebook

    # The device is for the kernel alone: looking at it here would import torch, and hold memory on a GPU all the time.
    run_id = check_run_id(run_id) or new_run_id(name, preset)
    workflow, folder = catalog.load(name), RunFolder(runtime.detect(hardware=False).runs_folder / run_id)
    folder.check(identity(name, preset, workflow.Config.from_preset(preset, overrides), authentic))
    folder.check_writable()
    if authentic:
        check_unchanged()
    if (process := folder.training_process()) is not None:
        raise UserError(f"process {process} is training in {folder.path}", "wait for it or stop it first")
    code = run_notebook(
        workflow,
        folder,
        {"preset": preset, "overrides": overrides, "run_id": run_id, "authentic": authentic},
        notebook,
        stop,
        ends_early,
    )
    if folder.run_json.exists():
        summary = folder.summary()
        ending = f"{summary['status']}: {summary['why']}"
        say_end(folder, ending, resumable=summary["status"] != "complete", launched=False)
    return code
