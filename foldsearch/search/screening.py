"""Before the trials: many plans, each healed and measured on little text in seconds; the best few are then trained.

1. every block dropped alone: what each is worth;
2. the rivals: what the quick criteria choose, at a few counts;
3. rounds: plans that a model of all measured ones asks for (see `foldsearch.search.chain`) at every count that the
   budget allows, and moves around the plans that nothing beats so far;
4. those that nothing beats at the end are promoted: the line of trials begins with them.

What is measured is kept in the cache by model and text: a run that goes on, or one with another budget, has it at once,
and pays for no plan twice. Only plans whose blocks are the dense model's are screened; what is new in other plans would
have to be fitted for each.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

from foldsearch import cache
from foldsearch.bound import lower_bound
from foldsearch.codec import from_json, to_json
from foldsearch.context import TrialContext, open_workbench
from foldsearch.criteria import CRITERIA
from foldsearch.draft import choose_blocks
from foldsearch.errors import ModelError
from foldsearch.fates import Drop
from foldsearch.model.judge import dense_targets
from foldsearch.model.screen import Screen, Threads
from foldsearch.model.states import FitText
from foldsearch.model.tokens import TokenSet
from foldsearch.plan.cost import GB, price
from foldsearch.plan.front import knee, non_dominated
from foldsearch.plan.neighbour import neighbour
from foldsearch.plan.plan import FoldPlan, Slot
from foldsearch.progress import StageProgress, counting, silent
from foldsearch.proposal import Fold, Proposal, Removed
from foldsearch.search.chain import ChainFit
from foldsearch.search.screened import Promoted, Screened, compared_criteria
from foldsearch.spec.fit import can_run
from foldsearch.spec.space import Space

ROUND = 8  # plans between two fits of the chain; sorted, so that they have their beginnings in common
MOVES = 4  # one of so many plans is a move around the front
BEST = 4  # plans of a draw that are looked at, the best first: some may be known
ANY = "uniform"  # a criterion: the bound of a plan is the same for all
TRIES = 20  # draws until a plan is found that was not measured
RIVAL_COUNTS = 3  # at which criteria are asked, over the range of the space
STAGE = "screening plans"
LENGTH = 128  # tokens of a sequence
SCHEMA = 2  # of what is kept; raise it when healing, judging, or what they read here changes


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
        self._threads = Threads()
        self._refused: set[FoldPlan] = set()
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
        key = cache.key(*parts, self._tokens.kinds.over, ids_NT.tolist())
        self._path = context.cache_dir / "screens" / f"{key}.json"
        self._screen = Screen(
            self._text, self._tokens, targets, progress=counting(progress, "residual states")
        )

    @property
    def found(self) -> list[Screened]:
        """What was measured, in order."""
        return list(self._found.values())

    def run(self) -> list[Screened]:
        """Screen; what earlier runs measured is there at once, and is not counted."""
        try:
            for plan, author in self._asked_for():
                if self._is_over():
                    break
                self._measure(plan, author)
        finally:
            self._keep()  # also where it is stopped
        return self.found

    def _asked_for(self) -> Iterator[tuple[FoldPlan, str]]:
        for batch in self._batches():
            self._keep()
            yield from sorted(batch.items(), key=lambda one: _in_order(one[0]))

    def _keep(self) -> None:
        """Put what was measured into the cache, and take over what others have measured."""

        def grow(kept: list[Any] | None) -> list[Any]:
            every = {one.plan: one for one in (from_json(Screened, value) for value in kept or [])}
            for plan, one in every.items():
                if plan in self._found:
                    for author in one.authors:
                        self._found[plan] = self._found[plan].asked_by(author)
                elif self._may_be(plan):
                    self._found[plan] = one
            return [to_json(one) for one in (every | self._found).values()]

        cache.json_grown(self._path, grow)

    def _batches(self) -> Iterator[dict[FoldPlan, str]]:
        num_blocks = len(self._context.table.blocks)
        yield {FoldPlan.dropping([block], num_blocks): "alone" for block in range(num_blocks)}
        yield dict(self._rivals())
        while batch := self._round():
            yield batch

    def _is_over(self) -> bool:
        spent = time.monotonic() - self._began
        share = max(self._num_new / self._settings.plans, spent / self._seconds)
        self._say(STAGE, min(1.0, share))
        return share >= 1

    def _measure(self, plan: FoldPlan, author: str) -> None:
        if plan in self._found:
            self._found[plan] = self._found[plan].asked_by(author)
        if plan in self._found or not can_run(plan, self._context.table, self._context.target):
            return
        try:
            with self._threads.measuring(self._screen):
                quality = self._screen.measure(plan)
        except ModelError:  # this plan has no finite figures
            self._refused.add(plan)
            return
        if math.isfinite(quality.kl):
            self._num_new += 1
            self._found[plan] = Screened(plan, (author,), quality)
        else:
            self._refused.add(plan)

    # ---- what is asked for

    def _counts(self) -> list[int]:
        fewest, most = self._space.counts(len(self._context.table.blocks))
        return [count for count in range(max(1, fewest), most + 1) if self._fits_somehow(count)]

    def _fits_somehow(self, count: int) -> bool:
        """Whether some plan that drops so many blocks may keep the budget, whichever they are."""
        proposal = Proposal(Fold(Removed(ANY, count, Drop())))
        return self._context.budget.admits(lower_bound(proposal, self._context.table, self._context.target))

    def _fits(self, plan: FoldPlan) -> bool:
        context = self._context
        return context.budget.admits(price(plan, context.table, context.target))

    def _rivals(self) -> Iterator[tuple[FoldPlan, str]]:
        """The choices of the criteria that are quick, in the space or not: they cost nothing beside what they tell."""
        counts, num_blocks = self._counts(), len(self._context.table.blocks)
        if not counts:
            return
        last = len(counts) - 1
        asked = sorted({counts[round(i * last / (RIVAL_COUNTS - 1))] for i in range(RIVAL_COUNTS)})
        for criterion in CRITERIA:
            if criterion.is_quick:
                for count in asked:
                    chosen = choose_blocks(Removed(criterion.name, count, Drop()), self._context, self._say)
                    yield FoldPlan.dropping(chosen.blocks, num_blocks), criterion.name

    def _round(self) -> dict[FoldPlan, str]:
        """Plans that were not measured yet; none where nothing more is found."""
        counts, batch = self._counts(), dict[FoldPlan, str]()
        if not counts:
            return batch
        drops = {one.plan.dropped: one.quality.kl for one in self.found if one.plan.only_drops}
        fit = ChainFit(len(self._context.table.blocks), drops)
        for index in range(ROUND):
            plan = self._moved() if index % MOVES == MOVES - 1 else self._drawn(fit, counts, batch)
            if plan is not None and plan not in batch:
                batch[plan] = "move" if index % MOVES == MOVES - 1 else "chain"
        return batch

    def _drawn(self, fit: ChainFit, counts: Sequence[int], taken: Iterable[FoldPlan]) -> FoldPlan | None:
        """The best new plan of a draw, at a count that is drawn too."""
        known = {*self._found, *self._refused, *taken}
        for _ in range(TRIES):
            count = self._rng.choice(counts)
            best = fit.draw(self._rng).best(count, keep=BEST)
            plans = (FoldPlan.dropping(blocks, len(self._context.table.blocks)) for blocks in best)
            found = next((plan for plan in plans if plan not in known and self._fits(plan)), None)
            if found is not None:
                return found
        return None

    def _moved(self) -> FoldPlan | None:
        """A plan that is one move away from one that nothing beats."""
        parents = self.front()
        known = {*self._found, *self._refused}
        for _ in range(TRIES if parents else 0):
            plan = neighbour(self._rng.choice(parents).plan, self._rng)
            if plan is not None and plan not in known and self._may_be(plan) and self._fits(plan):
                return plan
        return None

    def _may_be(self, plan: FoldPlan) -> bool:
        """Whether the plan can be screened, and is of what the space allows."""
        halves = sum(isinstance(slot, Slot) and None in (slot.attention, slot.mlp) for slot in plan.slots)
        allowed = self._space.attention_counts(plan.num_blocks, len(plan.dropped))[1]
        return (
            plan.adds_nothing
            and halves <= allowed
            and can_run(plan, self._context.table, self._context.target)
        )

    # ---- what comes of it

    def front(self) -> list[Screened]:
        """The plans of the space that fit the budget and that no other beats."""
        fewest, most = self._space.counts(len(self._context.table.blocks))
        found = [
            one for one in self.found if fewest <= len(one.plan.dropped) <= most and self._fits(one.plan)
        ]
        return [found[i] for i in non_dominated([self._point(one) for one in found])]

    def promoted(self) -> Promoted:
        """What is worth training: the best plan, the knee, others of the front at even distances in size; and a rival.

        The rival is the best of the criteria that were compared, at the count nearest to the best plan's.
        """
        front = sorted(self.front(), key=lambda one: one.quality.kl)
        if not front:
            return Promoted()
        most = self._settings.promoted
        even = [front[round(i * (len(front) - 1) / max(1, most - 1))] for i in range(most)]
        middle = front[knee([self._point(one) for one in front])]
        plans = tuple(dict.fromkeys(one.plan for one in (front[0], middle, *even)))[:most]
        wanted, compared = len(plans[0].dropped), compared_criteria(self._space)
        rivals = [
            (abs(len(one.plan.dropped) - wanted), one.quality.kl, author, len(one.plan.dropped))
            for one in self.found
            for author in one.authors
            if author in compared and self._fits(one.plan)
        ]
        return Promoted(plans, min(rivals)[2:] if rivals else None)

    def _point(self, one: Screened) -> tuple[float, float, float]:
        cost = price(one.plan, self._context.table, self._context.target)
        return one.quality.kl, cost.memory_bytes / GB, float(cost.flops)


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
    slots = (slot for slot in plan.slots if isinstance(slot, Slot))
    return tuple((slot.home, slot.attention is None, slot.mlp is None) for slot in slots)
