"""One flat, frozen config class per workflow: it drives the notebook, the command line, the form and the launchers."""

import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from trainbook.errors import UserError


class BaseConfig(BaseModel):
    """Everything that changes the result of a run, and nothing else (device and folders belong to the runtime).

    A workflow subclasses it with one annotated field per choice and a docstring under each field. `PRESETS` maps a
    preset's name to the fields it changes: `smoke` (seconds, for tests), `laptop` (minutes on 2 CPU cores) and
    `full` (the published setting).
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"smoke": {}, "laptop": {}, "full": {}}
    DATA_PARALLEL: ClassVar[bool] = False  # whether several processes can share a batch of this workflow
    BRIEF_NAMES: ClassVar[dict[str, str]] = {}  # what the training brief calls a field, to the field
    FILE_FIELDS: ClassVar[tuple[str, ...]] = ("initial_weights",)  # name files or folders that travel with a run
    MODULE_FIELDS: ClassVar[dict[str, tuple[str, str]]] = {}  # a field that names a file with one module's weights, to the
    # module and to what to do about a file that does not fit
    TIMED_WITH: ClassVar[dict[str, Any]] = {}  # fields that cut the same work into smaller steps, while a plan times some

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of every random number of the run."""
    initial_weights: str = ""
    """Start from the exported weights of another run: its folder, its export folder, or one .safetensors file; "" from chance."""

    @field_validator("*", mode="before")
    @classmethod
    def _split_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Read "16, 16, 8" as a tuple and "" as an empty one, so that a command line and a YAML file can name them."""
        if isinstance(value, str) and get_origin(cls.model_fields[info.field_name].annotation) is tuple:
            inside = value.strip("()[] ")
            return [part.strip() for part in inside.split(",")] if inside else []
        return value

    @classmethod
    def from_preset(cls, preset: str, overrides: dict[str, Any] | None = None) -> Self:
        """Config of a preset with single fields overridden.

        Args:
            preset: a key of `PRESETS`.
            overrides: field name to value; text such as "5e-4" is read as the field's type.

        Raises:
            UserError: for an unknown preset or field, or a value out of range; one line each.
        """
        if preset not in cls.PRESETS:
            raise UserError(f"there is no preset {preset!r}", f"choose one of: {', '.join(cls.PRESETS)}")
        try:
            return cls(**{**cls.PRESETS[preset], **(overrides or {})})
        except ValidationError as error:
            lines = [explain(line, cls.model_fields) for line in error.errors()]
            raise UserError("\n".join(lines), "edit the values above") from None

    def sha256(self) -> str:
        """SHA-256 of the config's canonical JSON: equal configs, equal digests."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def options(self, preset: str) -> list[str]:
        """The command line's options that make this config of a preset, such as ["--timesteps", "50"]."""
        words = []
        for name, value in self:
            if value != getattr(type(self).from_preset(preset), name):
                words += [f"--{name.replace('_', '-')}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        return words

    def rows(self, preset: str = "") -> list[list[str]]:
        """Table rows: field, value, what `preset` sets if that differs, allowed values, meaning."""
        reference = type(self).from_preset(preset) if preset else self
        return [
            [
                name,
                str(getattr(self, name)),
                str(getattr(reference, name)) if getattr(self, name) != getattr(reference, name) else "",
                allowed_values(field),
                " ".join((field.description or "").split()),
            ]
            for name, field in type(self).model_fields.items()
        ]


def explain(line: dict[str, Any], fields: Iterable[str]) -> str:
    """One of pydantic's complaints in one line for a person; `fields` are the names that there are."""
    name = ".".join(str(part) for part in line["loc"]) or "config"
    if line["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, fields, n=1)
        return f"there is no field {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    if line["type"] == "missing":
        return f"{name} is missing"
    return f"{name} = {line['input']!r}: {line['msg'].removeprefix('Value error, ')}"


def field_groups(config_class: type[BaseConfig]) -> dict[str, list[str]]:
    """Fields that stand together: a class's own before those it inherits, apart where its source has an empty line."""
    groups: dict[str, list[str]] = {}
    for owner in config_class.__mro__:
        if issubclass(owner, BaseConfig):
            for names in _paragraphs(owner):
                own = [name for name in names if name in config_class.model_fields and not _is_in(name, groups)]
                if own:
                    groups[", ".join(own[:4]) + (", ..." if len(own) > 4 else "")] = own
        if owner is BaseConfig:
            break
    return groups


def _is_in(name: str, groups: dict[str, list[str]]) -> bool:
    return any(name in names for names in groups.values())


def _paragraphs(owner: type[BaseConfig]) -> list[list[str]]:
    """Names annotated in a class, split at empty lines; all together where there is no source to read."""
    try:
        lines = inspect.getsource(owner).splitlines()
    except (OSError, TypeError):
        return [list(owner.__annotations__)]
    found: list[list[str]] = [[]]
    for line in lines:
        if not line.strip():
            found.append([])
        elif (match := re.match(r"    (\w+): ", line)) and match[1] in owner.__annotations__:
            found[-1].append(match[1])
    return [names for names in found if names]


def allowed_values(field: FieldInfo) -> str:
    """The bounds or choices of a field as text, such as "1 to 1000" or "pcd, recovery, cd"."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(str(choice) for choice in get_args(field.annotation))
    bounds = {name: getattr(part, name) for part in field.metadata for name in ("ge", "gt", "le", "lt") if hasattr(part, name)}
    low = f"{bounds['ge']}" if "ge" in bounds else f"> {bounds['gt']}" if "gt" in bounds else ""
    high = f"{bounds['le']}" if "le" in bounds else f"< {bounds['lt']}" if "lt" in bounds else ""
    if low and high:
        return f"{low} to {high}"
    if low or high:
        return low if "gt" in bounds else f"from {low}" if low else f"up to {high}"
    return "true, false" if field.annotation is bool else ""
