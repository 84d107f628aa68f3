"""The public names. Oracle: the module's own docstring, and what `import` loads."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import foldsearch
from foldsearch.api import check_plan_text
from foldsearch.errors import PlanError
from foldsearch.plan.plan import FoldPlan


def test_all_is_exact() -> None:
    homes = [name for names in foldsearch._HOMES.values() for name in names]
    assert sorted(homes) == sorted(foldsearch.__all__)
    assert len(set(foldsearch.__all__)) == len(foldsearch.__all__)
    assert set(foldsearch.__all__) <= set(dir(foldsearch))


@pytest.mark.parametrize("name", foldsearch.__all__)
def test_each_name_is_there_and_documented(name: str) -> None:
    found = getattr(foldsearch, name)
    assert found.__name__ == name
    assert len(inspect.getdoc(found) or "") > 20
    assert (
        f"    {name} " in (foldsearch.__doc__ or "")
        or f"{name}," in (foldsearch.__doc__ or "")
        or f" {name} " in (foldsearch.__doc__ or "")
    )


@pytest.mark.parametrize(
    "name", [n for n in foldsearch.__all__ if inspect.isfunction(getattr(foldsearch, n))]
)
def test_each_function_says_what_it_raises_where_it_does(name: str) -> None:
    found = getattr(foldsearch, name)
    assert "Raises:" in (inspect.getdoc(found) or ""), name
    assert found.__annotations__.get("return") is not None, name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("0-5;7", "not a word of a plan"),
        ("9-3~linear", "Write 3-9~linear"),
        ("30=3", "Keep block 3, or leave block 30 out too"),
    ],
)
def test_a_plan_is_read_before_its_model_is_known(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_plan_text(text)


@pytest.mark.parametrize("text", ["0-12345", "0-999999999999", "0 12345~linear"])
def test_a_block_beyond_any_model_is_left_to_the_model(text: str) -> None:
    """Which then says how many blocks it has, and not how many any model has."""
    check_plan_text(text)
    with pytest.raises(PlanError, match="blocks go from 0 to 29"):
        FoldPlan.parse(text, 30)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'run_serch'"):
        _ = foldsearch.run_serch


def test_importing_foldsearch_and_its_command_loads_nothing_heavy() -> None:
    code = (
        "import sys, foldsearch.cli\n"
        "heavy = {'torch', 'transformers', 'ray', 'optuna', 'pydantic', 'numpy', 'matplotlib', 'rich', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
