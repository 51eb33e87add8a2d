"""Clauses of the licences that the kit's own requirements carry in their metadata, each with the family of its licence."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata

from trainbook.near_duplicates import near_pairs

# Required by the kit, on both cloud images, and with licence texts. Fixed, so that the same versions give the same clauses.
DISTRIBUTIONS = (
    "certifi", "contourpy", "fonttools", "huggingface-hub", "idna", "ipykernel", "ipython", "jinja2", "joblib", "jupyter-client",
    "jupyterlab-widgets", "kiwisolver", "matplotlib", "mdurl", "mpmath", "networkx", "numpy", "packaging", "parso", "pexpect",
    "pillow", "psutil", "ptyprocess", "pydantic", "pygments", "python-dateutil", "pyyaml", "pyzmq", "regex", "requests",
    "safetensors", "scikit-image", "scikit-learn", "scipy", "setuptools", "shellingham", "sympy", "threadpoolctl", "tifffile",
    "torch", "torchvision", "tornado", "tqdm", "traitlets", "transformers", "triton", "typing-extensions", "tzdata", "urllib3",
)  # fmt: skip
LICENCE_FILE = re.compile(r".*\.dist-info/(?:.*/)?[^/]*(?:licen[cs]e|copying|notice)[^/]*", re.IGNORECASE)

# A paragraph with one of these begins a licence text; the first that matches counts. A mere notice ends the text before it.
BEGINNINGS = {
    family: re.compile(pattern, re.IGNORECASE)
    for family, pattern in {
        "": r"Licensed under the Apache|modify it under the terms of|Source Code Form is subject to the terms of the Mozilla",
        "Apache": r"Apache License,? Version 2\.0|LLVM Exceptions to the Apache",
        "Creative Commons": r"CC0 1\.0 Universal|Creative Commons Legal Code",
        "FreeType": r"The FreeType Project LICENSE",
        "GNU": r"GNU (?:\w+ )?GENERAL PUBLIC LICENSE Version [\d.]+, (?:\d+ )?[A-Z][a-z]+ \d{4}|GCC RUNTIME LIBRARY EXCEPTION$",
        "Mozilla": r"Mozilla Public License,? Version \d",
        "Open Font": r"SIL OPEN FONT LICENSE Version",
        "Python": r"PYTHON SOFTWARE FOUNDATION LICENSE VERSION|BEOPEN PYTHON OPEN SOURCE|CNRI LICENSE AGREEMENT FOR"
        r"|CWI LICENSE AGREEMENT|License agreement for matplotlib",
        "permissive": r"Redistribution and use in source|any person obtaining a copy of (?:this|the) software"
        r"|obtaining a copy of the software and|Permission to use, copy, (?:and )?modify|Permission is granted to anyone to use"
        r"|Permission is hereby granted to use"
        r"|specifically disclaims? any warrant|Except as contained in this notice, the name",
    }.items()
}
SEPARATOR = re.compile(
    r"-{2,6}|=====|={40,}|-+ end of .*|.*END OF TERMS AND CONDITIONS.*|(?:Name|Files|Description|Availability|License): .*"
)
# After these a permissive licence has no more to say; what follows is about the program.
LAST_WORDS = re.compile(
    r"such damages?\.|dealings in the software|use or performance of this|removed or altered from|by the product vendor",
    re.IGNORECASE,
)
COPYRIGHT = re.compile(r"\W*(?:Portions )?(?:Copyright\b|\(c\)|©).*(?:\d{4}|Inc\.).*", re.IGNORECASE)
TITLE = re.compile(r"(?!.*LICENSE)[A-Z][A-Z& ]{3,30}")
# A clause that names a licence would give its label away.
NAMES = re.compile(
    r"\b(?:gnu|l?gplv?\d?|general public|gcc|free software foundation|fsf|apache|llvm|mozilla|mpl|exhibit \w|sil|ofl|open font"
    r"|freetype|ftl|creative commons|cc0|python|psf|beopen|cnri|cwi|stichting|matplotlib|mdt|jdh|bsd|mit|isc|boost|berkeley)\b",
    re.IGNORECASE,
)
# How an entry of a list begins, and where a sentence ends; neither at an initial nor at Inc.
ITEM = re.compile(r"(?:[-*o•·](?= +[\"“]?[A-Z][a-z])|\(?(?:\d{1,2}|[a-z]|[ivx]+)[.)]|\d{1,2}(?:\.\d{1,2})+\.?)\s+")
SENTENCE = re.compile(r"(?:(?<=[.;:?])|(?<=[.;:?][\"'”)]))(?<!\b[A-Z]\.)(?<!Inc\.)(?<!\bno\.)\s+")
ENDINGS = ".;:,)\"'”?"  # of a clause; a title has none
LEAST_WORDS, MOST_WORDS = 6, 30
LEAST_CLAUSES = 20  # of a family
NEAR_REPEAT, WORDS_COMPARED = 0.6, 3  # share of the sequences of so many words that two texts have in common


@dataclass
class Clause:
    """A sentence of a licence, or a part of a long one.

    Attributes:
        text: as it stands in the licence, but for white space and the mark of a list's entry.
        family: of licences.
        paragraph: the place of the first paragraph that holds it, in the order of reading.
        packages: name and version of every distribution that carries it, in the order of reading.
    """

    text: str
    family: str
    paragraph: int
    packages: list[str] = field(default_factory=list)


def licence_clauses() -> list[Clause]:
    """Distinct clauses of the families with `LEAST_CLAUSES` of them, family by family, each in the order of reading.

    Near repeats of an earlier clause of the family are left out, and so is what stands in the licences of two families, since
    it has no one answer.
    """
    found: dict[str, Clause] = {}
    families: dict[str, set[str]] = defaultdict(set)
    paragraphs: dict[str, int] = {}
    for package, text in _licence_files():
        for family, paragraph in licence_paragraphs(text):
            place = paragraphs.setdefault(_key(paragraph), len(paragraphs))
            for clause in cut(paragraph):
                known = found.setdefault(_key(clause), Clause(clause, family, place))
                families[_key(clause)].add(family)
                if package not in known.packages:
                    known.packages.append(package)
    return distinct([clause for key, clause in found.items() if len(families[key]) == 1])


def _licence_files() -> Iterator[tuple[str, str]]:
    """Name and version of a distribution, and the text of one of its licence files."""
    for name in DISTRIBUTIONS:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        recorded = (line.split(",")[0] for line in (distribution.read_text("RECORD") or "").splitlines())
        for file in sorted(filter(LICENCE_FILE.fullmatch, recorded)):
            yield f"{name} {distribution.version}", distribution.locate_file(file).read_bytes().decode(errors="replace")


def licence_paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """Family and paragraph, of the paragraphs of a file from where a known licence begins to where it ends.

    A licence ends at its own last line, at a line that sets texts apart and where another one begins; a permissive one also at
    a copyright notice. Notices and titles in capitals are left out. An entry of a list is a paragraph.
    """
    family, lines = "", []
    for line in [*map(str.strip, text.splitlines()), ""]:
        is_separator, is_copyright = SEPARATOR.fullmatch(line), COPYRIGHT.fullmatch(line)
        is_left_out = not line or is_separator or is_copyright or (not lines and TITLE.fullmatch(line))
        if is_left_out or ITEM.match(line):
            paragraph = " ".join(" ".join(lines).split())
            family = next((name for name, pattern in BEGINNINGS.items() if pattern.search(paragraph)), family)
            if family and paragraph:
                yield family, paragraph
            lines = []
            if is_separator or (family == "permissive" and (is_copyright or LAST_WORDS.search(paragraph))):
                family = ""
        if not is_left_out:
            lines.append(line)


def cut(paragraph: str) -> list[str]:
    """Sentences and parts up to a semicolon or colon, long ones cut at commas, of 6 to 30 words, which name no licence."""
    clauses = []
    for sentence in SENTENCE.split(ITEM.sub("", paragraph, 1) if ITEM.match(paragraph) else paragraph):
        parts = [""]
        for part in re.split(r"(?<=,)\s", sentence) if len(sentence.split()) > MOST_WORDS else [sentence]:
            if len(f"{parts[-1]} {part}".split()) > MOST_WORDS:
                parts.append("")
            parts[-1] = f"{parts[-1]} {part}".strip()
        clauses += [part for part in parts if LEAST_WORDS <= len(part.split()) <= MOST_WORDS and part[-1] in ENDINGS]
    return [clause for clause in clauses if not NAMES.search(clause) and not COPYRIGHT.match(clause) and " * " not in clause]


def distinct(clauses: list[Clause]) -> list[Clause]:
    """Without near repeats of another family's and of an earlier one of the same family; large enough families alone."""
    if not clauses:
        return []
    texts = [clause.text for clause in clauses]
    near: dict[int, list[int]] = defaultdict(list)
    for one, other in near_pairs(texts, NEAR_REPEAT, WORDS_COMPARED).T.tolist():
        near[one].append(other)
        near[other].append(one)
    kept: set[int] = set()
    for index, clause in enumerate(clauses):
        is_shared = any(clauses[other].family != clause.family for other in near[index])
        if not is_shared and not kept.intersection(near[index]):
            kept.add(index)
    sizes = Counter(clauses[index].family for index in kept)
    return [
        clauses[index]
        for family in BEGINNINGS
        for index in sorted(kept)
        if clauses[index].family == family and sizes[family] >= LEAST_CLAUSES
    ]


def _key(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
