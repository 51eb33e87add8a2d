"""What held-out sentences come out as while the cube learns: after every epoch the known sentence nearest to what it says."""

import logging
from typing import Any

from torch import Tensor

from trainbook.state import TrainState
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.data import SentenceData
from trainbook.workflows.cellular_cube.retrieval import retrieve

logger = logging.getLogger("trainbook")

NUM_SHOWN = 4  # validation sentences, the same in every epoch
NAME = "epoch_examples"


class EpochExamples:
    """Rows (step of the run, share of variance unexplained, nearest known sentences), one per validation.

    Attributes:
        rows: so far.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, float, list[str]]] = []

    def add(self, data: SentenceData, step: int, valid_fvu: float, outputs: Tensor) -> None:
        """Keep and log what `outputs`, (NUM_SHOWN, D) standardised, of the first validation sentences retrieve."""
        found = retrieve(data.raw(data.train["embeddings"]), data.sentences["train"], data.raw(outputs))
        self.rows.append((step, valid_fvu, found))
        for sentence, known in zip(data.sentences["valid"], found, strict=False):
            logger.info("step %d: %s -> %s", step, sentence, known)

    def text(self, sentences: tuple[str, ...]) -> str:
        """Each sentence, and below it what it was after every validation."""
        lines = ["Validation sentences, and the known sentence nearest to what the cube makes of each, by step of the run.", ""]
        for index, sentence in enumerate(sentences[:NUM_SHOWN]):
            lines += [sentence, *(f"  {step:>6}  FVU {fvu:.3f}  {found[index]}" for step, fvu, found in self.rows), ""]
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and text only."""
        return {"rows": self.rows}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.rows = [tuple(row) for row in saved["rows"]]


def export(config: Config, data: SentenceData, state: TrainState, metrics: dict[str, float]) -> dict[str, str]:
    """The examples of every epoch, for the run's export and its report."""
    return {f"{NAME}.txt": state.stateful[NAME].text(data.sentences["valid"])}
