"""Views: held out, reduced, read from files; what is wrong with files is said."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_brief import TEXT
from trainbook.brief import read_brief
from trainbook.errors import UserError
from trainbook.workflows.nerf.config import Config
from trainbook.workflows.nerf.data import hold_out, load_data

ANGLE = 0.7
RUNTIME = SimpleNamespace(device="cpu")


def load(**fields):
    return load_data(Config.from_preset("smoke", fields), RUNTIME)


def write_scene(folder, number=8, size=12, splits=("train",)):
    """A folder as nerf_synthetic has it, with random RGBA pictures; returns the training pixels."""
    generator, written = np.random.default_rng(0), {}
    for split in splits:
        (folder / split).mkdir(parents=True)
        pixels = generator.integers(0, 256, (number, size, size, 4), dtype=np.uint8)
        frames = []
        for index, picture in enumerate(pixels):
            Image.fromarray(picture).save(folder / split / f"r_{index}.png")
            pose = np.eye(4)
            pose[:3, 3] = generator.normal(size=3)
            frames.append({"file_path": f"./{split}/r_{index}", "transform_matrix": pose.tolist()})
        content = {"camera_angle_x": ANGLE, "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(content))
        written[split] = (pixels, frames)
    return written


def test_the_embedded_scene_is_labelled_synthetic_and_split_by_view():
    data = load(num_cameras=12, test_views=3, valid_views=2)
    assert data.synthetic is True
    assert "synthetic" in data.source
    assert [len(getattr(data, split)["poses"]) for split in ("train", "valid", "test")] == [7, 2, 3]
    places = torch.cat([data.train["poses"], data.valid["poses"], data.test["poses"]])[:, :, 3]
    assert len(places.unique(dim=0)) == 12
    assert torch.allclose(places.norm(dim=1), torch.tensor(4.0))
    seen = data.test["depths"][data.test["depths"].isfinite()]
    assert 2 < float(seen.min()) < float(seen.max()) < 6
    assert data.train["images"].max() == 1.0 > data.train["images"].mean() > data.train["images"].min() >= 0


def test_held_out_views_are_evenly_spaced():
    views = {"poses": torch.arange(48.0)}
    rest, held = hold_out(views, 6, "test_views")
    assert held["poses"].tolist() == [4, 12, 20, 28, 36, 44]
    assert sorted(rest["poses"].tolist() + held["poses"].tolist()) == list(range(48))
    with pytest.raises(UserError, match="48 views cannot spare 48"):
        hold_out(views, 48, "test_views")


def test_a_folder_is_read_over_white_with_its_own_cameras(tmp_path):
    pixels, frames = write_scene(tmp_path)["train"]
    data = load(dataset="blender", data_folder=str(tmp_path))
    kept = [index for index in range(8) if index not in (2, 6)]  # test
    kept.remove(4)  # valid: the fourth of six
    for row, index in enumerate(kept):
        rgba = pixels[index] / 255.0
        expected = rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:])
        np.testing.assert_allclose(data.train["images"][row].numpy(), expected, atol=1e-6)
        np.testing.assert_allclose(data.train["poses"][row].numpy(), np.array(frames[index]["transform_matrix"])[:3], rtol=1e-6)
    assert float(data.train["focals"][0]) == pytest.approx(6 / math.tan(ANGLE / 2))
    assert data.synthetic is None


def test_a_folder_with_its_own_test_views_keeps_them_apart(tmp_path):
    pixels = write_scene(tmp_path, splits=("train", "val", "test"))
    data = load(dataset="blender", data_folder=str(tmp_path), test_views=3)
    assert [len(getattr(data, split)["poses"]) for split in ("train", "valid", "test")] == [15, 1, 3]
    rgba = pixels["test"][0][1] / 255.0
    np.testing.assert_allclose(data.test["images"][0].numpy(), rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:], atol=1e-6)


def packed(path, **changed):
    generator = np.random.default_rng(1)
    arrays = {
        "images": generator.integers(0, 256, (9, 20, 20, 3), dtype=np.uint8),
        "poses": np.tile(np.eye(4, dtype=np.float32), (9, 1, 1)),
        "focal": np.float32(30),
    }
    np.savez(path, **{**arrays, **changed})
    return arrays


def test_larger_pictures_are_averaged_down_with_their_focal_length(tmp_path):
    arrays = packed(tmp_path / "views.npz")
    data = load(dataset="packed", data_file=str(tmp_path / "views.npz"), image_size=10)
    index = 0  # of the views; not held out
    expected = arrays["images"][index].reshape(10, 2, 10, 2, 3).mean((1, 3)) / 255
    np.testing.assert_allclose(data.train["images"][0].numpy(), expected, atol=1e-6)
    assert float(data.train["focals"][0]) == 15.0


def broken_json(folder):
    (folder / "transforms_train.json").write_text("{")


def no_picture(folder):
    (folder / "train" / "r_3.png").unlink()


def other_size(folder):
    Image.new("RGBA", (5, 5)).save(folder / "train" / "r_3.png")


def no_json(folder):
    (folder / "transforms_train.json").unlink()


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (broken_json, "cannot read cameras"),
        (no_json, "cannot read cameras"),
        (no_picture, r"cannot read the picture .*r_3"),
        (other_size, "differ in size"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(harm, complaint, tmp_path):
    write_scene(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=complaint):
        load(dataset="blender", data_folder=str(tmp_path))


@pytest.mark.parametrize(
    "changed", [{"images": np.zeros((9, 20, 20), np.uint8)}, {"poses": np.zeros((8, 4, 4))}, {"focal": np.float32(0)}]
)
def test_a_packed_file_of_another_form_is_refused(changed, tmp_path):
    packed(tmp_path / "views.npz", **changed)
    with pytest.raises(UserError, match="give images"):
        load(dataset="packed", data_file=str(tmp_path / "views.npz"))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match="cannot read views"):
        load(dataset="packed", data_file=str(tmp_path / "text.npz"))


def test_choices_that_do_not_go_together_are_refused():
    for fields in ({"dataset": "packed"}, {"data_folder": "x"}, {"near": 7}, {"num_cameras": 6, "test_views": 6}):
        with pytest.raises(UserError):
            Config.from_preset("smoke", fields)


def test_too_few_rays_for_a_batch_are_said():
    with pytest.raises(UserError, match="do not fill one batch"):
        load(num_rays=10**6)


def test_the_brief_arrives(tmp_path):
    path = tmp_path / "brief.yaml"
    path.write_text(TEXT)
    config = Config.from_preset("laptop", read_brief(path, "nerf", Config).overrides)
    expected = {"seed": 42, "num_epochs": 100, "learning_rate": 5e-4, "num_rays": 1024, "num_samples": 64, "clip_norm": 1.0}
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.precision == "mixed"
