"""What a cellular cube run can be told, and what it promises."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainbook.config import BaseConfig
from trainbook.optimization import OptimizationConfig
from trainbook.records import Target

MAX_SIDE = 64
MAX_FITTED = 8192  # numbers of a back face, for a closed form

TeacherName = Literal["tfidf_svd", "minilm", "minilm_768", "distilbert", "file"]

_REAL_TEACHER: dict[str, Any] = {"corpus": "mixed", "teacher": "minilm", "max_sentences": 12_000, "held_out_sentences": 2000}


class Config(OptimizationConfig):
    """The choices of a cellular cube run. A cube of side L reads L x L x numbers_per_cell numbers on its front face."""

    FILE_FIELDS: ClassVar[tuple[str, ...]] = (*BaseConfig.FILE_FIELDS, "text_file", "text_folder", "vector_file", "core")
    MODULE_FIELDS: ClassVar[dict[str, tuple[str, str]]] = {
        "core": ("core", "use the channels, hidden width, ranks and hardware numbers that its cube was trained with")
    }
    BRIEF_NAMES: ClassVar[dict[str, str]] = {
        "gradient_clipping": "clip_norm",
        "mixed_precision": "precision",
        "lattice_dim": "side",
        "reconstruction_loss_weight": "reconstruction_weight",
        "similarity_loss_weight": "similarity_weight",
        "diversity_loss_weight": "diversity_weight",
        "emergence_loss_weight": "emergence_weight",
    }
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "max_sentences": 160, "held_out_sentences": 48, "side": 4, "channels": 8, "mixed_numbers": 4, "hidden_width": 8,
            "attention_rank": 2, "value_width": 2, "hardware_numbers": 4, "num_epochs": 2, "fine_tune_epochs": 1,
            "batch_size": 16, "baseline_epochs": 2, "decoder_epochs": 1, "decoder_width": 16,
        },
        "laptop": {},
        "minilm": _REAL_TEACHER,
        "trials": {**_REAL_TEACHER, "trial_seeds": 3},
        "full": {
            **_REAL_TEACHER, "teacher": "distilbert", "max_sentences": 60_000, "side": 37, "radius": 0.2,
            "channels": 32, "mixed_numbers": 0, "hidden_width": 96, "band_pooling": 2, "gradient_checkpointing": True,
            "precision": "mixed", "num_epochs": 50,
        },
    }  # fmt: skip

    corpus: Literal["docstrings", "clinc150", "wikisplit", "mixed", "file"] = "docstrings"
    """docstrings: first sentences from the installed scientific packages, real English; clinc150, wikisplit and mixed (both):
    from text_folder or downloaded, with checksums; file: see text_file."""
    text_file: str = ""
    """With corpus = file: a text file, one sentence a line."""
    text_folder: str = ""
    """A folder with clinc150/ and wikisplit/; "" downloads them, with checksums."""
    teacher: TeacherName = "tfidf_svd"
    """Whose vectors the cube carries. tfidf_svd: word counts reduced by SVD, no language model; minilm: all-MiniLM-L6-v2, 384
    numbers, offline from a package; minilm_768: two of its layers side by side; distilbert: from the hub, 768 numbers;
    file: see vector_file."""
    vector_file: str = ""
    """For file among the teachers: .npy, or .safetensors with one tensor, a row of floats for each line of text_file that is not
    blank. Any vectors, of pictures or sounds too: the line says what each one is."""
    further_teachers: tuple[TeacherName, ...] = ()
    """Others, whose vectors linear heads on the back face learn too; a sentence without a vector (a row of NaN in vector_file) is
    left out of that head."""
    max_sentences: int = Field(default=2600, ge=64)
    """Sentences in all, held-out ones included; more than there are takes all."""
    held_out_sentences: int = Field(default=600, ge=16)
    """Sentences kept out, half of them for validation, half for the test."""
    embedding_cache_megabytes: int = Field(default=256, ge=1, le=1_000_000)
    """Largest size of the folder with teacher vectors; the least recently used ones go first."""
    decoder_epochs: int = Field(default=10, ge=0, le=1000)
    """Passes over the training sentences for the decoder to text, on teacher vectors; 0 leaves it out."""
    decoder_width: int = Field(default=128, ge=8, le=2048)
    """Units of that decoder's recurrent layer."""

    side: int = Field(default=8, ge=4, le=MAX_SIDE)
    """Cells along each edge of the cube, L."""
    numbers_per_cell: int = Field(default=1, ge=1, le=16)
    """Numbers that each cell of the front face is given: the code has side^2 times so many."""
    channels: int = Field(default=16, ge=2, le=256)
    """State numbers per cell, C."""
    hardware_numbers: int = Field(default=8, ge=1, le=128)
    """Learned numbers per cell that never change during a pass, P: the positional code."""
    hardware: Literal["learned", "coordinates"] = "learned"
    """The positional code: a table with a row per cell, or a network of the cell's coordinates that suits every size."""
    hidden_width: int = Field(default=32, ge=4, le=1024)
    """Hidden units of the local rule, H."""
    attention_rank: int = Field(default=4, ge=1, le=64)
    """Feature rank r of the functional expert's linear attention."""
    value_width: int = Field(default=8, ge=1, le=64)
    """Width of what that attention sums."""
    ode_steps: int = Field(default=1, ge=1, le=16)
    """Midpoint steps of the distant expert's differential equation."""
    radius: float = Field(default=0.9, gt=0, le=1)
    """Reach of a cell's neighbourhood as a share of the side, at least 3 cells; cut at 10 % and 65 % of the neighbours."""
    band_shape: Literal["cubic", "euclidean"] = "cubic"
    """Neighbourhoods as cubes, summed along the axes; or as balls, by a Fourier transform, several times slower."""
    band_pooling: Literal[1, 2, 4] = 1
    """Bands of a grid coarser by this factor: an eighth of the work for 2."""
    num_steps: int = Field(default=0, ge=0, le=256)
    """Steps of the cube per sentence; 0 takes side - 1, what the slowest signal needs from front to back."""
    write: Literal["once", "clamp"] = "once"
    """Write the code into the front face before the first step, or hold it there in every step."""
    face_layout: Literal["identity", "cosine", "pyramid"] = "cosine"
    """The code's numbers by rank over the front face; as coefficients of a two-dimensional cosine transform; or on a pyramid:
    first what blocks of 4 x 4 cells share, then what 2 x 2 cells and single ones add."""
    expert_norm: Literal["none", "rms", "batch"] = "none"
    """Normalisation of what each expert sees; any makes the cube a rougher function of the code, which generalises worse."""
    mixed_numbers: int = Field(default=11, ge=0, le=255)
    """Further numbers per cell on the front face, learned linear mixtures of the code: no more information, another layout."""
    cell_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of cells that skip a step while training."""
    gate_temperature: float = Field(default=1.0, gt=0, le=100)
    """Temperature of the softmax that weighs the experts."""
    levels: Literal[1, 2, 3] = 1
    """Sizes at which the cube works at once: itself, half, a quarter; one rule for all."""
    router_tokens: int = Field(default=0, ge=0, le=256)
    """Tokens that carry numbers across the front face, and as many across the back; 0 leaves them out."""
    sleep_threshold: float = Field(default=0.0, ge=0, le=1)
    """In evaluation: blocks of 4 x 4 x 4 cells sleep, and keep the rule's last answer without any work, until they or a neighbour
    block have moved by this much, as a mean magnitude; 0 is exact."""
    wall_hole: int = Field(default=0, ge=0, le=4096)
    """Put a wall across the middle plane with a hole of so many cells; 0: no wall."""

    transformer: Literal["linear", "hierarchical", "attention", "autoencoder"] = "linear"
    """From vector to code: linear from PCA; a residual network; cross-attention over pieces; or a pretrained encoder."""
    universal_width: int = Field(default=0, ge=0, le=4096)
    """Size of a code that lies as so many cosines on the face of a cube of any side; 0: one number per cell and channel."""
    train_scope: Literal["all", "experts", "experts_pca"] = "all"
    """What is trained: all; or the experts and the gate alone, beside a PCA transformer and a read-out that looks beyond its
    components, or at these alone (the brief's literal rule, which cannot improve on PCA)."""
    readout: Literal["ridge", "gradient"] = "ridge"
    """The linear map from the back face: trained on what the code does not foretell of it, in units of its deviation, and
    fitted in closed form after the main phase; or a plain map, trained only."""
    core: str = ""
    """Start the cube's rule from another run's: a run, its export folder or core.safetensors; any size of cube."""

    reconstruction_weight: float = Field(default=1.0, ge=0)
    """Of the squared error, in units of the vectors' variance."""
    similarity_weight: float = Field(default=0.3, ge=0)
    """Of 1 - cosine."""
    relational_weight: float = Field(default=0.0, ge=0)
    """Of the divergence between the batch's similarities as the teacher and as the cube sees them."""
    relational_temperature: float = Field(default=0.5, gt=0, le=10)
    """Temperature of those similarities at the start; a cosine takes it to a tenth."""
    diversity_weight: float = Field(default=0.0, ge=0)
    """Of a hinge on too small deviations of the output and of excess correlations."""
    emergence_weight: float = Field(default=0.01, ge=0, le=1)
    """Of log 3 less the information between cell and expert: high when every cell uses all experts alike."""
    sparsity_weight: float = Field(default=0.0, ge=0)
    """Of the mean magnitude of cell states."""
    bottleneck_weight: float = Field(default=0.0, ge=0)
    """Of the variational information bottleneck on the code, in nats; 0 adds no noise."""
    triplet_weight: float = Field(default=0.0, ge=0)
    """Of the triplet loss: a sentence nearer to one of its label than to one of another."""
    further_weight: float = Field(default=1.0, gt=0)
    """Of each further teacher's squared error, times its agreement with the main one: linear CKA of their training vectors."""
    text_weight: float = Field(default=0.0, ge=0)
    """Of the cross entropy, in nats per token, of the sentence as the decoder to text reads the cube's output; above 0 the
    decoder is trained first, and frozen."""
    prefix_weight: float = Field(default=0.0, ge=0)
    """Of the reconstruction from the first quarter and half of the code's numbers (Matryoshka)."""

    warm_up_epochs: int = Field(default=0, ge=0)
    """Epochs on SYNTHETIC vectors, Gaussian with the teacher's shrunk covariance, before the real ones."""
    num_epochs: int = Field(default=10, ge=1)
    """Passes over the training vectors."""
    fine_tune_epochs: int = Field(default=0, ge=0)
    """Further passes at a tenth of the rate; with domains = two, over the second domain at the full rate."""
    domains: Literal["one", "two"] = "one"
    """two: train on the lower half of the labels (mixed: CLINC150), fine-tune on the upper one, and measure forgetting."""
    batch_size: int = Field(default=32, ge=2, le=4096)
    """Sentences per step."""
    curriculum_start: float = Field(default=1.0, gt=0, le=1)
    """Share of the training sentences at the start, easiest for PCA first; a line takes it to 1 by the middle."""
    replay_share: float = Field(default=0.0, ge=0, lt=1)
    """With domains = two: share of each fine-tuning batch from a reservoir of the first domain."""
    replay_size: int = Field(default=512, ge=1)
    """Sentences in that reservoir."""
    elastic_weight: float = Field(default=0.0, ge=0)
    """With domains = two: pull towards the first domain's weights, by their Fisher information (EWC)."""
    expert_columns: Literal["one", "grow"] = "one"
    """With domains = two: grow freezes the experts after the first domain and adds new ones that start at zero."""
    reptile_steps: int = Field(default=0, ge=0, le=100_000)
    """With domains = two and router_tokens: the main phase sees both domains, in turns of so many steps, and after each turn the
    routers keep only reptile_share of what they learned in it; fine-tuning then meets a domain that is known. 0: no turns."""
    reptile_share: float = Field(default=0.5, gt=0, le=1)
    """Of a turn's change that the routers keep (Reptile)."""
    damage_share: float = Field(default=0.0, ge=0, le=0.9)
    """Share of cells set to zero at a random step while training."""
    pool_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps that start from where a first pass over the batch ended, so that the answer has to last."""
    any_time: bool = False
    """Train on the answer after a random number of steps, from side - 1 to num_steps."""

    local_rate: float = Field(default=3.0, ge=0, le=100)
    """Learning rate of the local expert, as a factor; 0 freezes it."""
    functional_rate: float = Field(default=3.0, ge=0, le=100)
    """Of the functional expert."""
    distant_rate: float = Field(default=3.0, ge=0, le=100)
    """Of the distant expert."""
    gate_rate: float = Field(default=3.0, ge=0, le=100)
    """Of the gate."""
    checkpoint_steps: int = Field(default=0, ge=0)
    """With gradient_checkpointing: steps of the cube per kept state; 0 takes the square root of their number."""

    learning_rate: float = Field(default=1e-3, gt=0, le=100)
    """The highest rate, reached after the rise; the experts and the gate have factors of their own."""
    weight_decay: float = Field(default=1.0, ge=0, le=10)
    """Pull of weights towards zero; biases, norms and one-dimensional parameters are spared."""
    schedule: Literal["constant", "cosine", "linear", "step", "one_cycle"] = "cosine"
    """Course of the learning rate after the rise."""
    warmup_steps: int = Field(default=30, ge=0)
    """Steps of linear rise in front of the schedule of each phase."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Scale the gradient down to this Euclidean norm; 0 does not clip."""
    best_metric: str = "valid_fvu"
    """The validation metric that chooses the weights of the main phase."""

    baseline_epochs: int = Field(default=40, ge=1)
    """Passes over the training vectors for the autoencoder and other networks that the cube is compared with."""
    trial_seeds: int = Field(default=0, ge=0, le=20)
    """Seeds of the trials against an equally large network (code, damage, sizes, any time, wall); 0 leaves them out."""
    trial_epochs: int = Field(default=3, ge=1)
    """Passes over the training vectors in each trial."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.corpus == "file") != bool(self.text_file):
            raise ValueError("text_file goes with corpus = file, and corpus = file needs text_file")
        teachers = (self.teacher, *self.further_teachers)
        if len(set(teachers)) < len(teachers):
            raise ValueError("further_teachers must differ from teacher and from each other")
        if ("file" in teachers) != bool(self.vector_file):
            raise ValueError("vector_file goes with file as teacher or among further_teachers, which needs vector_file")
        if self.vector_file and not self.text_file:
            raise ValueError("vector_file has a row for each line of text_file: set corpus = file and text_file")
        if self.text_weight and not self.decoder_epochs:
            raise ValueError("text_weight needs the decoder to text: set decoder_epochs")
        if self.held_out_sentences * 2 > self.max_sentences:
            raise ValueError("held_out_sentences must not be more than half of max_sentences")
        if self.numbers_per_cell + self.mixed_numbers > self.channels:
            raise ValueError("channels must hold numbers_per_cell and mixed_numbers")
        if self.num_steps and self.num_steps < self.side - 1:
            raise ValueError(f"num_steps must be 0 or at least side - 1 = {self.side - 1}: fewer do not reach the back face")
        if self.side % self.band_pooling and self.band_pooling > 1 and self.side < 2 * self.band_pooling:
            raise ValueError("band_pooling is too coarse for this side")
        if self.universal_width and (self.numbers_per_cell > 1 or self.universal_width > self.side**2):
            raise ValueError("universal_width must not be larger than side^2, and goes with numbers_per_cell = 1")
        if self.universal_width and self.face_layout == "pyramid":
            raise ValueError("universal_width lies as cosines: blocks of cells would not be the same places at another side")
        if self.levels > 1 and self.side < 2 ** (self.levels + 1):
            raise ValueError(f"levels = {self.levels} needs a side of at least {2 ** (self.levels + 1)}")
        if self.wall_hole and (self.band_shape != "cubic" or self.band_pooling > 1 or self.levels > 1):
            raise ValueError("wall_hole needs cubic bands without pooling and levels = 1: other sums would look through the wall")
        if self.wall_hole > self.side**2:
            raise ValueError("wall_hole must not be larger than side^2")
        if self.domains == "two" and not self.fine_tune_epochs:
            raise ValueError("domains = two trains the second domain in fine_tune_epochs: set them")
        two_domains = self.replay_share or self.elastic_weight or self.expert_columns == "grow"
        if two_domains and self.domains == "one":
            raise ValueError("replay_share, elastic_weight and expert_columns = grow need domains = two")
        if self.reptile_steps:
            if self.domains == "one" or not self.router_tokens or self.train_scope != "all":
                raise ValueError("reptile_steps needs domains = two, router_tokens and train_scope = all")
            if self.curriculum_start < 1 or self.ema_decay:
                raise ValueError("reptile_steps goes with neither curriculum_start, which orders one domain, nor ema_decay")
        if self.any_time and self.num_steps < self.side:
            raise ValueError("any_time needs num_steps above side - 1: there is nothing to choose from")
        return self

    @property
    def code_size(self) -> int:
        """Numbers of the code, cube_embedding_dim of the brief: side^2 numbers_per_cell, or universal_width."""
        return self.universal_width or self.side**2 * self.numbers_per_cell

    @property
    def fits_readout(self) -> bool:
        """Whether the read-out is fitted in closed form: asked for, possible at this size, and not against the brief's rule.

        Nor with damage: the closed form sees whole faces, and what it makes of broken ones is far off.
        """
        features = (self.universal_width or self.side**2) * self.channels
        allowed = self.train_scope != "experts_pca" and not self.damage_share
        return self.readout == "ridge" and features <= MAX_FITTED and allowed

    @property
    def moving_channels(self) -> int:
        """Channels that move one layer back in every step: what is written into the front face, at least half of all."""
        return max(self.numbers_per_cell + self.mixed_numbers, self.channels // 2)

    def reach(self, side: int) -> float:
        """Reach of a neighbourhood in a cube of this side, in cells; the three bands need at least 3."""
        return max(self.radius * side, 3.0)

    @property
    def steps(self) -> int:
        """Steps of the cube per sentence, T."""
        return self.num_steps or self.side - 1


_REAL = ("laptop", "minilm", "trials", "full")

TARGETS = (
    Target("cube/fvu", "<=", "pca/fvu", _REAL, "trainbook: never worse than PCA of the same width"),
    Target("cube/gap_closed", ">=", 0.5, ("minilm", "trials"), "trainbook: half of the way from PCA to an autoencoder"),
    Target("cube/fvu", "<", "untrained/fvu", _REAL, "trainbook: the experts earn their training"),
    Target("cube/fvu", "<", "random_features/fvu", _REAL, "trainbook: trained experts are worth more than random ones"),
    Target("cube/cosine", ">=", 0.9, ("full",), "brief: cosine above 0.9; see pca/cosine beside it"),
)
