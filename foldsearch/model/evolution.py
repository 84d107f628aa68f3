"""Which blocks or units to drop, by evolution: small changes of a plan, measured on few tokens, the better one stays.

EvoPress (arXiv 2410.14649, section 3): a (1 + λ) search. A generation makes λ offspring of one parent by level-switch
mutation, which keeps the count: something that is dropped comes back and something that runs is dropped. Offspring are
selected in stages, each on more tokens than the one before and with fewer survivors; the parent enters the last stage
only. Every stage draws its sequences anew, so that nothing is kept for being lucky on a few of them.

A plan here only drops: every unit that is present runs its own weights. Its fitness is mean KL(dense ‖ folded). The
whole-block swap beside unit swaps is ours (EvoPress swaps either blocks or units).

Shapes: N sequences, T positions, P = T − 1 predicting ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from foldsearch.errors import InputError, PlanError
from foldsearch.model.blocks import decoder_blocks
from foldsearch.model.fold import fold
from foldsearch.model.judge import DenseTargets, judge
from foldsearch.model.tokens import TokenSet
from foldsearch.plan.plan import FoldPlan, Slot
from foldsearch.progress import CountProgress

MOST_SWAPS = 3  # of one mutation
_TRIES = 50  # mutations for each offspring wanted: a small count has fewer different ones than are asked for


@dataclass(frozen=True, slots=True)
class EvolutionSettings:
    """How plans evolve.

    Attributes:
        generations: how often offspring are made and selected.
        offspring: different plans of a generation, its parent not counted.
        tokens: per stage of selection, each at least the one before. They are whole sequences: as many as fit in, at
            least one and at most all.
        survivors: per stage, each at most the one before; 1 at the end.
        units: whether single attentions and MLPs are swapped too, not whole blocks only.
        seed: of the mutations and of the sequences.
    """

    generations: int = 10
    offspring: int = 8
    tokens: tuple[int, ...] = (512, 2048)
    survivors: tuple[int, ...] = (2, 1)
    units: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.generations < 0 or self.offspring < 1:
            raise InputError(
                f"Evolution needs 0 generations or more of at least 1 offspring, but here are {self.generations} of "
                f"{self.offspring}."
            )
        if len(self.tokens) != len(self.survivors) or not self.tokens:
            raise InputError(
                "Each stage of selection has its tokens and its survivors, but here are "
                f"{list(self.tokens)} and {list(self.survivors)}. Give lists of the same length."
            )
        if self.tokens[0] < 1 or list(self.tokens) != sorted(self.tokens):
            raise InputError(
                f"A stage of selection takes at least the tokens of the one before, but here are {list(self.tokens)}. "
                "Try 512, 2048."
            )
        if self.survivors[-1] != 1 or list(self.survivors) != sorted(self.survivors, reverse=True):
            raise InputError(
                "A stage of selection keeps at most the survivors of the one before, and the last one keeps 1, but "
                f"here are {list(self.survivors)}. Try 2, 1."
            )


@dataclass(frozen=True, slots=True)
class EvolutionResult:
    """What evolution ended on.

    Attributes:
        plan: the parent after the last generation; it drops as many attentions and as many MLPs as the start.
        kl: of the plan, nats a token, when it was last measured: `history[-1]`.
        history: KL of the start that was best, then of the parent after every generation, each on that generation's
            own draw of tokens: they fall in the mean only, unless a draw takes all tokens.
        tokens: that folded models ran over, all evaluations together (forward only).
        evaluations: how often a plan was measured; one that reaches the last stage is measured in every stage.
    """

    plan: FoldPlan
    kl: float
    history: tuple[float, ...]
    tokens: int
    evaluations: int


def evolve(
    dense: PreTrainedModel,
    tokens: TokenSet,
    targets: DenseTargets,
    start: FoldPlan | Sequence[FoldPlan],
    settings: EvolutionSettings,
    *,
    progress: CountProgress | None = None,
) -> EvolutionResult:
    """Improve a plan at its count of dropped attentions and MLPs (EvoPress: see the module).

    The result is a function of the model, the tokens, the start and the settings.

    Args:
        dense: a causal language model of transformers, in eval mode; unchanged afterwards.
        tokens: what sequences are drawn from.
        targets: what the dense model says on all of `tokens`.
        start: the first parent, or several, of which the one with the lowest KL on a draw of the last stage's size
            becomes it.
        settings: how to search.
        progress: called with (generation, generations).

    Raises:
        InputError: a start does more than drop, or starts drop different counts; nothing can be swapped; there is no
            text.
        PlanError: the plans are for another number of blocks than the model has.
    """
    starts = (start,) if isinstance(start, FoldPlan) else tuple(dict.fromkeys(start))
    _check(starts, tokens, settings.units)
    rng = random.Random(settings.seed)
    fitness = _Fitness(dense, tokens, targets)

    def select(plans: Sequence[FoldPlan], num_tokens: int, survivors: int) -> dict[FoldPlan, float]:
        rows = fitness.draw(num_tokens, rng)
        kls = {plan: fitness.kl(plan, rows) for plan in plans}
        return {plan: kls[plan] for plan in sorted(kls, key=lambda plan: kls[plan])[:survivors]}

    ((parent, kl),) = select(starts, settings.tokens[-1], 1).items()
    history = [kl]
    for generation in range(settings.generations):
        plans = _offspring(parent, rng, settings)
        stages = list(zip(settings.tokens, settings.survivors, strict=True))
        for num_tokens, survivors in stages[:-1]:
            plans = list(select(plans, num_tokens, survivors))
        # Sorting is stable: of equals the parent, which comes first, stays.
        ((parent, kl),) = select([parent, *plans], *stages[-1]).items()
        history.append(kl)
        if progress is not None:
            progress(generation + 1, settings.generations)
    return EvolutionResult(parent, kl, tuple(history), fitness.tokens_done, fitness.evaluations)


def mutate(plan: FoldPlan, rng: random.Random, *, units: bool) -> FoldPlan:
    """A plan that drops as many attentions and as many MLPs, some of them others: level-switch mutation.

    One to three swaps, the lower of two even draws, so mostly one (EvoPress). Swaps may undo each other.

    Args:
        plan: only drops, and something in it can be swapped.
        rng: the draws.
        units: whether single attentions and MLPs are swapped too, not whole blocks only.
    """
    attention, mlp = set(plan.owners("attention")), set(plan.owners("mlp"))
    for _ in range(min(rng.randint(1, MOST_SWAPS), rng.randint(1, MOST_SWAPS))):
        kinds = _swaps(attention, mlp, plan.num_blocks, units)
        parts, goes, returns = rng.choice(kinds)
        gone, returned = rng.choice(goes), rng.choice(returns)
        for part in parts:
            part.remove(gone)
            part.add(returned)
    slots = [
        Slot(block, block if block in attention else None, block if block in mlp else None)
        for block in sorted(attention | mlp)
    ]
    return FoldPlan(tuple(slots), plan.num_blocks)


class _Fitness:
    """Measures plans on some of the sequences, and counts what that takes."""

    def __init__(self, dense: PreTrainedModel, tokens: TokenSet, targets: DenseTargets) -> None:
        num_sequences, length = tokens.ids_NT.shape
        assert targets.loss_NP.shape == (num_sequences, length - 1)
        self._dense = dense
        self._tokens = tokens
        self._targets = targets
        self.tokens_done = 0
        self.evaluations = 0

    def draw(self, num_tokens: int, rng: random.Random) -> list[int]:
        """Sequences, in order: a draw of all of them is the same every time, to the bit."""
        num_sequences, length = self._tokens.ids_NT.shape
        return sorted(rng.sample(range(num_sequences), min(num_sequences, max(1, num_tokens // length))))

    def kl(self, plan: FoldPlan, rows: list[int]) -> float:
        """Mean KL(dense ‖ folded) in nats a token; infinite where it is no finite number, or no such model exists."""
        tokens = self._tokens
        part = tokens.of(rows)
        try:
            model = fold(self._dense, plan)
        except PlanError:
            if plan.num_blocks != len(decoder_blocks(self._dense)):
                raise
            return math.inf  # no block attends, in a hybrid
        kl = judge(model, part, self._targets.of(rows)).kl
        self.tokens_done += part.num_tokens
        self.evaluations += 1
        return kl if math.isfinite(kl) else math.inf


def _offspring(parent: FoldPlan, rng: random.Random, settings: EvolutionSettings) -> list[FoldPlan]:
    """Different mutations of the parent: fewer than asked for where there are no more."""
    found: dict[FoldPlan, None] = {}
    for _ in range(_TRIES * settings.offspring):
        if len(found) == settings.offspring:
            break
        plan = mutate(parent, rng, units=settings.units)
        if plan != parent:
            found[plan] = None
    return list(found)


_Swap = tuple[tuple[set[int], ...], list[int], list[int]]


def _swaps(attention: set[int], mlp: set[int], num_blocks: int, units: bool) -> list[_Swap]:
    """The kinds of swap that can be made: which units, the blocks that may lose them, those that may regain them."""
    every = set(range(num_blocks))
    kinds: list[_Swap] = [((attention, mlp), sorted(attention & mlp), sorted(every - attention - mlp))]
    if units:
        kinds += [((part,), sorted(part), sorted(every - part)) for part in (attention, mlp)]
    return [kind for kind in kinds if kind[1] and kind[2]]


def _check(starts: Sequence[FoldPlan], tokens: TokenSet, units: bool) -> None:
    if not starts:
        raise InputError("Evolution starts from at least one plan, but here is none.")
    if len(tokens.ids_NT) < 1 or tokens.ids_NT.shape[1] < 2:
        raise InputError(
            f"Token ids come as (sequences, positions), at least 1 by 2, but here they are "
            f"{tuple(tokens.ids_NT.shape)}. Give longer or more text."
        )
    for plan in starts:
        if not plan.adds_nothing:
            raise InputError(
                f"Evolution swaps what is dropped, but '{plan}' shares, repeats or replaces blocks too. Start from a "
                "plan that only drops."
            )
    counts = {
        (plan.num_blocks, *(len(plan.owners(unit)) for unit in ("attention", "mlp"))) for plan in starts
    }
    if len(counts) > 1:
        shown = ", ".join(
            f"{attention} attentions and {mlp} MLPs of {blocks} blocks"
            for blocks, attention, mlp in sorted(counts)
        )
        raise InputError(
            f"Evolution keeps the count, so its starts keep the same one, but here are {shown}. Start once for each."
        )
    for plan in starts:
        attention, mlp = set(plan.owners("attention")), set(plan.owners("mlp"))
        if not _swaps(attention, mlp, plan.num_blocks, units):
            what = "units" if units else "whole blocks"
            raise InputError(
                f"Evolution swaps {what} that are dropped with {what} that run, but '{plan}' of {plan.num_blocks} "
                f"blocks leaves nothing to swap. From 1 to {plan.num_blocks - 1} of them can be dropped."
            )
