"""The page of the workflow: every section that an error or a hint names is there, and what it says of the kit is so."""

import re
from pathlib import Path

import pytest

import trainbook
from trainbook.__main__ import COMMANDS
from trainbook.options import parser_for
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.diagnostics import RULES

SOURCE = Path(trainbook.__file__).parent
PAGE = (SOURCE / "workflows" / "timestep_dbn" / "README.md").read_text()
HEADINGS = set(re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE))


def test_sections_that_messages_name_are_there():
    texts = [path.read_text() for path in SOURCE.rglob("*.py")]
    named = {name for text in texts for name in re.findall(r"[Ss]ee '([^']+)' in the workflow's README", text)}
    assert {"GPU memory", "Checkpoint", "CUDA and the card", "Wrong results"} <= named
    named.discard("{kind}")
    assert named | RULES.keys() | {"dead bits", "NaN"} <= HEADINGS


@pytest.mark.parametrize("command", re.findall(r"^trainbook (run timestep_dbn[^\n#]*?)(?:   .*)?$", PAGE, re.MULTILINE))
def test_commands_are_understood(command):
    options = parser_for(["run"], COMMANDS).parse_args(command.split())
    assert options.name == "timestep_dbn"


def test_fields_presets_and_files_exist():
    words = set(re.findall(r"`([a-z_0-9]+)`", PAGE))
    fields = {word for word in words if "_" in word}
    known = set(Config.model_fields) | {"timestep_dbn", "weights_only"}
    assert fields <= known, fields - known
    assert set(Config.PRESETS) <= words
    root = SOURCE.parents[1]
    for name in ("requirements.txt", "requirements-pinned.txt", "notebooks/timestep_dbn.ipynb"):
        assert (root / name).is_file()
        assert Path(name).name in PAGE


def test_the_readme_links_it():
    root = SOURCE.parents[1]
    links = re.findall(r"\]\((src/[^)]+)\)", (root / "README.md").read_text())
    assert "src/trainbook/workflows/timestep_dbn/README.md" in links
