"""What every criterion must do, whichever it is; and that a new one costs one file and one line."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from foldsearch import criteria
from foldsearch.bound import lower_bound
from foldsearch.context import TrialContext, open_workbench
from foldsearch.criteria import CRITERIA, Choice, Criterion, Request
from foldsearch.draft import choose_plan
from foldsearch.errors import PlanError
from foldsearch.fates import Drop, Replace, Share
from foldsearch.fates.replace import runs
from foldsearch.plan.cost import price
from foldsearch.progress import silent
from foldsearch.spec.propose import propose
from foldsearch.spec.space import Space
from foldsearch.trial import run_trial
from tests.contexts import tiny_context
from tests.proposals import count_of, removing, retrained
from tests.tiny import NUM_BLOCKS

NAMES = [criterion.name for criterion in CRITERIA]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> TrialContext:
    return tiny_context(tmp_path_factory.mktemp("criteria"), space=Space(removal=(0.0, 1.0)), rungs=(0,))


@pytest.mark.parametrize("count", [1, 2, NUM_BLOCKS - 1])
@pytest.mark.parametrize("criterion", CRITERIA, ids=NAMES)
def test_the_law_of_criteria(context: TrialContext, criterion: Criterion, count: int) -> None:
    """As many blocks as were asked for, each once and in order, in no more runs than it says, always the same ones."""
    proposal = removing(criterion.name, count)
    plan = choose_plan(proposal.fold, context, silent).plan
    assert len(plan.dropped) == count
    assert list(plan.dropped) == sorted(set(plan.dropped))
    assert criterion.max_runs is None or len(list(runs(plan.dropped))) <= criterion.max_runs
    assert choose_plan(proposal.fold, context, silent).plan == plan


@pytest.mark.parametrize("criterion", NAMES)
def test_no_plan_is_below_the_bound_of_its_proposal(context: TrialContext, criterion: str) -> None:
    """The bound knows the count alone; the plan's own price is the oracle."""
    for fate in (Drop(), Share(), Replace("linear"), Replace("layer")):
        proposal = removing(criterion, 2, fate)
        plan = choose_plan(proposal.fold, context, silent).plan
        exact = price(plan, context.table, context.target)
        bound = lower_bound(proposal, context.table, context.target)
        assert bound.memory_bytes <= exact.memory_bytes
        assert bound.flops <= exact.flops


def test_the_list() -> None:
    """Reports tell criteria apart by title and marker; a space lists what each is set by."""
    for values in (NAMES, [one.title for one in CRITERIA], [one.marker for one in CRITERIA]):
        assert len(set(values)) == len(values)
    for criterion in CRITERIA:
        assert criterion.source
        assert not criterion.setting or criterion.setting_key in Space.model_fields


def test_a_new_criterion_is_a_file_and_a_line(
    context: TrialContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CONTRIBUTING's recipe, followed: the file below, and one entry of the list."""
    (tmp_path / "first_blocks.py").write_text(
        textwrap.dedent(
            '''
            """The first blocks."""

            from foldsearch.criteria import Choice, Request


            def choose(request: Request) -> Choice:
                """Blocks 0, 1, ..."""
                return Choice(tuple(range(request.count)), {"asked": request.count})
            '''
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        criteria,
        "CRITERIA",
        [*CRITERIA, Criterion("first", "first blocks", "*", "ours", max_runs=1, module="first_blocks")],
    )
    space = Space(criteria=("first",))  # a person may write it

    class Suggest:
        def integer(self, name: str, low: int, high: int, *, step: int = 1) -> int:
            return high

        def number(self, name: str, low: float, high: float, *, log: bool = False) -> float:
            return low

        def choice(self, name: str, options):  # type: ignore[no-untyped-def]
            return options[0]

    proposal = propose(Suggest(), space, NUM_BLOCKS)  # a search proposes it
    (trial,) = run_trial(retrained(proposal, delta_rank=0), context, number=77)  # a trial measures it
    assert trial.plan.dropped == tuple(range(count_of(proposal)))
    assert trial.is_measured
    assert criteria.criterion_of("first").title == "first blocks"  # pictures and tables name it
    sys.modules.pop("first_blocks", None)


@pytest.mark.parametrize("count", [0, NUM_BLOCKS, -1])
@pytest.mark.parametrize("criterion", CRITERIA, ids=NAMES)
def test_a_block_is_left(context: TrialContext, criterion: Criterion, count: int) -> None:
    with pytest.raises(PlanError, match=f"from 1 to {NUM_BLOCKS - 1} of"):
        criterion.choose(Request(open_workbench(context), count, 1))


def test_an_unknown_criterion_is_told() -> None:
    with pytest.raises(PlanError, match=r"one of gate, .* got 'magic'"):
        criteria.criterion_of("magic")


def test_a_request_needs_a_bench_and_a_count_only(context: TrialContext) -> None:
    assert criteria.criterion_of("uniform").choose(Request(open_workbench(context), 1, 1)) == Choice((2,))
