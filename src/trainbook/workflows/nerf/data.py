"""Posed pictures of a scene: the embedded synthetic one, a nerf_synthetic folder, or a packed file."""

# V views, H height, W width

import json
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from trainbook.data import Data, content_sha256
from trainbook.errors import UserError
from trainbook.runtime import Runtime
from trainbook.workflows.nerf.config import Config
from trainbook.workflows.nerf.rays import orbit_poses, rays_of_view
from trainbook.workflows.nerf.scene import intersect, photograph, spheres_on_a_disc

CAMERA_RADIUS, FOCAL_SHARE = 4.0, 1.389  # distance and focal length over width, as in nerf_synthetic
LOWEST, HIGHEST = 0.1, 0.9  # sine of the embedded cameras' elevation
TURNS = 5  # of the spiral; with 48 cameras every eighth, those held out, then stand 60 degrees apart

Views = dict[str, Tensor]  # images (V, H, W, 3) in [0, 1], poses (V, 3, 4), focals (V,) in pixels


def load_data(config: Config, runtime: Runtime) -> Data:
    """Images (V, H, W, 3) in [0, 1] on white, poses (V, 3, 4) and focals (V,) per split, on the runtime's device.

    The embedded scene's test views also have depths (V, H, W), infinite where nothing is met.

    Raises:
        UserError: when files are missing, unreadable, of different sizes, or too few.
    """
    if config.dataset == "analytic":
        views, own_test = _photographed(config), None
        source, licence = "synthetic scene of spheres on a disc, by trainbook, rays intersected exactly", "the kit's own"
    elif config.dataset == "blender":
        views, own_test = _from_transforms(Path(config.data_folder))
        source, licence = f"folder {Path(config.data_folder).name} in the format of nerf_synthetic", "the user's"
    else:
        views, own_test = _from_packed(Path(config.data_file)), None
        source, licence = f"file {Path(config.data_file).name}", "the user's"
    sha256 = content_sha256([*views.values(), *(own_test or {}).values()])
    views, own_test = _reduced(views, config.image_size), own_test and _reduced(own_test, config.image_size)
    if own_test is None:
        views, test = hold_out(views, config.test_views, "test_views")
    else:
        _, test = hold_out(own_test, min(config.test_views, len(own_test["poses"])), "test_views", leave=0)
    train, valid = hold_out(views, config.valid_views, "valid_views")
    if train["images"].shape[1:] != test["images"].shape[1:]:
        raise UserError("the test pictures have another size than the training pictures", "give both one size")
    num_rays = train["images"][..., 0].numel()
    if num_rays < config.num_rays:
        raise UserError(f"{num_rays} training rays do not fill one batch of {config.num_rays}", "lower num_rays")
    synthetic = True if config.dataset == "analytic" else None
    if synthetic:
        test["depths"] = _exact_depths(test)
    return Data(train, valid, test, source, licence, sha256, synthetic).to(runtime.device)


def hold_out(views: Views, number: int, field: str, leave: int = 1) -> tuple[Views, Views]:
    """All but so many evenly spaced views, and those.

    Raises:
        UserError: when fewer than `leave` would remain; it names the config's `field`.
    """
    total = len(views["poses"])
    if total < number + leave:
        raise UserError(f"{total} views cannot spare {number}", f"lower {field}, or give more pictures")
    held = torch.zeros(total, dtype=torch.bool)
    held[[int((index + 0.5) * total / number) for index in range(number)]] = True
    return {name: tensor[~held] for name, tensor in views.items()}, {name: tensor[held] for name, tensor in views.items()}


def _photographed(config: Config) -> Views:
    places = (torch.arange(config.num_cameras) + 0.5) / config.num_cameras
    poses = orbit_poses(2 * math.pi * TURNS * places, torch.asin(LOWEST + (HIGHEST - LOWEST) * places), CAMERA_RADIUS)
    scene, focal = spheres_on_a_disc(), FOCAL_SHARE * config.image_size
    images = torch.stack([photograph(scene, pose, focal, config.image_size) for pose in poses])
    return {"images": images, "poses": poses, "focals": torch.full((len(poses),), focal)}


def _exact_depths(views: Views) -> Tensor:
    size, scene = views["images"].shape[1:3], spheres_on_a_disc()
    parts = zip(views["poses"], views["focals"], strict=True)
    return torch.stack([intersect(scene, *rays_of_view(pose, focal, *size)).distance.view(size) for pose, focal in parts])


def _from_transforms(folder: Path) -> tuple[Views, Views | None]:
    """Training views, those of transforms_val.json among them, and the test views if there are any."""
    train = _read_transforms(folder / "transforms_train.json")
    if (folder / "transforms_val.json").is_file():
        more = _read_transforms(folder / "transforms_val.json")
        try:
            train = {name: torch.cat([train[name], more[name]]) for name in train}
        except RuntimeError:
            raise UserError(f"{folder}: train and val pictures differ in size", "give all pictures one size") from None
    test = folder / "transforms_test.json"
    return train, _read_transforms(test) if test.is_file() else None


def _read_transforms(path: Path) -> Views:
    try:
        content = json.loads(path.read_text())
        angle, frames = float(content["camera_angle_x"]), content["frames"]
        poses = torch.tensor([frame["transform_matrix"] for frame in frames], dtype=torch.float32)
        names = [str(frame["file_path"]) for frame in frames]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read cameras from {path}: {error}",
            "give the folder of a scene of nerf_synthetic: camera_angle_x, and per frame file_path and transform_matrix",
        ) from None
    if poses.shape[1:] != (4, 4) or not 0 < angle < math.pi:
        raise UserError(f"{path}: transform_matrix must be 4 x 4 and camera_angle_x between 0 and pi", "mend the file")
    pictures = [_read_picture(path.parent / (name if Path(name).suffix else f"{name}.png")) for name in names]
    if len({picture.shape for picture in pictures}) != 1:
        raise UserError(f"the pictures of {path} differ in size", "give all pictures one size")
    images = torch.stack(pictures)
    focal = images.shape[2] / 2 / math.tan(angle / 2)
    return {"images": images, "poses": poses[:, :3], "focals": torch.full((len(poses),), focal)}


def _read_picture(path: Path) -> Tensor:
    """(H, W, 3) in [0, 1], transparent parts over white."""
    try:
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGBA"))).float() / 255
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the picture {path}: {error}", "put it there, or take its frame out of the file") from None
    return pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:]


def _from_packed(path: Path) -> Views:
    try:
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            images, poses, focal = arrays["images"], arrays["poses"], float(arrays["focal"])
    except (OSError, ValueError, TypeError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read views from {path}: {error}", "give a .npz with images, poses and focal") from None
    fits = images.ndim == 4 and images.shape[3] == 3 and images.dtype == np.uint8 and poses.shape == (len(images), 4, 4)
    if not fits or not focal > 0:
        raise UserError(
            f"{path}: images are {images.dtype} {images.shape}, poses {poses.shape}, focal {focal}",
            "give images (N, H, W, 3) uint8, poses (N, 4, 4) and one focal length in pixels",
        )
    return {
        "images": torch.from_numpy(images).float() / 255,
        "poses": torch.from_numpy(poses[:, :3]).float(),
        "focals": torch.full((len(images),), focal),
    }


def _reduced(views: Views, width: int) -> Views:
    """The same views at this width, if they are wider."""
    before = views["images"].shape[2]
    if before <= width:
        return views
    height = max(1, round(views["images"].shape[1] * width / before))
    images = interpolate(views["images"].permute(0, 3, 1, 2), size=(height, width), mode="area").permute(0, 2, 3, 1)
    return {"images": images.contiguous(), "poses": views["poses"], "focals": views["focals"] * width / before}
