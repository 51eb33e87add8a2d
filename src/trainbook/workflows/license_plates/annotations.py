"""Where the plates are, as three kinds of data sets write it: YOLO's text files, Pascal VOC's XML, CCPD's file names.

Every reader gives boxes x0, y0, x1, y1 in pixels of the picture, from its top left corner. All classes count as plates.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

from trainbook.errors import UserError

Box = tuple[float, float, float, float]
Reader = Callable[[Path, int, int], list[Box]]  # of a picture's file, its width and height

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}
TOLERANCE = 1.0  # pixels by which rounding may have moved a box out of the picture
CCPD_NAME = re.compile(r"\d+-\d+_\d+-(\d+)&(\d+)_(\d+)&(\d+)-")  # area, two angles, corners of the box, the rest


def yolo_boxes(picture: Path, width: int, height: int) -> list[Box]:
    """Boxes of labels/NAME.txt beside images/: one line "class x y w h" each, centre and size as shares of the picture.

    A picture without such a file has no plates.

    Raises:
        UserError: for a line that is none, and a box that cannot be.
    """
    path = picture.parent.parent / "labels" / f"{picture.stem}.txt"
    if not path.is_file():
        return []
    boxes = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words, where = line.split(), f"{path}, line {number}"
        if not words:
            continue
        if len(words) > 5:
            raise UserError(f"{where} has {len(words)} numbers", "give boxes, class x y w h; outlines are not read")
        try:
            x, y, wide, tall = (float(word) for word in words[1:])
        except ValueError:
            raise UserError(f"{where} is not a class and four numbers: {line.strip()!r}", "mend or remove it") from None
        box = ((x - wide / 2) * width, (y - tall / 2) * height, (x + wide / 2) * width, (y + tall / 2) * height)
        boxes.append(checked(box, width, height, where))
    return boxes


def voc_boxes(picture: Path, width: int, height: int) -> list[Box]:
    """Boxes of Annotations/NAME.xml beside the pictures' folder, or of NAME.xml beside the picture; corners as written.

    A picture without such a file has no plates.

    Raises:
        UserError: for a file that is no VOC annotation, one for another size of the picture, and a box that cannot be.
    """
    places = [picture.parent.parent / folder for folder in ("Annotations", "annotations")] + [picture.parent]
    path = next((place / f"{picture.stem}.xml" for place in places if (place / f"{picture.stem}.xml").is_file()), None)
    if path is None:
        return []
    try:
        root = ElementTree.parse(path).getroot()
        told = tuple(int(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
        boxes = [tuple(float(box.findtext(k, "")) for k in ("xmin", "ymin", "xmax", "ymax")) for box in root.iter("bndbox")]
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path} is no VOC annotation: {error}", "mend or remove it") from None
    if any(told) and told != (width, height):
        raise UserError(
            f"{path} is for a picture of {told[0]} x {told[1]}, but {picture.name} has {width} x {height}",
            "put the original picture there",
        )
    return [checked(box, width, height, f"{path}, box {number}") for number, box in enumerate(boxes, 1)]


def ccpd_boxes(picture: Path, width: int, height: int) -> list[Box]:
    """The box in a name such as 025-95_113-154&383_386&473-...jpg; pictures below a folder ccpd_np have no plate.

    Raises:
        UserError: for another name, and a box that cannot be.

    Source: Xu et al. (2018), Towards End-to-End License Plate Detection and Recognition; github.com/detectRecog/CCPD.
    """
    if "ccpd_np" in picture.parts:
        return []
    found = CCPD_NAME.match(picture.name)
    if found is None:
        raise UserError(f"{picture} is not named as CCPD names its pictures", "choose another dataset, or leave it out")
    return [checked(tuple(float(part) for part in found.groups()), width, height, str(picture))]


def checked(box: Box, width: int, height: int, where: str) -> Box:
    """The box, moved back by the pixel that rounding may have put it outside.

    Raises:
        UserError: when it lies outside the picture, or has no width or height.
    """
    x0, y0, x1, y1 = box
    # Written so that NaN fails too.
    if not (x0 >= -TOLERANCE and y0 >= -TOLERANCE and x1 <= width + TOLERANCE and y1 <= height + TOLERANCE):
        shown = ", ".join(f"{part:.1f}" for part in box)
        raise UserError(f"{where}: the box {shown} reaches out of the picture, {width} x {height}", "mend or remove it")
    clipped = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise UserError(f"{where}: the box has no width or no height", "mend or remove it")
    return clipped


def find_pictures(folder: Path, dataset: str) -> list[Path]:
    """The pictures of a data set's folder, sorted.

    Raises:
        UserError: when there are none where this kind of data set keeps them.
    """
    inside = {"yolo": ("images",), "voc": ("JPEGImages", "images")}.get(dataset, (".",))
    place = next((folder / name for name in inside if (folder / name).is_dir()), None)
    if place is None:
        raise UserError(f"there is no folder {folder / inside[0]}", "name the folder that holds it, or another dataset")
    paths = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{place} holds no pictures", f"put files there that end in {', '.join(sorted(SUFFIXES))}")
    return paths


READERS: dict[str, Reader] = {"yolo": yolo_boxes, "voc": voc_boxes, "ccpd": ccpd_boxes}
