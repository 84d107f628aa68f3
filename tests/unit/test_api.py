"""The public names. Oracle: the module's own docstring, and what `import` loads."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import foldsearch
from foldsearch.api import check_plan_text
from foldsearch.errors import PlanError
from foldsearch.plan.plan import FoldPlan
from foldsearch.report.view import RunView

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("name", foldsearch.__all__)
def test_a_path_may_be_text(name: str) -> None:
    """As in a notebook. What is done with it: tests/e2e and tests/integration/test_search.py."""
    found = getattr(foldsearch, name)
    types = getattr(found.__init__ if inspect.isclass(found) else found, "__annotations__", {})
    asked = {key: words for key, words in types.items() if "Path" in str(words) and key != "return"}
    assert all("str" in words for words in asked.values()), asked


def test_the_documented_example_calls_what_there_is() -> None:
    """Oracle: the signatures; and the run that it reads has such attributes."""
    words = (ROOT / "docs" / "verbs.md").read_text()
    code = ast.parse(words.partition("```python\n")[2].partition("```")[0])
    calls = [
        one for one in ast.walk(code) if isinstance(one, ast.Call) and ast.unparse(one.func).startswith("fs.")
    ]
    assert len(calls) == 8
    for call in calls:
        found = getattr(foldsearch, ast.unparse(call.func).removeprefix("fs."))
        inspect.signature(found).bind(*call.args, **{str(one.arg): one.value for one in call.keywords})
    of = {"run": RunView, "trial": foldsearch.Trial, "tried": foldsearch.Trial}
    named = [one for one in ast.walk(code) if isinstance(one, ast.Attribute) and ast.unparse(one.value) in of]
    assert {one.attr for one in named} == {"front", "knee", "number", "plan", "cost", "quality"}
    assert all(hasattr(of[ast.unparse(one.value)], one.attr) for one in named)


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
