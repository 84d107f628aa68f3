"""What an export is made of, taken down for its card: how the model is made again, and which licences are known."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from yaml import YAMLError

from foldsearch.context import TrialContext
from foldsearch.export.card import UNKNOWN, Licences, Recipe
from foldsearch.model.gguf.file import read_gguf
from foldsearch.plan.stored import StoredTypes
from foldsearch.prepare import sources_of
from foldsearch.record import Trial, read_trial

_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")


def recipe_of(
    context: TrialContext, number: int, trial: Trial, types: StoredTypes, *, shows_text: bool
) -> Recipe:
    """How a trial's model is made again.

    Args:
        context: of its run.
        number: of the trial in that run.
        trial: as it is exported: trained further, where it was.
        types: those that were asked for.
        shows_text: whether tokens of the report texts go into the export.
    """
    identity, of_run = context.run.identity(), read_trial(context.run.trial(number))
    assert identity is not None, "a context has written what its run is made of"
    assert of_run is not None, "a trial that is exported was measured"
    is_further = trial.last.recovery_tokens > of_run.last.recovery_tokens
    return Recipe(
        study=context.study.model_dump(
            mode="json", exclude={"cluster"}
        ),  # whose machines it ran on: nor is that
        identity=replace(identity, places=()),  # where it lay is nobody else's business
        trial=trial,
        recovery=of_run.recovery,
        further_tokens=trial.last.recovery_tokens if is_further else 0,
        weights=types.weights,
        kv_cache=types.kv_cache,
        shows_text=shows_text,
        latencies=context.table.latencies,
        before=of_run.machine if is_further else None,
    )


def licences_of(context: TrialContext) -> Licences:
    """What the files on this machine say of the licences of a run's model and texts; nobody is asked."""
    return Licences(
        model=_of_model(context),
        text={source: _of_text(source) for source in sources_of(context.study)},
    )


def _of_model(context: TrialContext) -> str:
    """By the metadata of a GGUF, or the model card or licence file beside the weights."""
    if context.files.gguf:
        value = read_gguf(context.files.gguf[:1]).metadata.get("general.license")
        return str(value) if value else UNKNOWN
    place = context.run.identity()
    typed = context.study.model
    lay = place.place_of(typed) if place else None
    folder = Path(lay.absolute) if lay else context.files.folder
    return _in_folder(folder if folder.is_dir() else folder.parent)


def _in_folder(folder: Path) -> str:
    with suppress(OSError, ValueError, YAMLError):
        told = (metadata_load(folder / "README.md") or {}).get("license")
        names = [
            name for name in (told if isinstance(told, list) else [told]) if isinstance(name, str) and name
        ]
        if names:
            return ", ".join(names)
    for name in _FILES:
        if (folder / name).is_file():
            return f"see {name} of the base model"
    return UNKNOWN


def _of_text(source: str) -> str:
    """By the metadata of the package that holds the text, or by what lies in its folder."""
    if source.startswith("package:"):
        name = source.removeprefix("package:").partition("/")[0]
        with suppress(PackageNotFoundError):
            about: Any = metadata(name)  # a message: None of a key that it lacks
            told = about["License-Expression"] or about["License"]
            kinds = [
                one.rpartition(" :: ")[2] for one in about.get_all("Classifier", []) if "License ::" in one
            ]
            first = str(told).strip().splitlines()[:1]
            return first[0] if told and first else ", ".join(kinds) or UNKNOWN
        return UNKNOWN
    path = Path(source)
    return _in_folder(path) if path.is_dir() else UNKNOWN
