"""Read studies and spaces from TOML, and report all the faults of a file at once.

A study is named by a path (`my/study.toml`) or by the name of one that ships with foldsearch (`smollm2-demo`);
likewise a space. The folder of a run names the study that it was made of.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from foldsearch.errors import SpecError, nearest, quote_error
from foldsearch.paths import printable
from foldsearch.spec.space import Space
from foldsearch.spec.study import (
    EACH,
    NAME,
    SEVERAL,
    SOURCE,
    ClusterSettings,
    FaultOf,
    Sources,
    SourceSettings,
    Study,
)

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

RUN_STUDY = "study.json"  # of a run folder; the study itself is under its key "study"
FOLDER_STUDY = "foldsearch.toml"  # of the current folder: the study when none is named
SPACE = "everything"  # of a study that names none
_Model = TypeVar("_Model", bound=BaseModel)
_Fault = tuple[list[int | str], str]  # the keys that lead to it, and what is wrong


def load_study(
    reference: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    options: Mapping[str, str] | None = None,
) -> Study:
    """Read a study.

    Args:
        reference: a path, the folder of a run, or the name of a shipped study; None is `foldsearch.toml` of the
            current folder if there is one, else the shipped study `default`.
        overrides: values by dotted key (`{"budget.gb": 2.0, "trials": 8}`) that win over the file's; None as a
            value means not given. `space` is a name or a path.
        options: the overrides' names on the command line by dotted key (`{"budget.gb": "--budget-gb"}`): faults of
            what was typed are told by them.

    Raises:
        SpecError: no such study; or it, its space or the overrides are wrong, all faults in one message.
    """
    if reference is None:
        reference = Path(FOLDER_STUDY) if Path(FOLDER_STUDY).is_file() else "default"
    path = _find(reference, "study", "studies")
    value = _read(path)
    given = {key: item for key, item in (overrides or {}).items() if item is not None}
    if "data" in given and isinstance(kinds := value.get("kinds"), dict):
        kinds.pop("unseen", None)  # it names kinds of the text that is replaced
    for key, item in given.items():
        if not key.startswith("space."):
            _set(value, key.split("."), item)
    faults, of_space = _put_space(value)
    for key, item in given.items():
        if key.startswith("space."):  # of a space that is named, it is there only now
            _set(value, key.split("."), item)
    study = _read_as(Study, value)
    if isinstance(study, list):
        faults += study
    elif not faults and not of_space:
        return study
    typed, written = _typed_and_written(faults, given, options or {})
    parts = [
        _section("the command line" if options else "the overrides", typed),
        _section(printable(path), written),
        of_space,
    ]
    raise SpecError("\n".join(part for part in parts if part))


def load_space(reference: str | Path) -> Space:
    """Read a space, by its path or by the name of one that ships with foldsearch.

    Raises:
        SpecError: no such space; or the file is wrong, all its faults in one message.
    """
    path = _find(reference, "space", "spaces")
    value = _read(path)
    value.setdefault("name", path.stem)
    return _validate(Space, value, printable(path))


def study_from_json(value: dict[str, Any]) -> Study:
    """Read what `Study.model_dump(mode="json")` made.

    Raises:
        SpecError: written by another version, or edited.
    """
    return _validate(Study, value, "the study of a run folder")


def cluster_settings(study: Study, given: Mapping[str, Any]) -> ClusterSettings:
    """Where the trials of a study run, with what was typed over it; None as a value means not given.

    Raises:
        SpecError: what was typed cannot be.
    """
    typed = {key: value for key, value in given.items() if value is not None}
    return _validate(ClusterSettings, study.cluster.model_dump(mode="json") | typed, "the command line")


def shipped(folder: str) -> dict[str, Path]:
    """Names and paths of the TOML files in `spaces` or `studies`: in the package, or at the root of a checkout.

    One in a folder is named with it: `baselines/uniform`.
    """
    package = Path(__file__).resolve().parents[1]
    for place in (package / folder, package.parent / folder):
        if found := {
            path.relative_to(place).with_suffix("").as_posix(): path for path in sorted(place.rglob("*.toml"))
        }:
            return found
    return {}


# ---- finding and reading


def _find(reference: str | Path, what: str, folder: str) -> Path:
    path = Path(reference)
    with suppress(OSError):  # no name that a file may have
        if path.is_file():
            return path
        if what == "study" and (path / RUN_STUDY).is_file():
            return path / RUN_STUDY
    known = shipped(folder)
    if str(reference) in known:
        return known[str(reference)]
    if path.suffix == ".toml" or len(path.parts) > 1 or isinstance(reference, Path):
        raise SpecError(
            f"a {what} is a TOML file, but there is no file '{printable(reference)}'.{nearest(path.stem, known)}"
        )
    raise SpecError(
        f"a {what} is a path to a TOML file or one of {', '.join(known)}; got '{printable(reference)}'."
        f"{nearest(str(reference), known)}"
    )


def _read(path: Path) -> dict[str, Any]:
    if path.name == RUN_STUDY:
        return _read_of_run(path)
    try:
        # -sig: some editors begin a file with a byte order mark
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SpecError(
            f"{printable(path)}: TOML is UTF-8 text, but byte {error.start} is not. Save the file as UTF-8."
        ) from error
    except RecursionError as error:
        raise SpecError(f"{printable(path)}: not TOML that can be read: it is nested too deeply.") from error
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
        raise SpecError(f"{printable(path)}: not TOML: {error}.") from error
    except OSError as error:
        raise SpecError(f"{printable(path)} cannot be read: {error.strerror}.") from error


def _read_of_run(path: Path) -> dict[str, Any]:
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))["study"]
        if isinstance(value, dict):
            return value
        error: Exception = ValueError("it has no table 'study'")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as caught:
        error = caught
    remedy = "Name a study's own TOML file instead."
    raise SpecError(quote_error(f"the study of a run, '{printable(path)}', cannot be read", error, remedy))


def _set(value: dict[str, Any], keys: list[str], item: Any) -> None:
    for key in keys[:-1]:
        inner = value.setdefault(key, {})
        if not isinstance(inner, dict):
            return  # no table: that is told with the file's other faults
        value = inner
    value[keys[-1]] = item


def _put_space(value: dict[str, Any]) -> tuple[list[_Fault], str]:
    """Put the space that a study names in its place; returns faults of its name, and the message of its file's.

    Where it cannot be read, a space without faults takes its place, so that the rest is still checked.
    """
    named = value.setdefault("space", SPACE)
    if not isinstance(named, str):
        return [], ""
    value["space"] = {}
    try:
        path = _find(named, "space", "spaces")
    except SpecError as error:
        return [(["space"], str(error))], ""
    try:
        value["space"] = load_space(path).model_dump(mode="json")
    except SpecError as error:
        return [], str(error)
    return [], ""


# ---- all faults at once


def _validate(model: type[_Model], value: dict[str, Any], where: str) -> _Model:
    found = _read_as(model, value)
    if isinstance(found, list):
        raise SpecError(_section(where, [_line(_dotted(keys), words) for keys, words in found]))
    return found


def _read_as(model: type[_Model], value: dict[str, Any]) -> _Model | list[_Fault]:
    try:
        # Through JSON: strict types, and still a list where a tuple is wanted.
        return model.model_validate_json(json.dumps(value, default=str))
    except RecursionError:
        return [([], "it is nested too deeply.")]
    except ValidationError as error:
        return list(_faults(model, error))


def _section(where: str, lines: list[str]) -> str:
    lines = list(dict.fromkeys(lines))
    if not lines:
        return ""
    count = f"{len(lines)} fault" + "s" * (len(lines) > 1)
    return f"{where}: {count}\n" + "\n".join(f"  {line}" for line in lines)


def _line(place: str, words: str) -> str:
    return f"{place or 'the file'}: {words}"


def _typed_and_written(
    faults: list[_Fault], given: Mapping[str, Any], options: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Lines for faults of the overrides, and for those of the file."""
    typed, written = [], []
    for keys, words in faults:
        override = next((key for key in given if keys[: len(parts := key.split("."))] == parts), None)
        if override is None:
            written.append(_line(_dotted(keys), words))
        else:
            typed.append(_line(options.get(override) or _dotted(keys), words))
    return typed, written


def _faults(model: type[BaseModel], error: ValidationError) -> Iterator[_Fault]:
    details = error.errors(include_url=False)
    for detail in details:
        if detail["type"] == "too_short" and any(_inside(other["loc"], detail["loc"]) for other in details):
            continue  # short only because its wrong members were left out
        keys = [key for key in detail["loc"] if key not in _WAYS]
        if isinstance(fault := detail.get("ctx", {}).get("error"), FaultOf):
            keys += fault.keys
        yield keys, _fault(model, keys, detail)


def _inside(inner: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _dotted(keys: list[int | str]) -> str:
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}"
    return text.removeprefix(".")


_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text in quotes",
    "tuple_type": "a list in brackets",
    "model_type": "a table of keys",
    "bool_type": "true or false",
}
_EITHER = {  # where text and a table may stand
    "data": "a source in quotes, a list of sources, or a table of search, recovery and report",
    "space": "a name or a path in quotes, or a table of keys",
}


# Keys that pydantic puts in itself: the way of naming text that a value is written in, and its table.
_WAYS: dict[int | str, type[BaseModel] | None] = {
    NAME: None,
    SOURCE: SourceSettings,
    SEVERAL: None,
    EACH: Sources,
}


# Keys of a space by their old names.
RENAMED = {"share": "groups", "reinstate": "children"}


def _fault(model: type[BaseModel], keys: list[int | str], detail: ErrorDetails) -> str:
    kind, got, context = detail["type"], detail["input"], detail.get("ctx", {})
    in_a_space = model.__name__ == "Space" or keys[:1] == ["space"]
    if kind == "extra_forbidden" and in_a_space and str(keys[-1]) in RENAMED:
        return f"this key has a new name. Write '{RENAMED[str(keys[-1])]}'."
    if kind == "extra_forbidden":
        known = list(_fields_at(model, detail["loc"][:-1]))
        return "unknown key." + (nearest(str(keys[-1]), known) or f" Known here: {', '.join(known)}.")
    if kind == "missing":
        return "a value is needed, but there is none." + (
            " A range is written [from, to]." if isinstance(keys[-1], int) else " Add the key."
        )
    if kind == "value_error":
        return f"{context['error']}."
    if kind == "literal_error":
        expected = str(context["expected"])
        options = [option.strip().strip("'") for option in expected.replace(" or ", ", ").split(",")]
        return f"must be one of {expected}; got {_show(got)}.{nearest(str(got), options)}"
    if kind in _EXPECTED:
        return f"must be {_EITHER.get(_dotted(keys)) or _EXPECTED[kind]}; got {_show(got)}."
    if kind == "too_short":
        return f"a list of at least {context['min_length']}; got {_show(got)}."
    if kind == "too_long":
        return f"a list of at most {context['max_length']}; got {_show(got)}."
    for word, text in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        if word in context:
            return f"must be {text} {context[word]:g}; got {_show(got)}."
    return f"{detail['msg'].lower()}; got {_show(got)}."


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, float) else json.dumps(value, default=str)  # inf, as TOML has it
    return text if len(text) <= 60 else text[:57] + "..."


def _fields_at(model: type[BaseModel], keys: tuple[int | str, ...]) -> Iterator[str]:
    """Names of the fields at a place of the file."""
    for key in keys:
        if key in _WAYS:
            model = _WAYS[key] or model
        elif isinstance(key, str):
            annotation = model.model_fields[key].annotation
            tables = (kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
            model = next((kind for kind in tables if issubclass(kind, BaseModel)), model)
    yield from model.model_fields
