"""A training brief in YAML: what it asks of one workflow, as config fields and runtime options. Needs no torch.

The file is parsed to nodes with their line numbers and never constructed: no tag in it can make an object.
"""

import difflib
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainbook.config import BaseConfig
from trainbook.errors import UserError

logger = logging.getLogger("trainbook")

SECTIONS = ("training", "models")
TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = {TAG + name for name in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map")}

_FOLDER = (r"[^\x00-\x20][^\x00-\x1f]*", "a folder's name, in quotes if it is a number or a date")
# The brief's word: our option, the texts it takes, and those in words.
RUNTIME_OPTIONS = {
    "device": ("device", r"auto|cpu|cuda(:[0-9]+)?", "auto, cpu, cuda or cuda:INDEX"),
    "num_workers": ("workers", r"0|[1-9][0-9]*", "a whole number from 0"),
    "checkpoint_dir": ("checkpoint_dir", *_FOLDER),
    "log_dir": ("log_dir", *_FOLDER),
}

Entries = dict[str, tuple[int, yaml.Node]]  # key: its line, counted from 1, and its value
Mistakes = list[tuple[int, str]]


@dataclass
class Brief:
    """What a brief asks of one workflow.

    Attributes:
        overrides: config field to value, text or a list of texts as on a command line, for `BaseConfig.from_preset`.
        settings: device, workers, checkpoint_dir and log_dir, those that are given, for `runtime.export`.
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)


def read_brief(path: Path, workflow: str, config: type[BaseConfig]) -> Brief:
    """What the file asks of a workflow: its `training` section, and over it the workflow's section of `models`.

    The workflow's section is the one whose key begins its name, the longest if there are several; the others are left
    alone. A key is an option of the runtime, or a field by its own name, or one by `BRIEF_NAMES` of the config and its
    parents; a word that stands there for "" does not apply to the workflow: it is left out, with a warning.

    Args:
        path: of the YAML file.
        workflow: its name, such as license_plates.
        config: its config class, which reads the values and checks their range in `from_preset`.

    Raises:
        UserError: for a file that is no brief, with every mistake and its line.
    """
    root = _parse(path)
    mistakes = _mistakes_of_form(root)
    sections = _entries("the file", root, mistakes)
    for name, (line, _) in sections.items():
        if name not in SECTIONS:
            mistakes.append((line, f"there is no section {name!r}{_closest(name, SECTIONS)}"))
    training = _section("training", sections, mistakes)
    models = _section("models", sections, mistakes)
    own = max((name for name in models if name and workflow.startswith(name)), key=len, default=None)
    brief = Brief()
    for entries in (training, _section(own, models, mistakes)):
        _read(entries, brief, workflow, config, mistakes)
    if told := sorted(set(mistakes)):  # through an alias one line can be read twice
        raise UserError(
            "\n".join(f"{path}, line {line}: {text}" for line, text in told),
            f"mend or remove {'this line' if len(told) == 1 else 'these lines'}; "
            f"`trainbook show {workflow}` lists the fields and their values",
        )
    return brief


def _parse(path: Path) -> yaml.Node:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text", "give a YAML file in UTF-8") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        if text[mark.index : mark.index + 1] == "\t":
            raise UserError(f"{path}, line {mark.line + 1}: a tab", "YAML takes only spaces between its words") from None
        raise UserError(f"{path}, line {mark.line + 1} is not YAML: {error.problem}", "mend the line, or the one above") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{path}, line {line}: character U+{error.character:04X} is not text", "remove it") from None
    except RecursionError:
        raise UserError(f"{path} nests lists or sections too deeply", f"keep to {' and '.join(SECTIONS)}") from None
    if root is None or _is_null(root):
        raise UserError(f"{path} is empty", f"give it the sections {' and '.join(SECTIONS)}")
    return root


def _mistakes_of_form(root: yaml.Node) -> Mistakes:
    """What no reader of YAML should let pass, anywhere in the file: a key twice, a key that is no word, a tag."""
    mistakes, seen, waiting = [], set(), [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias: another's node, perhaps its own parent
            continue
        seen.add(id(node))
        if node.tag not in PLAIN_TAGS:
            tag = node.tag.replace(TAG, "!!")
            mistakes.append((_line(node), f"the tag {tag} is refused; only text, numbers, true, false and lists are read"))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                waiting += [key, value]
                if not isinstance(key, yaml.ScalarNode):
                    mistakes.append((_line(key), "a list or section cannot be a key"))
                elif key.value in lines:
                    mistakes.append((_line(key), f"{key.value!r} is there twice, first in line {lines[key.value]}"))
                else:
                    lines[key.value] = _line(key)
    return mistakes


def _section(name: str | None, parent: Entries, mistakes: Mistakes) -> Entries:
    return _entries(name, parent[name][1], mistakes) if name in parent else {}


def _entries(name: str, node: yaml.Node, mistakes: Mistakes) -> Entries:
    """The keys of a section; one whose lines are all commented out has none."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: (_line(key), value) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
    if not _is_null(node):
        mistakes.append((_line(node), f"{name} must hold lines of `key: value`, not {_shown(node)}"))
    return {}


def _read(entries: Entries, brief: Brief, workflow: str, config: type[BaseConfig], mistakes: Mistakes) -> None:
    """Add a section to the brief."""
    # Along the MRO, so that a workflow adds words to those of its parents, or changes one.
    names = {word: name for cls in reversed(config.__mro__) for word, name in vars(cls).get("BRIEF_NAMES", {}).items()}
    words: dict[str, str] = {}
    for word, (line, node) in entries.items():
        if word in RUNTIME_OPTIONS:
            option, pattern, allowed = RUNTIME_OPTIONS[word]
            is_typed = node.tag == TAG + "str" or option == "workers"
            if isinstance(node, yaml.ScalarNode) and is_typed and re.fullmatch(pattern, node.value):
                brief.settings[option] = node.value
            else:
                mistakes.append((line, f"{word} must be {allowed}, not {_shown(node)}"))
            continue
        name = word if word in config.model_fields else names.get(word)
        if name == "":
            logger.warning("%s does not apply to %s and is left out", word, workflow)
        elif name not in config.model_fields:
            close = _closest(word, [*config.model_fields, *names, *RUNTIME_OPTIONS])
            mistakes.append((line, f"the config of {workflow} has no field {word!r}{close}"))
        elif name in words:
            mistakes.append((line, f"{word!r} sets {name} again, after {words[name]!r}"))
        elif (value := _value(node)) is None:
            mistakes.append((line, f"{word} must be one value or a list of values, none of them empty or a list itself"))
        else:
            words[name] = word
            # A config names the number format; the brief says whether it is mixed.
            if name == "precision" and isinstance(value, str) and value.lower() in yaml.SafeLoader.bool_values:
                value = "mixed" if yaml.SafeLoader.bool_values[value.lower()] else "float32"
            brief.overrides[name] = value


def _value(node: yaml.Node) -> str | list[str] | None:
    """A value as its text, which the config reads as the field's type; None for a missing or nested one."""
    parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if any(not isinstance(part, yaml.ScalarNode) or _is_null(part) for part in parts):
        return None
    return [part.value for part in parts] if isinstance(node, yaml.SequenceNode) else node.value


def _shown(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "a section"
    return "empty" if _is_null(node) else repr(node.value) if node.tag == TAG + "str" else node.value


def _closest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == TAG + "null"


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
