"""Licence texts: cut exactly as a hand-written file says, no label in a clause, no repeats, and the same in every process."""

import re
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

from trainbook.bundles import requirement_names
from trainbook.errors import UserError
from trainbook.workflows.legal_bert import licences
from trainbook.workflows.legal_bert.clauses import read_clauses
from trainbook.workflows.legal_bert.config import Config
from trainbook.workflows.legal_bert.licences import DISTRIBUTIONS, Clause, cut, distinct, licence_clauses, licence_paragraphs

PREINSTALLED = Path(__file__).parents[2] / "preinstalled"

BUNDLED = """
Some Program, a description of what it does for its users
Copyright (c) 2020, Somebody
All rights reserved.

Redistribution and use in source and binary forms are permitted, if you keep this list:

 * Redistributions of source code must retain
   the list of conditions above.
 * Nobody may use the name of Somebody Inc. without asking first; ask by letter, please, and wait for the answer.

THE PROGRAM COMES WITHOUT ANY WARRANTY. NOBODY IS LIABLE FOR ANY KIND OF SUCH DAMAGE.

The program was written in a hurry by two people.

----

                                 Apache License
                           Version 2.0, January 2004

   TERMS AND CONDITIONS

   1. Definitions.

      "Work" shall mean what somebody wrote under this License. The Apache name may not be used by anybody at all.

   (a) You must give any other recipients a copy of it; and

   END OF TERMS AND CONDITIONS

   This is how the licence is applied to one's work.

                    GNU GENERAL PUBLIC LICENSE
                       Version 3, 29 June 2007

 Copyright (C) 2007 Free Software Foundation, Inc.

  You may convey the program as you received it, in any medium.
"""


@pytest.fixture(scope="module")
def found():
    return licence_clauses()


def test_a_file_with_three_licences_is_cut_as_a_reader_would():
    clauses = [(family, clause) for family, paragraph in licence_paragraphs(BUNDLED) for clause in cut(paragraph)]
    assert clauses == [
        ("permissive", "Redistribution and use in source and binary forms are permitted, if you keep this list:"),
        ("permissive", "Redistributions of source code must retain the list of conditions above."),
        ("permissive", "Nobody may use the name of Somebody Inc. without asking first;"),
        ("permissive", "ask by letter, please, and wait for the answer."),
        ("permissive", "THE PROGRAM COMES WITHOUT ANY WARRANTY."),
        ("permissive", "NOBODY IS LIABLE FOR ANY KIND OF SUCH DAMAGE."),
        ("Apache", '"Work" shall mean what somebody wrote under this License.'),
        ("Apache", "You must give any other recipients a copy of it;"),
        ("GNU", "You may convey the program as you received it, in any medium."),
    ]


def test_a_notice_of_a_licence_is_no_licence():
    notice = "Licensed under the Apache License, Version 2.0 (the L); you may not use it otherwise.\n"
    assert not list(licence_paragraphs(f"{notice}\nIt is what it is and that is all there is.\n"))


def test_a_long_sentence_is_cut_at_commas_and_loses_no_word():
    sentence = "; ".join([", ".join(f"one two three four five six {i}" for i in range(12)), "that is the end of it all."])
    clauses = cut(sentence)
    assert " ".join(clauses) == sentence
    assert len(clauses) == 4
    assert all(6 <= len(clause.split()) <= 30 for clause in clauses)


def test_repeats_go_and_what_two_families_say_has_no_answer(monkeypatch):
    monkeypatch.setattr(licences, "LEAST_CLAUSES", 2)
    texts = {
        "GNU": ["a b c d e f g h", "A b, c d e f g h!", "k l m n o p q", "s t u v w x y z"],
        "Apache": ["k l m n o p q r", "c1 d1 e1 f1 g1", "h1 i1 j1 k1 l1"],
        "Mozilla": ["m1 n1 o1 p1 q1"],
    }
    clauses = [Clause(text, family, 0) for family, some in texts.items() for text in some]
    assert [(clause.family, clause.text) for clause in distinct(clauses)] == [
        ("Apache", "c1 d1 e1 f1 g1"),
        ("Apache", "h1 i1 j1 k1 l1"),
        ("GNU", "a b c d e f g h"),
        ("GNU", "s t u v w x y z"),
    ]
    assert distinct([]) == []


def test_there_are_hundreds_of_real_clauses_of_several_families(found):
    sizes = Counter(clause.family for clause in found)
    assert len(found) >= 300
    assert len(sizes) >= 4
    assert min(sizes.values()) >= 20
    for clause in found[::40]:
        name, version = clause.packages[0].split()
        assert metadata.version(name) == version
        files = [file for file in metadata.files(name) if re.search("licen|copying|notice", file.name, re.IGNORECASE)]
        words = " ".join(" ".join(file.read_text().split()) for file in files if "dist-info" in str(file))
        assert clause.text in words


def test_no_clause_names_its_family(found):
    names = "gnu|gpl|free software foundation|general public|apache|mozilla|mpl|bsd|mit|isc|sil|ofl|open font|freetype"
    names += "|creative commons|cc0"
    for clause in found:
        assert not re.search(rf"(?i)\b(?:{names})\b", clause.text)
        assert not re.search(r"(?i)copyright (?:\(c\)|©) *\d", clause.text)
        assert 6 <= len(clause.text.split()) <= 30


def test_no_clause_nearly_repeats_another(found):
    shingles = []
    for clause in found:
        words = re.findall(r"\w+", clause.text.lower())
        shingles.append({tuple(words[i : i + 3]) for i in range(len(words) - 2)})
    for i, a in enumerate(shingles):
        assert all(len(a & b) < 0.6 * len(a | b) for b in shingles[:i])


def test_another_process_finds_the_same_texts_and_parts():
    code = "from trainbook.workflows.legal_bert.clauses import *; print(read_clauses(Config(), {}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert done.stdout == f"{read_clauses(Config(), {})}\n"


def test_a_paragraph_is_in_one_part_and_a_family_in_all_three():
    clauses = read_clauses(Config(), {})
    parts: dict[str, set[str]] = {}
    for group, part in zip(clauses.groups, clauses.parts, strict=True):
        parts.setdefault(group, set()).add(part)
    assert all(len(some) == 1 for some in parts.values())
    assert {(family, part) for family in set(clauses.labels) for part in ("train", "valid", "test")} == set(
        zip(clauses.labels, clauses.parts, strict=True)
    )


def test_the_packages_are_on_both_platforms_and_needed_here():
    needed, waiting = set(), [re.split(r"[<>=]", name)[0] for name in requirement_names()]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name not in needed:
            needed.add(name)
            try:
                waiting += [re.match(r"[\w.-]+", line)[0] for line in metadata.requires(name) or [] if "extra ==" not in line]
            except metadata.PackageNotFoundError:
                continue
    assert set(DISTRIBUTIONS) <= needed
    for platform in ("kaggle", "colab"):
        lines = (PREINSTALLED / f"{platform}.txt").read_text().splitlines()
        assert set(DISTRIBUTIONS) <= {line.partition("==")[0] for line in lines}


def test_an_environment_without_licence_texts_is_refused(monkeypatch):
    monkeypatch.setattr(licences, "DISTRIBUTIONS", ("mdurl", "no-such-distribution"))
    with pytest.raises(UserError, match=r"carry \d+ licence clauses, which are too few"):
        read_clauses(Config(), {})
