"""Readers of the three kinds of labels, on files written by hand: exact boxes, and what is wrong with a bad one."""

from pathlib import Path

import pytest

from trainbook.errors import UserError
from trainbook.workflows.license_plates.annotations import ccpd_boxes, find_pictures, voc_boxes, yolo_boxes

CCPD = "025-95_113-154&383_386&473-386&473_177&454_154&383_363&402-0_0_22_27_27_33_16-37-15.jpg"
VOC = """<annotation><filename>a.jpg</filename><size><width>200</width><height>100</height><depth>3</depth></size>
<object><name>plate</name><bndbox><xmin>10</xmin><ymin>20.5</ymin><xmax>60</xmax><ymax>40</ymax></bndbox></object>
<object><name>other</name><bndbox><ymax>100</ymax><ymin>0</ymin><xmin>0</xmin><xmax>200</xmax></bndbox></object></annotation>"""


def write(path, text):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def yolo(text):
    write("set/labels/a.txt", text)
    return yolo_boxes(Path("set/images/a.jpg"), 200, 100)


def test_yolo_lines_are_boxes_in_pixels():
    assert yolo("0 0.5 0.5 0.25 0.2\n\n3 0.05 0.9 0.1 0.2\n") == [(75.0, 40.0, 125.0, 60.0), (0.0, 80.0, 20.0, 100.0)]


def test_a_picture_without_a_label_file_or_with_an_empty_one_has_no_plates():
    assert yolo_boxes(Path("set/images/b.jpg"), 200, 100) == voc_boxes(Path("set/images/b.jpg"), 200, 100) == []
    assert yolo("") == []


def test_a_rounding_out_of_the_picture_is_put_back():
    assert yolo("0 0.5 0.5 1.002 1.002") == [(0.0, 0.0, 200.0, 100.0)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0 0.5 0.5 0.2 0.2\n0 0.95 0.5 0.2 0.2", r"a\.txt, line 2: the box 170\.0, 40\.0, 210\.0, 60\.0 reaches out"),
        ("0 0.5 -0.4 0.2 0.2", "line 1: .* reaches out"),
        ("0 0.5 0.5 0 0.2", "line 1: the box has no width or no height"),
        ("0 0.5 0.5 0.2 -0.1", "no width or no height"),
        ("0 nan 0.5 0.2 0.2", "reaches out"),
        ("0 inf 0.5 0.2 0.2", "reaches out"),
        ("0 0.5 0.5 0.2", "line 1 is not a class and four numbers: '0 0.5 0.5 0.2'"),
        ("0 0.5 0.5 0.2 wide", "not a class and four numbers"),
        ("0 0.1 0.1 0.2 0.1 0.2 0.2", "line 1 has 7 numbers\n.*outlines are not read"),
    ],
)  # fmt: skip
def test_a_yolo_line_that_cannot_be_is_told_with_its_place(text, complaint):
    with pytest.raises(UserError, match=complaint):
        yolo(text)


@pytest.mark.parametrize("folder", ["Annotations", "annotations", "JPEGImages"])
def test_voc_boxes_are_the_corners_as_written_wherever_the_file_lies(folder):
    write(f"set/{folder}/a.xml", VOC)
    assert voc_boxes(Path("set/JPEGImages/a.jpg"), 200, 100) == [(10.0, 20.5, 60.0, 40.0), (0.0, 0.0, 200.0, 100.0)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (VOC.replace("</annotation>", ""), r"a\.xml is no VOC annotation"),
        (VOC.replace("<xmin>10</xmin>", ""), "no VOC annotation"),
        (VOC.replace("<xmax>60</xmax>", "<xmax>260</xmax>"), "box 1: the box 10.0, 20.5, 260.0, 40.0 reaches out"),
        (VOC.replace("<xmax>60</xmax>", "<xmax>10</xmax>"), "no width"),
        (VOC.replace("<width>200", "<width>400"), "is for a picture of 400 x 100, but a.jpg has 200 x 100"),
    ],
)
def test_a_voc_file_that_cannot_be_is_told(text, complaint):
    write("set/Annotations/a.xml", text)
    with pytest.raises(UserError, match=complaint):
        voc_boxes(Path("set/images/a.jpg"), 200, 100)


def test_a_voc_file_without_a_size_is_taken_at_its_word():
    write("set/Annotations/a.xml", VOC.replace("<size><width>200</width><height>100</height><depth>3</depth></size>", ""))
    assert len(voc_boxes(Path("set/images/a.jpg"), 200, 100)) == 2


def test_ccpd_boxes_stand_in_the_name():
    assert ccpd_boxes(Path("ccpd_base") / CCPD, 720, 1160) == [(154.0, 383.0, 386.0, 473.0)]
    assert ccpd_boxes(Path("ccpd_np/1.jpg"), 720, 1160) == []


@pytest.mark.parametrize(
    ("name", "complaint"), [("holiday.jpg", "not named as CCPD"), (CCPD, r"reaches out of the picture, 300 x 400")]
)
def test_a_ccpd_name_that_cannot_be_is_told(name, complaint):
    with pytest.raises(UserError, match=complaint):
        ccpd_boxes(Path(name), 300, 400)


def test_pictures_are_looked_for_where_the_kind_of_data_set_keeps_them():
    for name in ("set/images/b.PNG", "set/images/a.jpg", "set/labels/a.jpg", "set/images/notes.txt", "set/JPEGImages/c.jpg"):
        write(name, "")
    assert [path.name for path in find_pictures(Path("set"), "yolo")] == ["a.jpg", "b.PNG"]
    assert [path.name for path in find_pictures(Path("set"), "voc")] == ["c.jpg"]
    assert len(find_pictures(Path("set"), "ccpd")) == 4
    Path("empty/images").mkdir(parents=True)
    complaints = {"none": "there is no folder", "set/labels": "no folder set/labels/images", "empty": "holds no pictures"}
    for folder, complaint in complaints.items():
        with pytest.raises(UserError, match=complaint):
            find_pictures(Path(folder), "yolo")
