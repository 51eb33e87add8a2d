"""Metrics and pictures: who is measured, on what, and the finder of edges."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainbook.workflows.license_plates import evaluation, pictures
from trainbook.workflows.license_plates.baseline import edge_blobs
from trainbook.workflows.license_plates.config import Config
from trainbook.workflows.license_plates.images import load_data
from trainbook.workflows.license_plates.training import build

RUNTIME = SimpleNamespace(device="cpu", data_folder=Path("data"))


def test_edges_find_a_striped_board_and_not_a_plain_one():
    image = torch.full((3, 120, 160), 128, dtype=torch.uint8)
    image[:, 20:32, 100:140] = 255  # plain
    image[:, 60:72, 30:70] = 255
    image[:, 62:70, 32:68:4] = 0  # strokes
    found = edge_blobs(image)
    best = found["boxes"][found["scores"].argmax()]
    assert best.tolist() == pytest.approx([30, 60, 70, 72], abs=5)
    assert all(box[2] < 95 for box in found["boxes"])
    nothing = edge_blobs(torch.zeros(3, 40, 60, dtype=torch.uint8))
    assert (nothing["boxes"].shape, nothing["scores"].shape) == ((0, 4), (0,))


@pytest.fixture
def perfect(monkeypatch):
    """A run whose detector finds every test plate, and one box more that scores too low to be reported."""
    config = Config.from_preset("smoke")
    data = load_data(config, RUNTIME)
    torch.manual_seed(0)
    state = build(config, data, RUNTIME)

    def detect(model, images, batch_size):
        assert model is state.modules["detector"]
        assert torch.equal(images, data.test["images"])
        extra = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
        return [
            {"boxes": torch.cat((boxes[:number], extra)), "scores": torch.tensor([0.9] * number + [0.1])}
            for boxes, number in zip(data.test["boxes"], data.test["num_boxes"].tolist(), strict=True)
        ]

    monkeypatch.setattr(evaluation, "detect", detect)
    return config, data, state


def test_the_detector_stands_beside_edges_and_nothing_on_the_test_pictures(perfect):
    metrics = evaluation.evaluate(*perfect)
    names = ("ap", "ap50", "ap75", "top1_at_iou70", "precision", "recall")
    assert [metrics[f"detector/{name}"] for name in names] == pytest.approx([1] * 6)
    assert [metrics[f"nothing/{name}"] for name in names] == [0] * 6
    assert {key.partition("/")[0] for key in metrics} == {"detector", "edges", "nothing"}
    assert all(math.isfinite(value) for value in metrics.values())


def test_pictures_draw_every_kind_of_box(perfect):
    config, data, state = perfect
    figures = pictures.draw(config, data, state, [])
    assert figures.keys() == {"detections", "precision_recall", "recall_by_width"}  # no error, no worst
    outlines = [line for panel in figures["detections"].axes for line in panel.lines if len(line.get_xdata()) == 5]
    assert len(outlines) == int(data.test["num_boxes"].sum())
    assert {line.get_color() for line in outlines} == {pictures.FOUND}
    every = config.model_copy(update={"confidence_threshold": 0.05})  # now the box too many is reported
    figures = pictures.draw(every, data, state, [])
    colours = [line.get_color() for panel in figures["worst"].axes for line in panel.lines if len(line.get_xdata()) == 5]
    assert colours.count(pictures.FALSE) == len(data.test["images"])
    none = config.model_copy(update={"confidence_threshold": 0.95})
    figures = pictures.draw(none, data, state, [])
    colours = [line.get_color() for panel in figures["detections"].axes for line in panel.lines if len(line.get_xdata()) == 5]
    assert set(colours) == {pictures.MISSED}
