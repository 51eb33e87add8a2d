"""What a workflow that trains by gradient can be told about its optimizer. Needs no torch."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainbook.config import BaseConfig


class OptimizationConfig(BaseConfig):
    """The choices of training by gradient; a workflow's Config subclasses it, `Stepper` and `Stage` carry them out."""

    DATA_PARALLEL: ClassVar[bool] = True
    BRIEF_NAMES: ClassVar[dict[str, str]] = {"gradient_clipping": "clip_norm", "mixed_precision": "precision"}

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw: Adam with decoupled weight decay; sgd: gradient descent with momentum."""
    learning_rate: float = Field(default=1e-3, gt=0, le=100)
    """The highest rate, reached after the warm-up; for one_cycle the peak of the cycle."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """With optimizer = sgd: share of the last update kept in the next."""
    weight_decay: float = Field(default=0.01, ge=0, le=10)
    """Pull of weights towards zero; biases, norms and one-dimensional parameters are spared."""

    schedule: Literal["constant", "cosine", "linear", "step", "one_cycle"] = "constant"
    """Course of the learning rate after the warm-up: to the final share by a cosine or a line, in drops, or up and down once."""
    final_learning_rate_share: float = Field(default=0.0, ge=0, le=1)
    """With schedule = cosine, linear or one_cycle: the final rate as a share of learning_rate."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise in front of the schedule; 0 starts with the schedule."""
    step_size: int = Field(default=1000, ge=1)
    """With schedule = step: steps between two drops."""
    step_factor: float = Field(default=0.1, gt=0, le=1)
    """With schedule = step: what a drop multiplies the rate by."""

    clip_norm: float = Field(default=0.0, ge=0)
    """Scale the gradient down to this Euclidean norm over all parameters; 0 does not clip."""
    clip_value: float = Field(default=0.0, ge=0)
    """Clip every entry of the gradient to plus or minus this, after clip_norm; 0 does not clip."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches per step: less memory, the gradient of the whole batch. Doubled when memory runs out."""
    batch_scaling: Literal["kept", "per_process"] = "kept"
    """With several processes: share batch_size among them, or give that much to each; learning_rate stays as it is."""
    precision: Literal["float32", "bfloat16", "float16", "mixed"] = "float32"
    """Of products and convolutions; weights stay float32, float16 scales its losses; mixed: what the device is fast at."""
    tf32: bool = False
    """On NVIDIA cards from Ampere on: float32 products with 10 bits of mantissa, several times faster."""
    acceleration: Literal["off", "measured", "channels_last", "compiled"] = "off"
    """Run the model as written, or in a faster form; measured: time the forms first and keep the fastest that agrees."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay per step of the exponential moving average of the weights; 0 keeps none."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of a label's probability that is spread over all classes."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more work."""

    validate_every: int = Field(default=0, ge=0)
    """Steps between two measurements on the validation split; 0 takes none."""
    best_metric: str = "valid_loss"
    """The validation metric that chooses the weights: those of the best measurement are the ones evaluated and exported."""
    best_is: Literal["lowest", "highest"] = "lowest"
    """Which value of best_metric is best."""
    patience: int = Field(default=0, ge=0)
    """Measurements without a new best after which training ends; 0 never ends it."""

    spike_deviations: float = Field(default=0.0, ge=0)
    """A loss is a spike when its logarithm stands so many deviations above the running mean, or it is not finite; 0: no rule."""
    on_spike: Literal["skip", "lower_rate", "roll_back"] = "skip"
    """Leave the step out; also halve the rate from then on; or also return to the weights kept every 100 steps."""

    @model_validator(mode="after")
    def _validation_can_happen(self) -> Self:
        if self.patience and not self.validate_every:
            raise ValueError("patience counts validations: set validate_every too")
        return self
