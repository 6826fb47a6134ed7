"""Making HeadQ known to transformers and torchao, once both this package and transformers are imported.

``import headq_ao`` alone loads neither, so that the operators can be used without them. A checkpoint with HeadQ is
loaded by transformers, which then must know the method ``"headq"``: so registering waits for
``transformers.modeling_utils``, which every way of loading or building a model imports.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

AWAITED = "transformers.modeling_utils"


def register() -> None:
    """Register the attention function, the loader of checkpoints and torchao's handler."""
    importlib.import_module("headq_ao.quantize")


def register_with_transformers() -> None:
    """:func:`register` now where transformers' models can be imported already, else as soon as they are."""
    if AWAITED in sys.modules:
        register()
    elif not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport(AWAITED, register))


class AfterImport(importlib.abc.MetaPathFinder):
    """Call ``action`` once, when the module ``name`` has been imported."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders say of ``name``, with the action behind its execution; None for all other modules."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def run(module: ModuleType) -> None:
                execute(module)
                self.action()

            spec.loader.exec_module = run  # type: ignore[method-assign]
        return spec
