"""What a license plate run can be told, and what it promises."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainbook.config import BaseConfig
from trainbook.optimization import OptimizationConfig
from trainbook.records import Target


class Config(OptimizationConfig):
    """The choices of a license plate run."""

    FILE_FIELDS: ClassVar[tuple[str, ...]] = (*BaseConfig.FILE_FIELDS, "picture_folder", "test_folder")
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "image_width": 64, "image_height": 48, "train_pictures": 8, "valid_pictures": 4, "test_pictures": 4,
            "num_epochs": 2, "batch_size": 4, "pyramid_width": 8, "warmup_steps": 2, "validate_every": 2,
        },
        "laptop": {},
        "full": {
            "dataset": "ccpd", "image_width": 480, "image_height": 768, "max_pictures": 10_000, "body": "resnet50",
            "learning_rate": 1e-4, "num_epochs": 12, "warmup_steps": 500, "validate_every": 1000, "precision": "mixed",
        },
    }  # fmt: skip

    dataset: Literal["drawn", "yolo", "voc", "ccpd"] = "drawn"
    """drawn: synthetic plates, drawn by a program; the others read picture_folder: boxes in text files, in XML, in file names."""
    picture_folder: str = ""
    """Real pictures: with images/ and labels/ (yolo), JPEGImages/ and Annotations/ (voc), or CCPD's own folder (ccpd)."""
    test_folder: str = ""
    """Test on this folder, of the same form, instead of on a share of picture_folder."""
    split_by: Literal["video", "picture"] = "video"
    """video: pictures whose names differ only in a number at the end stay in one split; picture: each is on its own."""
    max_pictures: int = Field(default=5000, ge=3)
    """Of more pictures than this, so many are drawn: they stay in memory, 3 bytes per pixel."""
    image_width: int = Field(default=160, ge=32, le=4096)
    """Pictures are made to fit into this width, in pixels, and filled up with black."""
    image_height: int = Field(default=120, ge=32, le=4096)
    """Likewise their height."""
    train_pictures: int = Field(default=1000, ge=4)
    """With dataset = drawn: pictures to train on."""
    valid_pictures: int = Field(default=100, ge=4)
    """With dataset = drawn: pictures that choose the weights."""
    test_pictures: int = Field(default=200, ge=4)
    """With dataset = drawn: pictures that the metrics are measured on."""

    body: Literal["small", "resnet50"] = "small"
    """small: three stages, learns from nothing; resnet50: torchvision's retinanet_resnet50_fpn_v2, learns from COCO's weights."""
    coco_weights: bool = True
    """With body = resnet50: start from weights trained on COCO, downloaded (150 MB, checksummed); False starts from chance."""
    pyramid_width: int = Field(default=32, ge=8, le=512, multiple_of=8)
    """With body = small: channels of the feature pyramid and of the heads."""
    nms_threshold: float = Field(default=0.5, gt=0, lt=1)
    """A box that overlaps a better one by more than this (intersection over union) is dropped."""
    confidence_threshold: float = Field(default=0.25, ge=0, lt=1)
    """Boxes with a lower score are not reported; average precision, which is over all scores, does not depend on it."""

    augment: bool = True
    """Mirror half of the training pictures and vary their brightness and contrast."""
    num_epochs: int = Field(default=6, ge=1)
    """Passes over the training pictures."""
    batch_size: int = Field(default=16, ge=1)
    """Pictures per step."""
    learning_rate: float = Field(default=2e-3, gt=0, le=1)
    """The highest rate, reached after the warm-up."""
    schedule: Literal["constant", "cosine", "linear", "step", "one_cycle"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = Field(default=30, ge=0)
    """Steps of linear rise in front of the schedule."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Scale the gradient down to this Euclidean norm; 0 does not clip."""
    validate_every: int = Field(default=62, ge=0)
    """Steps between two measurements on the validation pictures; 0 takes none and keeps the last weights."""
    best_metric: str = "valid_ap"
    """The validation metric that chooses the weights: those of the best measurement are the ones evaluated and exported."""
    best_is: Literal["lowest", "highest"] = "highest"
    """Which value of best_metric is best."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dataset == "drawn" and (self.picture_folder or self.test_folder):
            raise ValueError("a folder goes with dataset = yolo, voc or ccpd")
        if self.dataset == "drawn" and self.batch_size > self.train_pictures:
            raise ValueError("batch_size must not be larger than train_pictures")
        if self.label_smoothing or self.gradient_checkpointing:
            raise ValueError("label_smoothing and gradient_checkpointing do not apply to this detector: leave them off")
        return self


_OURS = "trainbook: measured bar of the small body, 370 steps of 16"
_CCPD = "detectRecog/CCPD's table: YOLOv3-320, 87.2 % of top boxes with IoU > 0.7"

TARGETS = (
    Target("detector/ap50", ">=", 0.95, ("laptop",), _OURS),
    Target("detector/ap", ">=", 0.50, ("laptop",), _OURS),
    Target("detector/ap50", ">", "edges/ap50", ("laptop", "full"), "trainbook: better than looking for edges"),
    Target("detector/ap", ">", "nothing/ap", ("laptop", "full"), "the original's mAP was a constant 0"),
    Target("detector/top1_at_iou70", ">=", 0.872, ("full",), _CCPD),
)
