"""What a run's jobs have reached, what follows from it for the jobs after them, and how it goes into a checkpoint."""

# K views, N training images, C classes, M teachers

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainbook.data import Data
from trainbook.errors import RunFailed, UserError
from trainbook.runtime import Runtime
from trainbook.workflows.distillation.arms import Settings, default_settings, hpm_kd
from trainbook.workflows.distillation.config import SEARCHED_METHODS, Config, read_settings
from trainbook.workflows.distillation.gate import choose_gate, confidence_weights, entropy_weights, uniform_weights
from trainbook.workflows.distillation.graph import TEACHER, Graph, search_name, trial_student_name
from trainbook.workflows.distillation.images import num_classes
from trainbook.workflows.distillation.jobs import Job, Teaching, logits_of_views, new_network, one_thread, predict
from trainbook.workflows.distillation.ladder import accept_assistant, geometric_sizes, leading_channels, solve_width
from trainbook.workflows.distillation.logit_store import LogitStore, cache_key, fingerprint_tensors
from trainbook.workflows.distillation.methods import METHODS
from trainbook.workflows.distillation.networks import Classifier, family, num_parameters
from trainbook.workflows.distillation.search import Rung, Selection, Span, draw_arms, search
from trainbook.workflows.distillation.views import NUM_VIEWS

logger = logging.getLogger("trainbook")

JOBS = "jobs"  # name in `TrainState.stateful`
KEPT_DTYPE = "float32"  # exact: what is kept and what is computed anew are the same numbers
MOST_BYTES = 4 * 10**9  # of teachers' logits on disk
WIDEST = 64  # times a student's width: among these an assistant's width is looked for
RUNG_FACTOR, LAST_RUNG = 3, 3


class _NotTrainedError(Exception):
    """The search wants results that are not there yet."""


def rungs_of(config: Config) -> list[Rung]:
    """Rungs of the search: a third of the arms and three times the epochs each time, down to three arms."""
    rungs = [Rung(config.search_arms, config.search_epochs)]
    while rungs[-1].arms > LAST_RUNG:
        rungs.append(Rung(max(LAST_RUNG, -(-rungs[-1].arms // RUNG_FACTOR)), rungs[-1].epochs * RUNG_FACTOR))
    return rungs


class JobTable:
    """Networks and results of the jobs of a run; keep it in `TrainState.stateful`.

    Args:
        config, data: of the run.
        runtime: how many jobs at once, and where teachers' logits are kept.

    Attributes:
        graph: which jobs there are.
        networks: name of a finished job to its weights.
        results: name of a finished job to how it does on valid.
        facts: what was decided from them.
    """

    def __init__(self, config: Config, data: Data, runtime: Runtime) -> None:
        self.config, self.data, self.runtime = config, data, runtime
        self.jobs_at_once = runtime.jobs if config.parallel_pipeline else 1
        steps = max(1, len(data.train["labels"]) // config.batch_size)
        self.graph = Graph(config, steps, self._widths(), rungs_of(config))
        self.networks: dict[str, dict[str, Tensor]] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {}
        self._under_way: dict[str, dict[str, Any]] = {}
        self._logits: dict[str, Tensor] = {}
        self._accepted: dict[str, bool] = {}
        self._selections: dict[str, Selection] = {}
        self._drawn: list[dict[str, Any]] = []
        self.store = LogitStore(runtime.data_folder / "teacher_logits", MOST_BYTES) if config.shared_memory else None
        self.asked = 0  # for logits, by chunks of jobs
        self._arrays: dict[str, np.memmap] = {}
        self._fingerprint = ""
        self.test_logits: dict[str, Tensor] = {}  # once they are computed; in no checkpoint

    def _widths(self) -> list[int]:
        """Of the assistants, evenly spaced in the logarithm of parameters; they are wider students."""
        config, data = self.config, self.data
        if not hpm_kd(config).chain or config.stage not in ("all", "hpm_kd"):
            return []
        shape, classes = tuple(data.train["images"].shape[1:]), num_classes(data)

        def count(name: str, width: int) -> int:
            with torch.device("meta"):
                return num_parameters(family(name, shape, classes)(width))

        student, width = config.student_network, config.student_width
        try:
            sizes = geometric_sizes(
                count(config.teacher_network, config.teacher_width), count(student, width), config.num_assistants
            )
            return [solve_width(lambda w: count(student, w), size, width, WIDEST * width) for size in sizes[1:-1]]
        except ValueError as error:
            raise UserError(str(error), "choose a smaller student or a larger teacher, or chain = false") from None

    def chunks(self) -> list[int]:
        """Records of every level, as far as is known."""
        return [
            sum(job.num_chunks(self.config.chunk_steps) for job in self.graph.jobs(level, self)) for level in self.graph.levels()
        ]

    def take(self, job: Job, saved: dict[str, Any]) -> None:
        """What a chunk of a job has left; after its last one the network and its result."""
        if "network" not in saved:
            self._under_way[job.name] = saved
            return
        self._under_way.pop(job.name, None)
        self.networks[job.name], self.results[job.name] = saved["network"], saved["result"]

    def saved(self, job: Job) -> dict[str, Any] | None:
        """What to go on from; of a job that has not begun its first weights where it starts warm, else None."""
        if job.name in self._under_way or not job.arm.warm:
            return self._under_way.get(job.name)
        before = [name for name, *_ in job.sources if name in self.networks and not name.startswith(TEACHER)]
        if not before:
            return None
        narrow = new_network(self.config, self.data, job.network, job.width, job.seed).state_dict()
        return {"start": leading_channels(self.networks[before[-1]], narrow)}

    def adopt(self, name: str, network: nn.Module) -> None:
        """Take a network that another run has trained for a finished job."""
        self.networks[name] = dict(network.state_dict())
        self.results[name] = self._measured(network)

    def _measured(self, network: nn.Module) -> dict[str, Any]:
        logits, labels = predict(network, self.data.valid["images"]), self.data.valid["labels"]
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return {"valid_accuracy": float((logits.argmax(1) == labels).float().mean()), "valid_losses": losses}

    def network(self, name: str) -> Classifier:
        """A finished job's network, frozen, in evaluation mode.

        Before it is trained (the steps of a plan are timed so) one with random weights.
        """
        network_name, width = self.shape(name)
        network = new_network(self.config, self.data, network_name, width, self.config.seed)
        if name in self.networks:
            network.load_state_dict(self.networks[name])
        return network.requires_grad_(False).eval()

    def shape(self, name: str) -> tuple[str, int]:
        """Kind and width of a job's network, which its name tells."""
        if name.startswith(TEACHER):
            return self.config.teacher_network, self.config.teacher_width
        place = name.rpartition("/")[2]
        is_assistant = place.startswith("assistant_")
        width = self.graph.widths[int(place.removeprefix("assistant_")) - 1] if is_assistant else self.config.student_width
        return self.config.student_network, width

    def check_all_trained(self) -> None:
        """Raise unless every job of the run is finished.

        Raises:
            RunFailed: naming one that is not.
        """
        for level in self.graph.levels():
            missing = [job.name for job in self.graph.jobs(level, self) if job.name not in self.networks]
            if missing:
                raise RunFailed(f"{len(missing)} networks were never trained to the end, such as {missing[0]}")

    # What earlier levels say about later ones

    def rung(self, regime: str, number: int) -> list[Settings]:
        """The settings that a rung of the search trains; until the rung below is trained, the first ones."""
        asked: list[Settings] = []

        def train(settings: list[tuple[int, Any]], epochs: int) -> list[Any]:
            level = [rung.epochs for rung in self.graph.rungs].index(epochs)
            values = [Settings(**arm) for _, arm in settings]
            if level == number:
                asked.extend(values)
                raise _NotTrainedError
            return self._searched(regime, level, values)

        with suppress(_NotTrainedError):
            search(self._candidates(), self.graph.rungs, train)
        return asked or [Settings(**arm) for arm in self._candidates()[: self.graph.rungs[number].arms]]

    def selection(self, regime: str) -> Selection | None:
        """What the search picked; None before it is trained, or without one."""

        def train(settings: list[tuple[int, Any]], epochs: int) -> list[Any]:
            level = [rung.epochs for rung in self.graph.rungs].index(epochs)
            return self._searched(regime, level, [Settings(**arm) for _, arm in settings])

        if regime not in self._selections and self.config.adaptive:
            with suppress(_NotTrainedError):
                self._selections[regime] = search(self._candidates(), self.graph.rungs, train)
        return self._selections.get(regime)

    def settings(self, regime: str) -> Settings:
        """What the search chose; the default before it is trained, or without one."""
        picked = self.selection(regime)
        return default_settings(self.config, hpm_kd(self.config)) if picked is None else Settings(**picked.arm)

    def _candidates(self) -> list[dict[str, Any]]:
        config, rungs = self.config, self.graph.rungs
        if self._drawn:
            return self._drawn
        default = asdict(default_settings(config, hpm_kd(config)))
        space = {
            "method": SEARCHED_METHODS,
            "temperature": Span(1.0, 10.0, log=True),
            "weight": Span(0.05, 0.95),
            "learning_rate": Span(config.learning_rate / 4, config.learning_rate * 4, log=True),
            "weight_decay": Span(1e-5, 1e-2, log=True),
        }
        known = [read_settings(text) for text in config.known_settings]
        drawn = draw_arms(space, default, rungs[0].arms - len(known), config.seed)
        self._drawn = [*drawn[:1], *known, *drawn[1:]]
        return self._drawn

    def _searched(self, regime: str, level: int, settings: list[Settings]) -> list[Any]:
        losses = [self._losses(search_name(regime, level, one)) for one in settings]
        if any(each is None for each in losses):
            raise _NotTrainedError
        return [each.tolist() for each in losses]

    def search_losses(self, regime: str) -> dict[str, float]:
        """Valid NLL of the picked settings and of the defaults, in the last rung; {} without a search."""
        picked = self.selection(regime)
        if picked is None:
            return {}
        return {"valid_nll_picked": picked.valid_nll, "valid_nll_default": picked.default_valid_nll}

    def assistants(self, regime: str, before: int) -> list[int]:
        """Which of the first assistants the chain keeps, by a paired bootstrap of the trial students' losses on valid."""
        kept: list[int] = []
        base = self._losses(trial_student_name(regime, None))
        for index in range(before):
            losses = self._losses(trial_student_name(regime, index))
            if losses is None or base is None:  # not tried yet: planned for
                kept.append(index)
            elif self._accepts(trial_student_name(regime, index), base, losses):
                kept.append(index)
                base = losses
        return kept

    def _losses(self, name: str) -> Tensor | None:
        return self.results[name]["valid_losses"] if name in self.results else None

    def _accepts(self, name: str, base: Tensor, losses: Tensor) -> bool:
        if name not in self._accepted:
            self._accepted[name] = accept_assistant(losses.tolist(), base.tolist(), self.config.seed).accepted
        return self._accepted[name]

    # What a job is taught

    def teaching(self, job: Job) -> Teaching:
        """What a job's sources have to say."""
        names = [name for source in job.sources for name in source]
        teacher = self.results.get("teacher_1")
        accuracy = None if teacher is None or job.stage == TEACHER else teacher["valid_accuracy"]
        weights = self.weights(job.arm.gate) if any(len(source) > 1 for source in job.sources) else None
        if job.sources and (job.arm.live or METHODS[job.settings.method].needs != "logits"):
            return Teaching(networks={name: self.network(name) for name in names}, weights=weights, accuracy=accuracy)
        return Teaching({name: self.logits(name) for name in names}, weights=weights, accuracy=accuracy)

    def logits(self, name: str) -> Tensor:
        """Of a finished network for every view of every training image, (K, N, C); kept on disk where memory is shared."""
        self.asked += 1
        if name not in self._logits:
            images = self.data.train["images"]
            with one_thread(images.device):
                if self.store is None:
                    self._logits[name] = logits_of_views(self.network(name), images, self.config.augmentation)
                else:
                    self._arrays[name] = self._kept_logits(self.store, name)
                    self._logits[name] = torch.from_numpy(self._arrays[name]).to(images.device)
        return self._logits[name]

    def path(self, name: str) -> str:
        """The file that `logits` is mapped from; "" where nothing is kept on disk."""
        return str(self._arrays[name].filename) if name in self._arrays else ""

    def _kept_logits(self, store: LogitStore, name: str) -> np.memmap:
        network, images, augmentation = self.network(name), self.data.train["images"], self.config.augmentation
        self._fingerprint = self._fingerprint or fingerprint_tensors({"images": images})
        shape = (NUM_VIEWS[augmentation], len(images), num_classes(self.data))
        key = cache_key(network, self._fingerprint, {"views": augmentation}, shape[0], 0, KEPT_DTYPE)

        def fill(arrays: dict[str, np.ndarray]) -> None:
            arrays["logits"][:] = logits_of_views(network, images, augmentation).cpu().numpy()

        return store.fetch(key, {"logits": shape}, KEPT_DTYPE, fill)["logits"]

    def weights(self, rule: str) -> Tensor:
        """How much each teacher counts for every view of every training image, (K, N, M)."""
        logits = torch.stack([self.logits(name) for name in self.graph.teachers()])  # (M, K, N, C)
        views = logits.unbind(1)
        if rule == "uniform":
            return torch.stack([uniform_weights(view) for view in views])
        if rule == "entropy":
            return torch.stack([entropy_weights(view) for view in views])
        if rule == "ca_mkd":
            return torch.stack([confidence_weights(view, self.data.train["labels"]) for view in views])
        if "gate" not in self.facts:
            self._choose_gate(views)
        return self.facts["gate"]["weights"]

    def _choose_gate(self, views: Sequence[Tensor]) -> None:
        """Fit the gate on valid, which no teacher has learned from."""
        images, labels = self.data.valid["images"], self.data.valid["labels"]
        with one_thread(images.device):
            held_out = torch.stack([predict(self.network(name), images) for name in self.graph.teachers()])
            choice = choose_gate(held_out, labels, self.config.seed)
            weights = torch.stack([choice.weights(view) for view in views])
        self.facts["gate"] = {"weights": weights, "rule": choice.rule, "why": choice.why, "nll": choice.nll}

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text only, so that `torch.load(weights_only=True)` reads them back."""
        return {"networks": self.networks, "results": self.results, "facts": self.facts, "under_way": self._under_way}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a table of the same config."""
        self.networks, self.results, self.facts = saved["networks"], saved["results"], saved["facts"]
        self._under_way = saved["under_way"]
        self._logits, self._arrays, self._accepted, self._selections = {}, {}, {}, {}
