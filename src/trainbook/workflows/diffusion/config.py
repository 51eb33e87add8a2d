"""What an image diffusion run can be told, and what it promises."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainbook.config import BaseConfig
from trainbook.optimization import OptimizationConfig
from trainbook.records import Target

IMAGE_SIZES = {"digits": 8, "mnist": 28, "fashion_mnist": 28, "cifar10": 32}


class Config(OptimizationConfig):
    """The choices of an image diffusion run."""

    FILE_FIELDS: ClassVar[tuple[str, ...]] = (*BaseConfig.FILE_FIELDS, "data_folder")
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "max_train_images": 256, "block_channels": (8, 16), "num_groups": 4, "num_epochs": 4, "batch_size": 32,
            "num_inference_steps": 4, "num_samples": 40, "classifier_epochs": 2, "num_snapshots": 2, "validate_every": 16,
        },
        "laptop": {},
        "mnist": {
            "dataset": "mnist", "block_channels": (32, 64, 64), "layers_per_block": 2, "num_epochs": 30, "ema_decay": 0.999,
            "classifier_epochs": 3, "num_samples": 2000, "precision": "mixed", "validate_every": 1000,
        },
        "full": {
            "dataset": "cifar10", "block_channels": (128, 256, 256), "layers_per_block": 2, "attention": True, "num_groups": 32,
            "dropout": 0.1, "learning_rate": 2e-4, "schedule": "constant", "warmup_steps": 5000, "num_epochs": 500,
            "ema_decay": 0.9999, "classifier_epochs": 10, "num_samples": 10_000, "precision": "mixed", "validate_every": 5000,
        },
    }  # fmt: skip

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10"] = "digits"
    """digits: scikit-learn's 1,797 real 8x8 images; the others by torchvision, or from data_folder."""
    data_folder: str = ""
    """For mnist and fashion_mnist: a folder with the four official .gz files, instead of a download."""
    max_train_images: int = Field(default=0, ge=0)
    """Train on the first so many images; 0 takes all."""

    block_channels: tuple[int, ...] = (24, 48)
    """Channels of the U-Net's levels, from the finest; each halves the image."""
    layers_per_block: int = Field(default=1, ge=1, le=8)
    """Residual layers per level, on the way down."""
    attention: bool = False
    """Self-attention in all levels but the finest."""
    num_groups: int = Field(default=8, ge=1, le=64)
    """Groups of the group normalisation; every level's channels must be a multiple."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of units that a residual layer leaves out while it trains."""
    num_timesteps: int = Field(default=1000, ge=2, le=10_000)
    """Steps of the noise schedule, a squared cosine."""
    label_dropout: float = Field(default=0.1, ge=0, lt=1)
    """How often the class is hidden in training, which makes guidance possible."""

    num_inference_steps: int = Field(default=50, ge=1, le=10_000)
    """Steps of DDIM from noise to image."""
    guidance_scale: float = Field(default=2.0, ge=1, le=20)
    """Samples are judged without guidance (scale 1) and at this scale."""
    num_samples: int = Field(default=540, ge=10)
    """Samples that are judged, the classes in turn."""
    num_snapshots: int = Field(default=6, ge=1, le=20)
    """How often in training samples of every class are drawn for the picture."""

    batch_size: int = Field(default=128, ge=1)
    """Images per step."""
    num_epochs: int = Field(default=100, ge=1)
    """Passes over the training images."""
    learning_rate: float = Field(default=2e-3, gt=0, le=1)
    """The U-Net's highest rate, reached after the warm-up."""
    schedule: Literal["constant", "cosine", "linear", "step", "one_cycle"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear rise in front of the schedule."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Scale the gradient down to this Euclidean norm; 0 does not clip."""
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay per step of the exponential moving average of the weights, which is what draws; 0 keeps none."""
    validate_every: int = Field(default=200, ge=0)
    """Steps between two measurements of the loss on the validation images; 0 takes none."""

    classifier_epochs: int = Field(default=30, ge=1)
    """Passes of the classifier whose features and answers judge the samples."""
    classifier_learning_rate: float = Field(default=2e-3, gt=0, le=1)
    """Its rate."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.data_folder and self.dataset not in ("mnist", "fashion_mnist"):
            raise ValueError("data_folder goes with dataset = mnist or fashion_mnist")
        if not self.block_channels or any(channels < 1 or channels % self.num_groups for channels in self.block_channels):
            raise ValueError("every entry of block_channels must be a positive multiple of num_groups")
        size, halvings = IMAGE_SIZES[self.dataset], len(self.block_channels) - 1
        if size % 2**halvings:
            raise ValueError(f"images of {size} pixels cannot be halved {halvings} times")
        if self.num_inference_steps > self.num_timesteps:
            raise ValueError("num_inference_steps must not be larger than num_timesteps")
        if self.max_train_images and self.batch_size > self.max_train_images:
            raise ValueError("batch_size must not be larger than max_train_images")
        return self


_ALL = ("laptop", "mnist", "full")
_BRIEF = "trainbook issue 10: scikit-learn's digits, within 120 CPU-seconds"
_MEMORY = "trainbook: samples not much nearer to training images than held-out images are"

TARGETS = (
    Target("samples/frechet_distance", "<=", 12.0, ("laptop",), _BRIEF),
    Target("samples/conditional_accuracy", ">=", 0.9, ("laptop", "mnist"), _BRIEF),
    Target("samples/frechet_distance", "<", "gaussian/frechet_distance", _ALL, "trainbook: beat a Gaussian"),
    Target("samples/nearest_distance_share", ">=", 0.8, _ALL, _MEMORY),
)
