"""Data: what a run sees of drawn and of real pictures, and how they are split. (The original's loaders were None.)"""

import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from trainbook.errors import UserError
from trainbook.workflows.license_plates.config import Config
from trainbook.workflows.license_plates.drawing import draw_picture
from trainbook.workflows.license_plates.images import load_data, read_picture, split_paths, video_of

RUNTIME = SimpleNamespace(device="cpu", data_folder=Path("data"))
SHARED = Path(__file__).parents[4] / "shared/data/plates/romanian_plates_train.tar"  # beside the checkout
SMALL = {"image_width": 80, "image_height": 60, "batch_size": 2}


def yolo_set(folder, names, size=(200, 100), line="0 0.5 0.5 0.25 0.2"):
    """A data set with one white plate on black in each picture."""
    for part in ("images", "labels"):
        Path(folder, part).mkdir(parents=True, exist_ok=True)
    for name in names:
        image = Image.new("RGB", size)
        image.paste((255, 255, 255), (75, 40, 125, 60))
        image.save(Path(folder, "images", f"{name}.png"))
        Path(folder, "labels", f"{name}.txt").write_text(line)
    return [Path(folder, "images", f"{name}.png") for name in names]


def test_drawn_pictures_are_labelled_so_and_the_same_in_every_run():
    config = Config.from_preset("smoke")
    data, again = load_data(config, RUNTIME), load_data(config.model_copy(update={"seed": 5}), RUNTIME)
    assert data.synthetic is True
    assert data.sha256 == again.sha256
    assert (data.train["images"].shape, data.train["images"].dtype) == ((8, 3, 48, 64), torch.uint8)
    for split, first in (("train", 0), ("valid", 1_000_000), ("test", 2_000_000)):
        content = getattr(data, split)
        assert content["num_boxes"].sum() > 0
        picture, boxes = draw_picture(first + 1, 64, 48)
        assert np.array_equal(content["images"][1].permute(1, 2, 0).numpy(), picture)
        assert content["num_boxes"][1] == len(boxes)
        assert np.array_equal(content["boxes"][1][: len(boxes)].numpy(), boxes)
        assert not content["boxes"][1][len(boxes) :].any()


def test_a_real_picture_is_made_to_fit_and_its_boxes_with_it():
    (path,) = yolo_set("set", ["a"])
    picture, boxes = read_picture(path, "yolo", 80, 60)
    assert boxes == pytest.approx(np.array([[30, 16, 50, 24]]))  # by 0.4
    assert not picture[40:].any()  # filled up below
    rows, columns = (picture[..., 0] > 127).nonzero()
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (30, 16, 50, 24)
    tall, boxes = read_picture(path, "yolo", 400, 100)
    assert boxes == pytest.approx(np.array([[75, 40, 125, 60]]))
    assert not tall[:, 200:].any()


def test_a_folder_becomes_three_splits_with_all_its_boxes():
    yolo_set("set", [f"{video}_{second}" for video in "abcdefghij" for second in range(3)])
    Path("set/labels/a_1.txt").unlink()
    data = load_data(Config(dataset="yolo", picture_folder="set", **SMALL), RUNTIME)
    sizes = [len(split["images"]) for split in (data.train, data.valid, data.test)]
    assert sizes == [24, 3, 3]
    assert sum(int(split["num_boxes"].sum()) for split in (data.train, data.valid, data.test)) == 29
    assert data.synthetic is None
    yolo_set("other", ["x"])
    data = load_data(Config(dataset="yolo", picture_folder="set", test_folder="other", **SMALL), RUNTIME)
    assert [len(split["images"]) for split in (data.train, data.valid, data.test)] == [27, 3, 1]
    data = load_data(Config(dataset="yolo", picture_folder="set", split_by="picture", max_pictures=20, **SMALL), RUNTIME)
    assert [len(split["images"]) for split in (data.train, data.valid, data.test)] == [16, 2, 2]


@pytest.mark.parametrize(
    ("name", "video"),
    [("dayride_type1_001_191.jpg", "dayride_type1_001"), ("clip-12 007.png", "clip-12"), ("0042.jpg", ""), ("car.jpg", "car")],
)
def test_the_number_at_the_end_of_a_name_is_not_part_of_the_video(name, video):
    assert video_of(Path("images", name)) == video


def test_no_video_is_in_two_splits():
    paths = [Path(f"video{video}_{second}.jpg") for video in range(12) for second in range(1 + 3 * video)]
    parts = split_paths(paths, "video", ("test", "valid"))
    assert sorted(path for part in parts.values() for path in part) == sorted(paths)
    videos = [{video_of(path) for path in part} for part in parts.values()]
    assert sum(map(len, videos)) == len(set.union(*videos)) == 12
    assert all(len(part) >= 0.1 * len(paths) for part in parts.values())
    assert len(parts["train"]) > 0.5 * len(paths)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"picture_folder": ""}, "dataset = yolo needs picture_folder"),
        ({}, r"9 pictures of 1 videos cannot be split.*\n.*set split_by = picture"),
        ({"split_by": "picture", "batch_size": 8}, "7 training pictures do not fill a batch"),
        ({"split_by": "picture", "test_folder": "empty"}, "no test picture has a plate"),
        ({"split_by": "picture", "test_folder": "broken"}, r"cannot read the picture broken.images.x\.png"),
        ({"split_by": "picture", "test_folder": "bad"}, r"labels/y\.txt, line 1: the box .* reaches out"),
    ],
)
def test_what_cannot_be_trained_on_is_told_before_training(overrides, complaint):
    yolo_set("set", [f"frame_{second}" for second in range(9)])
    yolo_set("empty", ["x"], line="")
    yolo_set("broken", ["x"])[0].write_bytes(b"not a picture")
    yolo_set("bad", ["y"], line="0 0.9 0.5 0.4 0.2")
    config = Config(**{"dataset": "yolo", "picture_folder": "set", **SMALL, **overrides})
    with pytest.raises(UserError, match=complaint):
        load_data(config, RUNTIME)


def test_the_romanian_pictures_are_read_and_split_by_video():
    if not SHARED.is_file():
        pytest.skip(f"{SHARED} is not there")
    with tarfile.open(SHARED) as archive:
        archive.extractall("plates", filter="data")
    config = Config(dataset="yolo", picture_folder="plates/train", image_width=64, image_height=36)
    data = load_data(config, RUNTIME)
    assert [len(split["images"]) for split in (data.train, data.valid, data.test)] == [318, 63, 46]
    labels = list(Path("plates/train/labels").glob("*.txt"))
    lines = sum(len(path.read_text().splitlines()) for path in labels)
    assert sum(int(split["num_boxes"].sum()) for split in (data.train, data.valid, data.test)) == lines == 521
