"""Make transformers' Auto classes know folded models, without importing transformers for those who don't use it."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_AUTO = ("transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto")


def register() -> None:
    """Register the folded configs with AutoConfig: now if transformers' Auto classes are imported, else then.

    A config registers its model class with AutoModelForCausalLM (see foldsearch.model.folded), so after
    `import foldsearch` an export loads without `trust_remote_code`.
    """
    if _AUTO[0] in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from foldsearch.model.blocks import FAMILIES
    from foldsearch.model.folded import folded_config_class

    for family_name in FAMILIES:
        config_class: Any = folded_config_class(family_name)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


class _AfterImport(MetaPathFinder):
    """Finds the modules of the Auto classes the usual way, and registers once when one has run.

    modeling_auto imports configuration_auto, and no config can be imported before modeling_auto has run to its end:
    so what counts is that no module of the two is half way.
    """

    def __init__(self) -> None:
        self.running: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual spec of an Auto module, made to register after it has run; None for any other module."""
        if fullname not in _AUTO or fullname in self.running:
            return None
        self.running.add(fullname)  # so the call below asks the other finders
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.running.discard(fullname)  # who asked need not run it
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                self.running.add(fullname)
                try:
                    run(module)
                finally:
                    self.running.discard(fullname)
                if not self.running and self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _register()

            loader.exec_module = run_and_register
        return spec
