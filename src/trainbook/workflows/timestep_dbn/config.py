"""What a timestep-specific DBN run can be told, and what it promises."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from trainbook.config import BaseConfig
from trainbook.optimization import OptimizationConfig
from trainbook.records import Target

# The brief's setting. V100 and T4 differ from each other in memory and speed, which the size of the blocks follows by itself;
# both have 16-bit units for the autoencoder.
_FULL: dict[str, Any] = {
    "dataset": "cifar10_airplane", "timesteps": 50, "batch_size": 32, "epochs_per_timestep": 100, "gibbs_sweeps": 1,
    "learning_rate": 2e-3,
    "code_channels": (4, 8, 16), "hidden_units": (512, 256, 256), "autoencoder_epochs": 100, "autoencoder_width": 96,
    "ais_temperatures": 1000,
}  # fmt: skip


class Config(BaseConfig):
    """The choices of a timestep-specific DBN run; levels are counted from fine (0) to coarse (2)."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "timesteps": 3, "epochs_per_timestep": 2, "autoencoder_epochs": 2, "baseline_epochs": 2, "hidden_units": (16, 16, 8),
            "small_rbm_updates": 2,
            "max_train_images": 256, "evaluation_images": 32, "ais_temperatures": 20, "num_samples": 16, "autoencoder_width": 16,
        },
        "laptop": {},
        "full": _FULL,
        "v100": {**_FULL, "precision": "mixed"},
        "t4": {**_FULL, "precision": "mixed"},
        "cpu": {
            **_FULL, "autoencoder_epochs": 20, "autoencoder_width": 48, "epochs_per_timestep": 20, "baseline_epochs": 5,
            "evaluation_images": 64, "ais_temperatures": 100,
        },
    }  # fmt: skip

    BRIEF_NAMES: ClassVar[dict[str, str]] = {
        "num_epochs": "epochs_per_timestep",
        "gradient_clipping": "clip_norm",
        "mixed_precision": "precision",
    }

    FILE_FIELDS: ClassVar[tuple[str, ...]] = (*BaseConfig.FILE_FIELDS, "data_file", "autoencoder")
    MODULE_FIELDS: ClassVar[dict[str, tuple[str, str]]] = {
        "autoencoder": (
            "autoencoder",
            "use the data set and code_channels it was trained with, or regenerate it with: trainbook run timestep_dbn "
            "--stage autoencoder; see 'Checkpoint' in the workflow's README",
        )
    }

    dataset: Literal["digits", "cifar10_airplane", "file"] = "digits"
    """digits: scikit-learn's 1,797 real 8x8 images; cifar10_airplane: downloaded by torchvision; file: see data_file."""
    data_file: str = ""
    """With dataset = file: a .npz with uint8 arrays train and test, (N, H, W) or (N, H, W, 3); H and W multiples of 8."""
    max_train_images: int = Field(default=0, ge=0)
    """Use only the first so many training images; 0 uses all."""

    autoencoder: str = ""
    """A pre-trained autoencoder: a run, its export folder, a .safetensors file or a torch checkpoint; its stage is then left out,
    and code_channels and autoencoder_width are the file's."""
    stage: Literal["all", "autoencoder"] = "all"
    """Train everything, or only the autoencoder, for --autoencoder of other runs."""
    code_channels: tuple[int, int, int] = (4, 8, 32)
    """Bits per position on the three levels, at 1/2, 1/4 and 1/8 of the image's width."""
    autoencoder_width: int = Field(default=64, ge=4, le=1024, multiple_of=4)
    """Channels of the autoencoder's convolutions, a multiple of 4."""
    autoencoder_epochs: int = Field(default=60, ge=1)
    """Passes over the training images for the binary autoencoder."""
    autoencoder_learning_rate: float = Field(default=2e-3, gt=0, le=1)
    """Adam's rate for the autoencoder, lowered to a tenth by a cosine."""
    confidence_weight: float = Field(default=0.003, ge=0)
    """Weight of the entropy of each bit's probability: higher makes the encoder surer of its bits."""
    balance_weight: float = Field(default=0.01, ge=0)
    """Weight of the entropy of each bit's batch mean: higher makes every bit use both values."""

    timesteps: int = Field(default=8, ge=1, le=1000)
    """Diffusion steps T; one conditional RBM per step and level."""
    schedule: Literal["cosine", "reciprocal", "linear"] = "cosine"
    """How fast bits are flipped: cosine in the cumulative; 1/(2(T-t+1)); or linear 1e-4 to 0.02, which does not reach noise."""
    hidden_units: tuple[int, int, int] = (192, 96, 64)
    """Hidden units of the RBM on each level."""
    depth: tuple[int, int, int] = (1, 1, 1)
    """Layers on each level, or one number for all: RBMs above the first that model the hidden units below, trained one by one."""
    joint_epochs: int = Field(default=0, ge=0)
    """Epochs in which all levels of a timestep are trained on together, as one machine; needs context = hidden_sample."""
    context: Literal["hidden_mean", "hidden_sample", "bits"] = "hidden_mean"
    """What a level sees of the next coarser one: mean or sample of its hidden units, or its bits themselves."""
    noisy_context: bool = True
    """Show each RBM's hidden units the noisy bits of all levels, not only its own through the exact coupling."""
    negative_phase: Literal["pcd", "recovery", "cd"] = "pcd"
    """Where the negative Gibbs chain starts: persistent chains, the noisy bits, or the clean bits."""
    gibbs_sweeps: int = Field(default=2, ge=1, le=1000)
    """Gibbs sweeps of the negative phase, k."""
    order: Literal["block", "sequential"] = "block"
    """Train all timesteps of a block at once as one tensor, or one timestep after the other."""
    block_size: int = Field(default=0, ge=0)
    """Timesteps per block when order = block; 0 puts all in one. A later block starts from the last step before it."""
    epochs_per_timestep: int = Field(default=100, ge=1)
    """Passes over the training codes for each block of timesteps."""
    batch_size: int = Field(default=32, ge=2, le=4096)
    """Images per step, in every stage."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """How the RBMs follow the contrastive gradient."""
    learning_rate: float = Field(default=1e-2, gt=0, le=10)
    """Rate of the RBMs' optimizer, lowered to a tenth by a cosine within each block."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay on the RBMs' weights, none on their biases."""
    acceleration: Literal["auto", "off", "compiled"] = "auto"
    """Kernels of the RBMs' training compiled by torch, or not; auto: on a CPU, when the chain trains long enough to gain. The
    numbers are the same bit for bit; the first compilation of a machine takes about a minute."""
    rbm_precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the RBMs' products: bits are exact in 16 bits, weights and probabilities are rounded while W itself stays float32.
    Faster on cards with 16-bit units and on CPUs with AVX512-BF16 or AMX; a warning says where it is slower."""
    tf32: bool = False
    """On NVIDIA cards from Ampere on: float32 products with 10 bits of mantissa, several times faster."""

    correlation_threshold: float = Field(default=0.0, ge=0, lt=1)
    """Pull a timestep towards independent units while its chain's autocorrelation is above this and not falling; 0: never."""
    correlation_lag: int = Field(default=10, ge=1, le=1000)
    """Sweeps after which that autocorrelation is measured, once an epoch."""
    patience: int = Field(default=0, ge=0)
    """Epochs without a better validation value after which a timestep is no longer updated; 0: update all to the end. The chain
    has the weights of each timestep's best epoch either way."""

    baseline_epochs: int = Field(default=100, ge=1)
    """Passes over the training codes for the baselines; the small RBM takes more, see small_rbm_updates."""
    baseline_learning_rate: float = Field(default=2e-3, gt=0, le=10)
    """Rate of the logistic step, lowered to a tenth by a cosine; so are those of the other baselines."""
    monolithic_rbm_learning_rate: float = Field(default=5e-3, gt=0, le=10)
    """Rate of the RBM of the chain's size."""
    denoiser_learning_rate: float = Field(default=1e-3, gt=0, le=10)
    """Rate of the denoiser."""
    small_rbm_learning_rate: float = Field(default=1e-3, gt=0, le=10)
    """Rate of the small RBM."""
    small_rbm_updates: int = Field(default=10, ge=1)
    """Updates of the small RBM per step of the other baselines: 10 of them cost about as much as one of the chain."""
    baseline_weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay of the plain RBMs' weights."""

    clip_norm: float = Field(default=0.0, ge=0)
    """Of the autoencoder and the logistic step: scale the gradient down to this Euclidean norm; 0 does not clip."""
    precision: Literal["float32", "bfloat16", "float16", "mixed"] = "float32"
    """Of the products in the autoencoder and the logistic step; the RBMs' are float32. mixed: what the device is fast at."""

    sampling_sweeps: int = Field(default=0, ge=0)
    """Gibbs sweeps per reverse step when sampling; 0: chosen per timestep from the chain's measured autocorrelation."""
    most_sampling_sweeps: int = Field(default=200, ge=1)
    """The most that are chosen when sampling_sweeps = 0."""
    num_samples: int = Field(default=256, ge=8)
    """Ancestral samples drawn at the end."""
    evaluation_images: int = Field(default=256, ge=8)
    """Held-out images that likelihoods and bit errors are measured on, at most."""
    likelihood_tolerance: float = Field(default=0.002, gt=0)
    """Nats per bit: wanted width between the two directions of annealing, and standard error at which images suffice."""
    ais_temperatures: int = Field(default=500, ge=2)
    """Intermediate distributions of annealed importance sampling per reverse step, at most."""
    ais_particles: int = Field(default=2, ge=2, le=1024)
    """Independent importance weights per estimate, whose mean is taken before the logarithm."""

    @field_validator("depth", mode="before")
    @classmethod
    def _every_level(cls, value: Any) -> Any:
        """Read one number as the depth of every level."""
        return (value,) * 3 if isinstance(value, int) or (isinstance(value, str) and value.strip().isdigit()) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.dataset == "file") != bool(self.data_file):
            raise ValueError("data_file goes with dataset = file, and dataset = file needs data_file")
        if min(self.depth) < 1:
            raise ValueError("depth must be at least 1 on every level")
        if self.joint_epochs and self.context != "hidden_sample":
            raise ValueError(f"joint_epochs needs context = hidden_sample: with {self.context} the levels are not one machine")
        if min(self.code_channels) < 1 or min(self.hidden_units) < 1:
            raise ValueError("code_channels and hidden_units must be positive")
        if self.autoencoder and self.stage == "autoencoder":
            raise ValueError("with a pre-trained autoencoder nothing is left to train in stage = autoencoder")
        return self

    @classmethod
    def from_preset(cls, preset: str, overrides: dict[str, Any] | None = None) -> Self:
        """As of every config; the architecture of a pre-trained autoencoder is read from its file, where it is not given.

        Raises:
            UserError: as of every config, and when the file is no autoencoder of this workflow.
        """
        given = overrides or {}
        if given.get("autoencoder") and not {"code_channels", "autoencoder_width"} <= given.keys():
            from trainbook.workflows.timestep_dbn.pretrained import read_architecture

            architecture = read_architecture(given["autoencoder"])
            given = {"code_channels": architecture.code_channels, "autoencoder_width": architecture.width} | given
        return super().from_preset(preset, given)

    def optimization(self, rate: float) -> OptimizationConfig:
        """Of a stage whose highest learning rate is given: Adam, and a cosine down to a tenth of the rate."""
        return OptimizationConfig(
            learning_rate=rate,
            weight_decay=0.0,
            schedule="cosine",
            final_learning_rate_share=0.1,
            clip_norm=self.clip_norm,
            precision=self.precision,
            tf32=self.tf32,
        )

    @property
    def block_timesteps(self) -> int:
        """Timesteps trained at once."""
        return 1 if self.order == "sequential" else min(self.block_size or self.timesteps, self.timesteps)


_REAL = ("laptop", "full", "v100", "t4", "cpu")
_BRIEF = "brief: the chain must beat its baselines, or the report says so"

TARGETS = (
    Target("chain/nats_per_bit", "<", "independent_bits/nats_per_bit", _REAL, _BRIEF),
    Target("chain/nats_per_bit", "<", "monolithic_rbm/nats_per_bit", _REAL, _BRIEF),
    Target("chain/nats_per_bit", "<", "small_rbm/nats_per_bit", _REAL, "trainbook: an RBM of fitting width is the stronger one"),
    Target("chain/nats_per_bit", "<", "logistic_chain/nats_per_bit", _REAL, _BRIEF),
    Target("chain/nats_per_bit", "<", "denoiser/nats_per_bit", _REAL, _BRIEF),
    Target(
        "chain/end_bit_error",
        "<",
        "logistic_chain/end_bit_error",
        _REAL,
        "trainbook: a chain that knows joint structure must undo noise better",
    ),
    Target("chain/end_bit_error", "<", "denoiser/end_bit_error", _REAL, _BRIEF),
    Target("chain/sample_covariance_error", "<", "independent_bits/sample_covariance_error", _REAL, _BRIEF),
    Target("chain/squared_mmd", "<", "denoiser/squared_mmd", _REAL, _BRIEF),
    Target("chain/c2st_kernel", "<", "denoiser/c2st_kernel", _REAL, _BRIEF),
    Target("autoencoder/dead_bit_share", "<=", 0.05, _REAL, "trainbook: fewer than 1 in 20 bits unused"),
    Target("chain/final_flip_probability", ">=", 0.49, _REAL, "trainbook: the forward process must end in noise"),
)
