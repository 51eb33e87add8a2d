import logging
import os
import signal

# One thread per process: pytest runs on every core already, and two OpenMP pools on two cores wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "agg"

import pytest
import torch

from trainbook import runtime

torch.set_num_threads(1)

# A shell that starts the suite with & has it ignore Ctrl-C, and what a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Taken first, longest first, so that no worker is left with one of them when the others have done.
LONGEST = (
    "distributed",
    "bundles",
    "resume",
    "command_line",
    "notebooks",
    "contract",
    "colab_launcher",
    "colab",
    "chain",
    "blocks",
)


def pytest_collection_modifyitems(items):
    """Put the files that take a minute or more at the front."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Every test has its own working folder and run folders, and no setting of the person who runs it."""
    before = dict(os.environ)
    for name in runtime.SETTINGS.values():
        os.environ.pop(name, None)
    os.environ[runtime.RUNS] = str(tmp_path / "runs")
    os.environ[runtime.DATA] = str(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    yield
    os.environ.clear()  # a command line hands its options to its children through the environment
    os.environ.update(before)


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
