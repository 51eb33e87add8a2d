"""Slow: two processes and micro-batches train what one process and one batch train; the Romanian pictures are learned."""

import tarfile

import pytest
import torch

from tests.driving import Drive, final_state
from tests.workflows.license_plates.test_images import SHARED
from trainbook.run import prepare

pytestmark = pytest.mark.slow

# A mirrored picture would follow from the process that reads it; Adam would make steps of rounding errors.
SAME = {"augment": False, "num_epochs": 3, "optimizer": "sgd", "learning_rate": 0.01}


def test_two_processes_and_micro_batches_follow_the_curve_of_one(tmp_path):
    drives = [
        Drive(tmp_path, "one", SAME, "license_plates"),
        Drive(tmp_path, "parts", SAME | {"accumulation": 4}, "license_plates"),
        Drive(tmp_path, "two", SAME, "license_plates", processes=2),
    ]
    for drive in drives:
        assert drive() == 0
    one, *others = (drive.folder for drive in drives)
    for other in others:
        for ours, theirs in zip(other.history(), one.history(), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        weights = [final_state(folder)["modules"]["detector"] for folder in (other, one)]
        torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def test_the_romanian_pictures_are_learned_from_one_day_and_tested_on_other_videos(tmp_path):
    """318 pictures of one ride; validated on a ride at night, tested on two other rides."""
    if not SHARED.is_file():
        pytest.skip(f"{SHARED} is not there")
    with tarfile.open(SHARED) as archive:
        archive.extractall(tmp_path / "plates", filter="data")
    real = {"dataset": "yolo", "picture_folder": str(tmp_path / "plates/train"), "image_width": 384, "image_height": 216}
    run = prepare("license_plates", "laptop", real | {"augment": True, "num_epochs": 10, "validate_every": 38})
    run.load_data()
    run.build()
    run.train(progress=False)
    metrics = run.measure()
    run.leave()
    assert metrics["detector/ap50"] > 0.15 > 3 * metrics["edges/ap50"]
