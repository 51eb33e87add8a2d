"""What a NeRF run can be told, and what it promises."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainbook.config import BaseConfig
from trainbook.optimization import OptimizationConfig
from trainbook.records import Target


class Config(OptimizationConfig):
    """The choices of a NeRF run. Lengths are in the scene's own unit; the scene lies around the origin."""

    BRIEF_NAMES: ClassVar[dict[str, str]] = {"batch_size": ""}  # a batch is num_rays
    FILE_FIELDS: ClassVar[tuple[str, ...]] = (*BaseConfig.FILE_FIELDS, "data_folder", "data_file")
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "num_cameras": 12, "image_size": 16, "test_views": 2, "valid_views": 1, "num_rays": 128, "num_samples": 12,
            "num_epochs": 1, "width": 16, "grid_size": 16, "grid_epochs": 1, "position_frequencies": 4, "turntable_views": 4,
            "validate_every": 8,
        },
        "laptop": {},
        "full": {
            "image_size": 400, "num_cameras": 106, "num_rays": 1024, "num_samples": 64, "width": 256, "depth": 8,
            "position_frequencies": 10, "learning_rate": 5e-4, "num_epochs": 12, "grid_size": 160, "grid_epochs": 2,
            "validate_every": 2000, "precision": "mixed",
        },
    }  # fmt: skip

    dataset: Literal["analytic", "blender", "packed"] = "analytic"
    """analytic: synthetic spheres, rendered by exact ray intersection; blender: see data_folder; packed: see data_file."""
    data_folder: str = ""
    """With dataset = blender: a folder of nerf_synthetic: transforms_train.json, pictures, and perhaps transforms_test.json."""
    data_file: str = ""
    """With dataset = packed: a .npz with images (N, H, W, 3) uint8 on white, poses (N, 4, 4) and focal in pixels."""
    image_size: int = Field(default=64, ge=8, le=4096)
    """Width and height of the analytic scene's pictures; larger ones from files are reduced to this width by area averaging."""
    num_cameras: int = Field(default=48, ge=6, le=10_000)
    """With dataset = analytic: cameras on a spiral over the upper half of a sphere."""
    test_views: int = Field(default=6, ge=1)
    """Held-out views, evenly spaced among all, or among those of transforms_test.json."""
    valid_views: int = Field(default=2, ge=1)
    """Of the remaining views, so many are for validation."""
    near: float = Field(default=2.0, gt=0)
    """Distance from the camera at which rays begin."""
    far: float = Field(default=6.0, gt=0)
    """Distance at which rays end: what light is left there comes from the white background."""
    bound: float = Field(default=1.25, gt=0)
    """Half the edge of the cube that holds the scene; nothing outside is sampled. 1.5 holds all scenes of nerf_synthetic."""

    fields: Literal["both", "mlp", "grid"] = "both"
    """Train the network with positional encoding, the dense grid, or one after the other, to compare them."""
    num_rays: int = Field(default=384, ge=1)
    """Rays per step."""
    num_samples: int = Field(default=48, ge=2, le=4096)
    """Samples per ray, one at random in each of so many equal intervals; in their middles when it is evaluated."""
    position_frequencies: int = Field(default=8, ge=1, le=16)
    """Octaves of sines and cosines of a position that the MLP sees."""
    direction_frequencies: int = Field(default=4, ge=1, le=8)
    """Octaves for the viewing direction."""
    width: int = Field(default=64, ge=4, le=1024, multiple_of=2)
    """Units per layer of the MLP."""
    depth: int = Field(default=3, ge=2, le=12)
    """Layers of the MLP up to the density; from 5 on the position enters again in the middle."""
    num_epochs: int = Field(default=6, ge=1)
    """Passes of the MLP over all training rays."""
    learning_rate: float = Field(default=3e-3, gt=0, le=1)
    """The MLP's highest rate, reached after the warm-up."""
    grid_size: int = Field(default=64, ge=4, le=512)
    """Vertices of the grid along each axis."""
    grid_features: int = Field(default=6, ge=1, le=64)
    """Features per vertex, besides the density, from which a small network makes the colour."""
    grid_width: int = Field(default=32, ge=4, le=512)
    """Units of that network's hidden layer."""
    grid_epochs: int = Field(default=5, ge=1)
    """Passes of the grid over all training rays."""
    grid_learning_rate: float = Field(default=0.05, gt=0, le=1)
    """The grid's highest rate."""
    turntable_views: int = Field(default=12, ge=2, le=64)
    """Views of the turntable picture."""

    schedule: Literal["constant", "cosine", "linear", "step", "one_cycle"] = "cosine"
    """Course of the learning rate after the warm-up."""
    final_learning_rate_share: float = Field(default=0.03, ge=0, le=1)
    """With schedule = cosine, linear or one_cycle: the final rate as a share of learning_rate."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear rise in front of the schedule."""
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    """Pull of weights towards zero."""
    validate_every: int = Field(default=500, ge=0)
    """Steps between two renderings of the validation views; 0 takes none."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for dataset, field in (("blender", "data_folder"), ("packed", "data_file")):
            if (self.dataset == dataset) != bool(getattr(self, field)):
                raise ValueError(f"{field} goes with dataset = {dataset}, and dataset = {dataset} needs {field}")
        if self.near >= self.far:
            raise ValueError("near must be smaller than far")
        if self.dataset == "analytic" and self.num_cameras < self.test_views + self.valid_views + 1:
            raise ValueError("num_cameras must be larger than test_views + valid_views")
        return self

    @property
    def field_names(self) -> tuple[str, ...]:
        """Of the fields that are trained, in that order."""
        return ("mlp", "grid") if self.fields == "both" else (self.fields,)


_REAL = ("laptop", "full")
_BRIEF = "trainbook issue 10: held-out views of the analytic scene"

TARGETS = tuple(
    target
    for name in ("mlp", "grid")
    for target in (
        Target(f"{name}/psnr_db", ">=", 24.0, _REAL, _BRIEF),
        Target(f"{name}/gain_over_nearest_view_db", ">=", 8.0, _REAL, _BRIEF),
        Target(f"{name}/psnr_db", ">", "mean_colour/psnr_db", _REAL, "trainbook: better than one colour"),
    )
)
