"""One of the processes that train a run together: `torchrun -m trainbook.worker MODULE FOLDER SECONDS progress|quiet`."""

import importlib
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from trainbook import distributed
from trainbook.engine import Outcome
from trainbook.files import read_json
from trainbook.processes import die_with_parent, write_outcome
from trainbook.records import EXIT_CODES, RunFolder, new_run_id
from trainbook.run import prepare
from trainbook.runtime import configure_logging, detect

logger = logging.getLogger("trainbook")


def main(workflow: str, path: str, checkpoint_seconds: str, progress: str) -> None:
    """Train the run of a folder with the other processes of this group; the first writes how it ended."""
    die_with_parent()
    # A stop request that comes before training waits for StopSignals in the engine.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    folder = RunFolder(Path(path))
    saved = read_json(folder.config)
    runtime = detect()
    with distributed.joined(runtime.parallel, runtime.device):
        try:
            module = importlib.import_module(workflow)
            run = prepare(module, saved["preset"], saved["config"], authentic=saved["authentic"], folder=folder)
            if distributed.rank() == 0:
                folder.sign()
                configure_logging(run.runtime.log_level, folder.log)
            run.load_data()
            run.build()
            outcome = run.follow(float(checkpoint_seconds), progress == "progress")
        except BaseException as error:
            if distributed.rank() > 0:
                configure_logging(detect().log_level, folder.log)
            logger.error("process %d failed", distributed.rank(), exc_info=True)
            lost = isinstance(error, torch.distributed.DistBackendError) or "by peer" in str(error)
            why = f"a training process died; see {folder.log}" if lost else str(error) or type(error).__name__
            write_outcome(folder, Outcome("failed", why))
            raise
        if distributed.rank() == 0:
            write_outcome(folder, outcome)


def train_in_group(name: str, preset: str, overrides: dict[str, Any], run_id: str, authentic: bool) -> tuple[int | None, str]:
    """Train as one of the processes that `torchrun ... -m trainbook run` started, on this machine and others.

    The runs folder of the first process holds the run; the others need none. Returns an exit code, or None for the first
    process of a run that is trained to its end and wants evaluating; and the run id.
    """
    runtime = detect()
    with distributed.joined(runtime.parallel, runtime.device):
        chosen = distributed.bytes_from_first((run_id or new_run_id(name, preset)).encode()).decode()
        run = prepare(name, preset, overrides, chosen, authentic)
        run.load_data()
        run.build()
        run.train()
        run.leave()
        done = run.trained
        return (None if done and distributed.rank() == 0 else EXIT_CODES["complete" if done else "stopped"]), chosen


if __name__ == "__main__":
    main(*sys.argv[1:])
