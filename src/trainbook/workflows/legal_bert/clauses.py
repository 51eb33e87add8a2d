"""Labelled legal texts and where they come from: licences of installed packages, a file of one's own, or LexGLUE."""

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from trainbook.errors import UserError
from trainbook.workflows.legal_bert.config import Config
from trainbook.workflows.legal_bert.licences import licence_clauses

SPLIT_SEED = 20_261_127  # the split belongs to the data, not to the run
FOLDS = ("test", "test", "valid", *["train"] * 7)
FEWEST_LICENCE_CLAUSES = 200
KEPT = "clauses.json"


@dataclass(frozen=True)
class Clauses:
    """Texts with one label each.

    Attributes:
        texts, labels, groups: one entry per text; texts of one document share the group.
        source, licence: as in `trainbook.data.Data`; `is_real` is None where nobody told.
        parts: train, valid or test per text, where the source is split already; else "".
        packages: the installed packages that carry each text; "" where they are no licences.
    """

    texts: list[str]
    labels: list[str]
    groups: list[str]
    source: str
    licence: str
    is_real: bool | None
    parts: list[str]
    packages: list[str]


def read_clauses(config: Config, kept: Mapping[str, str]) -> Clauses:
    """The texts of a run's source.

    Args:
        config: which source, and how many texts.
        kept: what the run kept, see `kept_clauses`: other versions of the packages carry other licences.

    Raises:
        UserError: when a file cannot be read, lacks a field, or the data set cannot be had.
    """
    if config.dataset == "lexglue":
        return _lexglue(config)
    if config.dataset == "licences":
        return Clauses(**json.loads(kept[KEPT])) if KEPT in kept else _licences(config)
    rows = _rows(Path(config.data_file))
    fields = (config.text_field, config.label_field, config.group_field)
    about = (f"{Path(config.data_file).name}, a file of the user's", "as the user knows", None)
    texts, labels, groups = [], [], []
    for number, row in enumerate(rows, 1):
        missing = [name for name in fields[:2] if not isinstance(row.get(name), str) or not row[name].strip()]
        if missing:
            remedy = "name the fields with text_field and label_field"
            raise UserError(f"{config.data_file}, entry {number} has no text in {', '.join(missing)}", remedy)
        texts.append(" ".join(row[fields[0]].split()))
        labels.append(row[fields[1]].strip())
        groups.append(str(row.get(fields[2], f"text {number}")))
    chosen = _spread(len(texts), config.max_clauses)
    picked = ([values[index] for index in chosen] for values in (texts, labels, groups))
    return Clauses(*picked, *about, [""] * len(chosen), [""] * len(chosen))


def kept_clauses(config: Config, clauses: Clauses) -> dict[str, str]:
    """What `read_clauses` needs to find the same clauses on a machine with other packages: file name to text."""
    return {KEPT: json.dumps(asdict(clauses), indent=0)} if config.dataset == "licences" else {}


def _spread(number: int, most: int) -> np.ndarray:
    """Indices of at most so many of a number of texts, spread evenly; 0 is all."""
    return np.linspace(0, number - 1, most).astype(int) if most and most < number else np.arange(number)


def _licences(config: Config) -> Clauses:
    """Clauses of the licences that installed packages carry; whole paragraphs go to one part, each family to all three."""
    found = licence_clauses()
    if len(found) < FEWEST_LICENCE_CLAUSES:
        what = f"the packages of this environment carry {len(found)} licence clauses, which are too few"
        raise UserError(what, "use an environment with what requirements.txt names, or dataset = file")
    labels, paragraphs = [clause.family for clause in found], [clause.paragraph for clause in found]
    folds = StratifiedGroupKFold(len(FOLDS), shuffle=True, random_state=SPLIT_SEED).split(labels, labels, paragraphs)
    parts = np.empty(len(found), object)
    for part, (_, fold) in zip(FOLDS, folds, strict=True):
        parts[fold] = part
    chosen = _spread(len(found), config.max_clauses)
    clauses = [found[index] for index in chosen]
    carriers = sorted({clause.packages[0] for clause in clauses})
    return Clauses(
        [clause.text for clause in clauses],
        [clause.family for clause in clauses],
        [f"paragraph {clause.paragraph}" for clause in clauses],
        f"licence texts in the metadata of installed packages: {', '.join(carriers)}",
        "the licences' own",
        True,
        parts[chosen].tolist(),
        [", ".join(clause.packages) for clause in clauses],
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    """The entries of a JSONL or CSV file."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            if path.suffix == ".csv":
                return list(csv.DictReader(file))
            rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}", "give a .csv file, or JSONL: one JSON object a line") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} has lines that are no JSON objects", 'write lines like {"text": "...", "label": "..."}')
    return rows


def _lexglue(config: Config) -> Clauses:
    """LexGLUE with its own split (Chalkidis et al. 2022)."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "dataset = lexglue needs the package datasets", "pip install datasets, or use dataset = licences"
        ) from None
    try:
        found = datasets.load_dataset("coastalcph/lex_glue", config.lexglue_task)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        remedy = "turn the internet on, or use dataset = licences or dataset = file"
        raise UserError(f"cannot get LexGLUE {config.lexglue_task}: {error}", remedy) from None
    texts, labels, parts = [], [], []
    for ours, theirs in (("train", "train"), ("valid", "validation"), ("test", "test")):
        rows = found[theirs]
        step = max(1, len(rows) // config.max_clauses) if config.max_clauses else 1
        names = rows.features["label"].names
        for index in range(0, len(rows), step):
            texts.append(" ".join(rows[index]["text"].split()))
            labels.append(names[rows[index]["label"]])
            parts.append(ours)
    source = f"LexGLUE {config.lexglue_task} (Chalkidis et al. 2022), coastalcph/lex_glue"
    groups = [str(index) for index in range(len(texts))]
    return Clauses(texts, labels, groups, source, "CC BY 4.0", True, parts, [""] * len(texts))
