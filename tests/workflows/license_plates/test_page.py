"""The page of the workflow: what it says of the kit is so."""

import re
from pathlib import Path

import pytest

import trainbook
from trainbook.__main__ import COMMANDS
from trainbook.options import parser_for
from trainbook.workflows.license_plates.config import Config

FOLDER = Path(trainbook.__file__).parent / "workflows" / "license_plates"
PAGE = (FOLDER / "README.md").read_text()
EXAMPLES = re.findall(r"^trainbook (run license_plates[^\n#]*?)(?:   .*)?$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", EXAMPLES)
def test_commands_are_understood(command):
    given = parser_for(["run"], COMMANDS).parse_args(command.split())
    assert given.name == "license_plates"


def test_files_and_fields_exist():
    files = set(re.findall(r"`([a-z_]+\.py)`", PAGE))
    assert {path.name for path in FOLDER.glob("*.py")} - {"__init__.py", "config.py"} == files
    fields = set(re.findall(r"`([a-z]+_[a-z_]+)( = [a-z]+)?`", PAGE))
    assert {name for name, _ in fields} - {"license_plates", "edge_blobs", "ccpd_np"} <= set(Config.model_fields)
