"""Synthetic street pictures with number plates, drawn with Pillow: an index always gives the same picture and boxes.

A plate is a light board with a dark rim and one line of capitals and digits that fills it, turned, shaded, blurred and noisy.
What else is in the picture is there to mislead: coloured signs with words, light boards without text, posters, grilles.
"""

# H, W of the picture in pixels; boxes are x0, y0, x1, y1 in pixels from the top left corner

import functools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SEED = 20_261_127  # belongs to the data, not to the run
SUPERSAMPLING = 2  # drawn this much larger, then averaged
LETTERS, DIGITS = "ABCDEFGHJKLMNPRSTUVWXYZ", "0123456789"
SCHEMES = ("LL DD LLL", "L DDD LL", "DDD LLL", "LLL DDDD", "LL DDD LL", "LL DDDD")
WORDS = ("market", "Hotel", "open", "coffee", "exit", "Station", "sale", "Bakery", "parking", "fresh", "Taxi", "STOP", "BAR")
TINTS = ((250, 250, 245), (245, 215, 80), (225, 235, 250), (250, 235, 190), (215, 240, 215))
RIMS = ((15, 15, 20), (20, 30, 90), (90, 15, 15))
MAX_PLATES = 2
MAX_DEGREES = 12.0
PLATE_WIDTHS = (0.2, 0.4)  # share of the picture's width
MAX_OVERLAP = 0.02  # of two plates' boxes, as a share of the smaller
MAX_TRIES = 20


def draw_picture(index: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture of an index, with 0 to 2 plates.

    Args:
        index: any whole number from 0; all random choices follow from it.
        width, height: W and H.

    Returns:
        (H, W, 3) uint8; (n, 4) float32, the smallest upright boxes around the turned plates, all inside the picture.
    """
    random = np.random.default_rng((SEED, index))
    canvas = _background(random, width * SUPERSAMPLING, height * SUPERSAMPLING)
    pen = ImageDraw.Draw(canvas)
    for _ in range(random.integers(2, 6)):
        DISTRACTORS[random.integers(len(DISTRACTORS))](random, pen, *canvas.size)
    boxes: list[np.ndarray] = []
    for _ in range(random.integers(0, MAX_PLATES + 1)):
        box = _put_plate(random, canvas, boxes)
        if box is not None:
            boxes.append(box)
    picture = canvas.reduce(SUPERSAMPLING)
    picture = picture.filter(ImageFilter.GaussianBlur(random.uniform(0, 0.006) * width))
    light = np.asarray(picture, np.float32) * random.uniform(0.55, 1.2) + random.uniform(-15, 15)
    light += random.uniform(2, 10) * random.standard_normal(light.shape, np.float32)
    found = np.stack(boxes) / SUPERSAMPLING if boxes else np.zeros((0, 4))
    return light.clip(0, 255).astype(np.uint8), found.astype(np.float32)


@functools.lru_cache(maxsize=8)
def draw_pictures(first: int, number: int, width: int, height: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """`draw_picture` of so many indices; kept in memory, so that a process draws them once. Do not change them.

    Returns:
        (number, H, W, 3) uint8; the boxes of each.
    """
    pictures, boxes = zip(*(draw_picture(first + index, width, height) for index in range(number)), strict=True)
    stacked = np.stack(pictures)
    stacked.setflags(write=False)
    return stacked, boxes


@functools.lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _colour(random: np.random.Generator, low: int = 0, high: int = 256) -> tuple[int, ...]:
    return tuple(random.integers(low, high, 3).tolist())


def _place(random: np.random.Generator, width: int, height: int, wide: float, tall: float) -> tuple[int, int, int, int]:
    """A rectangle of about such a size somewhere in the picture, partly outside at times."""
    x, y = random.uniform(-wide / 3, width - wide / 2), random.uniform(-tall / 3, height - tall / 2)
    return int(x), int(y), int(x + max(wide, 4)), int(y + max(tall, 4))


def _background(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """Soft blotches under rectangles, ellipses and lines."""
    blotches = random.integers(20, 236, (5, 7, 1)) + random.integers(-50, 51, (5, 7, 3))
    canvas = Image.fromarray(blotches.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)
    for _ in range(random.integers(8, 20)):
        place = _place(random, width, height, random.uniform(0.03, 0.5) * width, random.uniform(0.03, 0.5) * height)
        kind = random.integers(4)
        if kind == 0:
            pen.rectangle(place, _colour(random), _colour(random), int(random.integers(1, 4)))
        elif kind == 1:
            pen.ellipse(place, _colour(random), _colour(random))
        else:
            pen.line(place, _colour(random), int(random.integers(1, 6)))
    return canvas


def _sign(random: np.random.Generator, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """A dark or coloured board with a light word."""
    font = _font(int(random.uniform(0.06, 0.13) * width))
    word = WORDS[random.integers(len(WORDS))]
    wide, tall = pen.textbbox((0, 0), word, font)[2:]
    x, y, right, bottom = _place(random, width, height, 1.25 * wide, 1.5 * tall)
    pen.rectangle((x, y, right, bottom), _colour(random, 0, 140), _colour(random))
    pen.text(((x + right) / 2, (y + bottom) / 2), word, _colour(random, 180), font, "mm")


def _blank(random: np.random.Generator, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """A light board with a plate's proportions and a rim, and nothing on it."""
    wide = random.uniform(*PLATE_WIDTHS) * width
    place = _place(random, width, height, wide, wide * random.uniform(0.22, 0.5))
    pen.rectangle(place, TINTS[random.integers(len(TINTS))], RIMS[random.integers(len(RIMS))], 2)


def _poster(random: np.random.Generator, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """A light sheet with several lines of small text."""
    font, lines = _font(max(7, int(0.035 * width))), int(random.integers(3, 6))
    text = "\n".join(" ".join(random.choice(WORDS, 2)) for _ in range(lines))
    *_, wide, tall = pen.textbbox((0, 0), text, font)
    x, y, right, bottom = _place(random, width, height, 1.15 * wide, 1.15 * tall)
    pen.rectangle((x, y, right, bottom), TINTS[random.integers(len(TINTS))])
    pen.text((x + 0.07 * wide, y + 0.05 * tall), text, _colour(random, 0, 90), font)


def _grille(random: np.random.Generator, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """Parallel bars: as many edges as a plate has."""
    wide = random.uniform(*PLATE_WIDTHS) * width
    x, y, right, bottom = _place(random, width, height, wide, wide * random.uniform(0.2, 0.5))
    pen.rectangle((x, y, right, bottom), _colour(random, 0, 90))
    step = int(random.integers(5, 10))
    for bar in range(x, right, step):
        pen.line((bar, y, bar, bottom), _colour(random, 120), 2)


DISTRACTORS = (_sign, _blank, _poster, _grille)


def _put_plate(random: np.random.Generator, canvas: Image.Image, taken: list[np.ndarray]) -> np.ndarray | None:
    """Draw a plate where it covers no other; its box, or None when no place was found."""
    wide = random.uniform(*PLATE_WIDTHS) * canvas.width
    plate = _plate(random, wide)
    angle = math.radians(random.uniform(-MAX_DEGREES, MAX_DEGREES))
    cosine, sine = math.cos(angle), math.sin(angle)
    half = np.abs([[cosine, sine], [sine, cosine]]) @ (plate.width / 2, plate.height / 2)
    for _ in range(MAX_TRIES):
        if np.any(2 * half >= canvas.size):
            return None
        centre = random.uniform(half, np.array(canvas.size) - half)
        box = np.concatenate((centre - half, centre + half))
        if all(_overlap(box, other) <= MAX_OVERLAP for other in taken):
            break
    else:
        return None
    # The plate is sampled at R(-a) (p - centre) + its own centre, for the pixels p of a window around the box.
    left, top = np.floor(box[:2]).astype(int)
    window = tuple((np.ceil(box[2:]).astype(int) - (left, top)).tolist())
    x, y = left - centre[0], top - centre[1]
    matrix = (
        cosine, sine, cosine * x + sine * y + plate.width / 2,
        -sine, cosine, -sine * x + cosine * y + plate.height / 2,
    )  # fmt: skip
    turned = plate.transform(window, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    canvas.paste(turned, (int(left), int(top)), turned)
    return box


def _plate(random: np.random.Generator, wide: float) -> Image.Image:
    """A plate seen from the front, with random text, tint and proportions; opaque."""
    height = wide * random.uniform(0.21, 0.42)
    size = (round(wide), round(height))
    plate = Image.new("RGBA", size, (*TINTS[random.integers(len(TINTS))], 255))
    pen = ImageDraw.Draw(plate)
    ink = (*RIMS[random.integers(len(RIMS))], 255)
    pen.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=ink, width=max(1, round(0.06 * height)))
    left = 0.05 * wide
    if random.random() < 0.4:  # the band of European plates
        left = 0.12 * wide
        pen.rectangle((1, 1, left, size[1] - 2), (25, 60, 170, 255))
    scheme = SCHEMES[random.integers(len(SCHEMES))]
    pools = {"L": LETTERS, "D": DIGITS, " ": " "}
    text = "".join(pools[part][random.integers(len(pools[part]))] for part in scheme)
    font = _font(max(6, round(0.8 * height)))
    x0, y0, x1, y1 = font.getbbox(text)
    line = Image.new("L", (x1 - x0, y1 - y0))
    ImageDraw.Draw(line).text((-x0, -y0), text, 255, font)
    room = (max(1, round(0.94 * wide - left)), max(1, round(0.66 * height)))
    line = line.resize((min(room[0], round(line.width * room[1] / line.height)), room[1]), Image.Resampling.BILINEAR)
    plate.paste(ink, (round(left + (room[0] - line.width) / 2), round(0.17 * height)), line)
    return plate


def _overlap(box: np.ndarray, other: np.ndarray) -> float:
    """Common area as a share of the smaller box."""
    common = np.prod(np.clip(np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]), 0, None))
    return float(common / min(np.prod(box[2:] - box[:2]), np.prod(other[2:] - other[:2])))
