"""Jobs for the tests of the pool: a fresh process must be able to import them."""

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional


def train(spec, shared):
    """One chunk of a small network's training on shared data: state in, state out."""
    torch.manual_seed(spec["seed"])
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if spec["state"] is not None:
        model.load_state_dict(spec["state"]["model"])
        optimizer.load_state_dict(spec["state"]["optimizer"])
    images, labels = (torch.from_numpy(shared[name]) for name in ("images", "labels"))
    for step in range(spec["first"], spec["first"] + 5):
        batch = slice(64 * step, 64 * step + 64)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loss": loss.item()}


def sleep(seconds, shared):
    time.sleep(seconds)
    return time.monotonic()


def nothing(spec, shared):
    return spec


def describe(spec, shared):
    """What a job sees of its process."""
    return {
        "threads": torch.get_num_threads(),
        "process": os.getpid(),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "random": torch.rand(1).item() if spec else None,
    }


def fail(spec, shared):
    raise RuntimeError(f"no way to do {spec}")


def die(spec, shared):
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(path, shared):
    if not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def scribble(name, shared):
    """A job that breaks the rule."""
    shared[name][:] = 0
    return float(shared[name].sum())
