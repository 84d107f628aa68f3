"""The folder of an export: new, whole or absent, and read again."""

from __future__ import annotations

import glob
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from safetensors import SafetensorError

from foldsearch.errors import InputError, ModelError, quote_error
from foldsearch.export.card import CARD, read_card
from foldsearch.files import ABANDONED_SECONDS
from foldsearch.paths import beside, printable, stem_beside
from foldsearch.plan.cost import GB
from foldsearch.runtimes import Loader, Runtime, runtime_named, verify
from foldsearch.signals import uninterrupted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMERLY = "foldsearch.json"  # what earlier versions wrote in place of the card
ROOM = 1.1  # of disk or memory, as a multiple of the weights


def check_new(folder: Path, *, overwrite: bool, marks: tuple[str, ...] = (CARD, FORMERLY)) -> None:
    """An export is replaced where that was asked for; nothing else is.

    marks: the files of which one is in what may be replaced.
    """
    if not folder.exists():
        return
    ours = any((folder / name).is_file() for name in marks) or (folder.is_dir() and not any(folder.iterdir()))
    if overwrite and not ours:
        raise InputError(
            f"only an export is overwritten, but {printable(folder)} holds no {marks[0]}. Choose another folder, or "
            "move it away."
        )
    if not overwrite:
        or_force = ", or overwrite it with --force" if ours else ""
        raise InputError(
            f"{printable(folder)} exists already. Choose another folder, or move it away{or_force}."
        )


def make_room(folder: Path, weight_bytes: int) -> None:
    """Make the folder that the export goes into, and refuse a disk that cannot hold it."""
    parent = _behind(folder).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the export goes into {printable(parent)}, which cannot be made: {error.strerror}. "
            "Choose another folder."
        ) from error
    if (free := shutil.disk_usage(parent).free) < ROOM * weight_bytes:
        raise InputError(
            f"the export needs {weight_bytes / GB:.2f} GB, but {printable(parent)} has {free / GB:.2f} GB free. "
            "Make room, or choose another folder."
        )


@contextmanager
def whole_or_absent(
    folder: Path, weight_bytes: int, *, overwrite: bool = False, marks: tuple[str, ...] = (CARD, FORMERLY)
) -> Iterator[Path]:
    """A folder to write in, which gets its name when all went well, and else is removed.

    What a killed process left beside it goes with the next export of the same name, once it is a day old. What came to
    be under the name meanwhile is left alone, as by `check_new`. Where the name is a link, what it leads to is written.
    """
    folder = _behind(folder)
    temporary = beside(folder, "partial")
    _remove_abandoned(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        with uninterrupted():
            check_new(folder, overwrite=overwrite, marks=marks)
            _rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            quote_error(
                f"the export could not be written to {printable(folder.parent)}",
                error,
                f"It needs {weight_bytes / GB:.2f} GB. Make room, or choose another folder.",
            )
        ) from error
    finally:
        with uninterrupted():
            shutil.rmtree(temporary, ignore_errors=True)


def _behind(folder: Path) -> Path:
    """What a link leads to, as a link is often to the disk that has room; any other folder as it is."""
    return folder.resolve() if folder.is_symlink() else folder


def _remove_abandoned(folder: Path) -> None:
    """Remove what earlier processes left: an export half written, the dense model beside it, a trial made again."""
    stem = glob.escape(stem_beside(folder))
    for pattern in (f"{stem}*.partial", f"{stem}*.rebuilt", f".{stem}*.dense"):
        for left in folder.parent.glob(pattern):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)


def _rename(temporary: Path, folder: Path) -> None:
    """Put the finished folder in its place; an old one goes only after the new one is there."""
    old = beside(folder, "old")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


def runtime_of(folder: Path) -> Runtime | None:
    """What an export is run by; None of a folder that does not say it."""
    try:
        return runtime_named(read_card(folder).report.runtime)
    except InputError:
        return None


def load_exported(folder: Path | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """An exported model, whatever its runtime, in eval mode and its own dtype; and its tokenizer, where it has one.

    Of a text part that was put back into the model that also sees, the whole model.

    Raises:
        ModelError: not a model folder, or weights are missing from it.
    """
    from transformers import AutoTokenizer

    from foldsearch.model.register import register

    register()
    folder = Path(folder)
    runtime = runtime_of(folder)
    loader = runtime.loader if runtime else ""
    if not loader and not (folder / "config.json").is_file():
        raise ModelError(
            f"{printable(folder)} is not an exported model: it has no config.json. `foldsearch export` writes one."
        )
    if loader:
        loaded, wrong = cast("Loader", import_module(loader)).load(str(folder), "auto", None)
    else:
        auto = verify.auto_class(str(folder))
        loaded, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
        wrong = verify.wrong_keys(info)
    if wrong:
        raise ModelError(
            f"{printable(folder)} does not hold the weights its config asks for: {wrong[:5]}. Export it again."
        )
    model: PreTrainedModel = loaded.eval()
    if not (folder / "tokenizer_config.json").is_file():
        return model, None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return model, tokenizer
