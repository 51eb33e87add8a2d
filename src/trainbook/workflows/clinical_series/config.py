"""What a clinical series run can be told, and what it promises."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainbook.config import BaseConfig
from trainbook.optimization import OptimizationConfig
from trainbook.records import Target


@dataclass(frozen=True)
class Variable:
    """What is measured, and its unit."""

    name: str
    unit: str


GENERATED = (Variable("HR", "1/min"), Variable("MAP", "mmHg"), Variable("SpO2", "%"))
PHYSIONET = (
    *(Variable("HR", "1/min"), Variable("MAP", "mmHg"), Variable("SysABP", "mmHg"), Variable("RespRate", "1/min")),
    *(Variable("Temp", "°C"), Variable("GCS", "points"), Variable("Urine", "mL"), Variable("FiO2", "share")),
)


class Config(OptimizationConfig):
    """The choices of a clinical series run."""

    FILE_FIELDS: ClassVar[tuple[str, ...]] = (*BaseConfig.FILE_FIELDS, "data_path", "outcome_file")
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "num_patients": 160, "sequence_length": 240, "patch_minutes": 20, "prediction_horizon": 4, "width": 16,
            "num_heads": 2, "num_layers": 1, "batch_size": 32, "num_epochs": 2, "validate_every": 3,
        },
        "laptop": {},
        "full": {
            "dataset": "physionet", "sample_minutes": 60, "width": 128, "num_heads": 8, "num_layers": 4, "num_epochs": 100,
            "batch_size": 32, "learning_rate": 1e-4, "dropout": 0.2, "precision": "mixed", "patience": 20,
        },
    }  # fmt: skip

    dataset: Literal["generated", "physionet", "csv"] = "generated"
    """generated: labelled synthetic, with a known best answer; physionet: 4,000 real ICU stays of 2012; csv: your own."""
    data_path: str = ""
    """physionet: the folder or .tar.gz with set-a and Outcomes-a.txt, "" downloads them; csv: the file."""
    value_columns: tuple[str, ...] = ()
    """With dataset = csv: the variables, as columns, or as the words in a column called variable (values in value)."""
    units: tuple[str, ...] = ()
    """With dataset = csv: one unit per variable, for the pictures."""
    outcome_file: str = ""
    """With dataset = csv: a CSV file of id and outcome, 0 or 1; without it no risk is learned."""
    window_stride_minutes: int = Field(default=0, ge=0)
    """With dataset = csv: minutes between the starts of two windows of a record; 0 takes one window, from its first reading."""
    num_patients: int = Field(default=4800, ge=40, le=1_000_000)
    """With dataset = generated: patients; 15 % of them for validation and 25 % for the test."""

    sequence_length: int = Field(default=1440, ge=2)
    """Minutes that the model reads."""
    sample_minutes: int = Field(default=1, ge=1)
    """Minutes per reading; denser readings are averaged."""
    patch_minutes: int = Field(default=60, ge=1)
    """Minutes of a patch, which becomes one token and is one step of the forecast."""
    prediction_horizon: int = Field(default=12, ge=1, le=1000)
    """Patches to forecast: the means of the next 12 hours, where a patch is an hour."""

    width: int = Field(default=32, ge=4, le=4096)
    """Features of a token."""
    num_heads: int = Field(default=4, ge=1)
    """Heads of attention; they share the width."""
    num_layers: int = Field(default=2, ge=1, le=64)
    """Layers of the encoder."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of features dropped while training."""
    forecast_weight: float = Field(default=0.5, ge=0)
    """Weight of the forecast's squared error beside the cross entropy of the outcome; the brief's is 0.5."""

    num_epochs: int = Field(default=18, ge=1)
    """Passes over the training patients."""
    batch_size: int = Field(default=64, ge=1)
    """Patients per step."""
    learning_rate: float = Field(default=4e-3, gt=0, le=1)
    """The highest rate, reached after the warm-up."""
    weight_decay: float = Field(default=0.05, ge=0, le=10)
    """Pull of weights towards zero; biases, norms and one-dimensional parameters are spared."""
    schedule: Literal["constant", "cosine", "linear", "step", "one_cycle"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear rise in front of the schedule."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Scale the gradient down to this Euclidean norm; 0 does not clip."""
    validate_every: int = Field(default=135, ge=0)
    """Steps between two measurements on the validation patients; the best weights are kept; 0 takes none."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.patch_minutes % self.sample_minutes or self.sequence_length % self.patch_minutes:
            raise ValueError("sequence_length must be a multiple of patch_minutes, and that of sample_minutes")
        if self.width % self.num_heads:
            raise ValueError("width must be a multiple of num_heads")
        if self.dataset == "csv" and not (self.data_path and self.value_columns):
            raise ValueError("dataset = csv needs data_path and value_columns")
        if self.dataset != "csv" and (self.value_columns or self.outcome_file or self.window_stride_minutes):
            raise ValueError("value_columns, outcome_file and window_stride_minutes go with dataset = csv")
        if self.units and len(self.units) != len(self.value_columns):
            raise ValueError("units must name one unit per value column")
        if self.dataset == "generated" and (self.sample_minutes != 1 or self.data_path):
            raise ValueError("the generated series have one reading a minute and no data_path: choose sample_minutes = 1")
        return self

    @property
    def num_tokens(self) -> int:
        """Patches that the model reads."""
        return self.sequence_length // self.patch_minutes

    @property
    def patch_samples(self) -> int:
        """Readings in a patch."""
        return self.patch_minutes // self.sample_minutes

    @property
    def window_samples(self) -> int:
        """Readings of a window: what is read and what is forecast."""
        return (self.num_tokens + self.prediction_horizon) * self.patch_samples

    @property
    def variables(self) -> tuple[Variable, ...]:
        """What the series measure."""
        if self.dataset == "csv":
            units = self.units or ("",) * len(self.value_columns)
            return tuple(Variable(*pair) for pair in zip(self.value_columns, units, strict=True))
        return GENERATED if self.dataset == "generated" else PHYSIONET


_OURS = "trainbook: near the best that is possible on a known generator"

TARGETS = (
    Target("model/share_of_oracle_auroc", ">=", 0.9, ("laptop",), _OURS),
    Target("model/mae_over_persistence", "<=", 0.85, ("laptop",), _OURS),
    Target("model/mae_over_oracle", "<=", 1.15, ("laptop",), _OURS),
    Target("model/auroc", ">=", 0.8, ("full",), "trainbook: logistic regression on set A against set B has 0.804 from 24 h"),
    Target("model/mae", "<", "persistence/mae", ("laptop", "full"), "trainbook: the next hours are not the last one"),
    Target("model/mae", "<", "day_mean/mae", ("laptop", "full"), "trainbook: nor their mean"),
)
