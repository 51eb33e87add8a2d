"""TensorBoard's event files, where it is installed."""

import importlib.util
from pathlib import Path

from trainbook import distributed


class Events:
    """The numbers of a run as TensorBoard reads them; does nothing where it is not installed.

    Args:
        folder: of the event files.
        step: training continues after it; what an interrupted session wrote for later steps is dropped from view.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = None
        if distributed.rank() == 0 and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, points: dict[str, tuple[int, float]]) -> None:
        """One point for each number at this step."""
        if self._writer is not None:
            for name, (step, value) in points.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
