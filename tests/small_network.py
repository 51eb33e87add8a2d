"""A small network, its batches and losses, for the tests of a training step."""

import io

import torch
from torch import nn
from torch.nn import functional

from trainbook.optimization import OptimizationConfig
from trainbook.stepper import Stepper


def small_network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def examples(number, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 5, dtype=dtype, generator=generator), torch.randint(3, (number,), generator=generator)


def loss_of(network, batch):
    return functional.cross_entropy(network(batch[0]), batch[1])


def times(factor):
    return lambda network, batch: loss_of(network, batch) * factor


def stepper_of(network, total_steps=100, **choices):
    return Stepper(network, OptimizationConfig(**choices), total_steps)


def weights_of(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def gradient_of(network):
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def correct(network, batch):
    return (network(batch[0]).argmax(1) == batch[1]).double().mean()


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
]


class Memory:
    """A loss function for which memory suffices up to a number of examples; remembers the sizes it was given."""

    def __init__(self, limit, error, in_backward=False):
        self.limit, self.error, self.in_backward, self.sizes = limit, error, in_backward, []

    def __call__(self, network, batch):
        self.sizes.append(len(batch[0]))
        loss = loss_of(network, batch)
        if len(batch[0]) > self.limit:
            if not self.in_backward:
                raise self.error
            loss.register_hook(self.fail)
        return loss

    def fail(self, gradient):
        raise self.error


def hand_over(one, other):
    """What a checkpoint carries from one stepper to another."""
    file = io.BytesIO()
    torch.save([one.module.state_dict(), one.state_dict()], file)
    file.seek(0)
    for part, saved in zip((other.module, other), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
