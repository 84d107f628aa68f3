"""Several exports in one folder that stores each tensor once: points of one front, which are blocks of one model.

    family.json         the points, and the bytes stored beside those of separate exports
    shared/             safetensors files that several points read, named by what is in them
    trial-00003/        a point: an export like any other, whose index names files of its own and of `shared`

transformers follows `../shared/...` in an index of a folder on disk. A tensor of a stock model has the number of its
block in its name, and a file has the names in it: points share what has the same values *and* the same name, which are
the embeddings and the blocks before the first that only one of them drops. Folded models are read by code of ours, so
their tensors are named by content and each is stored once (`fold["stored"]` in config.json; `foldsearch.model.folded`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from foldsearch.codec import from_json, to_json
from foldsearch.errors import InputError, VerificationError, quote_error
from foldsearch.export.card import README, files_of, hashes_of, read_card, write_card
from foldsearch.export.readme import loading_lines, model_card, shares_files
from foldsearch.export.recheck import recheck
from foldsearch.model.checks import SHARED
from foldsearch.paths import printable
from foldsearch.progress import StageProgress, silent
from foldsearch.runtimes import runtime_named

SCHEMA = 1
FAMILY = "family.json"
OWN = "model-own.safetensors"  # what no other point has
INDEX = "model.safetensors.index.json"
_METADATA = {"format": "pt"}  # as transformers writes it


@dataclass(frozen=True, slots=True)
class Member:
    """A point of a family. folder: its name. trial: of the run. plan: its text. separate_bytes: of its weight files as
    they would be alone; perplexity: of the export, on the report texts.
    """

    folder: str
    trial: int
    plan: str
    separate_bytes: int
    perplexity: float


@dataclass(frozen=True, slots=True)
class Family:
    """What family.json holds. runtime: of all points. stored_bytes: of all weight files, each once."""

    runtime: str
    base_model: str
    stored_bytes: int
    members: tuple[Member, ...]

    @property
    def separate_bytes(self) -> int:
        """What the same exports take in folders of their own."""
        return sum(member.separate_bytes for member in self.members)


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of a point: its name in the model, the one that it is stored by, and the file that holds it now."""

    name: str
    stored: str
    digest: str
    file: Path


def read_family(folder: Path) -> Family:
    """What a folder of several points holds.

    Raises:
        InputError: it is none.
    """
    path = folder / FAMILY
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["schema"] != SCHEMA:
            raise ValueError("it is of another version of foldsearch")
        family = from_json(Family, value)
        if not family.members:
            raise ValueError("it names none")
        return family
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            quote_error(
                f"{printable(path)} is no list of exports", error, "Name what `export --front` wrote."
            )
        ) from error


def exports_in(folder: Path) -> list[Path]:
    """The exports of a folder: its points where it is a family, else itself.

    Raises:
        InputError: it is a family that cannot be read.
    """
    if not (folder / FAMILY).is_file():
        return [folder]
    names = [member.folder for member in read_family(folder).members]
    if outside := [name for name in names if Path(name).name != name or name == ".."]:
        raise InputError(f"the points of a family lie in it; got {outside[:3]}. Do not use this folder.")
    return [folder / name for name in names]


def member_name(trial: int) -> str:
    """The folder of a point."""
    return f"trial-{trial:05}"


def pool(folder: Path, trials: Sequence[int], final: Path, progress: StageProgress = silent) -> Family:
    """Turn exports that lie side by side in a folder into a family: each tensor is kept once, each point checked again.

    Args:
        folder: holds an export of each trial, under its `member_name`.
        trials: their numbers.
        final: what the folder will be called, as the loading lines name it.
        progress: told what is being done.

    Raises:
        VerificationError: a point does not load as the model that it was.
    """
    places = [folder / member_name(trial) for trial in trials]
    cards = [read_card(place) for place in places]
    by_content = not runtime_named(cards[0].report.runtime).needs_only_transformers
    progress("storing each tensor once", 0.0)
    points = [list(_tensors(place, by_content=by_content)) for place in places]
    users = Counter(_key(one) for point in points for one in point)
    written: dict[str, str] = {}  # where a tensor lies, as a point names it
    (folder / SHARED).mkdir()
    for place, point in zip(places, points, strict=True):
        new = [one for one in point if users[_key(one)] > 1 and _key(one) not in written]
        # What comes in with the same point is mostly used by the same points: one file for all of it.
        if new:
            name = _shard_name(new)
            save_file(_read(new), folder / SHARED / name, _METADATA)
            written |= {_key(one): f"../{SHARED}/{name}" for one in new}
        own = [one for one in point if users[_key(one)] == 1]
        if own:
            save_file(_read(own), place / OWN, _METADATA)
        _write_index(place, {one.stored: written.get(_key(one), OWN) for one in point})
        if by_content:
            _name_in_config(place, {one.stored: one.name for one in point})
    for point in points:  # others read from these files until now
        for path in {one.file for one in point}:
            path.unlink()
    for place, card in zip(places, cards, strict=True):
        shards = json.loads((place / INDEX).read_text())["weight_map"].values()
        named = {*files_of(place), *shards}
        where = final / place.name
        card = replace(
            card,
            files=hashes_of(place, sorted(named)),
            loading=loading_lines(card.report, where, is_shared=shares_files(named)),
        )
        (place / README).write_text(model_card(card, where), encoding="utf-8")
        write_card(card, place)
    _check(places, progress)
    files = (*folder.glob(f"{SHARED}/*.safetensors"), *folder.glob(f"*/{OWN}"))
    family = Family(
        runtime=cards[0].report.runtime,
        base_model=cards[0].report.base_model,
        stored_bytes=sum(path.stat().st_size for path in files),
        members=tuple(
            Member(place.name, trial, card.report.plan, card.report.file_bytes, card.report.perplexity)
            for place, trial, card in zip(places, trials, cards, strict=True)
        ),
    )
    (folder / FAMILY).write_text(json.dumps({"schema": SCHEMA, **to_json(family)}, indent=1))
    return family


def _key(one: _Stored) -> str:
    return one.stored + one.digest


def _tensors(place: Path, *, by_content: bool) -> Iterable[_Stored]:
    """Every tensor of an export; by_content: to be stored by what it holds, and the how-manieth such one it is."""
    seen: Counter[str] = Counter()
    for file in sorted(place.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no dict
                digest = _digest(opened.get_tensor(name))
                stored = f"{digest[:24]}.{seen[digest]}" if by_content else name
                seen[digest] += 1
                yield _Stored(name, stored, digest, file)


def _digest(tensor: Tensor) -> str:
    about = f"{tensor.dtype} {tuple(tensor.shape)}"
    # the bytes as they are: numpy has no bfloat16
    held: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(about.encode() + held.tobytes()).hexdigest()


def _shard_name(tensors: Sequence[_Stored]) -> str:
    keys = "\n".join(sorted(map(_key, tensors)))
    return f"{hashlib.sha256(keys.encode()).hexdigest()[:24]}.safetensors"


def _read(tensors: Sequence[_Stored]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in {one.file for one in tensors}:
        with safe_open(file, framework="pt") as opened:
            found |= {one.stored: opened.get_tensor(one.name) for one in tensors if one.file == file}
    return found


def _write_index(place: Path, weight_map: dict[str, str]) -> None:
    value = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    (place / INDEX).write_text(json.dumps(value, indent=1))


def _name_in_config(place: Path, names: dict[str, str]) -> None:
    path = place / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["fold"]["stored"] = names
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check(places: Sequence[Path], progress: StageProgress) -> None:
    faults = []
    for number, place in enumerate(places):
        progress("checking each point again", number / len(places))
        found = recheck(place)
        faults += [f"{place.name}: {fault}" for fault in found.faults]
    if faults:
        raise VerificationError(
            f"the points of a family are the models that were measured, but {'; '.join(faults)}. Nothing was exported. "
            "This is a bug of foldsearch or of a library: please report it with the plans and the versions."
        )
