"""The rule that all cells of a cube follow: what each perceives, three experts, a gate. Its weights fit every size of cube."""

# B batch, L side, C channels, P hardware numbers

import torch
from torch import Tensor, nn

from trainbook.workflows.cellular_cube.bands import Bands, PooledBands
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.experts import (
    NAMES,
    BatchNorm,
    DistantExpert,
    FunctionalExpert,
    Gate,
    LocalExpert,
    scaled_by_root_mean_square,
)
from trainbook.workflows.cellular_cube.perception import count_near, perceive
from trainbook.workflows.cellular_cube.sleep import EVERYWHERE, Everywhere


class Geometry(nn.Module):
    """What a rule needs to know of a cube's size: how many cells are near, bands, which cells are alive.

    Args:
        side: L.
        config: its radius, band shape and pooling, and wall.
    """

    def __init__(self, side: int, config: Config) -> None:
        super().__init__()
        self.side = side
        wall = side // 2 if config.wall_hole else None
        reach = config.reach(side)
        if config.band_pooling > 1:
            self.bands: nn.Module = PooledBands(side, reach, config.band_shape, config.band_pooling)
        else:
            self.bands = Bands(side, reach, config.band_shape, wall)
        self.register_buffer("num_near", count_near(side), persistent=False)
        alive = torch.ones(side, side, side, 1)
        if wall is not None:
            alive[wall] = 0
            middle = (side - 1) / 2  # the hole grows from the middle of the wall
            y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
            order = ((y - middle) ** 2 + (x - middle) ** 2).flatten().argsort(stable=True)
            alive[wall].view(-1)[order[: config.wall_hole]] = 1
        self.register_buffer("alive", alive, persistent=False)
        self.has_wall = wall is not None


class Column(nn.Module):
    """Three experts, the norms of what they see, and their gate."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels, hardware, hidden = config.channels, config.hardware_numbers, config.hidden_width
        self.norm = config.expert_norm
        self.norms = nn.ModuleList(BatchNorm(channels) for _ in NAMES) if self.norm == "batch" else None
        self.local = LocalExpert(channels, hardware, hidden)
        self.functional = FunctionalExpert(channels, hardware, config.attention_rank, config.value_width)
        self.distant = DistantExpert(channels, hardware, channels, config.ode_steps)
        self.gate = Gate(channels, hardware, channels, len(NAMES), config.gate_temperature)
        self.numbers = config.numbers_per_cell
        self.leave_code_alone()

    @torch.no_grad()
    def leave_code_alone(self, silent: bool = False) -> None:
        """Let no expert change the channels that carry the code; with `silent` no channel at all."""
        numbers = None if silent else self.numbers
        for part in (self.local.outward.weight, self.local.outward.bias, self.functional.gain, self.distant.gain):
            part[:numbers] = 0

    def forward(self, x: Tensor, hardware: Tensor, geometry: Geometry, cells: Everywhere = EVERYWHERE) -> tuple[Tensor, Tensor]:
        """The change of every cell's state, (B, L, L, L, C), and the experts' weights, (B, L, L, L, 3); or of K chosen cells."""
        if self.norm == "batch":
            near, middle, far = (norm(x) for norm in self.norms)
        else:
            near = middle = far = scaled_by_root_mean_square(x) if self.norm == "rms" else x
        means = geometry.bands.means(far, ("distant", "all"), cells.planes)
        distant_mean, whole_mean = (cells.of_planes(mean) for mean in means)
        own, place = cells.of_grid(far), cells.of_table(hardware)
        weights = self.gate(own, whole_mean, place)
        local, functional, distant = weights.unsqueeze(-2).unbind(-1)
        change = local * self.local(cells.of_grid(perceive(near, geometry.num_near)), place)
        change = change + functional * self.functional(middle, hardware, geometry.bands, cells)
        return change + distant * self.distant(own, distant_mean, place), weights


class Rule(nn.Module):
    """One column of experts, or two of which the second starts at zero and is used from `grow()` on.

    Args:
        config: of the run.

    Attributes:
        grown: 1 once the second column takes part, kept with the weights.
        masked: leave the second column out, to see what the first does alone.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.columns = nn.ModuleList(Column(config) for _ in range(2 if config.expert_columns == "grow" else 1))
        self.level_gains = nn.Parameter(torch.zeros(max(config.levels - 1, 0), config.channels))
        self.register_buffer("grown", torch.zeros(()))
        self.numbers = config.numbers_per_cell
        for column in self.columns[1:]:
            column.leave_code_alone(silent=True)
        self.masked = False

    def leave_code_alone(self) -> None:
        """Let no expert change the channels that carry the code, so that it arrives as it was written."""
        for column in self.columns:
            column.leave_code_alone()
        with torch.no_grad():
            self.level_gains[:, : self.numbers] = 0

    def grow(self) -> None:
        """Let the second column take part."""
        self.grown.fill_(1)

    def forward(self, x: Tensor, hardware: Tensor, geometry: Geometry, cells: Everywhere = EVERYWHERE) -> tuple[Tensor, Tensor]:
        """As `Column`; the weights are the first column's."""
        change, weights = self.columns[0](x, hardware, geometry, cells)
        if len(self.columns) > 1 and not self.masked and bool(self.grown):
            change = change + self.columns[1](x, hardware, geometry, cells)[0]
        return change, weights
