"""The page of the workflow: what it says of the kit is so."""

import re
from pathlib import Path

import pytest

import trainbook
from trainbook.__main__ import COMMANDS
from trainbook.options import parser_for
from trainbook.workflows.graph_diffusion_em.config import Config

FOLDER = Path(trainbook.__file__).parent / "workflows" / "graph_diffusion_em"
PAGE = (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("command", re.findall(r"^trainbook (run graph_diffusion_em[^\n#]*?)(?:   .*)?$", PAGE, re.MULTILINE))
def test_commands_are_understood(command):
    assert parser_for(["run"], COMMANDS).parse_args(command.split()).name == "graph_diffusion_em"


def test_files_and_fields_exist():
    files = set(re.findall(r"`([a-z_]+\.py)`", PAGE))
    tests = Path(__file__).parent
    assert all((FOLDER / name).is_file() or (tests / name).is_file() for name in files)
    assert {path.name for path in FOLDER.glob("*.py")} - {"__init__.py", "config.py", "training.py", "codebook.py"} <= files
    functions = set(re.findall(r"`([a-z]+_[a-z_]+)`", PAGE)) - set(Config.model_fields) - {"graph_diffusion_em"}
    source = "\n".join(path.read_text() for path in FOLDER.glob("*.py"))
    assert all(f"def {name}(" in source for name in functions), functions
