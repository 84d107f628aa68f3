"""Make an export again from its card: from the model, the text, the plan and the settings, and from nothing of the run.

A run that still exists is not looked at. The model is folded, healed and trained anew in a folder of its own, exported
in the same way, and held against the card: files by their hashes, figures within tolerances.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from foldsearch.context import TrialContext
from foldsearch.errors import DataError, InputError, ModelError
from foldsearch.export.card import CARD, PROBE, Card, Recipe, read_card
from foldsearch.further import recover_further
from foldsearch.identity import Identity
from foldsearch.machine import DEVICES, Machine, choose_device
from foldsearch.model import source
from foldsearch.model.content import ContentHashes
from foldsearch.model.training import FurtherTraining
from foldsearch.paths import beside, printable
from foldsearch.prepare import open_source, prepare_context
from foldsearch.progress import Notice, StageProgress, silent, unheard
from foldsearch.proposal import Given, Proposal
from foldsearch.rebuild import ROUNDING, latest_folder
from foldsearch.record import Trial, read_trial
from foldsearch.signals import uninterrupted
from foldsearch.spec.load import study_from_json
from foldsearch.spec.study import Study
from foldsearch.trial import run_trial

NUMBER = 0  # of the only trial
MOST_THREADS = 4096  # of a processor, that a card may name
# Of the KL and the mean loss, in nats, after training, where another processor or another number of threads sums in
# another order: each step of training carries the differences on. Chosen, not measured: see docs/decisions/0023.
TRAINED_ROUNDING = {"float32": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of the card, the same of what was made again, and how far they may be apart; 0: not at all."""

    name: str
    first: float
    again: float
    tolerance: float

    @property
    def is_equal(self) -> bool:
        """Within the tolerance."""
        return abs(self.first - self.again) <= self.tolerance


@dataclass(frozen=True, slots=True)
class Reproduced:
    """What was made again, beside the card.

    again: its card. equal, other: names of files that have the same hash, and of those that have another one or are
    there only once. figures: each beside that of the card. is_same_machine: whether the first was measured on such a
    machine, with as many threads and the same torch: then every bit is expected to be the same.
    """

    first: Card
    again: Card
    equal: tuple[str, ...]
    other: tuple[str, ...]
    figures: tuple[Figure, ...]
    is_same_machine: bool

    @property
    def faults(self) -> list[str]:
        """The figures that are too far apart, in words."""
        return [
            f"{one.name} is {one.again:.6g}, the card says {one.first:.6g} (tolerance {one.tolerance:g})"
            for one in self.figures
            if not one.is_equal
        ]


def recipe_in(card: Card, path: Path) -> Recipe:
    """How a card's export is made.

    Raises:
        InputError: the card does not say it.
    """
    if card.recipe is None:
        raise InputError(
            f"only an export of a run, of `try` or of `extend` can be made again, but {printable(path)} is the card of "
            "a model that was exported from Python without a recipe."
        )
    identity, trial = card.recipe.identity, card.recipe.trial
    threads = [one.threads for one in card.recipe.machines if one is not None]
    if (
        identity.dtype not in ROUNDING
        or identity.device not in DEVICES
        or None in (trial.draft, trial.proposal)
        or not trial.results
        or not all(0 < one <= MOST_THREADS for one in threads)
    ):
        raise InputError(
            f"a recipe says in which dtype and on which device a trial was measured that had a plan, but that of "
            f"{printable(path)} says '{identity.dtype}', '{identity.device}' and a trial with {len(trial.results)} "
            f"results{f' on {threads} threads' if threads else ''}. Export the model again."
        )
    return card.recipe


def reproduce(
    path: Path,
    out: Path,
    write: Callable[[TrialContext, Recipe], object],
    *,
    moved: Mapping[str, str],
    progress: StageProgress = silent,
    notice: Notice = unheard,
) -> Reproduced:
    """Make an export again.

    Args:
        path: of its card, or of its folder.
        out: where the new export is written by `write`.
        write: exports trial `NUMBER` of a context to `out`.
        moved: where the model and the texts lie now, by what the card calls them; what is not named is where it was.
        progress: told what is being done.
        notice: told what a person should know.

    Raises:
        InputError: it is no card, or it cannot be followed; the model or the text is another one.
    """
    card = read_card(path)
    recipe = recipe_in(card, path)
    study = _study(recipe, moved)
    with _remedy_told():
        found = source.identify(open_source(study, progress), of_weights=False)
    _check_parts(recipe.identity.content, found, whole=False)
    workplace = beside(out, "rebuilt")
    threads = torch.get_num_threads()
    try:
        workplace.parent.mkdir(parents=True, exist_ok=True)
        with _remedy_told():
            context = prepare_context(_without_times(study), workplace, progress=progress, notice=notice)
        context = _with_times(context, study, recipe)
        identity = context.run.identity()
        assert identity is not None, "it was written just now"
        _check_parts(recipe.identity.content, identity.content, whole=True)
        _check_tokens(recipe.identity, identity)
        again = _rebuilt(context, recipe, progress)
        torch.set_num_threads(threads)
        write(context, recipe)
    finally:
        torch.set_num_threads(threads)
        with uninterrupted():
            shutil.rmtree(workplace, ignore_errors=True)
    return _compared(card, read_card(out), recipe, again)


@contextmanager
def _remedy_told() -> Iterator[None]:
    """Say of a model or a text that cannot be read what helps where it was moved."""
    try:
        yield
    except (ModelError, DataError) as error:
        raise InputError(f"{error} What lies elsewhere now is named by --moved OLD=NEW.") from error


def _study(recipe: Recipe, moved: Mapping[str, str]) -> Study:
    """The study of the run, with what has moved where it is now, in the precision that the run computed in."""
    named: set[str] = set()

    def now(value: Any) -> Any:
        if isinstance(value, str):
            named.add(value)
            return moved.get(value, value)
        if isinstance(value, list):
            return [now(one) for one in value]
        if isinstance(value, dict):  # of a source, what says where it is; of the splits, all of them
            return {key: now(one) if key in _PLACES else one for key, one in value.items()}
        return value

    study_from_json(recipe.study)  # refused before it is looked into
    value = dict(recipe.study)
    value |= {key: now(value[key]) for key in ("model", "data")}
    if unknown := sorted(set(moved) - named):
        raise InputError(
            f"--moved OLD=NEW names the model or a text as the card calls it; the card does not know {unknown}. Its "
            f"model is {recipe.study['model']}, its texts {json.dumps(recipe.study['data'])}."
        )
    study = study_from_json(value)
    device = recipe.identity.device
    try:
        choose_device(device)
    except InputError:
        device = "auto"
    changes: dict[str, Any] = {"precision": recipe.identity.dtype, "device": device, "warm_from": None}
    if recipe.identity.commit and recipe.study["model"] not in moved:  # on the hub another one may follow it
        changes |= {"model": study.model.partition("@")[0], "revision": recipe.identity.commit}
    return study.model_copy(update=changes)


def _without_times(study: Study) -> Study:
    """The study as it is prepared for: nothing is timed for a plan that is chosen already.

    The program that would be timed may not be installed here, and a slower machine would not keep the budget.
    """
    if not study.has_times:
        return study
    untimed = {"prompt_ms": None, "decode_ms": None}
    objectives = Study.model_fields["objectives"].default
    return study.model_copy(
        update={"budget": study.budget.model_copy(update=untimed), "objectives": objectives}
    )


def _with_times(context: TrialContext, study: Study, recipe: Recipe) -> TrialContext:
    """The context of the whole study: the new card is to say of its bounds and objectives what the first one says.

    On the same kind of machine with the lines through the times that were measured for it, so that the same is
    predicted; elsewhere they would foretell the times of another machine.
    """
    latencies = recipe.latencies if _is_same_machine(recipe) else ()
    table = replace(context.table, latencies=latencies)
    return replace(context, run=replace(context.run, study=study, table=table))


def _is_same_machine(recipe: Recipe) -> bool:
    """Whether a trial was measured on such a machine, by the same torch; its threads are taken as they were there."""
    here = Machine.here("cpu")
    return all(one is not None and replace(here, threads=one.threads) == one for one in recipe.machines)


_PLACES = ("source", "search", "recovery", "report")


def _check_parts(ours: ContentHashes, theirs: ContentHashes, *, whole: bool) -> None:
    """Whether the model is the one of the card, by content; whole: its weights too."""
    for part in ("config", "tokenizer", "code", *(["weights"] if whole else [])):
        if getattr(ours, part) != getattr(theirs, part) and (whole or getattr(theirs, part)):
            raise InputError(
                f"an export is made again from the same model only, but its {part} is another one (sha256 "
                f"{getattr(ours, part)[:12] or 'none'} on the card, {getattr(theirs, part)[:12] or 'none'} here). Name "
                "the right one by --moved OLD=NEW."
            )


def _check_tokens(ours: Identity, theirs: Identity) -> None:
    for name, expected in ours.tokens.items():
        if theirs.tokens.get(name) != expected:
            raise InputError(
                f"an export is made again from the same text only, but its {name} tokens are others (sha256 "
                f"{expected[:12]} on the card, {theirs.tokens.get(name, '')[:12]} here). Name the right text by "
                "--moved OLD=NEW; a text that the model wrote itself is the same on the same kind of processor only."
            )


def _rebuilt(context: TrialContext, recipe: Recipe, progress: StageProgress) -> Trial:
    """Fold, heal and train as the recipe says; the trial as it then stands."""
    given = Given(recipe.trial.plan, recipe.trial.fold.adapter_start)
    proposal = Proposal(given, recipe.recovery, "hand", recipe.trial.types)
    of_run, latest = recipe.machines
    _take_threads(of_run)
    *_, trial = run_trial(proposal, context, number=NUMBER, progress=progress)
    if trial.state != "finished":
        raise InputError(f"the model could not be made again, as the trial {trial.reason}.")
    if recipe.further_tokens:
        _take_threads(latest)
        asked = FurtherTraining(recipe.further_tokens, recipe.trial.recovery.trains)
        for _ in recover_further(NUMBER, context, asked, progress=progress):
            pass
    found = read_trial(latest_folder(context.run, NUMBER))
    assert found is not None, "it has just ended"
    return found


def _take_threads(machine: Machine | None) -> None:
    """As many as there: other numbers of threads sum in other orders."""
    if machine is not None:
        torch.set_num_threads(machine.threads)


def _compared(first: Card, again: Card, recipe: Recipe, rebuilt: Trial) -> Reproduced:
    names = sorted((set(first.files) | set(again.files)) - {PROBE})
    equal = tuple(name for name in names if first.files.get(name) == again.files.get(name))
    rounding = TRAINED_ROUNDING if recipe.trial.last.kept_tokens else ROUNDING
    tolerance = rounding[recipe.identity.dtype]
    ours, theirs = recipe.trial.final, rebuilt.final
    stored, stored_again = first.report.exported, again.report.exported
    figures = (
        Figure("KL to dense, nats", ours.kl, theirs.kl, tolerance * max(1.0, ours.kl)),
        Figure("perplexity", ours.perplexity, theirs.perplexity, tolerance * ours.perplexity),
        Figure(
            "perplexity of the export",
            first.report.perplexity,
            again.report.perplexity,
            # one of them may have been computed in 16 bits, the other in 32
            (tolerance + max(first.probe.loss_tolerance, again.probe.loss_tolerance))
            * first.report.perplexity,
        ),
        Figure("parameters", stored.parameters, stored_again.parameters, 0.0),
        Figure("bytes of weights", stored.weight_bytes, stored_again.weight_bytes, 0.0),
    )
    other = tuple(name for name in names if name not in equal)
    return Reproduced(first, again, equal, other, figures, _is_same_machine(recipe))


def check_out(path: Path, out: Path) -> None:
    """Whether what is made again may be written to `out`: not over the export whose card is read.

    Raises:
        InputError: it may not.
    """
    folder = path if path.is_dir() else path.parent
    if out.resolve() == folder.resolve():
        raise InputError(
            f"--out is another folder than that of the card, but both are {printable(out)}, which holds {CARD}. Choose "
            "another one."
        )
