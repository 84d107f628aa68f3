"""What every fate of removed blocks must do, whichever it is; and that a new one costs one file and one line."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from foldsearch.bound import lower_bound
from foldsearch.context import TrialContext
from foldsearch.errors import PlanError
from foldsearch.fates import FATES, Fate, FateTable, fate_named
from foldsearch.plan.cost import price
from foldsearch.proposal import Proposal, fold_plan
from foldsearch.runtimes import RUNTIMES
from foldsearch.spec.space import Space
from foldsearch.trial import run_trial
from tests.contexts import tiny_context
from tests.proposals import removing
from tests.tiny import NUM_BLOCKS, save_model, write_corpus

NAMES = [fate.name for fate in FATES]
WIDE: dict[str, dict[str, Any]] = {  # tables with a choice of everything
    "children": {"ranks": (0, 2, 4), "starts": ("zero", "svd", "data")},
    "replace": {"kinds": ("linear", "ffn", "swiglu", "layer")},
}


def wide_table(fate: type[Fate]) -> FateTable:
    return fate.table(**WIDE.get(fate.table.key, {}))


class Script:
    """Suggestions by a list of numbers: the n-th answer is the option of the n-th number."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = list(numbers)

    def integer(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        return low + step * (self.numbers.pop(0) % ((high - low) // step + 1))

    def number(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return low

    def choice(self, name: str, options):  # type: ignore[no-untyped-def]
        return options[self.numbers.pop(0) % len(options)]


def every_fate(table: FateTable) -> list[Fate]:
    """All that it proposes: every combination of the first answers of two questions, of four options at most."""
    return list(dict.fromkeys(table.propose(Script(pair)) for pair in itertools.product(range(4), repeat=2)))


EVERY = [one for fate in FATES for one in every_fate(wide_table(fate))]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> TrialContext:
    return tiny_context(tmp_path_factory.mktemp("fates"), space=Space(removal=(0.0, 1.0)))


def test_the_list() -> None:
    """Spaces tell fates apart by name and table."""
    keys = [fate.table.key for fate in FATES if fate.table.key]
    for values in (NAMES, keys):
        assert len(set(values)) == len(values)
    assert set(keys) <= Space.model_fields.keys()
    assert all(fate.source for fate in FATES)
    assert all(fate.table.unused for fate in FATES if fate.table.key)


@pytest.mark.parametrize("fate", EVERY, ids=str)
def test_a_plan_tells_what_was_removed(fate: Fate) -> None:
    """`undo` is the inverse of `slots`, for every set of blocks; the plan is lawful, or it would not be made."""
    for count in range(1, NUM_BLOCKS):
        for blocks in itertools.combinations(range(NUM_BLOCKS), count):
            kept = next(block for block in range(NUM_BLOCKS) if block not in blocks)
            bases = dict.fromkeys(blocks, kept)
            plan = fold_plan(blocks, removing("window", count, fate).fold, NUM_BLOCKS, bases=bases)
            removed, found = fate.undo(plan)
            assert removed == blocks
            assert found == (bases if fate.needs_bases else {})


@pytest.mark.parametrize("fate", EVERY, ids=str)
def test_no_plan_is_below_the_bound(context: TrialContext, fate: Fate) -> None:
    """The bound knows the count alone; the price of every plan is the oracle."""
    for count in range(1, NUM_BLOCKS):
        proposal = removing("window", count, fate)
        bound = lower_bound(proposal, context.table, context.target)
        for blocks in itertools.combinations(range(NUM_BLOCKS), count):
            kept = next(block for block in range(NUM_BLOCKS) if block not in blocks)
            plan = fold_plan(blocks, proposal.fold, NUM_BLOCKS, bases=dict.fromkeys(blocks, kept))
            exact = price(plan, context.table, context.target)
            assert bound.memory_bytes <= exact.memory_bytes
            assert bound.flops <= exact.flops


@pytest.mark.parametrize("fate", EVERY, ids=str)
def test_json_round_trip(fate: Fate) -> None:
    proposal = removing("window", 2, fate)
    assert Proposal.from_json(json.loads(json.dumps(proposal.to_json()))) == proposal


@pytest.mark.parametrize("fate", FATES, ids=NAMES)
def test_its_table(context: TrialContext, fate: type[Fate]) -> None:
    table, every = wide_table(fate), every_fate(wide_table(fate))
    assert {type(one) for one in every} == {fate}
    assert table.size() == len(every)
    for one in every:
        nearest = list(table.nearest(one))
        assert nearest[0] == one
        assert set(nearest) <= set(every)
    costs = {one: lower_bound(removing("window", 2, one), context.table, context.target) for one in every}
    cheapest = set(table.cheapest())
    for term in ("memory_bytes", "flops"):  # one of the cheapest is the cheapest
        least = min(getattr(cost, term) for cost in costs.values())
        bounds = (lower_bound(removing("window", 2, one), context.table, context.target) for one in cheapest)
        assert min(getattr(cost, term) for cost in bounds) == least


@pytest.mark.parametrize("fate", FATES, ids=NAMES)
def test_what_a_runtime_is_offered_it_holds(fate: type[Fate]) -> None:
    """Oracle: the refusal by which an export is refused."""
    table = wide_table(fate)
    for runtime in RUNTIMES:
        held = table.held(runtime.cannot)
        offered = set(every_fate(held)) if held is not None else set()
        for one in every_fate(table):
            plan = fold_plan([2], removing("window", 1, one).fold, NUM_BLOCKS, bases={2: 0})
            assert (runtime.refusal(plan) is None) == (one in offered), (runtime.name, one)
        assert bool(table.lost(runtime.cannot)) == (offered != set(every_fate(table)))


@pytest.mark.parametrize("fate", FATES, ids=NAMES)
def test_a_trial_builds_trains_and_measures_it(context: TrialContext, fate: type[Fate]) -> None:
    one = every_fate(fate.table())[0]
    proposal = removing("window", 2, one, delta_rank=2)
    *_, last = run_trial(proposal, context, number=100 + NAMES.index(fate.name))
    assert last.is_measured
    assert last.last.recovery_tokens == 64
    assert len(one.undo(last.plan)[0]) == 2


def test_an_unknown_fate_is_told() -> None:
    with pytest.raises(PlanError, match=f"one of {', '.join(NAMES)}; got 'burn'"):
        fate_named("burn")


FATE = '''
"""Removed blocks keep their MLP: only their attention goes."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from foldsearch.fates.contract import Bound, Fate, FateTable
from foldsearch.plan.plan import Slot


class Halves(FateTable):
    """every: which of the removed blocks keep it, 1 all of them, 2 every second one."""

    key: ClassVar[str] = "halves"
    unused: ClassVar[str] = "no block is halved"
    every: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)

    def propose(self, suggest):
        return Halve(suggest.choice("halve_every", self.every))

    def cheapest(self):
        yield Halve(max(self.every))

    def size(self):
        return len(set(self.every))

    def held(self, cannot):
        return None if "half block" in cannot else self

    def lost(self, cannot):
        return "space.fates 'halve'" if "half block" in cannot else ""


@dataclass(frozen=True, slots=True)
class Halve(Fate):
    every: int

    name = "halve"
    source = "ours"
    table = Halves

    @property
    def title(self):
        return "halves"

    def slots(self, removed, bases):
        return [Slot(block, None, block) for block in removed[:: self.every]]

    @classmethod
    def undo(cls, plan):
        halved = (slot.home for slot in plan.slots if isinstance(slot, Slot) and slot.attention is None)
        return tuple(sorted({*plan.dropped, *halved})), {}

    def bound(self, count, table):
        kept = -(-count // self.every)
        mlps = [block.mlp for block in table.blocks]
        return Bound(parameters=kept * min(m.weights for m in mlps), macs=kept * min(m.macs for m in mlps))
'''
RECIPE = """
import sys
from foldsearch import fates
from halve import Halve

fates.FATES.append(Halve)  # the line

from pathlib import Path

from foldsearch.bound import lower_bound
from foldsearch.draft import choose_plan
from foldsearch.plan.cost import Budget, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.prepare import prepare_context
from foldsearch.progress import silent
from foldsearch.proposal import Fold, Proposal, Removed
from foldsearch.report.view import author
from foldsearch.spec.fit import narrow, size, smallest
from foldsearch.spec.load import load_space
from foldsearch.spec.propose import RandomSuggest, baseline, propose
from foldsearch.spec.study import SplitSettings, Study
from foldsearch.spec.unused import unused_settings
from foldsearch.trial import run_trial

place = Path(sys.argv[1])
space = load_space(place / "space.toml")  # a person writes it
study = Study(
    model=str(place / "model"), data=str(place / "corpus.txt"), space=space, rungs=(0, 64), precision="float32",
    splits=SplitSettings(sequence_length=32, search=2, recovery=4, report=2),
)
context = prepare_context(study, place / "run", cache_dir=place / "cache")
table, target = context.table, context.target
assert size(space, 5) == 4 * 2  # counts 1 to 4
assert baseline(space, "uniform", 2, 5).fold == Fold(Removed("uniform", 2, Halve(1)))
least = smallest(space, table, target)[1]
assert narrow(space, table, target, Budget(memory_bytes=least.memory_bytes)).counts(5) == (4, 4)
assert Halve.undo(FoldPlan.parse("0 1m 2 4", 5)) == ((1, 3), {})  # what chose the blocks is told from the plan
for seed in range(20):  # a search proposes it, and prices it before it is drafted
    proposal = propose(RandomSuggest(seed), space, 5)
    assert isinstance(proposal.removed.fate, Halve)
    assert Proposal.from_json(proposal.to_json()) == proposal
    plan = choose_plan(proposal.fold, context, silent).plan
    assert lower_bound(proposal, table, target).memory_bytes <= price(plan, table, target).memory_bytes
assert author(proposal) == "uniform → halves"  # reports name it
*_, last = run_trial(Proposal(Fold(Removed("uniform", 2, Halve(1)))), context, number=0)  # a trial builds it
assert last.is_measured and str(last.plan) == "0 1m 2 3m 4", last
plain = study.model_copy(update={"space": space.model_copy(update={"fates": ("drop",)})})
(words,) = unused_settings(plain)
assert words == "space.halves.every does not apply: the space's fates do not name 'halve', so no block is halved."
stock = study.model_copy(update={"target": study.target.model_copy(update={"runtime": "stock"})})
assert any(words.startswith("space.fates 'halve'") for words in unused_settings(stock))
print("followed")
"""


def test_a_new_fate_is_a_file_and_a_line(tmp_path: Path) -> None:
    """CONTRIBUTING's recipe, followed in a process of its own: spaces have their keys once they are imported."""
    (tmp_path / "halve.py").write_text(FATE)
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "space.toml").write_text(
        textwrap.dedent(
            """
            removal = [0.2, 0.8]
            criteria = ["uniform"]
            fates = ["halve"]
            [halves]
            every = [1, 2]
            """
        )
    )
    save_model(tmp_path / "model")
    write_corpus(tmp_path / "corpus.txt")
    command = [sys.executable, str(tmp_path / "recipe.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("followed")
