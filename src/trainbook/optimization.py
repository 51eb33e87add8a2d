"""What a workflow that trains by gradient can be told about its optimizer. Needs no torch."""

from typing import Literal

from pydantic import Field

from trainbook.config import BaseConfig


class OptimizationConfig(BaseConfig):
    """The choices of training by gradient; a workflow's Config subclasses it and `optim` carries them out."""

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
    """Micro-batches per step: less memory, the gradient of the whole batch."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of matrix products and convolutions; weights stay in float32, and float16 scales its losses."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay per step of the exponential moving average of the weights; 0 keeps none."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of a label's probability that is spread over all classes."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more work."""
