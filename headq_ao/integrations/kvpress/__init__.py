"""HeadQ as a press of kvpress: ``from headq_ao.integrations.kvpress import HeadQPress``."""

import importlib.util

if importlib.util.find_spec("kvpress") is None:
    raise ModuleNotFoundError(
        "headq_ao.integrations.kvpress needs kvpress, which asks for an older transformers: "
        "pip install --no-deps kvpress 'cachetools<6' 'fire<0.7' peft && pip install datasets"
    )

from headq_ao.integrations.kvpress.press import HeadQPress

__all__ = ["HeadQPress"]
