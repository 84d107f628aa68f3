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
# The file in which each of these is.
_FILES = {
    "ExportReport": "figures",
    "ModelFigures": "figures",
    "Shipment": "shipment",
    "check_export": "ship",
    "export": "ship",
    "load_exported": "folder",
}


def __getattr__(name: str) -> Any:
    if name in _FILES:
        return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
