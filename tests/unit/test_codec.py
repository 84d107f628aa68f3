"""Values as JSON. Oracle: the value itself, through a text; and faults of the kinds that readers of files know."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from foldsearch.codec import from_json, to_json
from foldsearch.errors import PlanError
from foldsearch.plan.plan import FoldPlan


@dataclass(frozen=True, slots=True)
class Inner:
    kind: Literal["a", "b"]
    rows: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Outer:
    plan: FoldPlan
    inner: Inner | None
    told: dict[str, Any] | None = None
    latest: tuple[int, ...] = ()


VALUES = [
    Outer(FoldPlan.parse("0 1=0+r4 2~linear", 4), Inner("a", ((1.5, 2.0), ())), {"x": [1, None]}, (3, 4)),
    Outer(FoldPlan.identity(2), None),
]


@pytest.mark.parametrize("value", VALUES)
def test_a_value_is_read_back_from_the_text_of_its_json(value: Outer) -> None:
    assert from_json(Outer, json.loads(json.dumps(to_json(value)))) == value


def test_a_plan_is_its_text_and_its_number_of_blocks() -> None:
    assert to_json(VALUES[1])["plan"] == {"plan": "0-1", "num_blocks": 2}


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        ({"plan": {"plan": "0-1"}}, KeyError),
        ({"plan": {"plan": "0-9", "num_blocks": 2}}, PlanError),
        ({"plan": "0-1"}, TypeError),
        ({"inner": {"kind": "c", "rows": []}}, ValueError),
        ({"inner": {"kind": "a", "rows": 3}}, TypeError),
        ({"inner": {"kind": "a", "rows": [["x"]]}}, ValueError),
    ],
)
def test_what_is_no_such_value_is_a_fault_that_readers_of_files_know(
    damage: dict[str, Any], fault: type[Exception]
) -> None:
    with pytest.raises(fault):
        from_json(Outer, {**to_json(VALUES[1]), **damage})
