"""Blocks of timesteps that are trained at once: as many as the memory holds, fewer when it runs out, none left untrained."""

# T timesteps, n of one block, m of them stepped at once, B batch, R rows that metrics are measured on
# V_l bits, H_l hidden units, G_l context units of level l

import logging
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trainbook.errors import RunFailed
from trainbook.tables import Table
from trainbook.workflows.timestep_dbn.chain import TimestepDBN
from trainbook.workflows.timestep_dbn.config import Config

logger = logging.getLogger("trainbook")

CPU_TILE = 10  # timesteps stepped at once on a CPU, so that what a step makes stays in the cache
METRIC_ROWS = 128  # codes of each split that per-epoch metrics are measured on
USED_SHARE = 0.9  # of the free memory: the allocator rounds up and keeps some
GPU_MEMORY_PAGE = "see 'GPU memory' in the workflow's README"


def block_allocations(config: Config, dbn: TimestepDBN, timesteps: int, num_images: int, on_cpu: bool) -> dict[str, int]:
    """What training a block takes on top of the chain itself, from the shapes, in bytes of float32.

    Gradients cost n P with P = sum_l (V H + V + H + G H)_l, Adam's moments twice that. A step works, for the m timesteps
    it takes at once, in m B sum_l (3 V + 4 H + G) for the phases and, uncompiled, twice the largest level's 2 m B max(V, H); with
    products in 16 bits also in their operands and results, half of m (B sum_l (2 V + 2 H + G) + 2 sum_l (V H + G H)).
    The metrics of an epoch make n R (2 sum_l (3 V + H) + sum_l (G + V) + 4 max_l H).

    Args:
        config: of the run.
        dbn: the chain, for its shapes.
        timesteps: n.
        num_images: whose codes are kept.
        on_cpu: a CPU steps at most `CPU_TILE` timesteps at once, a GPU the whole block.

    Returns:
        Name to bytes; all of it is there at the end of an epoch.
    """
    shapes = [(*level.weight.shape[1:], level.context_weight.shape[1]) for level in dbn.levels]  # V, H, G
    parameters = timesteps * sum(V * H + V + H + G * H for V, H, G in shapes)
    bits, hidden, contexts = (sum(shape[i] for shape in shapes) for i in range(3))
    step = min(timesteps, CPU_TILE if on_cpu else timesteps) * config.batch_size
    metrics = 2 * (3 * bits + hidden) + contexts + bits + 4 * max(H for _, H, _ in shapes)
    in_16_bits = 0
    if config.rbm_precision != "float32":
        weights = sum(V * H + G * H for V, H, G in shapes)
        in_16_bits = step // 2 * (2 * bits + 2 * hidden + contexts) + step // config.batch_size * weights
    floats = {
        "codes of the images": num_images * bits,
        "gradients": parameters,
        "moments of the optimizer": 2 * parameters if config.optimizer == "adam" else 0,
        "weights at the start of an epoch's last step": timesteps * sum(V * H for V, H, _ in shapes),
        "what a step works in": step * (3 * bits + 4 * hidden + contexts + 4 * max(max(V, H) for V, H, _ in shapes)),
        "products in 16 bits": in_16_bits,
        "what the metrics of an epoch make": timesteps * METRIC_ROWS * metrics,
    }
    return {name: 4 * number for name, number in floats.items()}


def largest_block(config: Config, dbn: TimestepDBN, num_images: int, on_cpu: bool, free_bytes: int) -> int:
    """The most timesteps whose block fits in 90 % of the free memory; 1 where none does."""
    for timesteps in range(config.timesteps, 1, -1):
        if sum(block_allocations(config, dbn, timesteps, num_images, on_cpu).values()) <= USED_SHARE * free_bytes:
            return timesteps
    return 1


class Blocks:
    """Which timesteps are trained together, and how far each has moved; keep it in `TrainState.stateful`.

    A later block starts from the last timestep before it, so its bounds change the result: they go into the checkpoint,
    and a run that is resumed on a machine with more memory keeps them.

    Args:
        config: `block_size` and `order` fix the blocks; with block_size = 0 the free memory does.
        dbn: the chain.
        num_images: whose codes are kept.
        on_cpu: as in `block_allocations`.
        free_bytes: of the device.

    Attributes:
        bounds: [0, ..., T]; block i has the timestep indices bounds[i]..bounds[i + 1] - 1.
        moved: (T, levels), sum over epochs of the root mean square change of the weights in the epoch's last step.
    """

    def __init__(self, config: Config, dbn: TimestepDBN, num_images: int, on_cpu: bool, free_bytes: int) -> None:
        self._config, self._dbn, self._num_images, self._on_cpu, self._free_bytes = config, dbn, num_images, on_cpu, free_bytes
        size = config.block_timesteps
        if config.order == "block" and not config.block_size:
            size = largest_block(config, dbn, num_images, on_cpu, free_bytes)
        self.bounds = [*range(0, config.timesteps, size), config.timesteps]
        self.moved = torch.zeros(config.timesteps, len(dbn.levels))

    def announce(self) -> None:
        """Log the choice, and what the largest block takes: shown where memory was short, else for the log file."""
        size = max(stop - start for start, stop in pairwise(self.bounds))
        allocations = block_allocations(self._config, self._dbn, size, self._num_images, self._on_cpu)
        needed, free = sum(allocations.values()), USED_SHARE * self._free_bytes
        logger.info(
            "chain: %d block(s) of at most %d of %d timesteps; one needs %s of %s free",
            len(self.bounds) - 1, size, self._config.timesteps, _shown(needed), _shown(self._free_bytes),
        )  # fmt: skip
        is_short = len(self.bounds) > 2 or needed > free
        table = Table(["memory of a block", "size"], [[name, _shown(number)] for name, number in allocations.items()])
        logger.log(logging.INFO if is_short else logging.DEBUG, "%s", table)
        if needed > free:
            logger.warning("a block may not fit in the free memory: lower block_size or batch_size; %s", GPU_MEMORY_PAGE)

    def halve(self, start: int) -> None:
        """After memory ran out: cut the block that begins at a timestep index, and those after it, to half its timesteps.

        Raises:
            RunFailed: when it has one timestep only.
        """
        stop = next(bound for bound in self.bounds if bound > start)
        if stop - start == 1:
            raise RunFailed(f"out of memory with timestep {start + 1} alone; lower batch_size or hidden_units; {GPU_MEMORY_PAGE}")
        size, end = (stop - start + 1) // 2, self.bounds[-1]
        self.bounds = [*(bound for bound in self.bounds if bound < start), *range(start, end, size), end]
        logger.warning(
            "out of memory: the timesteps from %d on are trained in blocks of %d instead of %d, going on from where they are; %s",
            start + 1, size, stop - start, GPU_MEMORY_PAGE,
        )  # fmt: skip

    def count(self, start: int, update_norms: Tensor) -> None:
        """Add an epoch's update norms, (n, levels), of the timesteps from index `start` on."""
        self.moved[start : start + len(update_norms)] += update_norms.detach().cpu()

    def check_all_trained(self) -> None:
        """Refuse success to a chain of which a part was never trained.

        Raises:
            RunFailed: naming the timesteps of which some level never moved.
        """
        still = [t + 1 for t, moved in enumerate(self.moved.tolist()) if not min(moved) > 0]
        if still:
            raise RunFailed(f"timesteps {still} made no update in the whole run: the chain is not trained")

    def state_dict(self) -> dict[str, Any]:
        """Bounds and movements."""
        return {"bounds": list(self.bounds), "moved": self.moved.clone()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on with the saved blocks, whatever would fit here."""
        self.bounds, self.moved = list(saved["bounds"]), saved["moved"].cpu().clone()


def release(optimizer: torch.optim.Optimizer, timesteps: int) -> None:
    """Let go of the gradients an optimizer holds, and of all its moments but those of the first timesteps of its block."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    if not timesteps:
        optimizer.state.clear()
    for moments in optimizer.state.values():
        for name, value in moments.items():
            if value.ndim and len(value) > timesteps:  # the step count has no timesteps
                moments[name] = value[:timesteps].clone()


def _shown(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
