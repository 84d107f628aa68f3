"""What a run was made of, kept beside its token sets: so that it goes on with that, or not at all.

    identity.json   hashes of the model's parts and of the token sets, the dtype and the device that were chosen, the
                    commit of a hub model, and where the files lay

Files are looked for where they lay when the run began, whatever the current folder is by now; and, since a run folder
and its model may have been moved together, at the same place as seen from the run folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from foldsearch.errors import RunError
from foldsearch.model.content import ContentHashes
from foldsearch.paths import local, printable

__all__ = ["Identity", "Location"]

_PARTS = ("weights", "config", "tokenizer", "code")  # whose change is another model


@dataclass(frozen=True, slots=True)
class Location:
    """Where a file or folder lay when the run began.

    typed: as a person wrote it. absolute: in full. beside: as seen from the run folder.
    """

    typed: str
    absolute: str
    beside: str

    @classmethod
    def of(cls, typed: str, run_folder: Path) -> Location:
        """The place that a path names now."""
        absolute = local(typed).absolute()
        return cls(
            typed, str(absolute), os.path.relpath(os.path.realpath(absolute), os.path.realpath(run_folder))
        )

    def now(self, run_folder: Path) -> Path | None:
        """Find it where it lay, or at the same place as seen from the run folder; None if it is at neither."""
        there = (Path(self.absolute), Path(os.path.realpath(run_folder)) / self.beside)
        return next((path for path in there if path.exists()), None)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a run was made of.

    Attributes:
        model: as it was typed.
        content: hashes of the model's parts.
        commit: of a hub model; else "".
        dtype: "float32" or "bfloat16", that trials compute in; what "auto" stood for when the run began.
        device: that the run began on.
        tokens: hash of each token set by its name.
        places: of the model and the texts that lie on this machine.
    """

    model: str
    content: ContentHashes
    commit: str
    dtype: str
    device: str
    tokens: dict[str, str]
    places: tuple[Location, ...]

    def place_of(self, typed: str) -> Location | None:
        """The place of what a person typed; None for what is on the hub or in a package."""
        return next((place for place in self.places if place.typed == typed), None)

    def path_of(self, typed: str, run_folder: Path) -> Path | None:
        """Where the file or folder that was typed is now; None for what never lay on this machine.

        Raises:
            RunError: it is gone.
        """
        place = self.place_of(typed)
        if place is None:
            return None
        if (found := place.now(run_folder)) is None:
            raise RunError(
                f"'{printable(run_folder)}' was made with '{printable(place.absolute)}', which is not there any more. "
                "Put it back, or start a new run."
            )
        return found

    def check_model(self, found: ContentHashes, where: Path, run_folder: Path) -> None:
        """Check that a model is the one of the run; parts that are not known yet are not compared.

        Raises:
            RunError: it is another one; the message says which part differs.
        """
        for part in _PARTS:
            ours, theirs = getattr(self.content, part), getattr(found, part)
            if ours == theirs or (part == "weights" and not theirs):
                continue
            raise RunError(
                f"a run goes on only with the model that it was made with: '{printable(run_folder)}' was made with "
                f"{part} {_short(ours)} (sha256), but '{printable(where)}' now holds {_short(theirs)}. "
                "Put the old files back, or start a new run."
            )

    def check_tokens(self, found: dict[str, str], run_folder: Path) -> None:
        """Check that token sets are those of the run.

        Raises:
            RunError: they are others; the message says which.
        """
        for name, ours in self.tokens.items():
            if (theirs := found.get(name, "")) != ours:
                raise RunError(
                    "a run goes on only with the tokens that it was made with: "
                    f"'{printable(run_folder)}' was made with {name} tokens {_short(ours)} (sha256), but they are now "
                    f"{_short(theirs)}. Put the old tokens.safetensors back, or start a new run."
                )


def _short(digest: str) -> str:
    return digest[:12] or "none"
