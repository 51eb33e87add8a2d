import logging
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
    for name in runtime.SETTINGS.values():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(runtime.RUNS, str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def log_as_at_the_start(monkeypatch):
    """What an earlier test's run did to the kit's log, and to what is captured of it, is undone."""
    logger = logging.getLogger("trainbook")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "handlers", [])
    logger.setLevel(logging.NOTSET)
    yield
    for handler in logger.handlers:
        handler.close()
