"""Builds and trains: one field after the other, on random rays of all training views."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from trainbook.data import Batches, Data
from trainbook.fitting import Stage
from trainbook.records import Record
from trainbook.runtime import Runtime
from trainbook.state import TrainState
from trainbook.workflows.nerf.config import Config
from trainbook.workflows.nerf.model import FIELDS, Renderer, render_view
from trainbook.workflows.nerf.rays import rays_of_indices, rays_of_view


def build(config: Config, data: Data, runtime: Runtime) -> TrainState:
    """A renderer and a stage per field."""
    modules: dict[str, nn.Module] = {}
    stages: dict[str, Stage] = {}
    steps_per_epoch = data.train["images"][..., 0].numel() // config.num_rays
    for name in config.field_names:
        modules[name] = Renderer(FIELDS[name](config), config).to(runtime.device)
        of_grid = {"learning_rate": config.grid_learning_rate, "num_epochs": config.grid_epochs}
        own = config.model_copy(update=of_grid if name == "grid" else {})
        stages[name] = Stage(name, modules[name], own, steps_per_epoch * own.num_epochs)
    total = sum(stage.total_steps for stage in stages.values())
    return TrainState(modules, stateful=stages, total_steps=total, stage=config.field_names[0])


def train(config: Config, data: Data, state: TrainState) -> Iterator[Record]:
    """Train each field from where it is; yields once per step."""
    colours = data.train["images"].flatten(0, 2)
    rays = {"ray": torch.arange(len(colours), device=colours.device)}
    for name in config.field_names:
        batches = Batches(rays, config.seed, config.num_rays, config.batch_scaling)

        def loss(renderer: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return ray_loss(renderer, batch["ray"], data.train, colours)

        def validate(renderer: nn.Module) -> dict[str, float]:
            error = float(torch.stack(squared_errors(renderer, data.valid)).mean())
            return {"valid_loss": error}

        yield from state.stateful[name].train(state, batches, loss, validate)


def ray_loss(renderer: nn.Module, indices: Tensor, views: dict[str, Tensor], colours: Tensor) -> Tensor:
    """Mean squared error of the colours seen along rays.

    Args:
        renderer: a `Renderer`, or what stands for it.
        indices: (R,), of pixels, counted view by view and row by row.
        views: with images (V, H, W, 3), poses and focals.
        colours: (V H W, 3), the images' pixels.
    """
    origins, directions = rays_of_indices(indices, views["poses"], views["focals"], *views["images"].shape[1:3])
    return mse_loss(renderer(origins, directions).colour, colours[indices])


def squared_errors(renderer: nn.Module, views: dict[str, Tensor]) -> list[Tensor]:
    """Mean squared error of each view, rendered whole."""
    size = views["images"].shape[1:3]
    return [
        mse_loss(render_view(renderer, rays_of_view(pose, focal, *size)).colour, image.flatten(0, 1))
        for image, pose, focal in zip(views["images"], views["poses"], views["focals"], strict=True)
    ]
