"""What a search proposes where not every choice of blocks can be folded, or held by the runtime.

Oracles: the table's and the runtime's own laws, on the plan of every trial; trials that were really built and measured.
"""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from foldsearch.context import TrialContext
from foldsearch.criteria import CRITERIA
from foldsearch.draft import choose_plan
from foldsearch.plan.plan import FoldPlan
from foldsearch.progress import silent
from foldsearch.proposal import Fold, Removed
from foldsearch.report.view import RunView
from foldsearch.search.proposer import Line
from foldsearch.search.records import Records
from foldsearch.search.screening import Screening
from foldsearch.spec.fit import can_run
from foldsearch.spec.space import Space
from foldsearch.spec.study import ScreenSettings, SplitSettings, TargetSettings
from foldsearch.trial import run_trial
from tests.contexts import begin_run, tiny_context, tiny_study
from tests.tiny import LLAMA, NUM_BLOCKS, save_model, tokenizer

FEW = SplitSettings(sequence_length=32, search=2, recovery=4, report=2)
NUM_DEEP = 12  # blocks of a SmolLM3 in which every fourth does not turn by position


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> TrialContext:
    """Of a model whose first and last blocks are convolutions."""
    place = tmp_path_factory.mktemp("hybrid")
    return tiny_context(place, model=save_model(place / "lfm2", "lfm2"), rungs=(0,), splits=FEW)


@pytest.mark.parametrize("criterion", [one.name for one in CRITERIA if one.is_quick])
@pytest.mark.parametrize(("count", "thinned"), [(2, 0), (2, 2), (3, 1), (4, 0)])
def test_of_a_hybrid_some_block_attends(
    hybrid: TrialContext, criterion: str, count: int, thinned: int
) -> None:
    """The tail of four would leave the last block alone, a convolution."""
    plan = choose_plan(Fold(Removed(criterion, count), None, thinned), hybrid, silent).plan
    assert hybrid.table.can_fold(plan)
    assert len(plan.dropped) == count
    assert sum(slot.attention is None for slot in plan.slots) == thinned  # type: ignore[union-attr]


def test_what_can_be_folded_is_as_the_criterion_chose_it(hybrid: TrialContext) -> None:
    plan = choose_plan(Fold(Removed("tail", 2)), hybrid, silent).plan
    assert plan == FoldPlan.parse("0-1 4", NUM_BLOCKS)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> TrialContext:
    """A search for llama.cpp, which takes every fourth block of a SmolLM3 for one that does not turn by position."""
    place = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    config = tf.SmolLM3Config(**{**LLAMA, "num_hidden_layers": NUM_DEEP})
    tf.SmolLM3ForCausalLM(config).save_pretrained(place / "smollm3")
    tokenizer().save_pretrained(place / "smollm3")
    study = tiny_study(
        place,
        model=str(place / "smollm3"),
        target=TargetSettings(runtime="gguf", dtype="float32"),
        space=Space(removal=(0.0, 0.8), criteria=("block_influence", "uniform"), fates=("drop", "replace")),
        rungs=(0,),
        splits=FEW,
        screen=ScreenSettings(plans=12, promoted=2, healed_tokens=64, judged_tokens=32),
        trials=5,
    )
    return begin_run(study, place / "run", cache_dir=place / "cache")


def test_every_trial_of_such_a_search_can_be_exported(deep: TrialContext) -> None:
    records = Records(deep.run)
    queue = Line(records)
    while (asked := queue.next(num_running=0)) is not None:
        number, proposal = asked
        for trial in run_trial(proposal, deep, number=number):
            records.record(trial)
        records.finish(number)
    view = RunView.open(deep.run.path)
    assert len(view.finished) >= 2
    assert {trial.state for trial in view.trials} <= {"finished", "repeat"}
    for trial in view.finished:
        assert can_run(trial.plan, deep.table, deep.target)
        assert trial.plan.depth in (4, 8)
        turns = [(slot.home + 1) % 4 != 0 for slot in trial.plan.slots]  # type: ignore[union-attr]
        assert turns == [(position + 1) % 4 != 0 for position in range(trial.plan.depth)]
    # two criteria, and what is near: not only the last blocks go
    assert any(trial.plan.dropped[-1] < NUM_DEEP - 1 for trial in view.finished)


def test_and_so_can_what_is_screened(deep: TrialContext) -> None:
    found = Screening(deep, deep.study.narrowed(deep.table))
    found.run()
    assert len(found.found) > 4
    assert {"chain", "move"} & {author for one in found.found for author in one.authors}
    assert all(can_run(one.plan, deep.table, deep.target) for one in found.found)
