import os

# One thread per process: pytest runs on every core already, and two OpenMP pools on two cores wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "agg"

import pytest
import torch

from trainbook import runtime

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Every test has its own working folder and run folders, and no setting of the person who runs it."""
    for name in (
        runtime.DEVICE,
        runtime.TIME_BUDGET,
        runtime.LOG_LEVEL,
        runtime.PRICE,
        runtime.DATA,
        runtime.INPUTS,
        runtime.MIRROR,
        runtime.CHECKPOINT_EVERY,
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(runtime.RUNS, str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
