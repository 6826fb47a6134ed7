"""What the report works on: settings, groups of one recipe and model, recipes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPORT_TOKENS = 4096
CONTROLS = "controls"
OWN = ("chunk", "calibration_context", "calibration_readers")  # of a protocol, what a setting may have of its own


@dataclass(frozen=True)
class Setting:
    """One result file.

    Args:
        recipe: the folder's name.
        data: the file, checked.
    """

    recipe: str
    data: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What the recipe calls it."""
        return str(self.data["name"])

    @property
    def title(self) -> str:
        """The recipe's title, without Markdown's asterisks."""
        return str(self.data["title"]).replace("**", "")

    @property
    def family(self) -> str:
        return str(self.data["family"])

    @property
    def kind(self) -> str:
        """``"headq"``, ``"baseline"``, ``"transformers"`` or ``"exact"``."""
        return str(self.data["method"]["kind"])

    @property
    def is_headq(self) -> bool:
        return self.kind == "headq"

    @property
    def is_baseline(self) -> bool:
        return self.kind in ("baseline", "transformers")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.data["method"]["options"])

    @property
    def score(self) -> Mapping[str, Any]:
        score: Mapping[str, Any] = self.data["score"]
        return score

    @property
    def kl(self) -> float:
        return float(self.score["mean_kl"])

    @property
    def sides(self) -> str:
        """What is packed: ``"K+V"``, ``"K only"``, ``"V only"`` or ``"none"``."""
        keys, values = (self.data["bits"].get(side) is not None for side in ("key", "value"))
        if keys and values:
            return "K+V"
        return "K only" if keys else "V only" if values else "none"

    def bits_at(self, tokens: int) -> float | None:
        """Stored bits per element of the packed sides after ``tokens`` tokens, None for the exact cache."""
        at = self.data["bits"]["at"] or {}
        return at.get(str(tokens))

    @property
    def bits(self) -> float:
        """Bits at 4096 tokens, what settings are compared at.

        Raises:
            ValueError: for the exact cache, which has none.
        """
        bits = self.bits_at(REPORT_TOKENS)
        if bits is None:
            raise ValueError(f"{self.recipe}/{self.name} packs nothing: it has no bits at {REPORT_TOKENS} tokens")
        return float(bits)

    @property
    def memory(self) -> dict[int, float]:
        """Bytes of one sequence's cache by its tokens, in growing order."""
        return {int(tokens): n for tokens, n in sorted(self.data["memory_bytes"].items(), key=lambda x: int(x[0]))}

    @property
    def same_as(self) -> str:
        """Equal for settings that differ in their recipe, name or title only."""
        return json.dumps([self.data["model"], self.data["method"], self.data["calibrated"]], sort_keys=True)


@dataclass(frozen=True)
class Group:
    """The settings of one recipe on one model, read in chunks of one length: one protocol, so they may be compared.

    Args:
        recipe: its name.
        model: its name.
        settings: in the recipe's order.
        label: the model, with the chunk length where the recipe has several.
    """

    recipe: str
    model: str
    settings: tuple[Setting, ...]
    label: str

    @property
    def protocol(self) -> Mapping[str, Any]:
        protocol: Mapping[str, Any] = self.settings[0].data["protocol"]
        return protocol

    @property
    def packed(self) -> list[Setting]:
        """All but the exact cache."""
        return [s for s in self.settings if s.sides != "none"]

    @property
    def both_sides(self) -> list[Setting]:
        return [s for s in self.settings if s.sides == "K+V"]

    def shown(self, most: int = 8) -> list[Setting]:
        """Settings for the plots by layer, position and context, both sides first.

        Those with errors by layer; where there are none the headline ones, else all.
        """
        packed = self.packed
        chosen = [s for s in packed if s.data["layers"]] or [s for s in packed if s.data["headline"]] or packed
        return sorted(chosen, key=lambda s: s.sides != "K+V")[:most]


@dataclass(frozen=True)
class Recipe:
    """A results folder: its settings by model, and its perturbation panels.

    Args:
        name: of the folder.
        groups: settings by model.
        panels: content of ``panel*.json`` by name.
        panel_images: ``panel*.png``.
    """

    name: str
    groups: tuple[Group, ...]
    panels: Mapping[str, Any]
    panel_images: tuple[Path, ...] = ()
