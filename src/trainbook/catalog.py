"""Finds the workflows: a folder in `trainbook/workflows` is a workflow because it exists."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from trainbook import workflows
from trainbook.errors import UserError

CONTRACT = ("Config", "TARGETS", "load_data", "draw_data", "build", "train", "evaluate", "draw")


@dataclass(frozen=True)
class Workflow:
    """A workflow's module under its name; attributes of the contract are looked up there, when they are first used."""

    name: str
    module: ModuleType

    def __getattr__(self, attribute: str) -> Any:
        if attribute not in CONTRACT:
            raise AttributeError(f"{attribute!r} is not part of the workflow contract: {', '.join(CONTRACT)}")
        return getattr(self.module, attribute)

    @property
    def exports(self) -> Callable[..., dict[str, str]]:
        """(config, data, state, metrics) -> name to text of further files of a run's export folder; most workflows have none."""
        return getattr(self.module, "export", lambda config, data, state, metrics: {})

    @property
    def title(self) -> str:
        """First line of the module's docstring."""
        return (self.module.__doc__ or self.name).strip().splitlines()[0].rstrip(".")

    @property
    def notebook(self) -> Path:
        """The notebook of this workflow in the source tree.

        Raises:
            UserError: when the kit was installed without its notebooks.
        """
        path = Path(__file__).resolve().parents[2] / "notebooks" / f"{self.name}.ipynb"
        if not path.is_file():
            raise UserError(
                f"the notebook {path} is not there", "work in a clone of the repository: `git clone`, then `make demo`"
            )
        return path


def names() -> list[str]:
    """Names of all workflows, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(workflows.__path__))


def load(name: str) -> Workflow:
    """The workflow of a name; torch is imported only when one of its functions is used.

    Raises:
        UserError: when there is none of that name.
    """
    if name not in names():
        raise UserError(f"there is no workflow {name!r}", f"choose one of: {', '.join(names())}")
    return Workflow(name, importlib.import_module(f"trainbook.workflows.{name}"))
