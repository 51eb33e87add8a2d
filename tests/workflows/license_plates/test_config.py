"""Config: the brief's section loads as it stands; what cannot go together is refused. Downloads fail with a clear error."""

from pathlib import Path

import pytest
from torchvision.models.detection import RetinaNet_ResNet50_FPN_V2_Weights

from tests.test_brief import GIVEN, TEXT
from trainbook.brief import read_brief
from trainbook.errors import UserError
from trainbook.workflows.license_plates.config import Config
from trainbook.workflows.license_plates.detectors import build_detector

BRIEF = {
    "seed": 42, "num_epochs": 100, "batch_size": 32, "precision": "mixed", "clip_norm": 1.0, "learning_rate": 1e-4,
    "nms_threshold": 0.5, "confidence_threshold": 0.25,
}  # fmt: skip


@pytest.mark.parametrize("text", [TEXT, None], ids=["its values", "the file itself"])
def test_the_brief_loads_as_it_stands(text):
    if text is None and not GIVEN.is_file():
        pytest.skip(f"{GIVEN} is not there")
    path = GIVEN if text is None else Path("brief.yaml")
    if text is not None:
        path.write_text(text)
    brief = read_brief(path, "license_plates", Config)
    config = Config.from_preset("laptop", brief.overrides)
    assert config == Config(**BRIEF)
    assert brief.settings == {"device": "cuda", "workers": "4", "checkpoint_dir": "checkpoints", "log_dir": "logs"}


def test_thresholds_are_the_briefs_by_default():
    assert (Config().nms_threshold, Config().confidence_threshold) == (0.5, 0.25)


@pytest.mark.parametrize(
    "overrides",
    [
        {"picture_folder": "x"}, {"train_pictures": 8, "batch_size": 9}, {"nms_threshold": 1}, {"dataset": "coco"},
        {"label_smoothing": 0.1}, {"gradient_checkpointing": True},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(overrides):
    with pytest.raises(UserError):
        Config.from_preset("smoke", overrides)


@pytest.mark.parametrize("content", [None, b"not what it should be"])
def test_cocos_weights_that_cannot_be_had_are_told(content, tmp_path, monkeypatch):
    """No such server, and a file whose SHA-256 is another."""
    source = tmp_path / "there" / "weights-0123abcd.pth"
    if content is not None:
        source.parent.mkdir()
        source.write_bytes(content)
    weights = RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1
    other = type(weights.value)(source.as_uri(), weights.transforms, weights.meta)
    monkeypatch.setattr(weights, "_value_", other)
    with pytest.raises(UserError, match=r"cannot get COCO's weights of RetinaNet.*\n.*coco_weights = false"):
        build_detector(Config(body="resnet50"), tmp_path / "kept")
