"""Where a run happens, from marks that the platforms leave."""

import os
import time

import pytest
import torch

from trainbook import runtime
from trainbook.errors import UserError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("45s", 45), ("20m", 1200), ("11h", 39600), ("1h30m", 5400), ("0.5h", 1800), ("1h1m1s", 3661)],
)
def test_durations(text, seconds):
    assert runtime.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5 days", "-3m", "h", "m5"])
def test_what_is_no_duration(text):
    with pytest.raises(UserError, match="is not a duration"):
        runtime.parse_duration(text)


def test_kaggle_is_told_from_colab_though_its_image_is_built_from_colabs(monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert runtime.detect().platform == "colab"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    found = runtime.detect()
    assert found.platform == "kaggle"
    assert 10.9 * 3600 < found.deadline - time.monotonic() <= 11 * 3600


def test_a_time_budget_given_wins(monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv(runtime.TIME_BUDGET, "20m")
    assert runtime.detect().deadline - time.monotonic() <= 1200


def test_a_bad_log_level_is_refused(monkeypatch):
    monkeypatch.setenv(runtime.LOG_LEVEL, "loud")
    with pytest.raises(UserError, match="DEBUG, INFO, WARNING, ERROR"):
        runtime.detect()


def test_every_choice_has_its_reason():
    found = runtime.detect()
    assert all(found.reasons[name] for name in ("platform", "device", "dtype", "time budget"))


def test_both_of_kaggles_gpus_train_unless_told_otherwise(monkeypatch):
    for name, value in (("is_available", True), ("device_count", 2), ("get_device_capability", (7, 5))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(runtime, "_device", lambda wanted: ("cuda:0", "a test says so"))
    assert runtime.detect().processes == 1  # two GPUs elsewhere may be somebody else's
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    found = runtime.detect()
    assert (found.processes, found.reasons["processes"]) == (2, "Kaggle gave 2 GPUs")
    assert ["processes", "2, each with a copy of the weights", "Kaggle gave 2 GPUs"] in found.rows()
    monkeypatch.setenv(runtime.PROCESSES, "auto")
    assert runtime.detect().processes == 2
    monkeypatch.setenv(runtime.PROCESSES, "1")
    assert runtime.detect().processes == 1
    monkeypatch.delenv(runtime.PROCESSES)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")  # one of the two itself
    assert runtime.detect().processes == 1
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setattr(runtime, "_device", lambda wanted: ("cpu", "a test says so"))
    assert runtime.detect().processes == 1


def test_what_is_told_about_processes_workers_and_checkpoints(monkeypatch, tmp_path):
    found = runtime.detect()
    assert (found.processes, found.workers, found.keep, found.checkpoint_seconds, found.elsewhere) == (1, 0, 2, 60.0, {})
    assert found.parallel == "copies"
    assert found.jobs == len(os.sched_getaffinity(0))  # on a CPU
    told = {
        "JOBS": "6",
        "PARALLEL": "pipeline",
        "PROCESSES": "3",
        "WORKERS": "4",
        "KEEP": "5",
        "CHECKPOINT_EVERY": "5m",
        "CHECKPOINT_DIR": "far",
        "LOG_DIR": "/logs",
    }
    for name, value in told.items():
        monkeypatch.setenv(getattr(runtime, name), value)
    found = runtime.detect()
    assert (found.processes, found.workers, found.keep, found.checkpoint_seconds) == (3, 4, 5, 300.0)
    assert found.jobs == 6
    assert ["processes", "3, each with a stage of the weights", f"{runtime.PROCESSES}=3"] in found.rows()
    assert {name: str(place) for name, place in found.elsewhere.items()} == {"checkpoints": f"{tmp_path}/far", "logs": "/logs"}


def test_checkpoints_and_logs_mean_the_run_folders_own(monkeypatch):
    monkeypatch.setenv(runtime.CHECKPOINT_DIR, "checkpoints")
    monkeypatch.setenv(runtime.LOG_DIR, "logs")
    assert runtime.detect().elsewhere == {}


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        *((runtime.PROCESSES, value, 1) for value in ("0", "-1", "two", "1.5", "all")),
        *((runtime.WORKERS, value, 0) for value in ("-1", "many", "2.0")),
        *((runtime.JOBS, value, 1) for value in ("0", "-1", "both")),
        *((runtime.KEEP, value, 1) for value in ("0", "-2", "all")),
    ],
)
def test_what_is_no_number_of_processes_workers_or_checkpoints(name, value, least, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value} is not a whole number from {least} on"):
        runtime.detect()


@pytest.mark.parametrize("value", ["soon", "0s"])
def test_checkpoints_need_a_time_between_them(value, monkeypatch):
    monkeypatch.setenv(runtime.CHECKPOINT_EVERY, value)
    with pytest.raises(UserError, match=value):
        runtime.detect()


def test_an_unknown_way_to_train_in_parallel_is_refused(monkeypatch):
    monkeypatch.setenv(runtime.PARALLEL, "tensor")
    with pytest.raises(UserError, match=r"(?s)PARALLEL=tensor.*copies, slices, pipeline"):
        runtime.detect()
