"""The public names. Oracle: the module's own docstring, and what `import` loads."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import foldsearch


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
