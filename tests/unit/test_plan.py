"""Plans as values: text, JSON, laws, names.

Oracles: the plan a text came from (round trips), a regular expression for the text's alphabet, literal words and
messages, sets counted by hand, and another process (for ids).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldsearch.errors import PlanError
from foldsearch.plan.kinds import Kind
from foldsearch.plan.plan import SCHEMA, FoldPlan, Replacement, Slot, check_ranks
from tests.strategies import plans


def plan(text: str, num_blocks: int = 20) -> FoldPlan:
    return FoldPlan.parse(text, num_blocks)


# ---- text and JSON


@given(plans())
def test_text_and_json_round_trip(any_plan):
    assert FoldPlan.parse(str(any_plan), any_plan.num_blocks) == any_plan
    assert FoldPlan.from_json(any_plan.to_json()) == any_plan
    assert json.loads(any_plan.to_json())["schema"] == SCHEMA


@given(plans())
def test_the_text_is_canonical(any_plan):
    """Runs of kept blocks are as long as they can be, and no two plans share a text."""
    text = str(any_plan)
    words = text.split()
    assert text == " ".join(words)
    for word, after in pairwise(words):
        ends, starts = re.fullmatch(r"(?:\d+-)?(\d+)", word), re.fullmatch(r"(\d+)(?:-\d+)?", after)
        assert not (ends and starts and int(ends[1]) + 1 == int(starts[1]))
    assert hash(FoldPlan.parse(text, any_plan.num_blocks)) == hash(any_plan)


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("0-2", [Slot(0, 0, 0), Slot(1, 1, 1), Slot(2, 2, 2)]),
        ("8a 10m", [Slot(8, 8, None), Slot(10, None, 10)]),
        ("5 6=5", [Slot(5, 5, 5), Slot(6, 5, 5)]),
        ("7=9+r8+n 9", [Slot(7, 9, 9, 8, True), Slot(9, 9, 9)]),
        ("7=9a 9", [Slot(7, 9, 7), Slot(9, 9, 9)]),
        ("7=9m+n 9", [Slot(7, 7, 9, 0, True), Slot(9, 9, 9)]),
        ("5 7=9a5m 9", [Slot(5, 5, 5), Slot(7, 9, 5), Slot(9, 9, 9)]),
        ("7a=9 9", [Slot(7, 9, None), Slot(9, 9, 9)]),
        ("7m=9+r1 9", [Slot(7, None, 9, 1), Slot(9, 9, 9)]),
        ("3 3=3+r8", [Slot(3, 3, 3), Slot(3, 3, 3, 8)]),
        ("3 3a=3", [Slot(3, 3, 3), Slot(3, 3, None)]),
        ("3 5 3=5a", [Slot(3, 3, 3), Slot(5, 5, 5), Slot(3, 5, 3)]),
        ("0 13-18~linear", [Slot(0, 0, 0), Replacement(13, 18, "linear")]),
        ("0 13~ffn512", [Slot(0, 0, 0), Replacement(13, 13, "ffn", 512)]),
        ("13~layer", [Replacement(13, 13, "layer")]),
        (" 0\n 1\t ", [Slot(0, 0, 0), Slot(1, 1, 1)]),
        ("0 1=0+r0", [Slot(0, 0, 0), Slot(1, 0, 0)]),
    ],
)
def test_words(text, slots):
    assert plan(text).slots == tuple(slots)
    canonical = {" 0\n 1\t ": "0-1", "0 1=0+r0": "0 1=0"}
    assert str(plan(text)) == canonical.get(text, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "'x' is not a word of a plan. Examples: 0-5"),
        ("0..5", "'0..5' is not a word"),
        ("-1", "is not a word"),
        ("7=", "is not a word"),
        ("9 7=9+n+r8", "is not a word"),
        ("7b", "is not a word"),
        ("9" * 5000, "is not a word"),
        ("", "a plan runs at least one block, but it is empty."),
        ("3-1", "'3-1': a range goes up. Write 1-3."),
        ("9-3~linear", "'9-3~linear': a range goes up. Write 3-9~linear."),
        ("0-5a", "a range is of whole blocks. Write the blocks one by one."),
        ("0-5=9", "a range is of whole blocks"),
        ("0-5+r2", "a range is of whole blocks"),
        ("9 7a=9m", "'7a=9m': the unit is named once. Write 7a=9."),
        ("5 9 7=9m5m", "'7=9m5m': two owners are written 7=9a5m, the attention's first."),
        ("7=7", "'7=7': a block does not borrow from itself at its first occurrence. Write 7."),
        ("7a=7", "a block does not borrow from itself"),
        ("3 3", "'3': block 3 has run already. Write 3=3 to run it again with the same weights."),
        ("0-5 3-4", "block 3 has run already"),
        ("13-18~linear+r2", "a replacement is written first-last~kind, with nothing else."),
        ("13a~linear", "a replacement is written first-last~kind"),
        ("0-20", "'0-20' names block 20, but blocks go from 0 to 19. Name blocks that there are."),
        ("0-18 20a", "'20a' names block 20, but blocks go from 0 to 19."),
        ("0-18 19=20", "'19=20' names block 20"),
        ("0-18 19=3a21m", "'19=3a21m' names block 21"),
        ("3-20~linear", "'3-20~linear' names block 20"),
        ("0-999999999999", "blocks go from 0 to 19"),
        ("0-999999999", "blocks go from 0 to 19"),
        ("0-999999999~linear", "blocks go from 0 to 19"),
    ],
)
def test_malformed_words(text, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        plan(text)


@given(st.text(alphabet="0123456789-=~+amrn linearfw", max_size=30))
def test_any_text_is_a_plan_or_a_plan_error(text):
    with suppress(PlanError):
        read = plan(text, 5)
        assert plan(str(read), 5) == read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a plan in JSON has the keys schema, num_blocks and plan"),
        ("[1]", "a plan in JSON has the keys"),
        ('{"schema": 1, "plan": "0"}', "a plan in JSON has the keys"),
        ('{"schema": 1, "plan": 5, "num_blocks": 3}', "a plan in JSON"),
        ('{"schema": 1, "plan": "0", "num_blocks": "3"}', "a plan in JSON"),
        ('{"schema": 2, "plan": "0", "num_blocks": 3}', "reads plans of schema 1, got schema 2"),
        ('{"schema": 1, "plan": "0-9", "num_blocks": 3}', "blocks go from 0 to 2"),
    ],
)
def test_malformed_json(text, message):
    with pytest.raises(PlanError, match=message):
        FoldPlan.from_json(text)


# ---- laws: each states the law, the value and a remedy


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([], "a plan runs at least one block, but every block is dropped. Keep one."),
        (
            [Replacement(2, 1, "linear")],
            "replaces blocks 2 to 1, but blocks go from 0 to 4, first before last",
        ),
        ([Replacement(3, 5, "linear")], "position 0 replaces blocks 3 to 5, but blocks go from 0 to 4"),
        ([Replacement(0, 1, "lstm")], "is one of linear, ffn, swiglu, layer; got 'lstm'. Name one of these."),
        ([Replacement(0, 1, "layer", 8)], "a 'layer' replacement has no size to set, got 8. Leave it out."),
        ([Replacement(0, 1, "ffn", -8)], "the size of a replacement is positive, got -8"),
        ([Slot(5, 5, 5)], "position 0 (home) names block 5, but blocks go from 0 to 4"),
        ([Slot(0, 0, 0), Slot(1, -1, 1)], "position 1 (attention) names block -1"),
        ([Slot(0, 0, 9)], "position 0 (mlp) names block 9"),
        ([Slot(0, None, None)], "position 0 runs neither unit of block 0. Drop the block instead."),
        ([Slot(0, 0, 0), Slot(1, 0, 0, -2)], "position 1: an adapter's rank is 0 or more, got -2"),
        ([Slot(1, 1, 1), Slot(0, 0, 0)], "block 0 at position 1 stands after block 1. Write the blocks in"),
        (
            [Slot(3, 3, 3), Replacement(1, 2, "linear")],
            "block 1 at position 1 stands after block 3",
        ),
        ([Replacement(1, 3, "linear"), Slot(2, 2, 2)], "block 2 at position 1 stands after block 3"),
        ([Replacement(1, 2, "linear"), Replacement(2, 3, "linear")], "stands after block 2"),
        (
            [Slot(0, 0, 0), Slot(1, 2, 2)],
            "block 1 shares the attention of block 2, but block 2 does not run. "
            "Keep block 2, or leave block 1 out too.",
        ),
        (
            [Slot(0, 0, 0), Slot(1, 0, 0), Slot(2, 1, 1)],
            "block 2 shares the attention of block 1, but block 1 has no attention weights of its own",
        ),
        (
            [Slot(0, 0, None), Slot(1, 1, 0)],
            "block 1 shares the mlp of block 0, but block 0 has no mlp weights of its own",
        ),
        (
            [Slot(0, 0, 0, 4)],
            "only a child carries an adapter or an output norm, but block 0 at position 0 runs its own weights. "
            "Leave +r and +n out.",
        ),
        ([Slot(0, 0, 0, 0, True)], "only a child carries an adapter or an output norm"),
        (
            [Slot(0, None, 0), Replacement(1, 2, "ffn"), Slot(3, None, 0)],
            "a plan attends at one position at least, but '0m 1-2~ffn 3m=0' has no attention. Keep the attention",
        ),
        ([Replacement(0, 4, "linear")], "but '0-4~linear' has no attention"),
    ],
)
def test_laws(slots, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        FoldPlan(tuple(slots), 5)


def test_a_model_has_a_block():
    with pytest.raises(PlanError, match="at least one block, got num_blocks=0"):
        FoldPlan((Slot(0, 0, 0),), 0)
    with pytest.raises(PlanError, match="at least one block, got num_blocks=0"):
        FoldPlan.identity(0)


def test_a_repeat_may_stand_anywhere_later_and_owns_nothing():
    assert plan("0-2 0=0 3-4 1=1", 5).depth == 7
    with pytest.raises(PlanError, match="stands after"):
        plan("1 0 2", 5)
    with pytest.raises(PlanError, match="block 2 shares the mlp of block 1, but block 1 has no mlp"):
        plan("0 1a 1m=0 2=1", 5)


# ---- what a plan says


@given(plans())
def test_every_run_is_of_an_owner_or_its_child(any_plan):
    """Counted again: a block owns a unit where its first occurrence runs it with its own weights."""
    for unit in ("attention", "mlp"):
        first: dict[int, int | None] = {}
        sources = []
        for slot in any_plan.slots:
            if isinstance(slot, Slot):
                first.setdefault(slot.home, getattr(slot, unit))
                sources.append(getattr(slot, unit))
        owners = {home for home, source in first.items() if source == home}
        assert any_plan.owners(unit) == owners
        runs = list(any_plan.runs(unit))
        assert [source for _, _, source, _ in runs] == [source for source in sources if source is not None]
        assert sum(own for *_, own in runs) == len(owners)
        assert {source for _, _, source, _ in runs} <= owners


@given(plans())
def test_dropped_is_what_nothing_stands_for(any_plan):
    stands = set()
    for slot in any_plan.slots:
        stands |= {slot.home} if isinstance(slot, Slot) else set(range(slot.first, slot.last + 1))
    assert set(any_plan.dropped) | stands == set(range(any_plan.num_blocks))
    assert set(any_plan.dropped) & stands == set()
    assert list(any_plan.dropped) == sorted(any_plan.dropped)


@given(st.integers(1, 8), st.sets(st.integers(0, 7)))
def test_dropping(num_blocks, blocks):
    blocks &= set(range(num_blocks))
    if len(blocks) == num_blocks:
        with pytest.raises(PlanError, match="every block is dropped"):
            FoldPlan.dropping(blocks, num_blocks)
    else:
        assert set(FoldPlan.dropping(blocks, num_blocks).dropped) == blocks


def test_dropping_a_block_that_is_not_there():
    with pytest.raises(PlanError, match=r"only blocks 0 to 4 can be dropped, got \[-1, 5\]"):
        FoldPlan.dropping([5, 2, -1], 5)
    assert FoldPlan.dropping([], 5) == FoldPlan.identity(5)


def test_share():
    assert str(plan("0-4", 5).share(2, 1, rank=8, norm=True)) == "0-1 2=1+r8+n 3-4"
    assert str(plan("0-4 2=2+r1", 5).share(0, 3)) == "0=3 1-4 2=2+r1"
    with pytest.raises(PlanError, match="block 2 does not run in '0-1 3-4'"):
        plan("0-1 3-4", 5).share(2, 1)
    with pytest.raises(PlanError, match=r"block 3 does not run. Keep block 3, or leave block 2 out too"):
        plan("0-2", 5).share(2, 3)
    with pytest.raises(PlanError, match="block 1 has no attention weights of its own"):
        plan("0 1=0 2", 5).share(2, 1)


# ---- names


def test_an_id_is_the_same_in_every_process():
    """The value was written down once; a change of the text form or of the hash has to be noticed."""
    known = plan("0-5 6=5 7=9+r8+n 8a 9 10m 11-12 13-18~linear 19 3=3+r8")
    code = f"from foldsearch.plan.plan import FoldPlan; print(FoldPlan.parse({str(known)!r}, 20).id)"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert known.id == elsewhere.stdout.strip() == "4e80b4f7601d"


@given(plans(), plans())
def test_ids_tell_plans_apart(one, other):
    assert (one.id == other.id) == (one == other)
    assert re.fullmatch("[0-9a-f]{12}", one.id)


def test_an_id_depends_on_the_number_of_blocks():
    assert plan("0-4", 5).id != plan("0-4", 6).id


def test_an_adapter_is_at_most_as_wide_as_the_model() -> None:
    plan = FoldPlan.parse("0 1=0+r9 2", 3)
    check_ranks(plan, 9)
    with pytest.raises(PlanError, match="at most the model's width, 8, but block 1 asks for 9"):
        check_ranks(plan, 8)


@pytest.mark.parametrize(
    ("plan", "adds_nothing", "only_drops", "needs_no_fit"),
    [
        ("0-1 3-4", True, True, True),
        ("0-4", True, True, True),
        ("0 2a 3m", True, False, True),
        ("0 1=0 2", False, False, False),
        ("0 1=0a 2", False, False, False),
        ("0-1 2-3~linear 4", False, False, True),
        ("0 1m 2-3~linear", False, False, True),
        ("0-1 2-3~ffn 4", False, False, False),
        ("0-1 1=1 2-4", False, False, False),
    ],
)
def test_what_a_plan_has_beside_the_dense_model(
    plan: str, adds_nothing: bool, only_drops: bool, needs_no_fit: bool
) -> None:
    found = FoldPlan.parse(plan, 5)
    assert (found.adds_nothing, found.only_drops) == (adds_nothing, only_drops)
    assert found.needs_no_fit == needs_no_fit


@pytest.mark.parametrize("name", ["low_rank", "FFN", "ffn2", ""])
def test_a_kind_of_network_has_a_name_that_plans_can_have(name: str) -> None:
    with pytest.raises(PlanError, match=f"letters a to z, as plans have it, got '{name}'"):
        Kind(name, "ours", None)
