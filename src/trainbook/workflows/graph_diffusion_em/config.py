"""What a graph-diffusion EM run can be told, and what it promises."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainbook.config import BaseConfig
from trainbook.optimization import OptimizationConfig
from trainbook.records import Target

_ARMS: dict[str, Any] = {"ablation_seeds": 5}


class Config(OptimizationConfig):
    """The choices of a graph-diffusion EM run. Every ingredient can be left out; the report measures what that costs."""

    DATA_PARALLEL: ClassVar[bool] = False
    FILE_FIELDS: ClassVar[tuple[str, ...]] = (*BaseConfig.FILE_FIELDS, "image_folder", "test_folder")
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "num_components": 6, "codebook_patches": 2000, "em_iterations": 4, "train_crops": 48, "valid_crops": 8,
            "test_size": 48, "num_neighbours": 8, "search_radius": 5, "head_em_nodes": 200, "polish_neighbours": 15,
            "polish_passes": 1, "polish_scales": 1,
            "num_epochs": 2, "batch_size": 8, "width": 16, "ablation_seeds": 2, "ablation_steps": 2, "ablation_every": 1,
            "ablation_width": 8,
        },
        "laptop": {},
        "heads": {**_ARMS, "ablation_steps": 1000, "ablation_width": 64, "ablation_every": 10},
        "full": {
            **_ARMS, "dataset": "bsd400", "test_pictures": "bsd68", "test_size": 320, "codebook_patches": 200_000,
            "num_components": 128, "em_iterations": 60, "train_crops": 20_000, "num_epochs": 30, "batch_size": 64,
            "width": 192, "network_rounds": 3, "ablation_steps": 2000, "ablation_width": 64, "precision": "mixed",
        },
    }  # fmt: skip

    dataset: Literal["photos", "folder", "bsd400", "cifar10"] = "photos"
    """photos: scikit-image's and scikit-learn's own; folder: see image_folder; bsd400, cifar10: downloaded, with checksums."""
    image_folder: str = ""
    """With dataset = folder: pictures of any size, PNG, JPEG, TIFF or BMP; split into train, valid and test by picture."""
    test_pictures: Literal["own", "set12", "bsd68"] = "own"
    """Test on the data set's own held-out pictures, or on downloaded ones."""
    test_folder: str = ""
    """Test on all pictures in this folder instead."""
    colour: bool = False
    """Denoise colour pictures; False makes all grey."""
    test_size: int = Field(default=256, ge=48, le=1024, multiple_of=16)
    """Width and height of the middle part of each test picture that is denoised; smaller pictures make it smaller."""

    noise: Literal["gaussian", "poisson_gaussian"] = "gaussian"
    """White Gaussian noise; or photon noise besides, which a transform makes white before all methods and is undone after."""
    noise_level: float = Field(default=25.0, ge=1, le=100)
    """Standard deviation of the Gaussian noise, in grey levels of 255."""
    photon_gain: float = Field(default=0.02, gt=0, le=0.5)
    """With noise = poisson_gaussian: brightness per photon; white is 1 / photon_gain photons."""
    noise_known: bool = True
    """Tell all methods the true noise level; False estimates it from each noisy picture."""

    codebook: Literal["mixture", "kmeans"] = "mixture"
    """Gaussian mixture fitted by exact EM, or its hard limit, a k-means codebook."""
    patch_size: int = Field(default=8, ge=4, le=12, multiple_of=2)
    """Width p of the patches, even."""
    num_components: int = Field(default=64, ge=1, le=1024)
    """Components K of the mixture."""
    codebook_patches: int = Field(default=50_000, ge=500)
    """Clean training patches that EM sees, at most."""
    em_iterations: int = Field(default=30, ge=1)
    """Iterations of EM; each is a step of the run."""
    codebook_floor: float = Field(default=2.0, gt=0, le=20)
    """Noise floor of the mixture, in grey levels: no direction of a component has a smaller deviation."""
    codebook_stride: int = Field(default=3, ge=1, le=8)
    """Pixels between the patches that the codebook estimates."""
    codebook_rank: int = Field(default=0, ge=0)
    """Directions of each component that choose a patch's components; 0 takes all, fewer are faster and slightly worse."""

    diffusion: Literal["attention", "heat", "pagerank", "explicit", "none"] = "attention"
    """Along the graph: attention heads learned by EM; or a Laplacian's heat kernel, personalised PageRank or Euler steps, with
    diffusion times per coefficient learned by EM; or none."""
    num_heads: Literal[1, 4] = 4
    """Four heads (texture, structure, colour, spatial) or one."""
    diffusion_rounds: int = Field(default=1, ge=1, le=10)
    """With diffusion = attention: how often the estimates become the next round's centres; more can smooth too much."""
    num_neighbours: int = Field(default=16, ge=1, le=128)
    """Edges of each node of the graph."""
    search_radius: int = Field(default=16, ge=2, le=32)
    """Neighbours are looked for this many pixels to each side."""
    graph_stride: int = Field(default=3, ge=1, le=8)
    """Pixels between nodes that attend."""
    head_em_steps: int = Field(default=4, ge=0, le=100)
    """Iterations of EM for the heads, per picture and round."""
    head_em_nodes: int = Field(default=2000, ge=0)
    """Nodes that this EM looks at; 0 takes all."""

    polish_passes: int = Field(default=2, ge=0, le=4)
    """Passes of NL-Bayes over groups of similar patches; 0 leaves it out."""
    polish_neighbours: int = Field(default=31, ge=4, le=255)
    """Patches in a group besides the first."""
    polish_stride: int = Field(default=4, ge=1, le=8)
    """Pixels between groups."""
    polish_scales: int = Field(default=2, ge=0, le=4)
    """Coarse scales, each half as large as the one after it, that are polished first; 0 leaves them out."""

    network: Literal["supervised", "noise2noise", "none"] = "supervised"
    """Also train the unrolled network: on clean targets, on noisy ones, or not at all."""
    network_rounds: int = Field(default=2, ge=1, le=8)
    """Rounds of attention in the network."""
    width: int = Field(default=96, ge=8, le=1024, multiple_of=4)
    """Features per patch in the network."""
    crop_size: int = Field(default=32, ge=16, le=128, multiple_of=2)
    """Width of the crops that the network is trained on, and of the tiles it works in."""
    train_crops: int = Field(default=1600, ge=16)
    """Training crops, from all training pictures."""
    valid_crops: int = Field(default=128, ge=4)
    """Crops of the validation pictures, for the held-out loss."""
    num_epochs: int = Field(default=10, ge=1)
    """Passes over the training crops."""
    batch_size: int = Field(default=16, ge=1)
    """Crops per step."""
    learning_rate: float = Field(default=2e-3, gt=0, le=1)
    """The highest rate of the network, reached after the warm-up."""
    schedule: Literal["constant", "cosine", "linear", "step", "one_cycle"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear rise in front of the schedule."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Scale the gradient down to this Euclidean norm; 0 does not clip."""

    ablation_seeds: int = Field(default=0, ge=0, le=100)
    """Paired seeds of the five arms that ask whether four heads converge faster; 0 leaves the question out."""
    ablation_steps: int = Field(default=300, ge=2)
    """Steps of each arm."""
    ablation_every: int = Field(default=10, ge=1)
    """Steps between two measurements of an arm's held-out loss."""
    ablation_width: int = Field(default=32, ge=8, le=1024, multiple_of=4)
    """Features per patch of the arms' networks."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.dataset == "folder") != bool(self.image_folder):
            raise ValueError("image_folder goes with dataset = folder, and dataset = folder needs image_folder")
        if self.test_folder and self.test_pictures != "own":
            raise ValueError("choose test_folder or test_pictures, not both")
        if self.colour and (self.dataset == "bsd400" or self.test_pictures != "own"):
            raise ValueError("bsd400, set12 and bsd68 are grey: leave colour off")
        if self.crop_size < 2 * self.patch_size:
            raise ValueError("crop_size must be at least twice patch_size")
        if self.batch_size > self.train_crops:
            raise ValueError("batch_size must not be larger than train_crops")
        if (self.search_radius + 1) ** 2 <= max(self.num_neighbours, self.polish_neighbours if self.polish_passes else 0):
            raise ValueError("a corner's window of (search_radius + 1)^2 patches must hold all neighbours: raise search_radius")
        if self.ablation_every > self.ablation_steps:
            raise ValueError("ablation_every must not be larger than ablation_steps")
        return self

    @property
    def sigma(self) -> float:
        """Standard deviation of the Gaussian noise, white being 1."""
        return self.noise_level / 255


_REAL = ("laptop", "heads", "full")
_BRIEF = "brief: loss 0.50 to 0.13 within 8 to 10 epochs"
_OURS = "trainbook: better than what a practitioner reaches for first"

TARGETS = (
    Target("network/loss_of_identity", ">=", 0.48, _REAL, "trainbook: the loss is 0.5 where nothing is removed"),
    Target("network/held_out_loss", "<=", 0.13, _REAL, _BRIEF),
    Target("network/held_out_loss_epoch_1", "<=", 0.13, _REAL, "trainbook: the brief's loss inside the first epoch"),
    Target("network/loss_reduction", ">=", 0.74, _REAL, "brief: at least 74 % lower"),
    Target("network/epochs_to_0.13", "<=", 10.0, _REAL, _BRIEF),
    Target("four_heads/steps_ratio_0.13", "<=", 0.8, ("heads", "full"), "brief: four heads 25 % faster, to 0.13"),
    Target("four_heads/steps_ratio_0.10", "<=", 0.8, ("heads", "full"), "brief: four heads 25 % faster, to 0.10"),
    Target("four_heads/steps_ratio_final", "<=", 0.8, ("heads", "full"), "brief: four heads 25 % faster, to 1.01 x best"),
    Target("ours/psnr_db", ">", "non_local_means/psnr_db", _REAL, _OURS),
    Target("ours/psnr_db", ">", "total_variation/psnr_db", _REAL, _OURS),
    Target("ours/psnr_db", ">", "patch_mixture/psnr_db", _REAL, "trainbook: the graph must add to the codebook"),
    Target("network/psnr_db", ">", "non_local_means/psnr_db", _REAL, "trainbook: training must beat it too"),
    Target("ours/worst_gain_over_non_local_means_db", ">=", 0.0, _REAL, "trainbook: below it on no picture"),
    Target("ours/psnr_db", ">", "ours_no_em/psnr_db", _REAL, "trainbook: EM must be worth its name"),
    Target("ours/psnr_db", ">", "ours_no_diffusion/psnr_db", _REAL, "trainbook: so must the diffusion"),
    Target("ours/psnr_db", ">", "ours_one_head/psnr_db", _REAL, "trainbook: so must the four heads"),
)
