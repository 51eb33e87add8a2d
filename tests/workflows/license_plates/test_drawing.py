"""Drawn pictures: the same for the same index, and boxes that lie around what was painted."""

import numpy as np
import pytest
from PIL import Image

from trainbook.workflows.license_plates import drawing
from trainbook.workflows.license_plates.drawing import MAX_OVERLAP, draw_picture, draw_pictures


def test_an_index_gives_one_picture_whatever_was_drawn_before():
    first = draw_picture(7, 96, 64)
    draw_picture(8, 96, 64)
    again = draw_picture(7, 96, 64)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], draw_picture(8, 96, 64)[0])
    pictures, boxes = draw_pictures(6, 3, 96, 64)
    assert np.array_equal(pictures[1], first[0])
    assert np.array_equal(boxes[1], first[1])
    assert draw_pictures(6, 3, 96, 64)[0] is pictures  # kept, not drawn again


def test_pictures_hold_none_one_and_two_plates_inside_and_apart():
    _, boxes = draw_pictures(0, 60, 96, 64)
    assert {len(found) for found in boxes} == {0, 1, 2}
    for found in boxes:
        assert (found[:, :2] >= 0).all()
        assert (found[:, 2:] <= (96, 64)).all()
        assert (found[:, 2:] - found[:, :2] >= 3).all()
        if len(found) == 2:
            assert drawing._overlap(*found) <= MAX_OVERLAP + 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_a_box_is_the_extent_of_the_painted_pixels(seed):
    """Painted on nothing: the pixels that changed, against the box from geometry."""
    canvas = Image.new("RGB", (400, 300), (1, 2, 3))
    box = drawing._put_plate(np.random.default_rng(seed), canvas, [])
    changed = (np.asarray(canvas) != (1, 2, 3)).any(-1)
    rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
    painted = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert np.abs(box - painted).max() < 1.6  # pixels of the enlarged picture; corners taper off


def test_a_plate_finds_no_place_where_another_covers_all():
    canvas = Image.new("RGB", (200, 150))
    assert drawing._put_plate(np.random.default_rng(0), canvas, [np.array((0.0, 0.0, 200.0, 150.0))]) is None
    assert not np.asarray(canvas).any()
