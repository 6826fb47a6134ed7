"""A model's configs as its own: what HeadQ writes into them must not reach other models that hold the same objects.

``from_config`` does not copy a config, so two models may share one, and so may a script that built them.
"""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

# What quantize_ and transformers' quantizers write into a config.
MARKS = ("quantization_config", "_is_quantized", "_attn_implementation_internal")
SAVED = ("architectures", "dtype")  # and save_pretrained, at each save


class OwnConfigs:
    """Copies of all configs that the modules of a model hold, in their places.

    Configs that were one object are one copy, and a copy's sub-configs are the copies of its sub-configs.

    Args:
        model: whose modules get the copies.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from headq_ao.integrations.transformers.own_config import OwnConfigs
        >>> config = LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> own = OwnConfigs(model)
        >>> model.config is config, model.config is model.model.config
        (False, True)
        >>> own.put_back(model)
        >>> model.config is config
        True
    """

    def __init__(self, model: nn.Module) -> None:
        held = _held(model)
        shared = [vars(x).get("quantization_config") for x in held]  # replaced as a whole, and large when calibrated
        memo, again = ({id(x): x for x in shared if x is not None} for _ in range(2))
        self.configs = [(copy.deepcopy(x, memo), x) for x in held]
        self.as_taken = [copy.deepcopy(x, again) for x in held]
        _exchange(model, {id(original): own for own, original in self.configs})

    def put_back(self, model: nn.Module) -> None:
        """Give the modules the configs that they had."""
        _exchange(model, {id(own): original for own, original in self.configs})

    def give_up(self, model: nn.Module, keep: bool = False) -> None:
        """End what HeadQ needed them for: the original configs again, or the copies without HeadQ's marks.

        The copies stay where the model's user has changed one (``model.config.use_cache = False``) or put another in
        its place, for another model may hold the original, or where the caller says so.
        """
        pairs = [(own, taken) for (own, _), taken in zip(self.configs, self.as_taken, strict=True)]
        known = {id(x) for pair in self.configs for x in pair}
        others = [x for x in _held(model) if id(x) not in known]
        if not keep and not others and all(_same(own, taken) for own, taken in pairs):
            self.put_back(model)
            return
        for own, taken in pairs:
            _unmark(own, taken)
        for other in others:
            for taken in self.as_taken:
                if type(taken) is type(other):
                    _unmark(other, taken)


def _held(model: nn.Module) -> list[PreTrainedConfig]:
    """The configs that a model's modules hold, each once."""
    found = [x for module in model.modules() for x in vars(module).values() if isinstance(x, PreTrainedConfig)]
    return list({id(x): x for x in found}.values())


def _exchange(model: nn.Module, new: dict[int, PreTrainedConfig]) -> None:
    """Put another config in the place of each whose id is in ``new``."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig) and id(value) in new:
                vars(module)[name] = new[id(value)]


def _same(a: Any, b: Any) -> bool:
    """Whether two configs are the same but for marks and what is written when a model is saved."""
    if not (isinstance(a, PreTrainedConfig) and isinstance(b, PreTrainedConfig)):
        return bool(a == b)
    x, y = ({name: v for name, v in vars(c).items() if name not in MARKS + SAVED} for c in (a, b))
    return x.keys() == y.keys() and all(_same(x[name], y[name]) for name in x)


def _unmark(own: PreTrainedConfig, taken: PreTrainedConfig) -> None:
    """Set the marks of a config and its sub-configs to what they were."""
    for name in MARKS:
        vars(own).pop(name, None)
        if name in vars(taken):
            vars(own)[name] = vars(taken)[name]
    for name, value in vars(own).items():
        before = vars(taken).get(name)
        if isinstance(value, PreTrainedConfig) and isinstance(before, PreTrainedConfig):
            _unmark(value, before)
