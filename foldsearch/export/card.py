"""The card of an export, card.json: what it is, what was checked and what was not, and how it is made again.

It is read where nothing else of a run is: `foldsearch verify` holds the folder against it, `foldsearch reproduce`
rebuilds the export from it. The probe beside it, check.npz, holds tokens, and what the measured model says of each.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foldsearch.codec import from_json, to_json
from foldsearch.errors import FoldsearchError, InputError, quote_error
from foldsearch.export.figures import ExportReport
from foldsearch.identity import Identity
from foldsearch.machine import Machine
from foldsearch.paths import printable
from foldsearch.plan.latency import Latency
from foldsearch.plan.plan import FoldPlan
from foldsearch.proposal import RecoveryChoice
from foldsearch.record import Trial
from foldsearch.version import __version__

SCHEMA = 1
CARD = "card.json"
PROBE = "check.npz"
README = "README.md"
UNKNOWN = "unknown"
# Changed by people, or written with the figures of a moment: no part of what the card vouches for.
UNHASHED = (CARD, README)
TEXT, RANDOM = "tokens of the report texts", "tokens at random"  # what a probe is of
PROBE_TOKENS = 1 << 16  # at most: some hundred kilobytes
RANDOM_TOKENS = (2, 64)  # sequences, and tokens of each
_READ = 1 << 20  # bytes at a time


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of an export: its size and its sha256, as `sha256sum` prints it."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Licences:
    """What is known of licences, in the words of who gave them; "unknown" where nothing is. text: by source."""

    model: str = UNKNOWN
    text: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that an export is made of, but for the model and the text themselves.

    study: of the run, resolved, as JSON. identity: hashes of the model's parts and of the token sets, without the
    places where these lay. trial: as it was exported. recovery: how the rungs of the run trained it; further_tokens: up
    to which it was trained beyond them, 0 where it was not. weights, kv_cache: the types that were asked for, empty for
    the dtype's own. shows_text: whether the probe holds tokens of the report texts. latencies: what the run reckoned
    times from. before: the machine of the run's rungs, where it was trained beyond them, maybe on other threads; else
    None.
    """

    study: dict[str, Any]
    identity: Identity
    trial: Trial
    recovery: RecoveryChoice
    further_tokens: int
    weights: str
    shows_text: bool
    latencies: tuple[Latency, ...] = ()
    kv_cache: str = ""
    before: Machine | None = None

    @property
    def machines(self) -> tuple[Machine | None, Machine | None]:
        """That of the run's rungs, and that of the latest training."""
        return (self.before or self.trial.machine, self.trial.machine)


@dataclass(frozen=True, slots=True)
class ProbeFigures:
    """What the measured model says on the probe, and how far an export that is loaded elsewhere may be from it.

    of: what the tokens are, in words. tokens: that are predicted. perplexity: over these. tolerance: of the mean
    absolute difference of their log-probabilities, and loss_tolerance: of the mean loss, in nats. engine_tolerance: of
    the same difference, in the program that the export is for, where it was not asked about these tokens.
    """

    of: str
    tokens: int
    perplexity: float
    tolerance: float
    loss_tolerance: float
    engine_tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class Card:
    """What card.json holds.

    foldsearch: the version that wrote it. plan: of the model. report: figures with their tolerances, and versions of
    libraries. files: of the folder, by name; README.md may be changed. checked, not_checked: in sentences. loading:
    Python that loads the export. attention: the implementation of attention that it was checked with. commands: that
    check the export again, and that make it again. recipe: None where the model was not made by a run, a `try` or an
    `extend`: it cannot be made again from here.
    """

    foldsearch: str
    plan: FoldPlan
    report: ExportReport
    files: dict[str, StoredFile]
    probe: ProbeFigures
    attention: str
    checked: tuple[str, ...]
    not_checked: tuple[str, ...]
    licences: Licences
    loading: str
    commands: dict[str, str]
    recipe: Recipe | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Tokens, and what a model says of them.

    ids_NT: int64. text_NT: bool, which are of the text. log_probabilities_NP: float32, nats, P = T − 1: of each token
    after the first of its sequence.
    """

    ids_NT: Tensor
    text_NT: Tensor
    log_probabilities_NP: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As a process of `foldsearch.runtimes.verify` is given them."""
        names = ("ids_NT", "text_NT", "log_probabilities_NP")
        return {name: getattr(self, name).contiguous() for name in names}

    def cut(self) -> Probe:
        """Its first sequences, as many as a probe has tokens."""
        kept = max(1, PROBE_TOKENS // self.ids_NT.shape[1])
        return Probe(self.ids_NT[:kept], self.text_NT[:kept], self.log_probabilities_NP[:kept])

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        arrays["ids_NT"] = arrays["ids_NT"].astype(np.int32)
        np.savez_compressed(folder / PROBE, allow_pickle=False, **arrays)

    @classmethod
    def read(cls, folder: Path) -> Probe:
        """Read what `write` wrote.

        Raises:
            InputError: it is not there, or no probe.
        """
        try:
            # opened here: numpy leaves a damaged file open
            with (folder / PROBE).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return cls(
                    torch.from_numpy(arrays["ids_NT"].astype(np.int64)),
                    torch.from_numpy(arrays["text_NT"]),
                    torch.from_numpy(arrays["log_probabilities_NP"]),
                )
        # a damaged archive may name a way of packing, or a size, that nobody has
        except (
            OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError
        ) as error:  # fmt: skip
            raise InputError(
                quote_error(f"{printable(folder / PROBE)} cannot be read", error, "Export the model again.")
            ) from error


def random_tokens(ids_NT: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """Tokens that stand in for text that is not to be shown: the first of each sequence as it is, the others at random.

    They are no text, so a perplexity over them says nothing of a model, but that it is the same model.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (min(RANDOM_TOKENS[0], ids_NT.shape[0]), min(RANDOM_TOKENS[1], ids_NT.shape[1]))
    drawn_NT = torch.randint(0, vocab_size, shape, generator=generator)
    drawn_NT[:, 0] = ids_NT[: shape[0], 0]
    return {"ids_NT": drawn_NT, "text_NT": torch.ones_like(drawn_NT, dtype=torch.bool)}


def write_card(card: Card, folder: Path) -> None:
    """Write card.json into a folder that is not finished yet."""
    (folder / CARD).write_text(json.dumps({"schema": SCHEMA, **to_json(card)}, indent=1), encoding="utf-8")


def read_card(path: Path) -> Card:
    """The card of an export.

    Args:
        path: of its folder, or of card.json itself.

    Raises:
        InputError: there is none, or it cannot be read, or it is of another version of foldsearch.
    """
    try:
        file = path / CARD if path.is_dir() else path
        is_there = file.is_file()
    except OSError:  # a name that no file can have
        file, is_there = path, False
    if not is_there:
        raise InputError(
            f"an export holds {CARD}, but there is no {printable(file)}. Name a folder that `foldsearch export` wrote."
        )
    remedy = "Name another export, or export the model again."
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        schema = value["schema"]
        made_by = value.get("foldsearch", UNKNOWN)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(quote_error(f"{printable(file)} is no card of an export", error, remedy)) from error
    if schema != SCHEMA and made_by == __version__:  # another file of ours, such as study.json of a run
        raise InputError(
            f"{printable(file)} is no card of an export: its schema is {schema!r}, not {SCHEMA}. {remedy}"
        )
    if schema != SCHEMA:
        raise InputError(
            f"{printable(file)} must be a card of schema {SCHEMA}, which foldsearch {__version__} reads; got schema "
            f"{schema!r}, written by foldsearch {made_by}. Install that version."
        )
    try:
        card = from_json(Card, value)
    except (ValueError, KeyError, TypeError, RecursionError, FoldsearchError) as error:
        raise InputError(quote_error(f"{printable(file)} is no card of an export", error, remedy)) from error
    if not (0 < card.probe.perplexity < math.inf and PROBE in card.files):
        raise InputError(
            f"the card of an export names the file {PROBE}, and says a perplexity above 0 of it; {printable(file)} "
            f"names {len(card.files)} files, and says {card.probe.perplexity:g}. {remedy}"
        )
    return card


def files_of(folder: Path) -> list[str]:
    """Names of the files in a folder that its card vouches for, sorted."""
    files = (path for path in folder.rglob("*") if path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    return [name for name in names if name not in UNHASHED]


def hashes_of(folder: Path, names: Iterable[str]) -> dict[str, StoredFile]:
    """Size and sha256 of files by their names in a folder; each is read whole."""
    return {name: StoredFile((folder / name).stat().st_size, _sha256(folder / name)) for name in names}


def commands_for(recipe: Recipe | None) -> dict[str, str]:
    """What is typed to check the export again, and to make it again; DIR is its folder, wherever that lies by then."""
    again = {} if recipe is None else {"reproduce": f"foldsearch reproduce DIR/{CARD} --out NEW"}
    return {"verify": "foldsearch verify DIR", **again}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ):
            digest.update(piece)
    return digest.hexdigest()
