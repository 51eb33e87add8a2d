"""Several processes train what one process trains."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.driving import REPOSITORY, Drive, assert_same_run, final_state
from trainbook import distributed
from trainbook.errors import UserError
from trainbook.files import read_json

STEPS = 200
EVERYTHING = {
    "dropout": 0.0,
    "steps": STEPS,
    "schedule": "cosine",
    "warmup_steps": 20,
    "clip_norm": 1.0,
    "label_smoothing": 0.1,
    "ema_decay": 0.95,
    "accumulation": 2,
    "validate_every": 40,
}
KINDS = ("copies", "slices", "pipeline")
# Whole copies on every process are the easiest to stop and to go on with: what cuts weights or layers goes through it by default.
INTERRUPTED = (pytest.param("copies", marks=pytest.mark.slow), "slices", "pipeline")
STARTUP_SECONDS = 300  # torchrun and its processes load torch first; on a busy machine that takes its time


def drive(runs, run_id, overrides=EVERYTHING, **choices):
    return Drive(runs, run_id, overrides, "tests.digits_classifier", **choices)


def assert_close(ours, theirs):
    assert ours.pop("stage") == theirs.pop("stage")
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process, two with a copy each, a slice each, a stage each: the same run to its end."""
    folder = tmp_path_factory.mktemp("runs")
    assert drive(folder, "one")() == 0
    for kind in KINDS:
        assert drive(folder, kind, processes=2, parallel=kind)() == 0
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_follow_the_curve_of_one(runs, kind):
    one, two = drive(runs, "one").folder, drive(runs, kind).folder
    assert len(two.history()) == len(one.history()) == STEPS
    for ours, theirs in zip(two.history(), one.history(), strict=True):
        assert_close(ours, theirs)
    weights = [final_state(folder)["modules"]["model"] for folder in (one, two)]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-5)
    assert read_json(two.run_json)["segments"][0]["processes"] == 2


def test_a_checkpoint_is_the_same_thing_whoever_wrote_it(runs):
    def shapes(value):
        if isinstance(value, dict):
            return {key: shapes(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [shapes(part) for part in value]
        return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else type(value)

    one, *others = (shapes(final_state(drive(runs, kind).folder)) for kind in ("one", *KINDS))
    assert others == [one] * len(KINDS)


@pytest.mark.parametrize("kind", INTERRUPTED)
def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path, kind):
    """One process, then two, then one."""
    several = {"processes": 2, "parallel": kind}
    sessions = [{"signal_step": 70}, {"signal_step": 140, **several}, {}]
    for session in sessions:
        assert drive(tmp_path, "moved", signal_number=signal.SIGTERM, **session)() == 0
    folder = drive(tmp_path, "moved").folder
    segments = read_json(folder.run_json)["segments"]
    assert [s["processes"] for s in segments] == [1, 2, 1]
    assert 70 <= segments[1]["first_step"] < 140 <= segments[2]["first_step"] < STEPS
    history, expected = folder.history(), drive(runs, "one").folder.history()
    assert [record["step"] for record in history] == list(range(1, STEPS + 1))
    assert [r["loss"] for r in history] == pytest.approx([r["loss"] for r in expected], rel=2e-4)


@pytest.mark.parametrize("kind", INTERRUPTED)
def test_two_processes_killed_and_resumed_are_bit_identical(runs, tmp_path, kind):
    several = {"processes": 2, "parallel": kind}
    killed = drive(tmp_path, "killed", checkpoint_seconds=0.02, signal_step=150, **several)
    assert killed() == 1  # whoever waits for the processes lives on and says what happened
    summary = read_json(killed.folder.run_json)
    assert summary["status"] == "failed"
    assert "a training process died" in summary["why"]
    assert drive(tmp_path, "killed", **several)() == 0
    assert read_json(killed.folder.run_json)["segments"][1]["first_step"] > 0
    assert_same_run(killed.folder, drive(runs, kind).folder)


def test_the_reason_of_a_failing_process_reaches_run_json(tmp_path):
    failing = drive(tmp_path, "failing", EVERYTHING | {"learning_rate": 100.0, "optimizer": "sgd", "clip_norm": 0.0}, processes=2)
    assert failing() == 1
    summary = read_json(failing.folder.run_json)
    assert summary["status"] == "failed"
    assert "non-finite" in summary["why"]
    assert "RunFailed" in (failing.folder.logs / "errors.log").read_text()


def test_a_batch_per_process_doubles_the_global_batch(tmp_path):
    overrides = {"dropout": 0.0, "steps": 20}
    two = drive(tmp_path, "two", overrides | {"batch_scaling": "per_process"}, processes=2)
    one = drive(tmp_path, "one", overrides | {"batch_size": 96})
    assert two() == one() == 0
    losses = [[record["loss"] for record in run.folder.history()] for run in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_torchrun_on_two_machines_is_the_same_command(runs, tmp_path):
    """Two torchruns that meet over the network, one process each, runs folders of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    overrides = [f"--{name.replace('_', '-')}={value}" for name, value in EVERYTHING.items()]

    def node(number):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={number}"]
        command += ["--master-addr=127.0.0.1", f"--master-port={port}", "-m", "tests.digits_command", "run", "digits_classifier"]
        command += ["--preset=smoke", "--run-id=both", *overrides]
        notebook = (
            (REPOSITORY / "notebooks" / "timestep_dbn.ipynb")
            .read_text()
            .replace("from trainbook.workflows import", "from tests import digits_command,")
        )
        (tmp_path / "digits_classifier.ipynb").write_text(notebook.replace("timestep_dbn", "digits_classifier"))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            "TEST_NOTEBOOKS": str(tmp_path),
            "TRAINBOOK_RUNS": str(tmp_path / f"node{number}"),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    nodes = [node(0), node(1)]
    outputs = [process.communicate(timeout=STARTUP_SECONDS)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], "\n".join(outputs)
    assert not (tmp_path / "node1").exists() or not any((tmp_path / "node1").iterdir())
    one, both = drive(runs, "one").folder, drive(tmp_path / "node0", "both").folder
    for ours, theirs in zip(both.history(), one.history(), strict=True):
        assert_close(ours, theirs)
    assert read_json(both.run_json)["segments"][0]["processes"] == 2


def test_shared_weights_cannot_be_cut_into_slices():
    tied = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    with pytest.raises(UserError, match="share a weight"):
        distributed.shard(tied)
