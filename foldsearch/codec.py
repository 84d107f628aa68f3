"""Our values as JSON, and back: cattrs reads the types of their fields. A plan is its text and its number of blocks; a
value with methods `to_json` and `from_json` is what these say.
"""

from __future__ import annotations

from typing import Any, TypeVar

from cattrs import Converter
from cattrs.errors import CattrsError
from cattrs.strategies import use_class_methods

from foldsearch.plan.plan import FoldPlan

Value = TypeVar("Value")

_CONVERTER = Converter(
    detailed_validation=False
)  # the first fault as the error that it is, not a group of all
use_class_methods(_CONVERTER, "from_json", "to_json")
_CONVERTER.register_unstructure_hook(
    FoldPlan, lambda plan: {"plan": str(plan), "num_blocks": plan.num_blocks}
)
_CONVERTER.register_structure_hook(
    FoldPlan, lambda value, _: FoldPlan.from_words(value["plan"], value["num_blocks"])
)


def to_json(value: object) -> Any:
    """Turn a value into what JSON has: dicts, lists, texts, numbers."""
    return _CONVERTER.unstructure(value)


def from_json(kind: type[Value], value: Any) -> Value:
    """Read what `to_json` made of a value of this type.

    Raises:
        ValueError, KeyError, TypeError, PlanError: it is no such value.
    """
    try:
        return _CONVERTER.structure(value, kind)
    # a text or a number where a table should be; an infinity where a whole number should
    except (CattrsError, AttributeError, OverflowError) as error:
        raise ValueError(str(error)) from error
