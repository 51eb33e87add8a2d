"""Runs a workflow in a child process, where it can be killed, and compares what two runs left behind."""

import importlib
import multiprocessing
import os
import resource
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainbook import catalog, mirror, runtime
from trainbook.checkpoints import STATE_FILE
from trainbook.records import RunFolder
from trainbook.run import Run, prepare

REPOSITORY = Path(__file__).resolve().parents[1]
SIGNAL = "TEST_SIGNAL"  # step and number of the signal that the first of several processes sends itself
CHILDREN = multiprocessing.get_context("forkserver")
# The first optimizer of a process imports torch._dynamo, for seconds. Modules that a workflow does not have are passed over.
_PARTS = [f"trainbook.workflows.{name}.{part}" for name in catalog.names() for part in ("training", "images", "data")]
CHILDREN.set_forkserver_preload(["tests.driving", "torch._dynamo", *_PARTS])

# Every stage has some hundred quick steps, two blocks of timesteps, and epochs that end inside a stage.
SMALL_DBN = {
    "max_train_images": 128,
    "autoencoder_epochs": 20,
    "epochs_per_timestep": 12,
    "baseline_epochs": 20,
    "autoencoder_width": 8,
    "code_channels": (2, 2, 4),
    "hidden_units": (12, 8, 8),
    "block_size": 2,
}
STAGES = {"autoencoder": (1, 80), "chain": (81, 176), "baselines": (177, 256)}  # first and last step of SMALL_DBN


@dataclass(frozen=True)
class Drive:
    """One training session in a child process.

    Attributes:
        workflow: a workflow's name, or the dotted path of a module that keeps the contract.
        signal_step: at this step (in this session's records) send `signal_number` to the process, `delay` seconds later; of
            several processes to the first, at once.
        processes, parallel: how many train together, and what each keeps of the weights.
        file_limit: no file may grow beyond so many bytes once that step is reached: a full disk.
        mirror: a folder to copy the run to, looked after every few milliseconds.
        pause: wait this long after each step.
    """

    runs: Path
    run_id: str
    overrides: dict[str, Any] = field(default_factory=lambda: SMALL_DBN)
    workflow: str = "timestep_dbn"
    checkpoint_seconds: float = 0.1
    signal_step: int = -1
    signal_number: int = signal.SIGKILL
    delay: float = 0.0
    file_limit: int = 0
    time_budget: str = ""
    processes: int = 1
    parallel: str = "copies"
    mirror: str = ""
    pause: float = 0.0

    def __call__(self) -> int:
        """Start the child, wait for it, and return its exit code (negative: the signal that ended it)."""
        child = CHILDREN.Process(target=_session, args=(self,))
        child.start()
        child.join()
        return child.exitcode

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.runs / self.run_id)


def _session(drive: Drive) -> None:
    torch.set_num_threads(1)
    os.environ[runtime.TIME_BUDGET] = drive.time_budget
    os.environ[runtime.RUNS] = str(drive.runs)
    os.environ[runtime.PROCESSES] = str(drive.processes)
    os.environ[runtime.PARALLEL] = drive.parallel
    os.environ[runtime.MIRROR] = drive.mirror
    mirror.Mirror.__init__.__defaults__ = (0.005, 0.5)
    workflow = importlib.import_module(drive.workflow) if "." in drive.workflow else drive.workflow
    run = prepare(workflow, "smoke", drive.overrides, drive.run_id)
    run.load_data()
    run.build()
    if drive.processes == 1:
        run.workflow = _Disturbed(run.workflow, drive)
    else:  # they build the workflow themselves
        os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        os.environ[SIGNAL] = f"{drive.signal_step} {drive.signal_number}"
    run.train(checkpoint_seconds=drive.checkpoint_seconds, progress=False)
    run.leave()


class _Disturbed:
    """A workflow whose training is hit by a signal or a full disk at a chosen step."""

    def __init__(self, workflow: Any, drive: Drive) -> None:
        self._workflow, self._drive = workflow, drive

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workflow, name)

    def train(self, config: Any, data: Any, state: Any) -> Any:
        for record in self._workflow.train(config, data, state):
            if state.step == self._drive.signal_step:
                if self._drive.file_limit:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (self._drive.file_limit, resource.RLIM_INFINITY))
                else:
                    threading.Timer(self._drive.delay, os.kill, (os.getpid(), self._drive.signal_number)).start()
            yield record
            time.sleep(self._drive.pause)


def train_and_draw(run: Run) -> Run:
    """Call the methods of a notebook's cells one after the other, all but `finish`, in this process."""
    run.load_data()
    run.build()
    run.train(progress=False)
    run.evaluate()
    run.draw()
    return run


def checkpoints(folder: RunFolder) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(path for path in folder.checkpoints.iterdir() if path.name.isdigit())


def final_state(folder: RunFolder) -> dict[str, Any]:
    """The state in a run's newest checkpoint."""
    return torch.load(checkpoints(folder)[-1] / STATE_FILE, weights_only=True)


def assert_identical(a: Any, b: Any, where: str = "state") -> None:
    """Fail unless two nested states hold the same keys and bit-identical tensors."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_identical(*pair, f"{where}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    """Fail unless two runs left byte-identical records and bit-identical weights and optimizers."""
    assert one.metrics.read_bytes() == other.metrics.read_bytes()
    assert_identical(final_state(one), final_state(other))
