"""Tokens and their life in a cache; knows codecs and operators, no engine.

``HeadQCache``, once in a module of this name, is in :mod:`headq_ao.integrations.transformers.cache`; the name here is
an alias for one version.
"""

from typing import Any

from headq_ao import lazy

_HOMES = {"HeadQCache": "headq_ao.integrations.transformers.cache"}


def __getattr__(name: str) -> Any:
    return lazy.find(__name__, name, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
