"""Adaptive computation: cells whose surroundings stand still keep the rule's last answer, and it is not worked out again."""

# B batch, L side, C channels, P planes with an awake cell, K awake cells

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from trainbook.workflows.cellular_cube.bands import pooled, spread

BLOCK = 4  # cells along an edge of what falls asleep together


class Everywhere:
    """The cells that a rule answers: all, so that nothing is left out of what it computes.

    Attributes:
        planes: (P,), z of the planes to compute, or None for all.
    """

    planes: Tensor | None = None

    def of_grid(self, x: Tensor) -> Tensor:
        """Those cells of (B, L, L, L, C)."""
        return x

    def of_planes(self, x: Tensor) -> Tensor:
        """Those cells of what was computed for `planes`, (B, P, L, L, C)."""
        return x

    def of_table(self, table: Tensor) -> Tensor:
        """The rows of those cells of a table that all sentences share, (L, L, L, C)."""
        return table


EVERYWHERE = Everywhere()


class Awake(Everywhere):
    """The K cells that are awake; everything asked of it has the shape (K, C).

    Args:
        mask: (B, L, L, L) bool.
    """

    def __init__(self, mask: Tensor) -> None:
        self.rows = mask.flatten().nonzero().squeeze(1)
        self.planes = mask.any(0).any(-1).any(-1).nonzero().squeeze(1)
        self._in_planes = mask[:, self.planes].flatten().nonzero().squeeze(1)
        self._in_table = self.rows % mask[0].numel()

    def of_grid(self, x: Tensor) -> Tensor:
        """(B, L, L, L, C) to (K, C)."""
        return x.flatten(0, -2).index_select(0, self.rows)

    def of_planes(self, x: Tensor) -> Tensor:
        """(B, P, L, L, C) to (K, C)."""
        return x.flatten(0, -2).index_select(0, self._in_planes)

    def of_table(self, table: Tensor) -> Tensor:
        """(L, L, L, C) to (K, C)."""
        return table.flatten(0, -2).index_select(0, self._in_table)


class Sleep:
    """Blocks of 4 x 4 x 4 cells sleep while they and all neighbour blocks have moved less than a threshold.

    A block has moved by mean |x - x'|: x the state that the rule would see now, x' the one it saw when it last answered this
    block. So what transport, a write or a watcher brought counts too, slow drift adds up, and a signal wakes blocks before
    it reaches them. A cell that sleeps is given the rule's last answer again (change and expert weights) and goes on being
    moved: channels travel through sleeping cells as through others. Awake cells see the sleeping ones' present state, so keys,
    values and perception are those of the whole grid, and band sums run over it, for planes with an awake cell; gate and
    experts are computed for awake cells only.

    A block sleeps where it moved less than the threshold: at 0 nobody does, and a step in which nobody sleeps is the plain one,
    bit for bit. That a cell which stands still answers alike holds only nearly where far neighbours move.

    Args:
        threshold: in units of the state.
        side: L.

    Attributes:
        num_active: cells that the rule answered so far, over steps and sentences.
        num_cells: cells that it would have answered without sleep.
    """

    def __init__(self, threshold: float, side: int) -> None:
        self.threshold, self.side = threshold, side
        self.num_active = self.num_cells = 0
        self._seen: Tensor | None = None
        self._answer: tuple[Tensor, ...] = ()

    def mask(self, x: Tensor) -> Tensor:
        """Which cells are awake, (B, L, L, L) bool, for the state before the rule, (B, L, L, L, C)."""
        if self._seen is None:
            return x.new_ones(x.shape[:-1], dtype=torch.bool)
        moved = pooled((x.detach() - self._seen).abs().mean(-1, keepdim=True), BLOCK)
        busy = (~(moved < self.threshold)).float().movedim(-1, 1)  # what is not a number is busy
        near_busy = functional.max_pool3d(busy, 3, 1, 1).movedim(1, -1)
        return spread(near_busy, BLOCK, self.side).squeeze(-1) > 0

    def answer(self, rule: Callable[..., tuple[Tensor, Tensor]], x: Tensor, *rest: object) -> tuple[Tensor, ...]:
        """The rule's change and weights for all cells, worked out for those awake.

        Args:
            rule: see `Rule.forward`.
            x: (B, L, L, L, C); the rest are the rule's further arguments.
        """
        mask = self.mask(x)
        num_active = int(mask.sum())
        self.num_active += num_active
        self.num_cells += mask.numel()
        if num_active == mask.numel():
            self._seen, self._answer = x.detach(), rule(x, *rest)
        elif num_active:
            awake = Awake(mask)
            found = rule(x, *rest, awake)
            self._answer = tuple(_put(old, awake.rows, new) for old, new in zip(self._answer, found, strict=True))
            self._seen = _put(self._seen, awake.rows, awake.of_grid(x.detach()))
        return self._answer


def _put(old: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    return old.flatten(0, -2).index_copy(0, rows, new.to(old.dtype)).view(old.shape)
