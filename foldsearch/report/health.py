"""Whether a search can be believed, in sentences: against its baselines, its ranges, its rungs and its foresight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from foldsearch.fates.drop import Drop
from foldsearch.plan.front import hypervolume
from foldsearch.plan.plan import FoldPlan
from foldsearch.record import Trial, point, point_of
from foldsearch.report.view import Agreement, RunView, rank_correlation
from foldsearch.search.chain import DROPPED, KEPT, ChainFit, code_of

LOW_AGREEMENT = 0.7  # rank correlation, below which two measurements disagree
NEAR_END = 0.1  # of a range, on its scale: what is nearer to an end is at the end
FEWEST = 3  # trials, or plans, that a sentence is about
LARGER = 5  # dropped blocks, from which on plans are foretold


def health(view: RunView) -> list[str]:
    """Sentences about a run that has a front."""
    return [*_against_baselines(view), *_at_an_end(view), *_disagreeing(view), *_growth(view)]


def _against_baselines(view: RunView) -> Iterator[str]:
    """The front's plans that no simple baseline gives, against the best baseline of about the same cost or less."""
    found = [trial for trial in view.front if not view.baseline(trial)]
    gains = [gain for trial in found if (gain := view.gain(trial)) is not None]
    if not view.baselines:
        yield "No simple baseline was trained, so nothing says what the search is worth."
    elif not found:
        yield "The search found nothing on the front beside the simple baselines."
    elif not gains:
        yield (
            f"No simple baseline of about the cost of the {len(found)} other plans on the front, or less, was trained, "
            "so nothing says what the search is worth."
        )
    else:
        better, alone = sum(gain < 0 for gain in gains), len(found) - len(gains)
        most = f" to {max(gains):+.3f}" if len(gains) > 1 else ""
        yield (
            f"Of the plans on the front that no simple baseline gives, {better} of {len(gains)} "
            f"{'has' if better == 1 else 'have'} a lower report KL "
            f"than the best baseline of about their cost or less (Δ KL {min(gains):+.3f}{most})"
            + (f"; for {alone} more no baseline of such a cost was trained." if alone else ".")
        )


def _at_an_end(view: RunView) -> Iterator[str]:
    """Settings of the front's trials that lie at an end of what the space allows."""
    space = view.folder.study.space
    low, high = space.recover.learning_rate
    rates = [
        math.log(trial.recovery.learning_rate / low) / math.log(high / low)
        for trial in view.front
        if high > low and trial.proposal is not None and trial.proposal.origin in ("sampler", "neighbour")
    ]
    for name, at_end in (
        ("lower", [rate < NEAR_END for rate in rates]),
        ("upper", [rate > 1 - NEAR_END for rate in rates]),
    ):
        if len(rates) >= FEWEST and sum(at_end) > len(rates) / 2:
            yield (
                f"{sum(at_end)} of {len(rates)} learning rates that were chosen for the front are at the {name} end of "
                f"space.recover.learning_rate ({low:g} to {high:g}): widen it."
            )
    most = space.counts(view.folder.num_blocks)[1]
    smallest = min(view.front, key=lambda trial: trial.cost.memory_bytes)
    if (removed := _num_removed(smallest)) >= most:
        yield (
            f"The smallest plan of the front removes as many blocks as the space allows ({removed}): for smaller ones "
            "raise space.removal."
        )


def _num_removed(trial: Trial) -> int:
    """Blocks that were removed, whatever took their place; of a plan that was given, without those that are shared."""
    return len(Drop.undo(trial.plan)[0]) if trial.removed is None else trial.removed.count


def _disagreeing(view: RunView) -> Iterator[str]:
    for one in view.agreements:
        if one.correlation < LOW_AGREEMENT:
            yield (
                f"{one.between.capitalize()} order {one.plans} plans differently (rank correlation "
                f"{one.correlation:.2f}): what was stopped early may have been good. Raise halving.keep, or measure "
                "on more text."
            )
    drops = {one.plan: one.quality.kl for one in view.screened if one.plan.only_drops}
    if (told := foretelling(drops, view.folder.num_blocks)) is not None:
        yield (
            f"The sum over blocks that asked for plans foretells those of equal counts with a rank correlation of "
            f"{told.correlation:.2f} ({told.plans} plans of {LARGER} and more dropped blocks, each left out in turn)."
        )


def foretelling(known: dict[FoldPlan, float], num_blocks: int) -> Agreement | None:
    """How the chain's figure of a plan that it was not fitted to agrees with what was measured, at equal counts.

    Equal counts: what is left of both logarithms after a line in the logarithm of the count.

    Args:
        known: the KL of plans that only drop blocks.
        num_blocks: of the dense model.

    Returns:
        None where there are too few plans.
    """
    codes = {code: kl for plan, kl in known.items() if (code := code_of(plan)) is not None}
    left_out = ChainFit(KEPT + DROPPED, num_blocks, codes).left_out()
    larger = [code for code in codes if code.count(DROPPED) >= LARGER]
    if len(larger) < FEWEST:
        return None
    counts = np.log([code.count(DROPPED) for code in larger])
    line = np.vstack([np.ones_like(counts), counts]).T

    def rest(values: Sequence[float]) -> list[float]:
        logs = np.log(np.maximum(values, 1e-4))
        return list(logs - line @ np.linalg.lstsq(line, logs, rcond=None)[0])

    told, measured = ([of[code] for code in larger] for of in (left_out, codes))
    return Agreement("the chain and plans", len(larger), rank_correlation(rest(told), rest(measured)))


def _growth(view: RunView) -> Iterator[str]:
    """The hypervolume of the front after more and more trials."""
    ended = len(view.finished)
    if ended < FEWEST:
        return
    quarters = [max(1, round(part * ended)) for part in (0.25, 0.5, 0.75, 1)]
    volumes = hypervolumes(view, [*quarters, ended - FEWEST + 1])
    grows = volumes[-2] > volumes[-1]
    yield (
        f"Hypervolume of the front after each quarter of the {ended} plans that reached the last rung: "
        f"{' → '.join(f'{one:.3f}' for one in volumes[:-1])}; it {'still grew' if grows else 'did not grow'} in the "
        f"last {FEWEST - 1}."
    )


def hypervolumes(view: RunView, numbers: Iterable[int]) -> list[float]:
    """Of the fronts of the first so many trials that reached the last rung.

    In the run's objectives: search KL as a share of the highest that any reached, what is paid as a share of what the
    dense model costs; up to 1 in each.

    Args:
        view: of the run.
        numbers: of trials, in the order of their numbers.
    """
    objectives, folder = view.folder.study.objectives, view.folder
    ended: list[Trial] = sorted(view.finished, key=lambda trial: trial.number)
    highest = max((trial.quality.kl for trial in ended), default=1.0) or 1.0
    timed = folder.timed_dense
    dense = replace(folder.dense, prompt_ms=timed.prompt_ms, decode_ms=timed.decode_ms)
    whole = point_of(highest, dense, objectives)
    points = [
        tuple(value / one for value, one in zip(point(trial, objectives), whole, strict=True))
        for trial in ended
    ]
    return [hypervolume(points[:number], (1.0,) * len(whole)) for number in numbers]
