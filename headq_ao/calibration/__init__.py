"""From text to statistics, and from statistics to bits.

What a module of this name had is imported from here when it is asked for.
"""

from typing import Any

from headq_ao import lazy

_HOMES = {"Calibration": "headq_ao.calibration.artifact", "LayerMoments": "headq_ao.statistics.moments"}


def __getattr__(name: str) -> Any:
    return lazy.find(__name__, name, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
