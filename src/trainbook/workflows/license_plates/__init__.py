"""License plates: a one-stage detector that draws a box around every plate in a picture, scored as COCO scores detectors.

RetinaNet (feature pyramid, anchors, focal loss) as torchvision has it: with a ResNet-50 body that knows COCO, or with a small
body that learns from nothing in minutes on a CPU. The embedded pictures are drawn by a program and labelled so; real ones come
from YOLO folders, VOC files and CCPD's file names.
"""

import lazy_loader

from trainbook.workflows.license_plates.config import TARGETS, Config

__getattr__, _dir, _all = lazy_loader.attach(
    __name__,
    submod_attrs={
        "images": ["load_data"],
        "training": ["build", "train"],
        "evaluation": ["evaluate"],
        "pictures": ["draw", "draw_data"],
    },
)
__all__ = ["TARGETS", "Config", "build", "draw", "draw_data", "evaluate", "load_data", "train"]
