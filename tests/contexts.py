"""The context of trials with another run in it: in another folder, or of another study."""

from __future__ import annotations

from dataclasses import replace
from typing import Any


def of_run(context: Any, **changes: Any) -> Any:
    """The same context of a run that differs, say in its `path` or `study`."""
    return replace(context, run=replace(context.run, **changes))


def of_study(context: Any, **changes: Any) -> Any:
    """The same context of a run whose study differs."""
    return of_run(context, study=context.run.study.model_copy(update=changes))
