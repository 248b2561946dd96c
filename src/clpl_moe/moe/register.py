"""Make ``AutoModel`` know the classes with experts after ``import clpl_moe``, without importing transformers for it.

The classes derive from transformers' own, whose modules import the registries themselves: registering as soon as the
registries are there would import a module that is still being loaded. So the loading of transformers is watched, and the
classes are registered when the outermost import is done.
"""

from __future__ import annotations

import importlib.abc
import sys

# The module whose import completes transformers' registries, and ours, which imports transformers.
_REGISTRIES = "transformers.models.auto.modeling_auto"
_CLASSES = "clpl_moe.moe.modeling_clpl_moe"


def register_models() -> None:
    """Register now where transformers' registries are loaded already, and otherwise as soon as they are."""
    if _REGISTRIES in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    from transformers import AutoConfig, AutoModel

    from clpl_moe.moe.modeling_clpl_moe import MOE_CLASSES

    for model_class in MOE_CLASSES.values():
        config_class = model_class.config_class
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module, and counts how many modules that need each other are being loaded."""

    def __init__(self) -> None:
        self.loading = 0

    def find_spec(self, fullname, path, target=None):
        if not fullname.startswith("transformers.") and fullname != _CLASSES:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module) -> None:
            self.loading += 1
            try:
                load(module)
            finally:
                self.loading -= 1
            if not self.loading and _REGISTRIES in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        spec.loader.exec_module = exec_module
        return spec
