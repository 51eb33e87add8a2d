"""Each augmentation against a search for what it drew: by brute force over all places, or by solving for the matrix."""

import math

import pytest
import torch
from scipy import stats
from torch._subclasses import FakeTensorMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as torchvision

from trainbook.augmentation import random_affine, random_crop, random_erasing, random_flip

AUGMENTATIONS = {
    "flip": random_flip,
    "crop": lambda images: random_crop(images, 2),
    "crop with zeros": lambda images: random_crop(images, 2, "constant"),
    "affine": lambda images: random_affine(images, degrees=20, translation=0.1, scale=(0.8, 1.2)),
    "erasing": lambda images: random_erasing(images, 0.3),
}
every_augmentation = pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=AUGMENTATIONS)


def noise(*shape, seed=0, dtype=torch.float32):
    """Images without zeros or symmetries."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).add(0.5).to(dtype)


def assert_uniform(counts):
    """Chi-square test; a right generator fails it for one seed in 10,000."""
    assert stats.chisquare(torch.tensor(counts).flatten()).pvalue > 1e-4


def assert_happens(number, trials, probability):
    assert stats.binomtest(number, trials, probability).pvalue > 1e-4


# What each one promises


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 1.0])
def test_an_image_is_mirrored_or_left_alone_as_often_as_asked(probability):
    torch.manual_seed(1)
    images = noise(4000, 2, 3, 5)
    mirrored = 0
    for before, after in zip(images, random_flip(images, probability), strict=True):
        is_mirrored = torch.equal(after, torchvision.horizontal_flip(before))
        assert is_mirrored or torch.equal(after, before)
        mirrored += is_mirrored
    assert_happens(mirrored, 4000, probability)


@pytest.mark.parametrize(("mode", "shape", "padding"), [("reflect", (3, 6, 9), 2), ("constant", (1, 5, 6), 4)])
def test_every_image_is_one_crop_of_its_padded_self_and_all_places_are_equally_likely(mode, shape, padding):
    torch.manual_seed(2)
    (_, height, width), places = shape, 2 * padding + 1
    images = noise(50 * places**2, *shape)
    counts = torch.zeros(places, places)
    pad = v2.Pad(padding, padding_mode=mode)
    for before, after in zip(images, random_crop(images, padding, mode), strict=True):
        padded = pad(before)
        found = [
            (top, left)
            for top in range(places)
            for left in range(places)
            if torch.equal(after, torchvision.crop(padded, top, left, height, width))
        ]
        assert len(found) == 1
        counts[found[0]] += 1
    assert_uniform(counts.tolist())


def test_no_padding_is_no_crop():
    images = noise(4, 2, 5, 6)
    assert torch.equal(random_crop(images, 0), images)


def matrices(height, width, num_images, **choices):
    """The map from output to input places, in pixels from the centre, solved from what happens to a picture of coordinates.

    Bilinear interpolation is exact on a ramp, away from the border.
    """
    down, across = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) - (height - 1) / 2,
        torch.arange(width, dtype=torch.float64) - (width - 1) / 2,
        indexing="ij",
    )
    ramps = torch.stack((across, down, torch.ones_like(down)))
    after = random_affine(ramps.expand(num_images, -1, -1, -1), **choices)
    found = []
    for image in after:
        whole = image[2] > 1 - 1e-9  # taken from inside alone
        assert whole.sum() > 20
        solution = torch.linalg.lstsq(ramps[:, whole].T, image[:2, whole].T)
        assert torch.allclose(ramps[:, whole].T @ solution.solution, image[:2, whole].T, atol=1e-5)
        found.append(solution.solution.T)  # (2, 3)
    return torch.stack(found)


def test_angle_scale_and_shift_are_uniform_in_their_ranges_and_nothing_else_happens():
    torch.manual_seed(3)
    found = matrices(24, 40, 1500, degrees=30, translation=0.2, scale=(0.8, 1.5))
    linear = found[:, :, :2].inverse()  # from input to output: a rotation times a factor
    factor = linear.det().sqrt()
    rotation = linear / factor[:, None, None]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(2, dtype=torch.float64).expand(1500, 2, 2), atol=1e-5, rtol=0)
    angle = torch.atan2(rotation[:, 1, 0], rotation[:, 0, 0]).rad2deg()
    shift = -(linear @ found[:, :, 2:])[..., 0]
    for drawn, low, high in (
        (angle, -30, 30),
        (factor, 0.8, 1.5),
        (shift[:, 0], -0.2 * 40, 0.2 * 40),
        (shift[:, 1], -0.2 * 24, 0.2 * 24),
    ):
        assert low - 1e-4 <= drawn.min()
        assert drawn.max() <= high + 1e-4
        assert stats.kstest(drawn, stats.uniform(low, high - low).cdf).pvalue > 1e-4
    assert torch.corrcoef(torch.stack((angle, factor, *shift.T))).sub(torch.eye(4)).abs().max() < 0.12


def test_affine_is_that_of_torchvision_with_the_same_angle_scale_and_shift():
    images, choices = noise(6, 3, 12, 18), {"degrees": 40, "translation": 0.15, "scale": (0.7, 1.4)}
    torch.manual_seed(4)
    found = matrices(12, 18, 6, **choices)
    torch.manual_seed(4)
    ours = random_affine(images, **choices)
    for image, after, matrix in zip(images, ours, found, strict=True):
        linear = matrix[:, :2].inverse()
        peer = torchvision.affine(
            image,
            angle=math.degrees(math.atan2(linear[1, 0], linear[0, 0])),
            scale=float(linear.det().sqrt()),
            translate=(-linear @ matrix[:, 2]).tolist(),
            shear=[0.0, 0.0],
            interpolation=v2.InterpolationMode.BILINEAR,
        )
        torch.testing.assert_close(after, peer, atol=1e-3, rtol=0)


def test_affine_without_ranges_changes_nothing():
    images = noise(3, 2, 7, 10)
    torch.testing.assert_close(random_affine(images), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("share", "tall", "wide"), [(0.25, 4, 6), (0.0, 0, 0), (1.0, 8, 12), (0.1, 3, 4)])
def test_the_erased_rectangle_has_the_promised_area_and_every_place_is_equally_likely(share, tall, wide):
    torch.manual_seed(5)
    images = noise(3000, 2, 8, 12)
    counts = torch.zeros(8 - tall + 1, 12 - wide + 1)
    for before, after in zip(images, random_erasing(images, share, probability=1.0), strict=True):
        erased = (after == 0).all(0)
        assert erased.sum() == tall * wide
        top, left = (int(places.nonzero()[0]) if places.any() else 0 for places in (erased.any(1), erased.any(0)))
        assert torch.equal(after, torchvision.erase(before, top, left, tall, wide, torch.zeros(1)))
        counts[top, left] += 1
    if share not in (0.0, 1.0):
        assert_uniform(counts.tolist())


def test_as_many_images_are_erased_as_asked():
    torch.manual_seed(6)
    images = noise(4000, 1, 4, 4)
    untouched = (random_erasing(images, 0.25, probability=0.3) == images).flatten(1).all(1)
    assert_happens(int(untouched.sum()), 4000, 0.7)


# What all of them promise


@every_augmentation
def test_the_same_seed_draws_the_same_and_another_draws_something_else(augment):
    images, results = noise(16, 3, 8, 10), []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        results.append(augment(images))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@every_augmentation
def test_images_are_drawn_one_by_one_and_their_channels_together(augment):
    torch.manual_seed(9)
    after = augment(noise(1, 1, 8, 10).expand(32, 3, -1, -1))
    assert torch.equal(after[:, 0], after[:, 1])
    assert torch.equal(after[:, 0], after[:, 2])
    assert len({image.numpy().tobytes() for image in after[:, 0].contiguous()}) > 1


@every_augmentation
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_type_shape_and_input_are_kept_also_for_a_batch_of_one_and_under_autocast(augment, dtype, autocast):
    for num_images in (1, 5):
        images = noise(num_images, 3, 8, 10, dtype=dtype)
        before = images.clone()
        torch.manual_seed(10)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            after = augment(images)
        assert (after.dtype, after.shape) == (dtype, images.shape)
        assert torch.equal(images, before)
        torch.manual_seed(10)
        expected = augment(before.double())
        torch.testing.assert_close(after.double(), expected, atol=0.01 if dtype == torch.bfloat16 else 1e-4, rtol=0)


@every_augmentation
def test_the_gradient_is_that_of_finite_differences(augment):
    def repeated(images):
        torch.manual_seed(11)
        return augment(images)

    images = noise(6, 2, 4, 5, dtype=torch.float64).requires_grad_()
    assert not torch.equal(repeated(images), images)
    assert torch.autograd.gradcheck(repeated, images)


@every_augmentation
def test_on_a_gpu_no_value_is_read_by_the_host_and_no_tensor_stays_on_it(augment):
    with FakeTensorMode():  # has every device, and raises where a shape or a branch depends on a value
        after = augment(torch.empty(4, 3, 8, 10, device="cuda"))
    assert (after.device.type, after.shape) == ("cuda", (4, 3, 8, 10))


@pytest.mark.gpu
@every_augmentation
def test_the_host_never_waits_for_the_gpu(augment):
    images = noise(8, 3, 8, 10).cuda()
    augment(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert augment(images).device == images.device
    finally:
        torch.cuda.set_sync_debug_mode("default")
