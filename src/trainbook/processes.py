"""Trains a run in several processes of this machine: starts them through torchrun, shows their output, reads how they ended.

accelerate's launcher calls torchrun too, but only for GPUs (on CPUs it wants MPI), and it takes settings from a file in the
user's home that could change a run unseen.
"""

import codecs
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

from trainbook.engine import Outcome
from trainbook.errors import RunFailed
from trainbook.files import last_line, read_json, write_json
from trainbook.live import Progress
from trainbook.records import RunFolder
from trainbook.runtime import group_environment
from trainbook.signals import StopSignals

PR_SET_PDEATHSIG = 1  # prctl(2)
WATCH_SECONDS = 1.0
LIBC = ctypes.CDLL(None)


def train_in_processes(
    folder: RunFolder,
    workflow: str,
    number: int,
    deadline: float | None,
    checkpoint_seconds: float,
    progress: bool,
    watch: Callable[[Progress], bool] | None = None,
) -> Outcome:
    """Train the run of a folder in so many processes, each on its own GPU where there are GPUs, and wait for them.

    A stop request that reaches this process is passed on to the first of them, which saves and stops with the others.
    Should this process die, they are told to stop.

    Args:
        folder: with the run's config, claimed by this process; the others keep it claimed if this one dies.
        workflow: dotted name of its module.
        number: of processes.
        deadline: `time.monotonic()` value at which they save and stop, or None.
        checkpoint_seconds: time between checkpoints.
        progress: whether the first shows a progress bar.
        watch: shown once a second what the run folder says of the progress; True asks for a stop.

    Raises:
        RunFailed: with the reason of the first process that failed.
    """
    folder.outcome.unlink(missing_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    bar = "progress" if progress else "quiet"
    worker = ["-m", "trainbook.worker", workflow, str(folder.path), str(checkpoint_seconds), bar]
    with (
        StopSignals() as signals,
        subprocess.Popen(
            torchrun + worker,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=group_environment(deadline, number),
            start_new_session=True,  # a notebook's interrupt goes to its whole process group; here it goes through us
            pass_fds=[folder.lock_descriptor],
            preexec_fn=die_with_parent,
        ) as launcher,
    ):
        try:
            _wait(launcher, signals, folder, watch)
        except BaseException:  # a second Ctrl-C
            _end(launcher)
            raise
    return _outcome(folder, launcher.returncode)


def _wait(launcher: subprocess.Popen, signals: StopSignals, folder: RunFolder, watch: Callable[[Progress], bool] | None) -> None:
    """Show what the processes say until they have ended, and pass a stop request on once."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    os.set_blocking(launcher.stdout.fileno(), False)
    told = asked = False
    watched = time.monotonic()
    while True:
        if watch is not None and time.monotonic() - watched >= WATCH_SECONDS:
            asked = watch(_progress(folder)) or asked
            watched = time.monotonic()
        ended = launcher.poll() is not None  # asked first, so that its last words are read
        chunk = launcher.stdout.read()
        if chunk:
            sys.stderr.write(decode(chunk))
            sys.stderr.flush()
        elif ended:
            return
        else:
            time.sleep(0.1)
        first = folder.training_process()
        if (signals.received or asked) and not told and first not in (None, os.getpid()):  # else they are still starting
            os.kill(first, signal.SIGTERM)
            told = True


def _progress(folder: RunFolder) -> Progress:
    record, reading = last_line(folder.metrics), last_line(folder.system)
    step, total = max(record.get("step", 0), reading.get("step", 0)), folder.summary()["planned_steps"]
    numbers = {name: [(record["step"], value)] for name, value in record.items() if isinstance(value, float)}
    return Progress(step, total, record.get("stage", ""), numbers, reading)


def _end(launcher: subprocess.Popen) -> None:
    launcher.terminate()  # torchrun gives its processes 30 seconds to save and stop
    os.set_blocking(launcher.stdout.fileno(), True)
    while launcher.stdout.read(1 << 16):  # what they still say must find a reader
        pass
    launcher.wait()


def _outcome(folder: RunFolder, exit_code: int) -> Outcome:
    """What the processes wrote about how they ended."""
    if not folder.outcome.exists():
        raise RunFailed(f"a training process died without a word (torchrun's exit code {exit_code}); see {folder.log}")
    ending = read_json(folder.outcome)
    folder.outcome.unlink()
    if ending["status"] == "failed":
        raise RunFailed(ending["why"])
    return Outcome(**ending)


def die_with_parent() -> None:
    """Have this process told to stop when the one that started it dies."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def write_outcome(folder: RunFolder, outcome: Outcome) -> None:
    """Say how training ended, unless another process has already said why it failed."""
    if not folder.outcome.exists():
        write_json(folder.outcome, asdict(outcome))
