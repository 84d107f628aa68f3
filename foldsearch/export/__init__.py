"""Ship a folded model to a runtime, verified against the model that was measured.

The names are looked up when they are asked for: verify.py runs as a module of this package in processes that need
nothing else of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foldsearch.export.figures import ExportReport, ModelFigures
    from foldsearch.export.folder import load_exported
    from foldsearch.export.ship import check_export, export
    from foldsearch.export.shipment import Shipment

__all__ = ["ExportReport", "ModelFigures", "Shipment", "check_export", "export", "load_exported"]
_FILES = ("figures", "folder", "ship", "shipment")  # in which these are


def __getattr__(name: str) -> Any:
    if name in __all__:
        files = (import_module(f"{__name__}.{file}") for file in _FILES)
        return next(getattr(file, name) for file in files if hasattr(file, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
