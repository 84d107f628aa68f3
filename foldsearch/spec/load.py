"""Read studies and spaces from TOML, and report all the faults of a file at once.

A study is named by a path (`my/study.toml`) or by the name of one that ships with foldsearch (`smollm2-demo`);
likewise a space.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from foldsearch.errors import SpecError
from foldsearch.spec.space import Space
from foldsearch.spec.study import Study

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

FOLDER_STUDY = "foldsearch.toml"  # of the current folder: the study when none is named
_Model = TypeVar("_Model", bound=BaseModel)


def load_study(reference: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read a study.

    Args:
        reference: a path, or the name of a shipped study; None is `foldsearch.toml` of the current folder if there
            is one, else the shipped study `default`.
        overrides: values by dotted key (`{"budget.gb": 2.0, "trials": 8}`) that win over the file's; None as a
            value means not given. `space` is a name or a path.

    Raises:
        SpecError: no such study; or the file is wrong, all its faults in one message.
    """
    if reference is None:
        reference = Path(FOLDER_STUDY) if Path(FOLDER_STUDY).is_file() else "default"
    path = _find(reference, "study", "studies")
    value = _read(path)
    for key, item in (overrides or {}).items():
        if item is not None:
            _set(value, key.split("."), item, path)
    if isinstance(value.get("space"), str):
        value["space"] = load_space(value["space"]).model_dump(mode="json")
    return _validate(Study, value, str(path))


def load_space(reference: str | Path) -> Space:
    """Read a space, by its path or by the name of one that ships with foldsearch.

    Raises:
        SpecError: no such space; or the file is wrong, all its faults in one message.
    """
    path = _find(reference, "space", "spaces")
    value = _read(path)
    value.setdefault("name", path.stem)
    return _validate(Space, value, str(path))


def study_from_json(value: dict[str, Any]) -> Study:
    """Read what `Study.model_dump(mode="json")` made.

    Raises:
        SpecError: written by another version, or edited.
    """
    return _validate(Study, value, "the study of a run folder")


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
    if path.is_file():
        return path
    known = shipped(folder)
    if str(reference) in known:
        return known[str(reference)]
    if path.suffix == ".toml" or len(path.parts) > 1 or isinstance(reference, Path):
        raise SpecError(
            f"a {what} is a TOML file, but there is no file '{reference}'.{_suggest(path.stem, known)}"
        )
    raise SpecError(
        f"a {what} is a path to a TOML file or one of {', '.join(known)}; got '{reference}'."
        f"{_suggest(str(reference), known)}"
    )


def _suggest(word: str, known: Mapping[str, Any] | list[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise SpecError(
            f"{path}: TOML is UTF-8 text, but byte {error.start} is not. Save the file as UTF-8."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path}: not TOML: {error}.") from error
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}.") from error


def _set(value: dict[str, Any], keys: list[str], item: Any, path: Path) -> None:
    for key in keys[:-1]:
        inner = value.setdefault(key, {})
        if not isinstance(inner, dict):
            raise SpecError(
                f"{path}: 1 fault\n  {key}: is a table of keys; got {_show(inner)}. Write it as [{key}]."
            )
        value = inner
    value[keys[-1]] = item


# ---- all faults at once


def _validate(model: type[_Model], value: dict[str, Any], where: str) -> _Model:
    try:
        # Through JSON: strict types, and still a list where a tuple is wanted.
        return model.model_validate_json(json.dumps(value, default=str))
    except ValidationError as error:
        faults = list(dict.fromkeys(_faults(model, error)))
        count = f"{len(faults)} fault" + "s" * (len(faults) > 1)
        raise SpecError(f"{where}: {count}\n" + "\n".join(f"  {fault}" for fault in faults)) from error


def _faults(model: type[BaseModel], error: ValidationError) -> Iterator[str]:
    details = error.errors(include_url=False)
    for detail in details:
        if detail["type"] == "too_short" and any(_inside(other["loc"], detail["loc"]) for other in details):
            continue  # short only because its wrong members were left out
        keys = [key for key in detail["loc"] if not _is_union_branch(key)]
        yield f"{_dotted(keys) or 'the file'}: {_fault(model, keys, detail)}"


def _inside(inner: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _is_union_branch(key: int | str) -> bool:
    """Whether pydantic put a key there itself: the type it tried of a union."""
    return key in ("float", "str", "Sources")


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
    "string_type": "text in quotes",
    "tuple_type": "a list in brackets",
    "model_type": "a table of keys",
    "bool_type": "true or false",
}


def _fault(model: type[BaseModel], keys: list[int | str], detail: ErrorDetails) -> str:
    kind, got, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = list(_fields_at(model, keys[:-1]))
        return "unknown key." + (_suggest(str(keys[-1]), known) or f" Known here: {', '.join(known)}.")
    if kind == "missing":
        return "a value is needed, but there is none." + (
            " A range is written [from, to]." if isinstance(keys[-1], int) else " Add the key."
        )
    if kind == "value_error":
        return f"{context['error']}."
    if kind == "literal_error":
        expected = str(context["expected"])
        options = [option.strip().strip("'") for option in expected.replace(" or ", ", ").split(",")]
        return f"must be one of {expected}; got {_show(got)}.{_suggest(str(got), options)}"
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}; got {_show(got)}."
    if kind == "too_short":
        return f"a list of at least {context['min_length']}; got {_show(got)}."
    if kind == "too_long":
        return f"a list of at most {context['max_length']}; got {_show(got)}."
    for word, text in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        if word in context:
            return f"must be {text} {context[word]:g}; got {_show(got)}."
    return f"{detail['msg'].lower()}; got {_show(got)}."


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields_at(model: type[BaseModel], keys: list[int | str]) -> Iterator[str]:
    """Names of the fields at a place of the file."""
    for key in keys:
        if isinstance(key, str):
            annotation = model.model_fields[key].annotation
            tables = (kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
            model = next(kind for kind in tables if issubclass(kind, BaseModel))
    yield from model.model_fields
