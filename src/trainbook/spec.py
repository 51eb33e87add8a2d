"""The run spec, `run.toml`: what to train and what it may take. The form writes it, every launcher reads it. Needs no torch."""

import json
import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from trainbook import catalog
from trainbook.config import BaseConfig, explain
from trainbook.errors import UserError
from trainbook.files import write_atomic
from trainbook.records import check_run_id, new_run_id
from trainbook.runtime import parse_duration


class RunSpec(BaseModel):
    """One run, checked against its workflow before anything is spent.

    Raises:
        UserError: for an unknown workflow, preset, key or config field, and for a value out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    workflow: str
    """Name of the workflow."""
    preset: str = "laptop"
    """The preset to start from."""
    overrides: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """Config fields that differ from the preset."""
    run_id: str = ""
    """Name of the run folder; an existing one of the same config is continued. Empty: a new one, or the newest unfinished."""
    authentic: bool = False
    """Refuse synthetic data, data without a checksum and a changed kit."""
    time_budget: str = ""
    """Stop and save after this long in one session, such as 20m or 11h. Empty: what the platform allows."""
    checkpoint_every: str = "60s"
    """At most this much work is lost when a session is cut off."""
    accelerator: str = ""
    """GPU to ask for, such as T4, L4 or RTX_4090; cpu for none. Empty: what the platform gives first."""
    max_price_per_hour: float | None = Field(default=None, gt=0)
    """Never rent a machine that costs more an hour, in dollars."""
    budget: float | None = Field(default=None, gt=0)
    """Never spend more on this run altogether, in dollars."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            lines = [explain(line, type(self).model_fields) for line in error.errors()]
            raise UserError("\n".join(lines), "edit the values named") from None

    @field_validator("overrides")
    @classmethod
    def _as_the_workflow_reads_them(cls, overrides: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if not {"workflow", "preset"} <= info.data.keys():  # refused already
            return overrides
        config = catalog.load(info.data["workflow"]).Config.from_preset(info.data["preset"], overrides)
        values = config.model_dump(mode="json")
        return {name: values[name] for name in overrides}

    @field_validator("run_id")
    @classmethod
    def _names_a_folder(cls, run_id: str) -> str:
        return check_run_id(run_id)

    @field_validator("time_budget", "checkpoint_every")
    @classmethod
    def _is_a_duration(cls, text: str, info: ValidationInfo) -> str:
        if (text or info.field_name == "checkpoint_every") and parse_duration(text) <= 0:
            raise ValueError("must be longer than nothing")
        return text

    @classmethod
    def read(cls, path: Path) -> Self:
        """The spec in a file.

        Raises:
            UserError: naming the file and the key.
        """
        try:
            return cls(**tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}", "write it with `trainbook bundle`, or mend it") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def write(self, path: Path) -> None:
        """Write the spec so that `read` gives the same one back."""
        write_atomic(path, self.to_toml().encode())

    def to_toml(self) -> str:
        """The text of run.toml, each key under its meaning."""
        lines = []
        for name, value in self.model_dump(exclude={"overrides"}, exclude_none=True).items():
            lines += [f"# {type(self).model_fields[name].description}", f"{name} = {_toml(value)}"]
        lines += [f"\n# {type(self).model_fields['overrides'].description}", "[overrides]"]
        lines += [f"{name} = {_toml(value)}" for name, value in self.overrides.items()]
        return "\n".join(lines) + "\n"

    def named(self) -> Self:
        """The spec itself, with a new run id where it has none: what is started again then continues."""
        return self if self.run_id else self.model_copy(update={"run_id": new_run_id(self.workflow, self.preset)})

    def config(self) -> BaseConfig:
        """The workflow's config that will be trained."""
        return catalog.load(self.workflow).Config.from_preset(self.preset, self.overrides)

    def parameters(self) -> dict[str, Any]:
        """Values of the notebook's `parameters` cell."""
        return self.model_dump(include={"preset", "overrides", "run_id", "authentic"})

    def settings(self) -> dict[str, str]:
        """What `runtime.export` hands to the process that trains."""
        return {"time_budget": self.time_budget, "checkpoint_every": self.checkpoint_every}


def _toml(value: Any) -> str:
    """A value as TOML writes it: JSON's notation of strings, numbers, truth values and arrays of them is TOML's too."""
    if value is None:
        raise UserError("a TOML file cannot say None", "leave the field out")
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")
