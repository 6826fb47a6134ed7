"""Messages of torchao's import that are harmless here and would be the first thing a newcomer reads."""

import logging
import sys

ENUMS = ("KernelPreference", "ScaleCalculationMode")  # of torchao, which registers them in a deprecated way


def harmless(record: logging.LogRecord) -> bool:
    """Whether it says that torchao's GPU kernels were not loaded where no GPU is, or that its enums are registered in a
    deprecated way. All other messages, and these on a machine with a GPU, are let through."""
    text = record.getMessage()
    if record.name == "torchao":
        torch = sys.modules.get("torch")
        return text.startswith("Failed to load") and torch is not None and not torch.cuda.is_available()
    return "is an Enum subclass" in text and any(name in text for name in ENUMS)


def install() -> None:
    """Leave them out of the logs of ``torchao`` and ``torch.utils._pytree``."""
    for name in ("torchao", "torch.utils._pytree"):
        logger = logging.getLogger(name)
        if _filter not in logger.filters:
            logger.addFilter(_filter)


def _filter(record: logging.LogRecord) -> bool:
    return not harmless(record)
