"""Which tests `make test` runs, and which `make runtimes`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

from tests.tiny import CONFIGS


def some(quick: Collection[str], names: Iterable[str] = CONFIGS) -> list[Any]:
    """Families as parameters of a test: `make test` runs it with the quick ones, `make runtimes` with the others."""
    return [pytest.param(name, marks=[pytest.mark.runtimes] * (name not in quick)) for name in names]
