"""A NeRF training step beside the plain maths of nerf-pytorch: `python -m tests.benchmarks.nerf`.

Needed: at least as fast at equal rays, samples and width. The peer is written here in plain torch after the well-known
implementation: encoding octave by octave, direction repeated for every sample, concatenation, cumulative product. It is spared
what ours does besides: rays from pixel indices, clipping to the cube, gradient norm, schedule.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from tests.benchmarks import pairing

# isort: split
import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from trainbook.data import Data
from trainbook.seeding import seed_step
from trainbook.workflows.nerf.config import Config
from trainbook.workflows.nerf.data import load_data
from trainbook.workflows.nerf.model import PositionalField
from trainbook.workflows.nerf.rays import rays_of_indices
from trainbook.workflows.nerf.rendering import composite
from trainbook.workflows.nerf.training import build, train

ROUNDS = 7
TOLERANCE = 2e-4  # of colours and relative of densities, both sides having the same weights and samples
FIELDS = {"fields": "mlp", "validate_every": 0, "num_epochs": 1000, "precision": "float32"}


@dataclass(frozen=True)
class Case:
    """Sizes of a step, and steps in a round."""

    name: str
    fields: dict[str, int]
    steps: int


CASES = (
    Case("laptop, 384 rays x 48 samples, 3 x 64", {}, 12),
    Case(
        "published width, 128 rays x 64 samples, 8 x 256",
        {"num_rays": 128, "num_samples": 64, "width": 256, "depth": 8, "position_frequencies": 10},
        2,
    ),
)


def encode(values: Tensor, num_frequencies: int) -> Tensor:
    """All octaves by their own sines and cosines."""
    parts = [values]
    for octave in range(num_frequencies):
        parts += [torch.sin(2.0**octave * math.pi * values), torch.cos(2.0**octave * math.pi * values)]
    return torch.cat(parts, -1)


class Plain(nn.Module):
    """The same network, with concatenations, sample by sample."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        position, direction = 3 * (1 + 2 * config.position_frequencies), 3 * (1 + 2 * config.direction_frequencies)
        width = config.width
        self.middle = (config.depth - 1) // 2 if config.depth >= 5 else None
        sizes = [position] + [width + (position if index == self.middle else 0) for index in range(config.depth - 1)]
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.density = nn.Linear(width, 1)
        self.views = nn.Linear(width + direction, width // 2)
        self.colour = nn.Linear(width // 2, 3)

    def forward(self, points: Tensor, directions: Tensor) -> Tensor:
        """(N, 3) twice -> raw colours and densities (N, 4)."""
        encoded = encode(points, self.config.position_frequencies)
        h = encoded
        for index, layer in enumerate(self.layers):
            h = relu(layer(torch.cat([h, encoded], -1) if index - 1 == self.middle else h))
        density = self.density(h)
        h = relu(self.views(torch.cat([h, encode(directions, self.config.direction_frequencies)], -1)))
        return torch.cat([self.colour(h), density], -1)

    def take(self, field: PositionalField) -> None:
        """The weights of ours."""
        self.layers[0].load_state_dict(field.first.state_dict())
        for index, (mine, theirs) in enumerate(zip(self.layers[1:], field.hidden, strict=True)):
            weight = theirs.weight if index != self.middle else torch.cat([theirs.weight, field.skip.weight], 1)
            mine.load_state_dict({"weight": weight, "bias": theirs.bias})
        self.density.load_state_dict(field.density.state_dict())
        self.views.load_state_dict(
            {"weight": torch.cat([field.features.weight, field.direction.weight], 1), "bias": field.features.bias}
        )
        self.colour.load_state_dict(field.colour.state_dict())


def to_pixels(raw: Tensor, distances: Tensor, last: float, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Raw outputs (R, S, 4) to colours (R, 3) over white, by alphas and their cumulative product."""
    steps = torch.cat([distances[:, 1:] - distances[:, :-1], torch.full_like(distances[:, :1], last)], -1)
    alpha = 1 - torch.exp(-activation(raw[..., 3]) * steps)
    through = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha + 1e-10], -1), -1)[:, :-1]
    weights = alpha * through
    return (weights[..., None] * torch.sigmoid(raw[..., :3])).sum(-2) + (1 - weights.sum(-1, keepdim=True))


def strata(num_rays: int, config: Config, random: bool) -> Tensor:
    """Distances (R, S) by middles and edges of strata."""
    edges = torch.linspace(config.near, config.far, config.num_samples + 1).expand(num_rays, -1)
    lower, upper = edges[:, :-1], edges[:, 1:]
    return lower + (upper - lower) * (torch.rand(lower.shape) if random else 0.5)


def plain_pixels(model: Plain, origins: Tensor, directions: Tensor, distances: Tensor, last: float, activation) -> Tensor:
    """Colours (R, 3) along rays."""
    points = (origins[:, None] + directions[:, None] * distances[..., None]) / model.config.bound
    repeated = directions[:, None].expand(points.shape)
    raw = model(points.reshape(-1, 3), repeated.reshape(-1, 3)).view(*distances.shape, 4)
    return to_pixels(raw, distances, last, activation)


def rays(views: dict[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Origins and directions of those pixels."""
    return rays_of_indices(pixels, views["poses"], views["focals"], *views["images"].shape[1:3])


def our_steps(config: Config, data: Data) -> Callable[[int], None]:
    """Takes so many steps of the workflow's own training, seeded as the engine does."""
    torch.manual_seed(0)
    state = build(config, data, SimpleNamespace(device="cpu"))
    records = train(config, data, state)

    def run(steps: int) -> None:
        for _ in range(steps):
            seed_step(0, state.step)
            float(next(records).metrics["loss"])

    return run


def plain_steps(config: Config, data: Data) -> Callable[[int], None]:
    """Takes so many steps of a bare loop over rays that were computed before."""
    torch.manual_seed(0)
    model = Plain(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    views = data.train
    colours = views["images"].flatten(0, 2)
    origins, directions = rays_of_indices(
        torch.arange(len(colours)), views["poses"], views["focals"], *views["images"].shape[1:3]
    )

    def run(steps: int) -> None:
        for _ in range(steps):
            batch = torch.randint(len(colours), (config.num_rays,))
            distances = strata(config.num_rays, config, random=True)
            found = plain_pixels(model, origins[batch], directions[batch], distances, 1e10, relu)
            loss = ((found - colours[batch]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return run


@torch.no_grad()
def check(config: Config, data: Data) -> float:
    """Largest difference of both sides' colours for the same weights, rays and samples."""
    torch.manual_seed(1)
    field, plain = PositionalField(config), Plain(config)
    nn.init.constant_(field.density.bias, 1.0)  # something to see
    plain.take(field)
    views = data.train
    origins, directions = rays_of_indices(
        torch.arange(0, 40_000, 97), views["poses"], views["focals"], *views["images"].shape[1:3]
    )
    distances = strata(len(origins), config, random=False)
    width = (config.far - config.near) / config.num_samples
    points = (origins[:, None] + directions[:, None] * distances[..., None]) / config.bound
    ours = composite(*field(points, directions), distances, torch.full((len(origins), 1), width), config.far).colour
    return float((ours - plain_pixels(plain, origins, directions, distances, width, softplus)).abs().max())


def main() -> None:
    """Compare a step at both sizes."""
    print(f"torch {torch.__version__}, CPU, one thread, CPU time")
    comparisons = []
    for case in CASES:
        config = Config.from_preset("laptop", {**FIELDS, **case.fields})
        data = load_data(config, SimpleNamespace(device="cpu"))
        difference = check(config, data)
        print(f"{case.name}: both sides' colours differ by at most {difference:.1e}, allowed {TOLERANCE:.0e}")
        assert difference <= TOLERANCE
        ours, theirs = our_steps(config, data), plain_steps(config, data)
        comparisons.append(
            pairing.alternate(
                lambda ours=ours, case=case: ours(case.steps),
                lambda theirs=theirs, case=case: theirs(case.steps),
                ROUNDS,
                benchmark="nerf step",
                peer=f"plain maths of nerf-pytorch, {case.name}",
                unit="steps per second",
                units=case.steps,
            )
        )
    for c in comparisons:
        print(f"{c.peer}: {c.ratio:.2f}, needed 1: {'reached' if c.ratio >= 1 else 'MISSED'}")
    pairing.report(comparisons)


if __name__ == "__main__":
    main()
