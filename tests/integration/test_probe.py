"""The largest plan is trained for a step before the first trial, so that too little memory is known early.

Oracles: what a model of the plan really trains; other random proposals; a run without a probe; errors as torch words
them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foldsearch import probe
from foldsearch.context import TrialContext, open_workbench
from foldsearch.model.fold import fold
from foldsearch.model.recover import Recovery, attach
from foldsearch.plan.cost import Budget, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.probe import probe_memory
from foldsearch.proposal import Fold, Given, Proposal, RecoveryChoice, fold_plan
from foldsearch.record import Trial
from foldsearch.search import dry_run
from foldsearch.search import run as searches
from foldsearch.search.events import Event, Notice
from foldsearch.search.messages import Measured, Probed, decode
from foldsearch.search.proposer import Line, Proposer
from foldsearch.search.records import Records
from foldsearch.search.run import TRIAL, Search, Watcher
from foldsearch.search.worker import TrialRunner
from foldsearch.spec.largest import largest_to_train, training_bytes
from foldsearch.spec.propose import RandomSuggest, propose
from foldsearch.spec.space import GroupsTable, Recover, Space
from foldsearch.spec.study import BudgetSettings, ScreenSettings, TargetSettings
from tests.contexts import begin_run, tiny_study
from tests.tiny import NUM_BLOCKS, dense_model, price_table

GROUPS = GroupsTable(max_groups=2, group_sizes=(2, 3), adapter_ranks=(0, 2))
SPACE = Space(removal=(0.0, 0.6), criteria=("window",), groups=GROUPS, recover=Recover(delta_ranks=(1, 2)))
LARGEST = Proposal(Given(FoldPlan.parse("0 1=0+r2+n 2-4", NUM_BLOCKS)), RecoveryChoice(delta_rank=2))


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> TrialContext:
    place = tmp_path_factory.mktemp("probe")
    # sharing keeps the budget with all blocks running, dropping does not
    settings: dict[str, Any] = {"budget": BudgetSettings(gb=0.00024), "screen": ScreenSettings(plans=0)}
    target = TargetSettings(dtype="float32", context=64)
    study = tiny_study(place, space=SPACE, trials=2, target=target, **settings)
    return replace(begin_run(study, place / "run", cache_dir=place / "cache"), threads=1)


# ---- which one is the largest


@pytest.mark.parametrize("text", ["0-4", "0 1=0+r2+n 2a", "0 2=0 3m 4=0+r3"])
@pytest.mark.parametrize("rank", [0, 3])
def test_what_is_trained_is_counted(text: str, rank: int) -> None:
    """Of a step of no token: the numbers in low-rank factors of a model that was made ready for training."""
    plan = FoldPlan.parse(text, NUM_BLOCKS)
    trained = attach(fold(dense_model("llama"), plan), rank)
    factors = sum(one.numel() for name, one in trained.items() if name.endswith((".up", ".down")))
    assert training_bytes(plan, RecoveryChoice(delta_rank=rank), price_table(), 0) == 16 * factors


def test_no_other_proposal_takes_more(context: TrialContext) -> None:
    space, run = Records(context.run).space, context.run
    found = largest_to_train(context.study, space, run.table, run.target, run.budget)
    assert found is not None
    assert found.plan is not None
    assert found.plan.depth == NUM_BLOCKS  # it shares, and drops nothing
    assert found.recovery.delta_rank == 2
    assert run.budget.admits(price(found.plan, run.table, run.target))
    tokens = context.study.recovery.batch * context.study.splits.sequence_length
    most, suggest, compared = (
        training_bytes(found.plan, found.recovery, run.table, tokens),
        RandomSuggest(12345),
        0,
    )
    for _ in range(300):
        other = propose(suggest, space, NUM_BLOCKS)
        count = other.removed.count if other.removed else 0
        assert isinstance(other.fold, Fold)
        plan = fold_plan(range(1, 1 + count), other.fold, NUM_BLOCKS)
        if run.budget.admits(price(plan, run.table, run.target)):
            compared += 1
            assert training_bytes(plan, other.recovery, run.table, tokens) <= most
    assert compared > 20


def test_the_example_of_a_hybrid_can_be_folded(context: TrialContext) -> None:
    """Every proposal removes so many of its blocks that the last ones hold all that attend."""
    table = price_table("lfm2")
    count = NUM_BLOCKS - min(block for block in range(NUM_BLOCKS) if table.attends(block))
    space = Space(removal=(count / NUM_BLOCKS, count / NUM_BLOCKS), criteria=("window",))
    found = largest_to_train(context.study, space, table, context.run.target, Budget(10**9))
    assert found is not None
    assert found.plan is not None
    assert len(found.plan.dropped) == count
    assert table.can_fold(found.plan)


# ---- what a probe says


def test_what_fits_is_not_told_and_leaves_nothing(context: TrialContext) -> None:
    dense = open_workbench(context).dense
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    assert probe_memory(LARGEST, context) == ""
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert not any(value.requires_grad for value in dense.parameters())
    assert not list(context.run.path.glob("trials/*"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "asked for 2.00 GiB, which memory did not have, nor did two halves of it fit. Trials",
        ),
        (
            MemoryError(),
            "(5 blocks run, deltas of rank 2) did not, nor did two halves of it fit. Trials like it",
        ),
    ],
)
def test_what_does_not_fit_is_a_sentence(
    context: TrialContext, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    sizes = []

    def lacking(self: Recovery, rows: list[int], scale: object) -> float:
        sizes.append(len(rows))
        raise error

    monkeypatch.setattr(Recovery, "_add_gradients", lacking)
    words = probe_memory(LARGEST, context)
    assert said in words
    assert "recovery.batch" in words
    assert "\n" not in words
    assert sizes == [2, 1]


def test_a_fault_of_our_own_is_raised(context: TrialContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "fold", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        probe_memory(LARGEST, context)


# ---- how a search asks, and goes on


def worker_of(context: TrialContext, config: dict[str, Any]) -> TrialRunner:
    runner = TrialRunner.__new__(TrialRunner)
    runner.setup(config, context, TRIAL, None, None)
    return runner


def test_the_first_trial_goes_on_as_without_it(context: TrialContext, tmp_path: Path) -> None:
    told: list[Event] = []
    measured: list[list[Trial]] = []
    for asked in (LARGEST, None):
        study = context.study
        run_context = begin_run(study, tmp_path / f"run-{asked is None}", cache_dir=context.cache_dir)
        run_context = replace(run_context, threads=1)
        records = Records(run_context.run)
        search = Search(records, Line(records), told.append, asked)
        proposer = Proposer(search.line, asked)
        config = proposer.suggest("a")
        assert (config["probe"] is None) == (asked is None)
        runner = worker_of(run_context, config)
        if asked is not None:
            message = runner.step()["result"]
            assert decode(message) == Probed("")
            assert not search.judge(config["number"], message)
            assert not told  # nothing to say
            assert not search.judge(config["number"], '{"kind": "Probed", "message": {"words": "too large"}}')
            assert told == [Notice("too large")]
        steps = []
        while not steps or not steps[-1].ended:
            message = decode(runner.step()["result"])
            assert isinstance(message, Measured)
            steps.append(message.trial)
        runner.cleanup()
        measured.append(steps)
    assert [[one.quality for one in steps] for steps in measured[:1]] == [
        [one.quality for one in steps] for steps in measured[1:]
    ]
    assert measured[0][-1].has_trained


def test_a_probe_that_cannot_be_made_ends_no_trial(
    context: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "fold", lambda *_: (_ for _ in ()).throw(RuntimeError("it broke")))
    runner = worker_of(context, {"number": 0, "proposal": LARGEST.to_json(), "probe": LARGEST.to_json()})
    message = decode(runner.step()["result"])
    assert isinstance(message, Probed)
    assert message.words.endswith("could not be probed: RuntimeError: it broke.")
    runner.cleanup()


def test_a_worker_that_it_killed_is_told_and_the_next_one_does_not_probe(context: TrialContext) -> None:
    told: list[Event] = []
    records = Records(context.run)
    search = Search(records, Line(records), told.append, LARGEST)
    config = Proposer(search.line, LARGEST).suggest("a")
    dead = SimpleNamespace(
        trial_id="a", config=config, get_pickled_error=lambda: None, get_error=lambda: "the worker was killed"
    )
    Watcher(search).on_trial_recover(0, [], dead)
    assert config["probe"] is None
    (notice,) = [event for event in told if isinstance(event, Notice)]
    assert "ended its process (crashed: the worker was killed). Trials like it will fail" in notice.text
    Watcher(search).on_trial_recover(0, [], dead)  # killed once more, by something else
    assert len([event for event in told if isinstance(event, Notice)]) == 1


def test_it_is_asked_for_where_memory_may_be_short(
    context: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, here = Records(context.run), SimpleNamespace(joined=None)
    assert searches._probe(records, context, here) is None  # type: ignore[arg-type]
    monkeypatch.setattr(dry_run, "free_memory", lambda: dry_run.memory_needed(context.run, "float32"))
    found = searches._probe(records, context, here)  # type: ignore[arg-type]
    assert found is not None
    monkeypatch.setattr(Trial, "has_trained", True)
    if not records.all():
        records.queue("window", 2)
    assert searches._probe(records, context, here) is None  # type: ignore[arg-type]
