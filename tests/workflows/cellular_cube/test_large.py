"""Large cubes take a step, and half precision agrees; by hand."""

import pytest
import torch

from trainbook.data import Batches
from trainbook.seeding import seed_step
from trainbook.stepper import Stepper
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.losses import cube_loss
from trainbook.workflows.cellular_cube.network import CellularCube
from trainbook.workflows.cellular_cube.principal import fit_principal

pytestmark = pytest.mark.slow
WIDTH = 48


def train(config, steps, width=WIDTH):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(256, width, generator=generator) @ torch.randn(width, width, generator=generator)
    vectors = (vectors - vectors.mean(0)) / (vectors - vectors.mean(0)).square().mean().sqrt()
    seed_step(0, 0)
    network = CellularCube(config, fit_principal(vectors), torch.zeros(width), 1.0)
    stepper = Stepper(network, config, steps)
    batches = Batches({"embeddings": vectors, "labels": torch.arange(256) % 4}, 0, config.batch_size)
    losses = []
    for step in range(steps):
        seed_step(0, step)
        report = stepper.step(batches(step), lambda model, batch: cube_loss(config, model, batch, 0.0), config.batch_size)
        losses.append(float(report["loss"]))
    return losses, network


@pytest.mark.parametrize(
    ("side", "pooling", "shape"), [(27, 2, "cubic"), (37, 1, "cubic"), (37, 2, "cubic"), (12, 1, "euclidean")]
)
def test_one_step_at_a_large_side(side, pooling, shape):
    config = Config(
        side=side, channels=4, mixed_numbers=0, hidden_width=8, radius=0.2 if side > 12 else 0.3, band_pooling=pooling,
        band_shape=shape, gradient_checkpointing=True, batch_size=2,
    )  # fmt: skip
    losses, network = train(config, 1)
    assert losses[0] < 0.05 + 0.01 * 1.1  # the face is wider than the vector: nothing but the emergence term is left
    for name, parameter in network.cube.named_parameters():
        assert parameter.numel() == 0 or bool(torch.isfinite(parameter).all()), name


def test_bfloat16_follows_float32():
    options = {"channels": 8, "mixed_numbers": 3, "side": 5, "radius": 0.6, "batch_size": 16, "warmup_steps": 5}
    single, half = (train(Config(precision=precision, **options), 50)[0] for precision in ("float32", "bfloat16"))
    assert sum(single[-16:]) < sum(single[:16])  # passes over the data
    assert half[-1] == pytest.approx(single[-1], rel=0.02)


def test_gradient_accumulation_gives_the_step_of_the_whole_batch():
    options = {"channels": 8, "mixed_numbers": 3, "side": 5, "radius": 0.6, "batch_size": 16, "emergence_weight": 0.0}
    whole, parts = (train(Config(accumulation=number, **options), 5) for number in (1, 4))
    assert parts[0] == pytest.approx(whole[0], rel=1e-4)
