"""What a person clicks in a notebook: the form of a config, and the panel of a run under way. The only user of ipywidgets.

Only what ipywidgets 7 (Colab) and 8 (Kaggle) have in common. Nobody there, or no ipywidgets: nothing of it is loaded.
"""

import html
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from IPython.display import display
from pydantic import ValidationError

from trainbook import catalog
from trainbook.config import BaseConfig, allowed_values, explain, field_groups
from trainbook.errors import UserError
from trainbook.kernel import answer_clicks, is_attended, later
from trainbook.live import LiveView, Progress
from trainbook.spec import RunSpec

RUN_TOML = Path("run.toml")
GREY, RED, BLUE = "#57606a", "#b42318", "#1f6fb4"


def can_show() -> bool:
    """Whether a person is there, and widgets to show."""
    return is_attended() and importlib.util.find_spec("ipywidgets") is not None


def edit(
    spec: RunSpec,
    saved: Callable[[RunSpec], str] | None = None,
    estimate: Callable[[BaseConfig], str] | None = None,
    path: Path = RUN_TOML,
) -> RunSpec:
    """Offer a form of the config that a spec says, and return the spec as it is; without a person that is all.

    Args:
        spec: what the form starts from.
        saved: called after Save with the new spec; returns what to tell.
        estimate: says what a config would take; behind a button, for it may train for seconds.
        path: the run.toml that Save writes.
    """
    if can_show():
        display(Form(spec, saved, estimate, path).widget)
    return spec


class Form:
    """A row per field of a workflow's config, with what is allowed, what the preset says, and what is wrong beside it."""

    def __init__(
        self,
        spec: RunSpec,
        saved: Callable[[RunSpec], str] | None = None,
        estimate: Callable[[BaseConfig], str] | None = None,
        path: Path = RUN_TOML,
    ) -> None:
        import ipywidgets as widgets

        self._spec, self._saved, self._estimate, self._path = spec, saved, estimate, path
        self._class = catalog.load(spec.workflow).Config
        self.preset = widgets.Dropdown(options=list(self._class.PRESETS), value=spec.preset, description="preset")
        self.inputs = {name: _input(field.annotation) for name, field in self._class.model_fields.items()}
        self.notes = {name: widgets.HTML() for name in self.inputs}
        self.wrong, self.message, self.estimated = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.save = widgets.Button(description="Save", button_style="primary", tooltip=f"write {path}")
        self.reset = widgets.Button(description="Reset", tooltip="all fields as the preset has them")
        self.measure = widgets.Button(description="Estimate", tooltip="take a few real steps: parameters, time, memory")
        self._presets = {name: self._texts(self._class.from_preset(name)) for name in self._class.PRESETS}
        self._quiet, self._measured = False, None
        self._set(self._texts(spec.config()))
        for one in self.inputs.values():
            one.observe(self._changed, "value")
        self.preset.observe(self._preset_changed, "value")
        self.save.on_click(lambda _: self._write())
        self.reset.on_click(lambda _: self._set(self._presets[self.preset.value]))
        self.measure.on_click(lambda _: self._start_estimate())
        buttons = [self.save, self.reset, *([self.measure] if estimate else [])]
        groups = field_groups(self._class)
        parts = widgets.Accordion([widgets.VBox([self._row(name) for name in names]) for names in groups.values()])
        for index, title in enumerate(groups):
            parts.set_title(index, title)
        self.widget = widgets.VBox([self.preset, parts, self.wrong, widgets.HBox(buttons), self.estimated, self.message])

    def _row(self, name: str) -> Any:
        import ipywidgets as widgets

        text = " ".join((self._class.model_fields[name].description or "").split())
        label = widgets.HTML(f'<span title="{html.escape(text, quote=True)}" style="cursor:help">{name}</span>')
        label.layout.min_width, self.inputs[name].layout.min_width = "230px", "300px"
        return widgets.HBox([label, self.inputs[name], self.notes[name]])

    def _texts(self, config: BaseConfig) -> dict[str, Any]:
        return {name: _shown(self.inputs[name], getattr(config, name)) for name in self.inputs}

    def _set(self, values: dict[str, Any]) -> None:
        self._quiet = True
        for name, value in values.items():
            self.inputs[name].value = value
        self._quiet = False
        self._check()

    def _preset_changed(self, change: dict[str, Any]) -> None:
        """Fields that were changed stay as they are; the others follow the preset."""
        own = {name: one.value for name, one in self.inputs.items() if one.value != self._presets[change["old"]][name]}
        self._set(self._presets[change["new"]] | own)

    def _changed(self, change: dict[str, Any]) -> None:
        if not self._quiet:
            self._check()

    def overrides(self) -> dict[str, Any]:
        """What differs from the preset, as it stands in the form."""
        there = self._presets[self.preset.value]
        return {name: _read(one, self._class, name) for name, one in self.inputs.items() if one.value != there[name]}

    def _check(self) -> BaseConfig | None:
        """The config, or None where something is wrong, which is then said beside the field."""
        overrides, errors, config = self.overrides(), {}, None
        try:
            config = self._class(**{**self._class.PRESETS[self.preset.value], **overrides})
        except ValidationError as error:
            for line in error.errors():
                name = str(line["loc"][0]) if line["loc"] else ""
                errors[name] = explain(line, self._class.model_fields) if name else line["msg"].removeprefix("Value error, ")
        for name, note in self.notes.items():
            field = self._class.model_fields[name]
            if name in errors:
                note.value = _coloured(RED, "✗ " + errors[name].partition(": ")[2])
            elif name in overrides:
                note.value = _coloured(BLUE, f"● the preset has {self._presets[self.preset.value][name]!r}")
            else:
                shown = hasattr(self.inputs[name], "continuous_update")  # the others show their choices themselves
                note.value = _coloured(GREY, allowed_values(field) if shown else "")
        self.wrong.value = _coloured(RED, "✗ " + errors[""]) if "" in errors else ""
        self.save.disabled = self.measure.disabled = config is None
        self.message.value = ""
        if config != self._measured and self.estimated.value and not self.estimated.value.startswith("<s"):
            self.estimated.value = f"<s>{self.estimated.value}</s>"  # of other values
        return config

    def spec(self) -> RunSpec:
        """What Save writes."""
        changed = {"preset": self.preset.value, "overrides": self.overrides(), "run_id": ""}
        return RunSpec(**{**self._spec.model_dump(), **changed})

    def _write(self) -> None:
        if self._check() is None:
            return
        try:
            spec = self.spec()
            spec.write(self._path)
            told = self._saved(spec) if self._saved else ""
        except (UserError, OSError) as error:
            self.message.value = _coloured(RED, str(error))
            return
        command = f"trainbook run --spec {self._path}"
        self.message.value = f"saved as {html.escape(str(self._path))}; headless: <code>{command}</code><br>{html.escape(told)}"

    def _start_estimate(self) -> None:
        if (config := self._check()) is None:
            return
        self.estimated.value, self._measured = "measuring a few steps ...", config

        def measure() -> None:
            try:
                self.estimated.value = html.escape(self._estimate(config))
            except Exception as error:  # shown, for nobody sees a traceback of a click
                self.estimated.value = _coloured(RED, f"{type(error).__name__}: {error}")

        later(measure)


class LivePanel:
    """A run under way: its curves, Stop and Resume. Called about once a second, between two steps.

    Args:
        history: records of earlier sessions.
        resume: goes on with the training; called in the main thread.
    """

    def __init__(self, history: list[dict[str, Any]], resume: Callable[[], None]) -> None:
        import ipywidgets as widgets

        self._view, self._asked, self._resume = LiveView(), False, resume
        self._view.load(history)
        self.page, self.message = widgets.HTML("starting ..."), widgets.HTML()
        self.stop = widgets.Button(description="Stop", icon="stop", tooltip="save after this step, and stop")
        self.go_on = widgets.Button(description="Resume", icon="play", disabled=True, tooltip="go on from the checkpoint")
        self.stop.on_click(lambda _: self._ask())
        self.go_on.on_click(lambda _: self._start_again())
        self.widget = widgets.VBox([self.page, widgets.HBox([self.stop, self.go_on]), self.message])
        display(self.widget)

    def __call__(self, progress: Progress) -> bool:
        """Show the progress; True where Stop was pressed."""
        answer_clicks()
        self.page.value = self._view.show(progress)
        return self._asked

    def _ask(self) -> None:
        self._asked, self.stop.disabled, self.message.value = True, True, "stopping after this step ..."

    def ended(self, text: str, resumable: bool) -> None:
        """Say how training ended."""
        self._asked, self.stop.disabled, self.go_on.disabled = False, True, not resumable
        self.message.value = html.escape(text)

    def _start_again(self) -> None:
        self.go_on.disabled, self.stop.disabled, self.message.value = True, False, "starting again ..."
        later(self._resume)


def _input(annotation: Any) -> Any:
    import ipywidgets as widgets

    if get_origin(annotation) is Literal:
        return widgets.Dropdown(options=list(get_args(annotation)))
    if annotation is bool:
        return widgets.Checkbox(indent=False)
    return widgets.Text(continuous_update=False)


def _shown(widget: Any, value: Any) -> Any:
    """A value as its input holds it: text, but for choices and truth values."""
    if not hasattr(widget, "continuous_update"):
        return value
    return ", ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else str(value)


def _read(widget: Any, config_class: type[BaseConfig], name: str) -> Any:
    annotation = config_class.model_fields[name].annotation
    return None if widget.value == "" and type(None) in get_args(annotation) else widget.value


def _coloured(colour: str, text: str) -> str:
    return f'<span style="color:{colour}">{html.escape(text)}</span>'
