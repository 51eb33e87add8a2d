"""Runs a workflow's notebook headless, as Kaggle does. The only user of papermill and jupytext."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import papermill
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from papermill.parameterize import parameterize_notebook

from trainbook.catalog import Workflow
from trainbook.files import write_json
from trainbook.records import BAD_INPUT, EXIT_CODES, RunFolder


def run_notebook(
    workflow: Workflow,
    folder: RunFolder,
    parameters: dict[str, Any],
    notebook: Path | None = None,
    stop: threading.Event | None = None,
    ends_early: Callable[[], bool] | None = None,
) -> int:
    """Execute the workflow's notebook with its output shown here, and return the kit's exit code.

    Ctrl-C and SIGTERM are passed on to the kernel that trains: it saves and stops, and the notebook runs to its end.
    The executed notebook lands in the run folder once there is one; a run that never started leaves nothing.

    Args:
        workflow: what to run.
        folder: its run folder; need not exist yet.
        parameters: values of the notebook's `parameters` cell.
        notebook: the file, where it is not the one in the source tree.
        stop: set when a signal came, so that the caller knows even of a run that was complete by then.
        ends_early: asked while the run goes on; True stops it as a signal would, and `stop` stays as it is.

    Returns:
        0 complete, 1 failed, 2 bad input, 3 stopped and resumable; judged by run.json, not by papermill.
    """
    notebook = notebook or workflow.notebook
    runs_folder_is_new = not folder.path.parent.exists()
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    output = folder.path.parent / f".{folder.path.name}.ipynb"
    errors: list[BaseException] = []

    def execute() -> None:
        try:
            papermill.execute_notebook(
                str(notebook),
                str(output),
                parameters,
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                cwd=Path.cwd(),
                extra_arguments=["--log-level=ERROR"],
                coalesce_streams=True,  # one line of progress in the notebook, not one per refresh
            )
        except BaseException as error:
            errors.append(error)

    # In a thread, because nbclient answers Ctrl-C in the main thread by killing the kernel, and the last minute with it.
    thread = threading.Thread(target=execute, daemon=True)
    stop_requested = stop or threading.Event()

    def request_stop(number: int, frame: Any) -> None:
        stop_requested.set()

    previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    thread.start()
    ended = delivered = False
    try:
        while thread.is_alive():
            thread.join(0.2)
            ended = ended or (ends_early is not None and ends_early())
            if (ended or stop_requested.is_set()) and not delivered:
                if not folder.run_json.exists():
                    break  # nothing has been trained yet, so there is nothing to wait for
                if (process := folder.training_process()) is not None:  # else it is still starting
                    delivered = True
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGTERM)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if output.exists():
        if folder.path.exists():
            output.replace(folder.notebook)
        else:
            output.unlink()
    if runs_folder_is_new and not any(folder.path.parent.iterdir()):
        folder.path.parent.rmdir()
    return _judge(folder, errors[0] if errors else None, ended or stop_requested.is_set())


def with_parameters(notebook: NotebookNode, parameters: dict[str, Any]) -> NotebookNode:
    """A notebook with a cell of parameters where papermill puts it, for a platform that runs it without any."""
    notebook.metadata["papermill"] = {}
    for cell in notebook.cells:
        cell.metadata.setdefault("tags", [])
    notebook = parameterize_notebook(notebook, parameters)
    del notebook.metadata["papermill"]
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.tags:
            cell["id"] = "injected-parameters"  # papermill's is drawn at random
        if not cell.metadata.tags:
            del cell.metadata["tags"]
    return notebook


def _judge(folder: RunFolder, error: BaseException | None, stop_requested: bool) -> int:
    if not folder.run_json.exists() and stop_requested:
        print("Interrupted before training began; there is nothing to resume.", file=sys.stderr)
        return EXIT_CODES["failed"]
    status = folder.summary()["status"] if folder.run_json.exists() else ""
    if status == "running" and folder.training_process() is None and not isinstance(error, PapermillExecutionError):
        # The kernel is gone and could not say so itself: killed, out of memory, or stopped while it evaluated. An error
        # in a cell is another matter: the kernel lived, and a run that had been cut off before stays as it was.
        status, why = ("stopped", "interrupted") if stop_requested else ("failed", f"the kernel died: {error}")
        write_json(folder.run_json, {**folder.summary(), "status": status, "why": why})
    if stop_requested and status == "stopped":
        return EXIT_CODES["stopped"]
    if isinstance(error, PapermillExecutionError):
        print(f"{error.ename}: {error.evalue}", file=sys.stderr)
        if error.ename == "UserError":
            return BAD_INPUT
    elif error is not None:
        print(f"the notebook could not be run: {error}", file=sys.stderr)
    return EXIT_CODES["failed"] if error is not None else EXIT_CODES.get(status, EXIT_CODES["failed"])
