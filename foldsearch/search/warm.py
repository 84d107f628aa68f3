"""What is known before a search begins, from earlier searches of the same model and text under other budgets.

What they screened is in the cache (see `foldsearch.search.screening`), and so is the front of what they trained, with
the folder of the run. What keeps the new budget is shown before any trial. A run that is named (`warm_from`) gives
its trained plans to the new one, which begins with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from foldsearch import cache
from foldsearch.codec import from_json, to_json
from foldsearch.errors import RunError
from foldsearch.identity import Identity
from foldsearch.paths import local, printable
from foldsearch.plan.cost import GB, Cost, CostTable, Target, price
from foldsearch.plan.front import non_dominated
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.stored import DTYPE_TYPES, StoredTypes, widest_first
from foldsearch.record import Trial, front
from foldsearch.run import Run, RunFolder
from foldsearch.search.records import read_trials
from foldsearch.search.screened import Promoted, Screened
from foldsearch.spec.fit import can_run
from foldsearch.spec.study import Study

SCHEMA = 3  # of what is kept
LISTED = 5  # plans of each list that are told, at even distances of the front


@dataclass(frozen=True, slots=True)
class Trained:
    """A plan that an earlier run trained.

    kl: on the search texts. run: its folder. trial: its number there. weights: the type that it was measured in; empty
    where that is the dtype's own. kv_cache: that of its keys and values; so too.
    """

    plan: FoldPlan
    kl: float
    recovery_tokens: int
    run: str
    trial: int
    weights: str = ""
    kv_cache: str = ""

    @property
    def types(self) -> StoredTypes:
        """Of what is stored."""
        return StoredTypes(self.weights, self.kv_cache)


def trained_by(run: Run, trials: Sequence[Trial]) -> list[Trained]:
    """The front of a run's trials."""
    folder = str(run.path.absolute())
    return [
        Trained(
            one.plan,
            one.quality.kl,
            one.last.recovery_tokens,
            folder,
            one.number,
            *astuple(_rounded_to(run, one.types)),
        )
        for one in front(trials)
    ]


def _rounded_to(run: Run, types: StoredTypes) -> StoredTypes:
    target = run.target.storing(types)
    return StoredTypes(target.weights if target.rounds else "", target.kv_cache)


# ---- a run that is named


def check_warm(study: Study, table: CostTable | None = None, tokens: dict[str, str] | None = None) -> None:
    """Whether the run that a study is to begin with is there and, as far as it can be told, of the same model and text.

    Args:
        study: that may name a run.
        table: what the blocks of its model cost, where that is known.
        tokens: hashes of its token sets by their names, of those that are known.

    Raises:
        RunError: it is not.
    """
    if study.warm_from is None:
        return
    other = Run.open(local(study.warm_from))
    theirs = other.identity()
    differ = ["config"] if table is not None and table.blocks != other.table.blocks else []
    if theirs is not None and tokens is not None:
        differ += _other_tokens(tokens, theirs)
    _refuse(other, differ)


def check_warm_made(study: Study, ours: Identity) -> None:
    """Whether the run that a study is to begin with was made of the same.

    Raises:
        RunError: it was not, or does not say what it was made of.
    """
    if study.warm_from is not None:
        _check_made(Run.open(local(study.warm_from)), ours)


def _check_made(other: Run, ours: Identity) -> None:
    if (theirs := other.identity()) is None:
        raise RunError(
            "a search takes over from a run that says what it was made of, but there is no identity.json in "
            f"'{printable(other.path)}'. Leave --warm-from out."
        )
    parts = ("weights", "config")
    differ = [part for part in parts if getattr(ours.content, part) != getattr(theirs.content, part)]
    _refuse(other, [*differ, *_other_tokens(ours.tokens, theirs)])


def _other_tokens(tokens: dict[str, str], theirs: Identity) -> list[str]:
    return [f"{name} tokens" for name, known in tokens.items() if known != theirs.tokens.get(name)]


def _refuse(other: Run, differ: list[str]) -> None:
    if differ:
        raise RunError(
            f"a search takes over from a run of the same model and texts, but '{printable(other.path)}' was made with "
            f"other {', '.join(differ)}. Name a run of this model, data and [splits], or leave --warm-from out."
        )


def warm_plans(run: Run) -> list[Trained]:
    """What the run that the study names has trained, and keeps the budget of this one in some type, the best first;
    nothing where none is named.

    Raises:
        RunError: there is no such run, or it is of another model or text.
    """
    if run.study.warm_from is None:
        return []
    if (ours := run.identity()) is None:
        raise RunError(
            "a run takes over from another one when it says what it was made of, but there is no identity.json in "
            f"'{printable(run.path)}'. Leave --warm-from out."
        )
    # Where it lay when the run began, whatever the current folder is by now.
    other = Run.open(ours.path_of(run.study.warm_from, run.path) or local(run.study.warm_from))
    _check_made(other, ours)
    found = [one for one in trained_by(other, read_trials(other)) if _keeps_budget(run, one.plan, run.target)]
    # What keeps the budget only in a narrower type than it was measured in will be worse than its KL says.
    return sorted(
        found, key=lambda one: (not _keeps_budget(run, one.plan, _target_of(run, one.types)), one.kl)
    )


def begun_with(promoted: Promoted, trained: Sequence[Trained], most: int) -> Promoted:
    """What a run begins with: up to half of it the first of what an earlier run trained, the rest as screened."""
    if not trained:
        return promoted
    best = [one.plan for one in trained]
    taken = best[: max(1, most // 2) if promoted.plans else most]
    return replace(promoted, plans=tuple(dict.fromkeys((*taken, *promoted.plans)))[:most])


# ---- the cache


def keep_trained(run: Run, trials: Sequence[Trial], cache_dir: Path) -> None:
    """Put the front of a run into the cache, in place of what the same run had put there."""
    found, path = trained_by(run, trials), _path(run, cache_dir)
    if path is None or not found:
        return

    def grow(kept: list[Any] | None) -> list[Any]:
        folder = str(run.path.absolute())
        return [*(one for one in kept or [] if one["run"] != folder), *map(to_json, found)]

    cache.json_grown(path, grow)


def known_trained(run: Run, cache_dir: Path) -> list[Trained]:
    """What of the cache keeps the run's budget, of the same model and search texts."""
    path = _path(run, cache_dir)
    if path is None or not path.exists():
        return []
    kept: list[Any] = cache.json_grown(path, lambda known: known or [])
    known = [from_json(Trained, value) for value in kept]
    ours = {_rounded_to(run, types) for types in run.study.space.types}
    return [
        one for one in known if one.types in ours and _keeps_budget(run, one.plan, _target_of(run, one.types))
    ]


def _path(run: Run, cache_dir: Path) -> Path | None:
    identity = run.identity()
    if identity is None:
        return None
    parts = (identity.content.weights, identity.content.config, identity.dtype, identity.tokens["search"])
    return cache_dir / "trained" / f"{cache.key(SCHEMA, *parts, run.study.kinds.objective)}.json"


# ---- in words


def known_words(run: Run, screened: Iterable[Screened], trained: Iterable[Trained]) -> str:
    """What is known within the budget: the fronts of what was trained and of what was screened; empty if nothing is."""
    kept = [(one, _target_of(run, one.types)) for one in dict.fromkeys(trained)]
    kept = [(one, target) for one, target in kept if _keeps_budget(run, one.plan, target)]
    lists = (
        ("trained", [(one.plan, one.kl, _where(one, run), target) for one, target in kept]),
        (
            "screened, KL of little text",
            [(one.plan, one.quality.kl, "", _widest_target(run, one.plan)) for one in screened],
        ),
    )
    lines = []
    for title, every in lists:
        points = [(kl, cost.memory_bytes / GB, float(cost.flops)) for cost, kl in _costs(run, every)]
        best = sorted(non_dominated(points), key=lambda i: points[i][0])
        shown = [best[round(i * (len(best) - 1) / (LISTED - 1))] for i in range(LISTED)] if best else []
        if best:
            some = f", {len(set(shown))} of these here" if len(best) > LISTED else ""
            lines.append(f"  {title}: {len(every)} plans, {len(best)} of them on their front{some}")
        for i in dict.fromkeys(shown):
            plan, kl, where, _ = every[i]
            lines.append(f"    {points[i][1]:.6g} GB  KL {kl:.3f}  {plan}  {where}".rstrip())
    return "\n".join(["known before this run, within its budget:", *lines]) if lines else ""


def _where(one: Trained, run: Run) -> str:
    """Where a plan was trained. Only its figures are left where its run is gone, or this one has taken its folder."""
    folder = Path(one.run)
    if folder == run.path.absolute() or not RunFolder(folder).study_file.is_file():
        return "of a run that is gone"
    return f"trial {one.trial} of {printable(one.run)}"


def _target_of(run: Run, types: StoredTypes) -> Target:
    """The target with what a plan was measured in; where a space has several types, no type is that of the dtype."""
    weights = types.weights or (run.target.weights and DTYPE_TYPES[run.target.dtype])
    return run.target.storing(StoredTypes(weights, types.kv_cache))


def _widest_target(run: Run, plan: FoldPlan) -> Target:
    """The target with the widest of its types in which a plan keeps the budget: a screening rounds no weights."""
    targets = [run.target.storing(types) for types in widest_first(run.study.space.types)]
    return next((target for target in targets if _keeps_budget(run, plan, target)), run.target)


def _costs(run: Run, plans: Iterable[tuple[FoldPlan, float, str, Target]]) -> list[tuple[Cost, float]]:
    return [(price(plan, run.table, target), kl) for plan, kl, _, target in plans]


def _keeps_budget(run: Run, plan: FoldPlan, target: Target) -> bool:
    """Whether a plan can run and keeps the budget, stored as the target has it."""
    return can_run(plan, run.table, target) and run.budget.admits(price(plan, run.table, target))
