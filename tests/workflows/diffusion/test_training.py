"""Stages: the classifier learns, the U-Net's loss falls, snapshots are of their steps; choices and files that do not fit."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.test_brief import TEXT
from trainbook.brief import read_brief
from trainbook.errors import UserError
from trainbook.runtime import detect
from trainbook.seeding import seed_step
from trainbook.workflows.diffusion.config import Config
from trainbook.workflows.diffusion.data import load_data
from trainbook.workflows.diffusion.evaluation import candidates
from trainbook.workflows.diffusion.judge import features_and_answers
from trainbook.workflows.diffusion.model import draw_samples
from trainbook.workflows.diffusion.training import build, held_out_loss, train

MNIST = Path(__file__).parents[4] / "shared/data/mnist"  # beside the checkout


def trained(config, data):
    """The state after all steps, seeded as the engine does, and the records."""
    torch.manual_seed(config.seed)
    state = build(config, data, SimpleNamespace(device="cpu"))
    records, generator = [], train(config, data, state)
    while True:
        seed_step(config.seed, state.step)
        if (record := next(generator, None)) is None:
            return state, records
        records.append({"stage": state.stage, **record.metrics})


@pytest.fixture(scope="module")
def run():
    fields = {"max_train_images": 0, "classifier_epochs": 8, "num_epochs": 3, "ema_decay": 0.9, "validate_every": 0}
    config = Config.from_preset("smoke", fields)
    data = load_data(config, detect())
    return config, data, *trained(config, data)


def test_digits_are_split_70_to_30_and_their_classes_evenly(run):
    _, data, _, _ = run
    assert [len(split["labels"]) for split in (data.train, data.valid, data.test)] == [1131, 126, 540]
    rows = {tuple(image.flatten().tolist()) for split in (data.train, data.valid, data.test) for image in split["images"]}
    assert len(rows) == 1797  # all digits are different: none is in two splits
    assert torch.bincount(data.test["labels"]).min() >= 50
    assert data.synthetic is False


def test_the_classifier_learns_digits_it_has_not_seen(run):
    _, data, state, _ = run
    _, answers = features_and_answers(state.modules["classifier"], data.test["images"])
    assert float((answers == data.test["labels"]).float().mean()) > 0.9


def test_the_unets_loss_falls(run):
    _, _, _, records = run
    losses = [float(record["loss"]) for record in records if record["stage"] == "unet"]
    assert sum(losses[-10:]) / 10 < 0.75 * sum(losses[:10]) / 10


def test_the_average_draws_and_the_last_snapshot_is_what_it_draws(run):
    config, _, state, _ = run
    stage, snapshots = state.stateful["unet"], state.modules["snapshots"]
    for name, tensor in stage.stepper.ema.state_dict().items():
        assert torch.equal(tensor, state.modules["unet"].state_dict()[name])
    assert snapshots.steps == [round(stage.total_steps / 2), stage.total_steps]
    again, _ = draw_samples(state.modules["unet"], config, (1, 8, 8), 10, 1.0)
    assert torch.equal(snapshots.images[-1], again)
    assert not torch.equal(snapshots.images[0], snapshots.images[-1])


def test_the_held_out_loss_repeats_and_draws_no_random_numbers_of_training(run):
    config, data, state, _ = run
    before = torch.get_rng_state()
    with torch.no_grad():
        losses = [
            held_out_loss(state.modules["unet"].eval(), config, data.valid["images"], data.valid["labels"]) for _ in range(2)
        ]
    assert losses[0] == losses[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_baselines_are_asked_for_every_class_alike(run):
    config, data, state, _ = run
    found = candidates(config, data, state)
    images, labels = found["class_gaussians"]
    _, answers = features_and_answers(state.modules["classifier"], images)
    assert torch.bincount(labels).tolist() == [4] * 10
    assert float((answers == labels).float().mean()) > 0.7  # a class's own mean and covariance look like it
    assert all(len(each[0]) == 40 for each in found.values())


@pytest.mark.parametrize(
    "fields",
    [
        {"data_folder": "x"},
        {"block_channels": (12, 20)},
        {"block_channels": (8, 8, 8, 8, 8)},
        {"num_timesteps": 20, "num_inference_steps": 30},
        {"max_train_images": 8},
    ],
)
def test_choices_that_do_not_go_together_are_refused(fields):
    with pytest.raises(UserError):
        Config.from_preset("laptop", fields)


def test_the_brief_arrives(tmp_path):
    path = tmp_path / "brief.yaml"
    path.write_text(TEXT)
    config = Config.from_preset("laptop", read_brief(path, "diffusion", Config).overrides)
    expected = {"seed": 42, "num_epochs": 100, "batch_size": 32, "learning_rate": 2e-5, "num_timesteps": 1000, "clip_norm": 1.0}
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.num_inference_steps == 50


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST's files are not in ../shared/data/mnist")
def test_mnist_is_learned_from_its_official_files():
    fields = {
        "dataset": "mnist", "data_folder": str(MNIST), "max_train_images": 6400, "batch_size": 64, "num_epochs": 2,
        "classifier_epochs": 5, "block_channels": (16, 32), "num_groups": 8, "validate_every": 100,
    }  # fmt: skip
    config = Config.from_preset("smoke", fields)
    data = load_data(config, detect())
    state, records = trained(config, data)
    _, answers = features_and_answers(state.modules["classifier"], data.test["images"])
    assert float((answers == data.test["labels"]).float().mean()) > 0.9
    measured = [record["valid_loss"] for record in records if "valid_loss" in record]
    assert measured[-1] < min(0.3, measured[0])  # 1 is what predicting no noise at all gives
