"""The model of a trial, built again from what its folder keeps, and held against what was recorded of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldsearch.codec import from_json, to_json
from foldsearch.context import TrialContext, open_workbench
from foldsearch.errors import RunError, VerificationError
from foldsearch.machine import Machine
from foldsearch.model.content import file_hash
from foldsearch.model.fold import fold
from foldsearch.model.healing import METHODS
from foldsearch.model.kept import DamagedFileError, read_tensors, read_words, write_tensors
from foldsearch.model.recover import attach, load_trained, merge, saved_tokens
from foldsearch.model.replacements import FitSettings
from foldsearch.model.starts import folded_start, new_values
from foldsearch.model.training import LinearStart
from foldsearch.paths import printable
from foldsearch.plan.result import Healing
from foldsearch.progress import StageProgress, counting, silent
from foldsearch.record import Trial, begun_as, read_trial
from foldsearch.run import Run, TrialFolder
from foldsearch.shipped import Split, judged

HEALING = "healing"  # of what is told with the start of a trial


def folded_model(
    trial: Trial, context: TrialContext, folder: TrialFolder, say: StageProgress
) -> PreTrainedModel:
    """The model that the training of a folder begins with.

    It is the folded model, and what was fitted for it, and healed in it, is kept in the trial's folder; where a trial
    is trained further, its model as the run left it.

    Raises:
        RunError: a trial that is trained further cannot be rebuilt.
    """
    if folder.before is not None:
        return _recovered(context, folder.before)[0]
    bench = open_workbench(context, say)
    path = folder.start
    # A trial that was killed before its first result, and whose number another plan has by now, left its own.
    if path.exists() and read_words(path).get("of") == begun_as(trial):
        return fold(bench.dense, trial.plan, read_tensors(path))
    text, settings = bench.fit_text(context.study.starts.tokens), context.study.healing
    # What runs deeper than the dense model is to become better than it, not more like it.
    heals = settings.tokens > 0 and not trial.plan.is_extension
    linear: LinearStart | None = context.study.starts.linear
    if heals and settings.method == "ridge" and linear == "ridge":
        linear = None  # healing solves it in its turn, on the states that it will read
    model, found = folded_start(
        text,
        trial.plan,
        adapters=trial.fold.adapter_start or "zero",
        fit=FitSettings(linear=linear),
        progress=say,
    )
    values = new_values(model)
    if heals and METHODS[settings.method].can_heal(model):
        healed, healing = _heal(model, context, say)
        values, found = values | healed, found | {HEALING: to_json(healing)}
    # A start that was let go of is made again, but not written again: nobody measured this file.
    if found and path.name not in trial.files:
        write_tensors(path, values, {"found": json.dumps(found), "of": begun_as(trial)})
    return model


def _heal(
    model: PreTrainedModel, context: TrialContext, say: StageProgress
) -> tuple[dict[str, Tensor], Healing]:
    """Heal a folded model in place; what is new in it, and what is told of it."""
    began = time.perf_counter()
    settings = context.study.healing
    text = open_workbench(context).fit_text(settings.tokens)
    states = text.states_in_order(counting(say, "residual states"))
    healed = METHODS[settings.method].heal(model, states, text.ids_NT, counting(say, "healing"))
    positions = healed.positions
    healing = Healing(
        tokens=healed.tokens,
        solved=len(positions),
        changed=sum(position.ridge is not None for position in positions),
        before=sum(position.before for position in positions) / len(positions),
        after=sum(position.after for position in positions) / len(positions),
        seconds=time.perf_counter() - began,
        method=settings.method,
    )
    return healed.values, healing


def healing_of(folder: TrialFolder) -> Healing | None:
    """What healing did to the model of a trial's folder, once that was folded; None where it did nothing."""
    if not folder.start.exists():
        return None
    found = json.loads(read_words(folder.start)["found"]).get(HEALING)
    return from_json(Healing, found) if found else None


def trained_before(folder: TrialFolder) -> int:
    """Tokens that the model which the training of a folder begins with had been trained on."""
    known = read_trial(folder.before) if folder.before is not None else None
    return 0 if known is None else known.last.recovery_tokens


def attached(model: PreTrainedModel, trial: Trial, context: TrialContext) -> dict[str, nn.Parameter]:
    """Make a trial's model trainable in place; the trained parameters by name."""
    how = trial.recovery
    return attach(model, how.delta_rank, context.study.seed, trains=how.trains)


def kept_model(trial: Trial, context: TrialContext, folder: TrialFolder, kept_tokens: int) -> PreTrainedModel:
    """A trial's model at the state that it keeps, what was trained not merged yet."""
    model = folded_model(trial, context, folder, silent)
    if kept_tokens > trained_before(folder):
        load_trained(attached(model, trial, context), folder.recovered)
    return model


def latest_folder(run: Run, number: int) -> TrialFolder:
    """The folder that holds a trial's state with the most training: that of `further`, where it was trained further."""
    folder = run.trial(number)
    return folder.further if folder.further.record.exists() else folder


def recovered_model(context: TrialContext, number: int) -> tuple[PreTrainedModel, Trial]:
    """The model of a finished trial at the best of its states so far, what was trained merged, and the trial.

    Where it was trained beyond the run's last rung, that counts.

    Raises:
        RunError: the trial was not measured, or its weights are gone.
    """
    return _recovered(context, latest_folder(context.run, number))


def _recovered(context: TrialContext, folder: TrialFolder) -> tuple[PreTrainedModel, Trial]:
    trial = read_trial(folder)
    name = f"trial {int((folder.before or folder).path.name)}"
    if trial is None or not trial.results:
        raise RunError(
            f"only a trial that was measured can be rebuilt, but {name} of '{printable(context.run.path)}' was not."
        )
    kept_tokens, rung = trial.last.kept_tokens, len(trial.results) - 1
    if kept_tokens > trained_before(folder):
        if not folder.recovered.exists():
            raise RunError(f"{name} was trained, but {printable(folder.recovered)} is gone. Run it again.")
        if is_ahead(trial, folder):
            remedy = "Resume the run first." if folder.before is None else "Go on with `foldsearch recover`."
            raise RunError(
                f"{name} was stopped while rung {rung + 1} was measured: its weights are of that rung, its last result "
                f"is of rung {rung}. {remedy}"
            )
    check_state(trial, folder)
    return merge(kept_model(trial, context, folder, kept_tokens)), trial


def check_state(trial: Trial, folder: TrialFolder) -> None:
    """Check that the files from which a trial's model is rebuilt are as they were when its last result was measured.

    Raises:
        RunError: one was changed.
    """
    for path in (folder.start, folder.recovered):
        ours = trial.files.get(path.name)
        if path == folder.recovered and is_ahead(trial, folder):
            continue  # the trial was killed between its training and its result
        if ours is not None and path.exists() and (theirs := file_hash(path)) != ours:
            raise RunError(
                f"a trial is rebuilt only from what it was measured with: '{printable(path)}' had the hash {ours[:12]} "
                f"(sha256), but now has {theirs[:12]}. Put the old file back, or choose another trial."
            )


def is_ahead(trial: Trial, folder: TrialFolder) -> bool:
    """Whether the trained weights on disk have seen other tokens than the last result says."""
    try:
        return saved_tokens(folder.recovered) != trial.last.kept_tokens
    except DamagedFileError:
        return False


# What rounding alone may change in a mean over thousands of tokens, in nats, and as a share of a KL above 1: another
# processor sums in another order. Measured on SmolLM2 between AVX512 and AVX2: 1e-7 in float32; in bfloat16 2e-4 of
# the KL and 1e-3 of the loss.
ROUNDING = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A rebuilt model beside what was recorded when it was measured, on the same tokens.

    tokens: "report", or "search" where a trial was not measured on those. tolerance: of the KL and of the mean
    next-token loss, in nats; 0 where the same machine computes both, which is to give the same numbers.
    """

    tokens: str
    recorded_kl: float
    found_kl: float
    recorded_perplexity: float
    found_perplexity: float
    tolerance: float

    def faults(self) -> Iterator[str]:
        """What differs by more than rounding, in words."""
        if not abs(self.found_kl - self.recorded_kl) <= self.tolerance * max(1.0, abs(self.recorded_kl)):
            yield f"its KL is {self.found_kl:.6g}, recorded were {self.recorded_kl:.6g}"
        if not abs(math.log(self.found_perplexity) - math.log(self.recorded_perplexity)) <= self.tolerance:
            yield f"its perplexity is {self.found_perplexity:.6g}, recorded were {self.recorded_perplexity:.6g}"


def check_rebuilt(
    context: TrialContext, number: int, model: PreTrainedModel, recorded: Trial | None = None
) -> Rebuilt:
    """Judge a rebuilt model, and compare it with the figures that were recorded when it was measured.

    Args:
        context: of the run.
        number: of the trial.
        model: what `recovered_model` rebuilt.
        recorded: the trial as the run's study has it, which must say the same; None outside a run.

    Raises:
        VerificationError: the figures differ by more than rounding.
        RunError: the study differs from what the trial's folder holds.
    """
    folder = latest_folder(context.run, number)
    trial = read_trial(folder)
    assert trial is not None
    last = trial.last
    if recorded is not None:
        of_run = replace(
            trial, results=trial.results[: len(recorded.results)]
        )  # it may have been trained further
        if (recorded.quality, recorded.last.report) != (of_run.quality, of_run.last.report):
            raise RunError(
                f"a trial has one result, but '{printable(folder.record)}' says KL {of_run.final.kl:.6g}, and the "
                f"run's study says KL {recorded.final.kl:.6g}. Put the old files back, or choose another trial."
            )
    tokens: Split = "report" if last.report else "search"
    told = trial.final
    here, threads = Machine.here(context.device), torch.get_num_threads()
    if trial.machine is not None and trial.machine.kind == here.kind:
        torch.set_num_threads(trial.machine.threads)
        here = replace(here, threads=trial.machine.threads)
    try:
        found = judged(model, context, tokens, context.target.storing(trial.types))
    finally:
        torch.set_num_threads(threads)
    # A figure of before the latest step, which hurt, may be of another machine; a GPU sums in any order.
    is_latest = trial.last.report is not None or trial.last.setback is None
    same = here == trial.machine and is_latest and context.device == "cpu"
    rebuilt = Rebuilt(
        tokens,
        told.kl,
        found.kl,
        told.perplexity,
        found.perplexity,
        0.0 if same else ROUNDING[context.files.dtype],
    )
    if faults := list(rebuilt.faults()):
        raise VerificationError(
            f"the rebuilt model of trial {number} is not the one that was measured: on the {tokens} tokens "
            f"{'; '.join(faults)} (tolerance {rebuilt.tolerance:g} nats). Nothing was written. If foldsearch, "
            "torch and transformers are the versions that the run was made with, please report it with the plan."
        )
    return rebuilt
