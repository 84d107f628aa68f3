"""Settings of a study that change nothing, told in a sentence each: whoever set them expects otherwise.

A setting counts as set where it differs from its default, and one of a space only where that is a person's own: who
copies `default.toml` whole, or takes a space that ships, is told of nothing that they did not touch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from foldsearch.criteria import CRITERIA, Criterion, criterion_of
from foldsearch.fates import FATES, Fate, fate_named
from foldsearch.fates.replace import Networks
from foldsearch.runtimes import runtime_named
from foldsearch.spec.fit import held_part
from foldsearch.spec.load import load_space, shipped
from foldsearch.spec.study import Study

__all__ = ["unused_settings"]

MANY_BLOCKS = 1000  # of a model whose size is not known yet: any rate above 0 removes some of so many


@dataclass(frozen=True, slots=True)
class _Rule:
    """settings: dotted keys, or tables of them. applies: whether they do something in a study. why: if they do not."""

    settings: tuple[str, ...]
    applies: Callable[[Study], bool]
    why: str


def _trains(study: Study) -> bool:
    return study.rungs[-1] > 0


def _fits(study: Study) -> bool:
    """Whether anything is fitted to text before training."""
    space = study.space
    criteria = map(criterion_of, space.criteria)
    return any(one.is_fitted for one in criteria) or any(space.table(fate).is_fitted for fate in space.fates)


def _may_group(study: Study) -> bool:
    """Whether weights may be shared in groups, if the space has any."""
    space = study.space
    beside = any(fate_named(fate).has_groups for fate in space.fates)
    return space.groups.max_groups == 0 or beside or space.counts(MANY_BLOCKS)[0] == 0


def _has_linear(study: Study) -> bool:
    """Whether a linear map may take the place of blocks."""
    tables = [study.space.table(fate) for fate in study.space.fates]
    return any(isinstance(table, Networks) and "linear" in table.kinds for table in tables)


def _of_criterion(criterion: Criterion, *more: str) -> _Rule:
    """The rule for a criterion's own setting, and `more` that serve it alone."""
    return _Rule(
        (*more, f"space.{criterion.setting_key}"),
        lambda study: criterion.name in study.space.criteria,
        f"the space's criteria do not name '{criterion.name}'",
    )


def _of_fate(fate: type[Fate]) -> _Rule:
    return _Rule(
        (f"space.{fate.table.key}",),
        lambda study: fate.name in study.space.fates,
        f"the space's fates do not name '{fate.name}', so {fate.table.unused}",
    )


_RULES = (
    *(
        _of_criterion(one, *(["gates"] if one.name == "gate" else []))
        for one in CRITERIA
        if one.setting is not None
    ),
    _Rule(
        ("space.groups.group_sizes", "space.groups.start", "space.groups.adapter_ranks"),
        lambda study: study.space.groups.max_groups > 0,
        "groups.max_groups is 0, so no weights are shared in groups",
    ),
    _Rule(
        ("space.groups",),
        _may_group,
        "every plan removes blocks, and what the space's fates leave cannot be shared in groups",
    ),
    _Rule(
        ("space.criteria", "space.fates"),
        lambda study: study.space.counts(MANY_BLOCKS)[1] > 0,
        "space.removal ends at 0, so no block is removed",
    ),
    *(_of_fate(fate) for fate in FATES if fate.table.key),
    _Rule(("starts.tokens",), _fits, "nothing in the space is fitted to text"),
    _Rule(
        ("starts.linear",),
        _has_linear,
        "the space has no network of the kind 'linear'",
    ),
    _Rule(
        ("recovery", "space.recover"),
        _trains,
        "the only rung is 0, so nothing is trained",
    ),
    _Rule(
        ("space.recover.delta_ranks",),
        lambda study: "deltas" in study.space.recover.trains,
        "space.recover.trains does not name 'deltas', so no delta is trained",
    ),
    _Rule(
        ("screen",),
        lambda study: "drop" in study.space.fates or _has_linear(study) or study.screen.plans == 0,
        "the space's blocks are neither dropped nor replaced by 'linear', and nothing else is screened",
    ),
    _Rule(
        ("screen",),
        lambda study: study.healing.tokens > 0 or study.screen.plans == 0,
        "healing.tokens is 0, and plans are screened as they are healed",
    ),
    _Rule(
        ("screen",),
        lambda study: study.healing.method == "ridge" or study.screen.plans == 0 or study.healing.tokens == 0,
        "healing.method is not 'ridge', and plans are screened healed by it",
    ),
    _Rule(
        ("healing.method",),
        lambda study: study.healing.tokens > 0,
        "healing.tokens is 0, so nothing is healed",
    ),
    _Rule(
        ("screen.share", "screen.promoted", "screen.healed_tokens", "screen.judged_tokens"),
        lambda study: study.screen.plans > 0,
        "screen.plans is 0, so nothing is screened",
    ),
    _Rule(
        ("halving",),
        lambda study: len(study.rungs) > 1,
        "there is one rung only, after which every trial ends",
    ),
)


def unused_settings(study: Study, *, only: tuple[str, ...] = ()) -> tuple[str, ...]:
    """A sentence for each reason why settings of a study change nothing.

    Args:
        study: as it is run.
        only: tables whose settings are looked at; all if empty.
    """
    found = []
    ships = study.space.name in shipped("spaces") and study.space == load_space(study.space.name)
    for rule in _RULES:
        names = [name for setting in rule.settings for name in _set(study, setting)]
        if ships:
            names = [name for name in names if not name.startswith("space.")]
        if only:
            names = [name for name in names if name.startswith(only)]
        if names and not rule.applies(study):
            found.append(f"{_listed(names)} {'do' if len(names) > 1 else 'does'} not apply: {rule.why}.")
    if not only:
        found += _left_out(study)
    return tuple(found)


def _left_out(study: Study) -> Iterator[str]:
    """What the sampler or the runtime cannot do, and so leaves out of the space."""
    space = study.space
    if study.sampler == "nsga2" and space.neighbour_share > 0:
        yield (
            "space.neighbour_share does not apply: the sampler nsga2 takes no neighbours, as it crosses only what all "
            "trials have in common."
        )
    runtime = runtime_named(study.target.runtime)
    held = held_part(space, runtime.cannot)
    tables = (space.table(fate) for fate in space.fates)
    lost = [
        *(words for table in tables if (words := table.lost(runtime.cannot))),
        *(["space.attention"] if space.attention != held.attention and space.attention[1] > 0 else []),
        *(["space.groups.max_groups"] if space.groups.max_groups != held.groups.max_groups else []),
    ]
    if lost:
        yield (
            f"{_listed(lost)} {'do' if len(lost) > 1 else 'does'} not apply: "
            f"the {runtime.name} runtime runs {runtime.blocks}."
        )


def _set(study: Study, setting: str) -> Iterator[str]:
    """Dotted names of the settings at a place that differ from their defaults."""
    *tables, name = setting.split(".")
    holder: Any = study
    for table in tables:
        holder = getattr(holder, table)
    value = getattr(holder, name)
    if isinstance(value, BaseModel):
        for inner in type(value).model_fields:
            yield from _set(study, f"{setting}.{inner}")
    elif value != type(holder).model_fields[name].get_default(call_default_factory=True):
        yield setting


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
