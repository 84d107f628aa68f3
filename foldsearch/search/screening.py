"""Before the trials: many plans, each healed and measured on little text in seconds; the best few are then trained.

1. the rivals: what the quick criteria choose, at a few counts, so that a search of little time ends with the best one;
2. every block dropped alone: what each is worth;
3. rounds: a few plans at large, of sizes that the budget allows, that a regression over all measured ones asks for (see
   `foldsearch.search.chain`); most are steps from plans that nothing beats so far (see `foldsearch.search.nearby`);
4. those that nothing beats at the end are promoted: the line of trials begins with them.

What is measured is kept in the cache by model and text: a run that goes on, or one with another budget, has it at once,
and pays for no plan twice. Only plans that need no fit are screened: whole blocks and units that go, and one matrix in
each gap, which healing solves; what is new in other plans would have to be fitted for each.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, zip_longest
from typing import Any

import numpy as np

from foldsearch import cache
from foldsearch.bound import lower_bound
from foldsearch.codec import from_json, to_json
from foldsearch.context import TrialContext, open_workbench
from foldsearch.criteria import CRITERIA
from foldsearch.draft import choose_blocks
from foldsearch.errors import ModelError, PlanError
from foldsearch.fates import Drop, Fate, Replace
from foldsearch.model.judge import dense_targets
from foldsearch.model.screen import Screen
from foldsearch.model.states import FitText
from foldsearch.model.tokens import TokenSet
from foldsearch.plan.cost import price
from foldsearch.plan.front import knee, non_dominated
from foldsearch.plan.plan import FoldPlan, Slot
from foldsearch.plan.result import Quality
from foldsearch.progress import StageProgress, counting, silent
from foldsearch.proposal import Fold, Proposal, Removed
from foldsearch.record import point_of
from foldsearch.search.chain import (
    DROPPED,
    HALVES,
    KEPT,
    LINEAR,
    MLP_ONLY,
    ChainFit,
    Prices,
    code_of,
    plan_of,
)
from foldsearch.search.nearby import Nearby, steps_from
from foldsearch.search.screened import EARLIER, Promoted, Screened, compared_criteria, screened_states
from foldsearch.spec.fit import can_run, held_removal
from foldsearch.spec.space import Space
from foldsearch.spec.study import TIMES

ROUND = 8  # plans between two fits of the chain; sorted, so that they have their beginnings in common
DRAWN = 1  # of a round: asked for at large; the others are steps from plans that nothing beats
WITH_HALVES = 2  # of a round: steps that take halves of blocks too, where the space has them
MOST_STEPS = 8000  # that are looked at; of more, a sample
BEST = 8  # plans of a draw that are looked at, the best first: some may be known
GONE = (DROPPED, LINEAR)
ANY = "uniform"  # a criterion: the bound of a plan is the same for all
TRIES = 20  # draws, or steps, until a plan is found that was not measured
RIVAL_COUNTS = 3  # at which criteria are asked, over the range of the space
STAGE = "screening plans"
LENGTH = 64  # tokens of a sequence: more documents at as many tokens tell more (docs/log.md)
SCHEMA = 8  # of what is kept; raise it when healing, judging, or what they read here changes


class Screening:
    """Screens plans of a run until so many are measured, or the time for it is up."""

    def __init__(
        self,
        context: TrialContext,
        space: Space,
        *,
        seconds: float = math.inf,
        progress: StageProgress = silent,
    ) -> None:
        """Asks the dense model for its states.

        Args:
            context: of the run.
            space: narrowed to the budget.
            seconds: that the screening may take.
            progress: told how far it is.
        """
        self._context, self._space, self._say = context, space, progress
        self._began, self._seconds = time.monotonic(), seconds
        self._settings = context.study.screen
        self._rng = random.Random(context.study.seed)
        self._found: dict[FoldPlan, Screened] = {}
        self._num_new = 0
        self._refused: set[FoldPlan] = set()
        self._states = screened_states(space)
        self._whole_states = KEPT + self._whole
        self._prices = {of: list(self._prices_of(of)) for of in {self._whole_states, self._states}}
        self._most_halves = space.attention_counts(len(context.table.blocks))[1]
        self._bench = bench = open_workbench(context, progress)
        self._tokens = _some(bench.splits.search, self._settings.judged_tokens)
        targets = dense_targets(
            bench.dense,
            self._tokens,
            model_hash=context.files.content_hash,
            cache_dir=context.cache_dir,
        )
        ids_NT = _some(bench.splits.recovery, self._settings.healed_tokens).ids_NT
        self._text = FitText(bench.dense, ids_NT, context.files.content_hash, context.cache_dir)
        parts = (SCHEMA, context.files.content_hash, context.files.dtype, self._tokens.content_hash)
        kinds = self._tokens.kinds  # figures are kept by the kinds' names
        key = cache.key(*parts, kinds.names, kinds.over, ids_NT.tolist())
        self._path = context.cache_dir / "screens" / f"{key}.json"
        self._screen = Screen(
            self._text, self._tokens, targets, progress=counting(progress, "residual states")
        )

    @property
    def num_new(self) -> int:
        """How many plans this screening measured itself."""
        return self._num_new

    @property
    def found(self) -> list[Screened]:
        """What was measured, in order."""
        return list(self._found.values())

    def take_over(self) -> list[Screened]:
        """What earlier screenings of the model and the text measured, and nothing beats within the budget."""
        self._keep()
        return self.front()

    def run(self, asked: Sequence[FoldPlan] = ()) -> list[Screened]:
        """Screen; what earlier runs measured is there at once, and is not counted.

        Args:
            asked: plans to measure besides, before the search asks for any.
        """
        try:
            for batch in filter(None, self._batches(asked)):
                self._keep()
                self._measure(batch)
                if self._is_over():
                    break
        finally:
            self._keep()  # also where it is stopped
        self._found = {
            plan: one if one.authors else one.asked_by(EARLIER) for plan, one in self._found.items()
        }
        return self.found

    def _keep(self) -> None:
        """Put what was measured into the cache, and take over what others have measured."""

        def grow(kept: list[Any] | None) -> list[Any]:
            every = {one.plan: one for one in (from_json(Screened, value) for value in kept or [])}
            for plan, one in every.items():
                if plan in self._found:
                    for author in one.searchers:
                        self._found[plan] = self._found[plan].asked_by(author)
                elif self._may_be(plan):
                    # What a criterion chose there may be of another seed or device; here it is asked again.
                    self._found[plan] = replace(one, authors=one.searchers)
            return [to_json(one) for one in (every | self._found).values()]

        cache.json_grown(self._path, grow)

    def _batches(self, asked: Sequence[FoldPlan]) -> Iterator[dict[FoldPlan, tuple[str, ...]]]:
        """Plans and who asks for them, which may be several."""
        yield {plan: (EARLIER,) for plan in asked if self._may_be(plan)}
        rivals = dict[FoldPlan, tuple[str, ...]]()
        for plan, criterion in self._rivals():
            rivals[plan] = (*rivals.get(plan, ()), criterion)
        yield rivals
        yield {self._removing([block]): ("alone",) for block in range(len(self._context.table.blocks))}
        while batch := self._round():
            yield {plan: (author,) for plan, author in batch.items()}

    def _is_over(self) -> bool:
        spent = time.monotonic() - self._began
        asked = self._num_new + len(self._refused)  # also where no plan has finite figures it comes to an end
        share = max(asked / self._settings.plans, spent / self._seconds)
        self._say(STAGE, min(1.0, share))
        return share >= 1

    def _measure(self, batch: Mapping[FoldPlan, tuple[str, ...]]) -> None:
        """Measure what of a batch is not known, and note it in an order that does not depend on what ended first.

        Raises:
            ModelError: no plan so far has finite figures, and several were tried.
        """
        new = []
        for plan in sorted(batch, key=_in_order):
            if plan in self._found:
                for author in batch[plan]:
                    self._found[plan] = self._found[plan].asked_by(author)
            elif plan not in self._refused and can_run(plan, self._context.table, self._context.target):
                new.append(plan)
        new = new[: self._settings.plans - self._num_new]
        ended: dict[FoldPlan, Quality | None] = {}
        try:
            for plan, quality in self._screen.measure_each(new, self._is_over):
                ended[plan] = quality
                self._num_new += quality is not None
        finally:
            for plan in new:
                if quality := ended.get(plan):
                    self._found[plan] = Screened(plan, batch[plan], quality)
                elif plan in ended:
                    self._refused.add(plan)
        if not self._found and len(self._refused) >= ROUND:
            raise ModelError(
                f"a screening must find plans of finite figures, but none of {len(self._refused)} has: "
                f"{self._screen.fault or 'their KL is no number.'}"
            )

    # ---- what is asked for

    def _counts(self) -> list[int]:
        every = self._space.every_count(len(self._context.table.blocks))
        return [count for count in every if count and self._fits_somehow(count)]

    def _fits_somehow(self, count: int) -> bool:
        """Whether some plan that removes so many blocks may keep the budget, whichever they are."""
        proposal = Proposal(Fold(Removed(ANY, count, self._fate)))
        return self._context.budget.admits(lower_bound(proposal, self._context.table, self._context.target))

    def _fits(self, plan: FoldPlan) -> bool:
        context = self._context
        return context.budget.admits(price(plan, context.table, context.target))

    @property
    def _whole(self) -> str:
        """The state of blocks that a criterion chooses."""
        return DROPPED if DROPPED in self._states else LINEAR

    @property
    def _fate(self) -> Fate:
        return Drop() if self._whole == DROPPED else Replace("linear")

    def _removing(self, blocks: Iterable[int]) -> FoldPlan:
        num_blocks, gone = len(self._context.table.blocks), set(blocks)
        return plan_of("".join(self._whole if block in gone else KEPT for block in range(num_blocks)))

    def _rivals(self) -> Iterator[tuple[FoldPlan, str]]:
        """The choices of the criteria that are quick, in the space or not: they cost nothing beside what they tell."""
        counts = self._counts()
        if not counts:
            return
        last = len(counts) - 1
        asked = sorted({counts[round(i * last / (RIVAL_COUNTS - 1))] for i in range(RIVAL_COUNTS)})
        for criterion in CRITERIA:
            if criterion.is_quick:
                setting = self._space.middle_setting(criterion.name)
                for count in asked:
                    removed = Removed(criterion.name, count, self._fate, setting)
                    chosen = choose_blocks(removed, self._context, self._say)
                    yield self._removing(chosen.blocks), criterion.name

    def _round(self) -> dict[FoldPlan, str]:
        """Plans that were not measured yet; none where nothing more is found."""
        batch, num_blocks = dict[FoldPlan, str](), len(self._context.table.blocks)
        if not self._counts():
            return batch
        codes = {code: one.quality.kl for one in self.found if (code := self._code(one.plan)) is not None}
        whole = ChainFit(self._whole_states, num_blocks, codes)
        for _ in range(DRAWN):
            found = self._drawn(whole, batch)
            if found is not None:
                batch[found] = "chain"
        halves = WITH_HALVES if self._states != self._whole_states else 0
        for plan in self._near(whole, batch, ROUND - DRAWN - halves):
            batch[plan] = "move"
        if halves:
            for plan in self._near(ChainFit(self._states, num_blocks, codes), batch, halves):
                batch[plan] = "move"
        return batch

    def _drawn(self, fit: ChainFit, taken: Container[FoldPlan]) -> FoldPlan | None:
        """The best new plan of a draw, at a size that is drawn too."""
        for _ in range(TRIES):
            prices = self._rng.choice(self._prices[fit.states])
            whole = sorted(prices.saved_LSS[:, 0, 1])
            least = self._rng.choice(self._counts()) * int(whole[len(whole) // 2])
            for code in fit.draw(self._rng).best(prices, least, keep=BEST):
                plan = self._new(code, taken)
                if plan is not None:
                    return plan
        return None

    def _near(self, fit: ChainFit, taken: Container[FoldPlan], count: int) -> Iterator[FoldPlan]:
        """The most promising new plans a step from those that nothing beats."""
        front = {code: one.quality.kl for one in self.front() if (code := self._code(one.plan)) is not None}
        parents = [code for code in front if set(code) <= set(fit.states)]
        counts = set(self._space.every_count(len(self._context.table.blocks)))
        steps = dict.fromkeys(
            step
            for code in parents
            for step in steps_from(code, fit.states)
            if step not in fit.known and sum(map(step.count, GONE)) in counts
        )
        codes = list(steps)
        if len(codes) > MOST_STEPS:
            codes = self._rng.sample(codes, MOST_STEPS)
        if not codes:
            return
        # Each is to beat the best plan that saves as much: memory, or FLOPs.
        prices = self._rng.choice(self._prices[self._states])
        saved_F, kl_F = prices.saved_by(list(front)), np.asarray(list(front.values()))
        saves_CF = saved_F >= prices.saved_by(codes)[:, None]
        best_C = np.where(saves_CF, kl_F, 2 * kl_F.max()).min(1)  # what saves more than any is welcome
        found = 0
        for code in islice(Nearby(fit, parents).most_promising(codes, best_C), TRIES * count):
            plan = self._new(code, taken)
            if plan is not None:
                found += 1
                yield plan
            if found == count:
                return

    def _new(self, code: str, taken: Container[FoldPlan]) -> FoldPlan | None:
        """The plan, or the nearest that can run; None where it was measured, or may not be asked for."""
        try:
            plan = self._held(plan_of(code))
        except PlanError:  # nothing runs, or nothing attends
            return None
        if plan in self._found or plan in self._refused or plan in taken:
            return None
        return plan if self._may_be(plan) and self._is_of_the_range(plan) and self._fits(plan) else None

    def _held(self, plan: FoldPlan) -> FoldPlan:
        """The plan, or the nearest that drops as many blocks, where the runtime holds it only so."""
        if not plan.only_drops:
            return plan
        gone = held_removal(plan.dropped, self._context.table, self._context.target)
        return FoldPlan.dropping(gone, plan.num_blocks)

    @staticmethod
    def _num_halves(code: str) -> int:
        return sum(code.count(state) for state in HALVES)

    def _prices_of(self, states: str) -> Iterator[Prices]:
        table, target = self._context.table, self._context.target
        num_blocks = len(table.blocks)
        yield Prices.of(states, num_blocks, lambda plan: price(plan, table, target).memory_bytes)
        if states != self._whole_states:  # halves of blocks save memory and FLOPs in other shares
            yield Prices.of(states, num_blocks, lambda plan: price(plan, table, target).flops)

    def _code(self, plan: FoldPlan) -> str | None:
        """The states of a plan's blocks; None where the space has not all of them."""
        code = code_of(plan)
        return code if code is not None and set(code) <= set(self._states) else None

    def _is_of_the_range(self, plan: FoldPlan) -> bool:
        """Whether something goes, as many blocks as the space allows, and as many attentions as it asks for."""
        if plan == FoldPlan.identity(plan.num_blocks):
            return False
        num_removed = _num_removed(plan)
        least = self._space.attention_counts(plan.num_blocks, num_removed)[0]
        enough = least == 0 or (self._code(plan) or "").count(MLP_ONLY) >= least
        return enough and num_removed in self._space.every_count(plan.num_blocks)

    def _may_be(self, plan: FoldPlan) -> bool:
        """Whether the plan can be screened, and is of what the space allows."""
        code = self._code(plan)
        if code is None or not can_run(plan, self._context.table, self._context.target):
            return False
        allowed = self._space.attention_counts(plan.num_blocks, _num_removed(plan))[1]
        return self._num_halves(code) <= allowed

    # ---- what comes of it

    def front(self) -> list[Screened]:
        """The plans of the space that fit the budget and that no other beats."""
        found = [one for one in self.found if self._is_of_the_range(one.plan) and self._fits(one.plan)]
        return [found[i] for i in non_dominated([self._point(one) for one in found])]

    def promoted(self) -> Promoted:
        """What is worth training: the best plan, the knee, others of the front at even distances in size; and a rival.

        The rival is the best of the criteria that were compared, at the count nearest to the knee's, if it is not among
        the promoted itself: that would tell nothing of the search.
        """
        front = sorted(self.front(), key=lambda one: one.quality.kl)
        if not front:
            return Promoted()
        most = self._settings.promoted
        even = [front[round(i * (len(front) - 1) / max(1, most - 1))] for i in range(most)]
        middle = front[knee([self._point(one) for one in front])]
        plans = tuple(dict.fromkeys(one.plan for one in (front[0], middle, *even)))[:most]
        wanted, compared = _num_removed(middle.plan), compared_criteria(self._space)
        rivals = [
            (abs(_num_removed(one.plan) - wanted), one.quality.kl, author, _num_removed(one.plan))
            for one in self.found
            for author in one.authors
            if author in compared and one.plan not in plans
            if self._is_of_the_range(one.plan) and self._fits(one.plan)
        ]
        return Promoted(plans, min(rivals)[2:] if rivals else None)

    def _point(self, one: Screened) -> tuple[float, ...]:
        cost = price(one.plan, self._context.table, self._context.target)
        times = [name for name in self._context.study.objectives if name in TIMES]
        return point_of(one.quality.kl, cost, ("kl", "memory", "flops", *times))


def _some(tokens: TokenSet, wanted: int) -> TokenSet:
    """Short sequences of a token set, the kinds of text in turns; of a kind at even distances, so of many documents."""
    cut = tokens.cut(LENGTH)
    of_kinds = [(cut.kinds.of_N == kind).nonzero().flatten().tolist() for kind in range(len(cut.kinds.names))]
    of_kinds = [rows for rows in of_kinds if rows]
    count = max(2, len(of_kinds), wanted // cut.ids_NT.shape[1])
    chosen = []
    for number, rows in enumerate(of_kinds):
        share = min(len(rows), len(range(number, count, len(of_kinds))))
        chosen.append([rows[i * len(rows) // share] for i in range(share)])
    return cut.of([row for turn in zip_longest(*chosen) for row in turn if row is not None])


def _in_order(plan: FoldPlan) -> tuple[tuple[int, bool, bool], ...]:
    """Sorts plans so that neighbours begin alike."""
    return tuple(
        (slot.home, slot.attention is None, slot.mlp is None)
        if isinstance(slot, Slot)
        else (slot.first, True, True)
        for slot in plan.slots
    )


def _num_removed(plan: FoldPlan) -> int:
    """Blocks that are dropped, or that one matrix stands for."""
    return plan.num_blocks - sum(isinstance(slot, Slot) for slot in plan.slots)
