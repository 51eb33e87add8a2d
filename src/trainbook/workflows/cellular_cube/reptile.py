"""Routers that learn to be adapted: two domains in turn, and after each turn the routers keep a share of what they learned."""

import torch
from torch import Tensor, nn

from trainbook.data import Batches


class Alternating:
    """Batches of two domains in turns of so many steps; a function of (seed, step).

    Args:
        first, second: batches of each domain, of one size.
        num_steps: of a turn.
    """

    def __init__(self, first: Batches, second: Batches, num_steps: int) -> None:
        self.domains, self.num_steps = (first, second), num_steps
        self.batch_size, self.per_epoch = first.batch_size, first.per_epoch + second.per_epoch

    def __call__(self, step: int) -> dict[str, Tensor]:
        """The batch of a step: each domain goes on where its last turn ended."""
        turn, within = divmod(step, self.num_steps)
        return self.domains[turn % 2](turn // 2 * self.num_steps + within)


class Reptile(nn.Module):
    """At the end of a turn the routers' weights go back: theta <- theta_0 + epsilon (theta' - theta_0).

    theta_0 is what they were when the turn began and theta' what its steps on one domain made of them; all other weights keep
    what they learned, and so do the optimizer's moments. Kept in `TrainState.modules`, so that a turn outlasts a checkpoint. What
    is validated, or ends, within a turn has the weights of that moment.

    Args:
        network: with `routers_in` and `routers_out`.
        num_steps: of a turn.
        share: epsilon, in (0, 1]; 1 changes nothing.

    Source: Nichol, Achiam, Schulman (2018), On First-Order Meta-Learning Algorithms, algorithm 1 (serial), section 3.
    """

    def __init__(self, network: nn.Module, num_steps: int, share: float) -> None:
        super().__init__()
        self.num_steps, self.share = num_steps, share
        for key, parameter in _routers(network).items():
            self.register_buffer(key, parameter.detach().clone())
        self.register_buffer("num_turns", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def begin(self, network: nn.Module) -> None:
        """Take the weights of now for theta_0 of the first turn."""
        for key, parameter in _routers(network).items():
            self.get_buffer(key).copy_(parameter)

    @torch.no_grad()
    def settle(self, network: nn.Module, steps_done: int) -> None:
        """Where a turn has just ended, move the weights back and begin the next; once, however often it is called."""
        turns, within = divmod(steps_done, self.num_steps)
        if within or turns == int(self.num_turns):
            return
        self.num_turns.fill_(turns)
        for key, parameter in _routers(network).items():
            start = self.get_buffer(key)
            parameter.copy_(start + self.share * (parameter - start))
            start.copy_(parameter)


def _routers(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name.replace(".", "__"): p for name, p in network.named_parameters() if name.startswith("routers_")}
