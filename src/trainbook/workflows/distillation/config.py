"""What a distillation run can be told, and what the brief promises of it."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainbook.config import BaseConfig
from trainbook.optimization import OptimizationConfig
from trainbook.records import Target

Method = Literal["dkd", "logit_std", "dist", "fitnets", "attention", "rkd", "crd", "multi_teacher", "uniform_teachers"]
Network = Literal["resnet18", "resnet8", "mobilenet", "simple_cnn", "small_cnn"]

SEARCHED_METHODS = ("kd", "logit_std", "dkd", "dist")
_BRIEF_SEEDS = (42, 123, 456, 789, 1024)
_BRIEF: dict[str, Any] = {
    "dataset": "mnist", "augmentation": "none", "teacher_network": "resnet18", "teacher_width": 64,
    "student_network": "mobilenet", "student_width": 32, "teacher_epochs": 20, "student_epochs": 20,
    "batch_size": 128, "student_seeds": _BRIEF_SEEDS, "labels": (0,), "missing_class": -1, "unlabelled_arm": False,
    "chunk_steps": 200,
}  # fmt: skip


class Config(BaseConfig):
    """The choices of a distillation run."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "num_teachers": 2, "teacher_epochs": 3, "student_epochs": 1, "student_seeds": (0, 1), "labels": (0,),
            "unlabelled_arm": False, "methods": ("dkd",), "search_arms": 3, "search_epochs": 1, "parallel_pipeline": False,
            "chunk_steps": 11, "teacher_width": 4,
        },
        "laptop": {},
        "full": _BRIEF,
        "mnist_cpu": {
            **_BRIEF, "teacher_width": 16, "num_teachers": 2, "student_network": "simple_cnn", "teacher_epochs": 3,
            "student_epochs": 2, "student_seeds": _BRIEF_SEEDS[:3], "labels": (0, 1000), "ablation": False, "methods": (),
            "search_arms": 3, "search_epochs": 1, "chunk_steps": 40,
        },
    }  # fmt: skip

    BRIEF_NAMES: ClassVar[dict[str, str]] = {
        "num_epochs": "student_epochs",
        "gradient_clipping": "clip_norm",
        "mixed_precision": "precision",
    }
    FILE_FIELDS: ClassVar[tuple[str, ...]] = (*BaseConfig.FILE_FIELDS, "data_folder", "teacher")
    MODULE_FIELDS: ClassVar[dict[str, tuple[str, str]]] = {
        "teacher": (
            "teacher",
            "use the teacher_network and teacher_width it was trained with, or train it anew with: trainbook run distillation "
            "--stage teacher",
        )
    }

    TIMED_WITH: ClassVar[dict[str, Any]] = {"chunk_steps": 4}

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100"] = "digits"
    """digits: scikit-learn's 1,797 real 8x8 images; the others by torchvision, or from data_folder."""
    data_folder: str = ""
    """For mnist and fashion_mnist: a folder with the four official .gz files, instead of a download."""
    max_train_images: int = Field(default=0, ge=0)
    """Use only the first so many training images; 0 uses all."""
    augmentation: Literal["none", "shifts", "shifts_and_flips"] = "shifts"
    """Views of an image: itself; itself and 8 shifts by one pixel; those mirrored too. Finite, so that logits can be kept."""

    stage: Literal["all", "teacher", "direct", "kd", "hpm_kd"] = "all"
    """Everything, or one stage alone: the teachers, or one kind of student with the teachers it needs."""
    teacher: str = ""
    """A trained first teacher: a run, its export folder, or a .safetensors file; it is then not trained."""
    teacher_network: Network = "resnet8"
    """Layers of the teachers; resnet8 has 3 stages of one block, resnet18 has 4 of two."""
    teacher_width: int = Field(default=16, ge=1, le=512)
    """Channels the teachers start with."""
    num_teachers: int = Field(default=3, ge=1, le=16)
    """Teachers, alike but for their seed; the first is the one that traditional KD learns from."""
    student_network: Network = "small_cnn"
    """Layers of the students."""
    student_width: int = Field(default=8, ge=1, le=512)
    """Channels the students start with."""

    student_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One student of every arm per seed; arms are compared seed by seed."""
    labels: tuple[int, ...] = (0, 100)
    """Labelled training images that students see, one regime each; 0 is all. Teachers always see all."""
    missing_class: int = Field(default=3, ge=-1)
    """Another regime, in which students never see an image of this class; -1 leaves it out."""
    unlabelled_arm: bool = True
    """With few labels: one more arm whose student also gets the teacher's answers on all the other training images."""
    methods: tuple[Method, ...] = ("dkd", "logit_std", "dist", "multi_teacher")
    """Further arms: a distillation loss with one teacher, or traditional KD from several teachers."""
    ablation: bool = True
    """For every component of HPM-KD that is on, an arm without it."""

    chain: bool = True
    """Component: assistants between teacher and student, where a short trial on valid says that they help."""
    num_assistants: int = Field(default=1, ge=1, le=3)
    """Most assistants of the chain, evenly spaced in the logarithm of the parameters."""
    chain_mode: Literal["takd", "dgkd"] = "dgkd"
    """takd: learn from the last assistant; dgkd: from all before, each left out of a batch with probability 1/4."""
    warm_start: bool = False
    """One more arm: HPM-KD whose networks start from the leading channels of the assistant before them."""
    temperature_law: Literal["constant", "cosine", "plateau", "adversarial", "hyper"] = "cosine"
    """Component: how HPM-KD's temperature moves; constant switches it off."""
    multi_teacher: bool = True
    """Component: learn from all teachers, weighted image by image, instead of from the first."""
    gate: Literal["uniform", "entropy", "ca_mkd", "learned"] = "learned"
    """How the teachers are weighted; learned: on held-out labels, or uniformly where that is not surely better."""
    adaptive: bool = True
    """Component: choose loss, temperature, weight and rate by successive halving on valid, the defaults always among them."""
    search_arms: int = Field(default=9, ge=2, le=81)
    """Settings that the search starts with; a third of them, and the defaults, go on to each next rung."""
    search_epochs: int = Field(default=4, ge=1)
    """Epochs of the first rung; three times as many in each next."""
    known_settings: tuple[str, ...] = ()
    """Settings that earlier searches picked, as their results.txt names them, such as dist/2.5/0.4/0.03/0.0005: method,
    temperature, weight, rate, decay. They are tried too, in place of as many drawn at random."""
    parallel_pipeline: bool = True
    """Component: train several networks at once in processes of their own; changes time, not results. How many: --jobs."""
    shared_memory: bool = True
    """Component: keep the teachers' answers instead of computing them in every step; changes time, results by rounding."""

    temperature: float = Field(default=4.0, gt=0, le=100)
    """T of the softened distributions; the default and the start where a law moves it."""
    temperature_range: tuple[float, float] = (2.0, 6.0)
    """Least and greatest temperature of the laws."""
    distillation_weight: float = Field(default=0.9, ge=0, le=1)
    """a in (1 - a) cross entropy + a T^2 KL."""

    teacher_epochs: int = Field(default=40, ge=1)
    """Passes of each teacher over the training images."""
    student_epochs: int = Field(default=60, ge=1)
    """Budget of a student, in passes over all training images; with fewer labels it takes as many steps."""
    batch_size: int = Field(default=64, ge=2, le=8192)
    """Images per step, or all labelled ones where they are fewer."""
    learning_rate: float = Field(default=0.1, gt=0, le=10)
    """Highest rate of gradient descent with momentum, lowered by a cosine."""
    final_learning_rate_share: float = Field(default=0.01, ge=0, le=1)
    """The last rate as a share of the highest."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Share of the last update kept in the next."""
    weight_decay: float = Field(default=5e-4, ge=0, le=1)
    """Pull of weights towards zero; biases and norms are spared."""
    warmup_share: float = Field(default=0.05, ge=0, le=0.5)
    """Share of the steps in which the rate rises."""
    clip_norm: float = Field(default=5.0, ge=0)
    """Scale the gradient down to this Euclidean norm; 0 does not clip."""
    precision: Literal["float32", "bfloat16", "float16", "mixed"] = "float32"
    """Of products and convolutions in training; mixed: what the device is fast at."""
    tf32: bool = False
    """On NVIDIA cards from Ampere on: float32 products with 10 bits of mantissa, several times faster."""
    chunk_steps: int = Field(default=132, ge=1)
    """Gradient steps of one network between two records; at most so much work is repeated after an interruption."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.student_seeds or len(set(self.student_seeds)) < len(self.student_seeds):
            raise ValueError("student_seeds must be different numbers, at least one")
        if not self.labels or len(set(self.labels)) < len(self.labels) or min(self.labels) < 0:
            raise ValueError("labels must be different numbers from 0 on, at least one")
        if not 0 < self.temperature_range[0] <= self.temperature_range[1]:
            raise ValueError("temperature_range must be positive and rising")
        if len(self.known_settings) >= self.search_arms or (self.known_settings and not self.adaptive):
            raise ValueError("known_settings must be fewer than search_arms, with adaptive = true")
        for text in self.known_settings:
            read_settings(text)
        if self.teacher and self.stage in ("teacher", "direct"):
            raise ValueError(f"stage = {self.stage} has no use for a trained teacher")
        if self.data_folder and self.dataset not in ("mnist", "fashion_mnist"):
            raise ValueError(f"data_folder holds .gz files of mnist or fashion_mnist, not of {self.dataset}")
        if self.missing_class >= (100 if self.dataset == "cifar100" else 10):
            raise ValueError(f"{self.dataset} has no class {self.missing_class}")
        return self

    def optimization(self, steps: int, learning_rate: float, weight_decay: float) -> OptimizationConfig:
        """Of a network that is trained for so many steps: SGD, a warm-up, then a cosine."""
        return OptimizationConfig(
            optimizer="sgd",
            learning_rate=learning_rate,
            momentum=self.momentum,
            weight_decay=weight_decay,
            schedule="cosine",
            final_learning_rate_share=self.final_learning_rate_share,
            warmup_steps=round(self.warmup_share * steps),
            clip_norm=self.clip_norm,
            precision=self.precision,
            tf32=self.tf32,
        )

    @property
    def regimes(self) -> tuple[str, ...]:
        """What students see of the labels: names that end the names of metrics."""
        named = tuple(regime_name(number) for number in self.labels)
        return (*named, f"without_{self.missing_class}") if self.missing_class >= 0 else named


def read_settings(text: str) -> dict[str, Any]:
    """What the adaptive component may choose, from method/temperature/weight/rate/decay.

    Raises:
        ValueError: when it is something else.
    """
    method, *numbers = text.split("/")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if method not in SEARCHED_METHODS or len(values) != 4 or not all(0 < value < float("inf") for value in values):
        methods = ", ".join(SEARCHED_METHODS)
        raise ValueError(f"{text!r} is not method/temperature/weight/rate/decay with a method of {methods} and positive numbers")
    return {"method": method, **dict(zip(("temperature", "weight", "learning_rate", "weight_decay"), values, strict=True))}


def regime_name(num_labels: int) -> str:
    """Name of the regime with so many labelled images; 0 is all of them."""
    return f"{num_labels}_labels" if num_labels else "all_labels"


_MEASURED = ("full", "mnist_cpu")
_BRIEF_SOURCE = "brief of HPM-KD, on MNIST"

TARGETS = (
    Target("teacher/accuracy", ">=", 0.993, _MEASURED, _BRIEF_SOURCE),
    Target("direct/accuracy_all_labels", ">=", 0.985, _MEASURED, _BRIEF_SOURCE),
    Target("kd/accuracy_all_labels", ">=", 0.989, _MEASURED, _BRIEF_SOURCE),
    Target("hpm_kd/accuracy_all_labels", ">=", 0.990, _MEASURED, _BRIEF_SOURCE),
    Target("hpm_kd/points_over_kd_all_labels", ">=", 0.1, _MEASURED, _BRIEF_SOURCE),
    Target("hpm_kd/retention_all_labels", ">=", 0.995, _MEASURED, _BRIEF_SOURCE),
    Target("run/student_seeds", ">=", 5, ("full",), "brief of HPM-KD: 5 seeds"),
)
