"""Making HeadQ known to transformers and torchao, once both this package and they are imported.

``import headq_ao`` alone loads neither, so that the operators can be used without them, and the command line answers
before they are read. A checkpoint with HeadQ is loaded by transformers, which then must know the method ``"headq"``: so
registering waits for ``transformers.modeling_utils``, which every way of loading or building a model imports. torchao
takes what is a subclass of its ``AOBaseConfig``: so ``HeadQConfig`` becomes one as soon as that class is there.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

TRANSFORMERS = "transformers.modeling_utils"
TORCHAO = "torchao.core.config"


def register() -> None:
    """Register the attention function, the loader of checkpoints and torchao's handler."""
    importlib.import_module("headq_ao.quantize")


def register_config() -> None:
    """Make ``HeadQConfig`` a subclass of torchao's ``AOBaseConfig``, which its ``config_from_dict`` finds."""
    from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig

    from headq_ao.config import HeadQConfig

    AOBaseConfig.register(HeadQConfig)
    ALLOWED_AO_MODULES.add("headq_ao")


def after(name: str, action: Callable[[], None]) -> None:
    """Do something now where a module is imported already, else once, as soon as it is."""
    if name in sys.modules:
        action()
    elif not any(isinstance(finder, AfterImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport(name, action))


def register_with_others() -> None:
    """:func:`register` and :func:`register_config`, now or as soon as what they register with is imported."""
    after(TRANSFORMERS, register)
    after(TORCHAO, register_config)


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
