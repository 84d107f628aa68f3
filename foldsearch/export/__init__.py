"""Ship a folded model to a runtime, verified against the model that was measured.

The names are looked up when they are asked for: verify.py runs as a module of this package in processes that need
nothing else of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foldsearch.export.figures import ExportReport, ModelFigures
    from foldsearch.export.ship import Shipment, check_export, export, load_exported

__all__ = ["ExportReport", "ModelFigures", "Shipment", "check_export", "export", "load_exported"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from foldsearch.export import ship

        return getattr(ship, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
