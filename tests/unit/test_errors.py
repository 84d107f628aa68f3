"""The words of a library's error. Oracles: errors raised here, whose every word is known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from foldsearch.errors import (
    MOST_LINES,
    DataError,
    ModelError,
    PlanError,
    RunError,
    describe_error,
    find_named,
    quote_error,
)


def caught(raise_it: object) -> Exception:
    assert callable(raise_it)
    with pytest.raises(Exception) as found:
        raise_it()
    return found.value


TWO_LINES = "the shards do not fit, because:\nshard 2 is of another model " + 600 * "x"


def two_lines(*_: object, **__: object) -> object:
    raise RuntimeError(TWO_LINES)


def nested(
    outer: BaseException, inner: BaseException, *, told: bool = True, hidden: bool = False
) -> Exception:
    def raise_it() -> None:
        try:
            raise inner
        except BaseException as error:
            if hidden:
                raise outer from None
            if told:
                raise outer from error
            raise outer  # noqa: B904  the chain by context is what is tested

    return caught(raise_it)


def test_one_line_is_a_sentence_before_the_remedy() -> None:
    error = ValueError("unknown quantisation Q9_9.\n")
    assert quote_error("m.gguf: cannot be read", error, "Fetch it again.") == (
        "m.gguf: cannot be read: ValueError: unknown quantisation Q9_9. Fetch it again."
    )


def test_every_line_is_shown_as_transformers_puts_the_cause_on_the_second() -> None:
    error = RuntimeError(
        "Failed to import x because of the following error (look up to see its traceback):\n"
        "No module named 'sentencepiece'"
    )
    assert quote_error("its weights cannot be read", error, "Install it.").splitlines() == [
        "its weights cannot be read:",
        "  RuntimeError: Failed to import x because of the following error (look up to see its traceback):",
        "    No module named 'sentencepiece'",
        "Install it.",
    ]


def test_a_cause_is_told_with_its_type_and_how_it_relates() -> None:
    inner = nested(OSError(111, "Connection refused"), KeyError("port"), told=False)
    assert describe_error(nested(ValueError("no model"), inner)).splitlines() == [
        "ValueError: no model",
        "  caused by ConnectionRefusedError: Connection refused",
        "  raised after KeyError: 'port'",
    ]
    assert (
        describe_error(nested(ValueError("no model"), KeyError("port"), hidden=True))
        == "ValueError: no model"
    )


def test_a_cause_that_was_quoted_is_not_told_twice() -> None:
    inner = json.JSONDecodeError("Expecting value", "", 0)
    assert describe_error(nested(ValueError(f"no config: {inner}"), inner)) == (
        "ValueError: no config: Expecting value: line 1 column 1 (char 0)"
    )


def test_a_missing_file_is_named_without_its_number(tmp_path: Path) -> None:
    missing = tmp_path / "x"
    words = describe_error(caught(missing.read_text))
    assert words == f"FileNotFoundError: No such file or directory: {str(missing)!r}"


def test_an_error_of_ours_needs_no_type_and_an_error_without_words_has_nothing_else() -> None:
    assert describe_error(PlanError("a plan must: do")) == "a plan must: do"
    assert describe_error(TimeoutError()) == "TimeoutError"
    assert describe_error(PlanError()) == "PlanError"


def test_groups_and_notes_are_told() -> None:
    error = ExceptionGroup("two of them", [ValueError("a"), nested(KeyError("b"), OSError("c"))])
    error.add_note("while reading shard 3")
    assert describe_error(error).splitlines() == [
        "ExceptionGroup: two of them (2 sub-exceptions)",
        "  while reading shard 3",
        "  1. ValueError: a",
        "  2. KeyError: 'b'",
        "  caused by OSError: c",
    ]


def test_a_chain_that_leads_back_to_itself_ends() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert describe_error(first).splitlines() == ["ValueError: first", "  caused by ValueError: second"]


def test_what_is_cut_is_told() -> None:
    lines = describe_error(RuntimeError("\n".join(f"line {number}" for number in range(100)))).splitlines()
    assert len(lines) == MOST_LINES
    (cut,) = (line for line in lines if line.lstrip().startswith("..."))
    missing = re.search(r"\d+", cut)
    assert missing is not None
    assert int(missing[0]) + MOST_LINES - 1 == 100
    assert "line 0" in lines[0]  # the first lines say what was done, the last ones why it failed
    assert lines[-1].strip() == "line 99"
    long = describe_error(ValueError("x" * 2_000))
    assert long == "ValueError: " + "x" * 488 + "... (1,512 more characters)"


def test_what_a_terminal_would_obey_is_left_out() -> None:
    assert describe_error(RuntimeError("\x1b[36mray::fold\x1b[39m died\x07\x1b[2K")) == (
        "RuntimeError: ray::fold died"
    )


# ---- where errors of libraries end up


def test_a_trial_that_fails_says_all_of_it(tmp_path: Path) -> None:
    from foldsearch.run import TrialFolder
    from foldsearch.search.messages import Failed, decode
    from foldsearch.search.worker import TrialRunner

    runner = TrialRunner.__new__(TrialRunner)  # its setup is Ray's business
    (tmp_path / "00003").mkdir()
    runner._number, runner._place = 3, TrialFolder(tmp_path / "00003")
    runner._site, runner._probe = None, None
    runner._steps = (two_lines() for _ in range(1))
    message = decode(runner.step()["result"])
    assert isinstance(message, Failed)
    assert "shard 2 is of another model" in message.reason
    assert "more characters" in message.reason
    assert "shard 2 is of another model" in runner._place.error.read_text()


def test_a_worker_that_dies_says_all_of_it() -> None:
    from foldsearch.search.run import _reason

    class Trial:
        def get_pickled_error(self) -> Exception:
            return nested(RuntimeError(TWO_LINES), ValueError("no GPU"))

    assert _reason(Trial()).splitlines()[1].strip().startswith("shard 2 is of another model xxx")
    assert "caused by ValueError: no GPU" in _reason(Trial())


def test_a_model_that_cannot_be_read_says_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from foldsearch.model.source import open_tokenizer, prepare
    from tests.tiny import CONFIGS

    transformers.LlamaForCausalLM(CONFIGS["llama"]()).save_pretrained(tmp_path / "m")
    files = prepare(str(tmp_path / "m"), dtype="float32", cache_dir=tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", two_lines)
    with pytest.raises(ModelError) as found:
        open_tokenizer(files)
    assert "\n    shard 2 is of another model" in str(found.value)


def test_a_data_set_that_cannot_be_read_says_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from foldsearch.model.text import _rows_of_hub

    monkeypatch.setattr(datasets, "load_dataset", two_lines)
    with pytest.raises(DataError) as found:
        list(_rows_of_hub("org/name", "org/name", None, "train"))
    assert "\n    shard 2 is of another model" in str(found.value)


def test_a_task_that_cannot_be_loaded_says_all_of_it() -> None:
    from foldsearch.model.harness import _loadable

    with pytest.raises(DataError) as found, _loadable("copa"):
        two_lines()
    assert "\n    shard 2 is of another model" in str(found.value)


# ---- a name of a list


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("linaer", "a thing is one of linear, layer; got 'linaer'. Did you mean 'linear'?"),
        ("x", "a thing is one of linear, layer; got 'x'. Name one of these."),
    ],
)
def test_a_name_that_is_none_is_told_with_the_nearest(name: str, words: str) -> None:
    things = [SimpleNamespace(name="linear"), SimpleNamespace(name="layer")]
    assert find_named(things, "layer", "a thing") is things[1]
    with pytest.raises(RunError, match=f"^{re.escape(words)}$"):
        find_named(things, name, "a thing", RunError)
