"""Names of a package that are imported when they are first used (PEP 562)."""

import importlib
from collections.abc import Mapping
from typing import Any


def find(package: str, name: str, homes: Mapping[str, str]) -> Any:
    """The object that a package offers under a name, from the module that ``homes`` gives for it.

    Raises:
        AttributeError: when the package has no such name.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)
