"""What a LegalBERT run can be told, and what it promises."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainbook.config import BaseConfig
from trainbook.optimization import OptimizationConfig
from trainbook.records import Target


class Config(OptimizationConfig):
    """The choices of a LegalBERT run."""

    FILE_FIELDS: ClassVar[tuple[str, ...]] = (*BaseConfig.FILE_FIELDS, "data_file")
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "max_clauses": 240, "max_sequence_length": 32, "vocabulary_size": 400, "width": 16, "num_heads": 2, "num_layers": 1,
            "num_epochs": 2, "validate_every": 4,
        },
        # Chosen among eight by the validation loss: four hundred texts are few, and a larger model learns them by heart.
        "laptop": {
            "vocabulary_size": 1000, "width": 64, "num_layers": 1, "dropout": 0.5, "learning_rate": 3e-3, "num_epochs": 20,
            "validate_every": 13,
        },
        "full": {
            "dataset": "lexglue", "pretrained": "nlpaueb/legal-bert-base-uncased", "max_sequence_length": 512, "num_epochs": 10,
            "batch_size": 16, "learning_rate": 2e-5, "weight_decay": 0.01, "warmup_steps": 1000, "validate_every": 1000,
            "precision": "mixed",
        },
    }  # fmt: skip

    dataset: Literal["licences", "file", "lexglue"] = "licences"
    """licences: real clauses of the licence texts of installed packages; file: see data_file; lexglue: fetched by `datasets`."""
    data_file: str = ""
    """With dataset = file: JSONL (one object a line) or CSV, with a text, a label and, if it can be, a document per line."""
    text_field: str = "text"
    """With dataset = file: the field of the text."""
    label_field: str = "label"
    """With dataset = file: the field of the label; every text has one."""
    group_field: str = "doc"
    """With dataset = file: what texts of one document share; they stay in one split. Where it is missing each is alone."""
    lexglue_task: Literal["ledgar", "scotus"] = "ledgar"
    """With dataset = lexglue: 100 kinds of contract provisions, or 14 areas of Supreme Court cases."""
    max_clauses: int = Field(default=0, ge=0)
    """Use only so many texts, spread over the file; 0 uses all."""

    pretrained: str = ""
    """A BERT of the Hugging Face hub or a local folder, such as nlpaueb/legal-bert-base-uncased; "" trains from scratch."""
    max_sequence_length: int = Field(default=128, ge=8, le=512)
    """Tokens of a text that are read; the rest is cut off."""
    vocabulary_size: int = Field(default=4000, ge=100, le=100_000)
    """From scratch: WordPiece tokens learned from the training texts."""
    width: int = Field(default=128, ge=8, le=4096)
    """From scratch: features of a token."""
    num_heads: int = Field(default=4, ge=1)
    """From scratch: heads of attention; they share the width."""
    num_layers: int = Field(default=2, ge=1, le=48)
    """From scratch: layers of the encoder."""
    pooling: Literal["attention_max", "first"] = "attention_max"
    """What the classifier sees: the tokens' mean weighted by learned attention and their maximum, or the first token, [CLS]."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of features dropped while training."""

    num_epochs: int = Field(default=10, ge=1)
    """Passes over the training texts."""
    batch_size: int = Field(default=32, ge=1)
    """Texts per step."""
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """The highest rate, reached after the warm-up; 2e-5 for pretrained weights."""
    weight_decay: float = Field(default=0.01, ge=0, le=10)
    """Pull of weights towards zero; biases, norms and one-dimensional parameters are spared."""
    schedule: Literal["constant", "cosine", "linear", "step", "one_cycle"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = Field(default=30, ge=0)
    """Steps of linear rise in front of the schedule."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Scale the gradient down to this Euclidean norm; 0 does not clip."""
    validate_every: int = Field(default=60, ge=0)
    """Steps between two measurements on the validation texts; the best weights are kept; 0 takes none."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.dataset == "file") != bool(self.data_file):
            raise ValueError("data_file goes with dataset = file, and dataset = file needs data_file")
        if self.width % self.num_heads:
            raise ValueError("width must be a multiple of num_heads")
        return self


_OURS = "trainbook: a model must know more than the commonest answer"

TARGETS = (
    Target("model/micro_f1", ">", "majority/micro_f1", ("laptop", "full"), _OURS),
    Target("model/micro_f1", ">=", 0.87, ("full",), "LexGLUE, LEDGAR: Legal-BERT 0.882, TF-IDF and SVM 0.870"),
    Target("model/macro_f1", ">", "majority/macro_f1", ("laptop", "full"), _OURS),
)
