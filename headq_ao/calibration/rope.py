"""Rotary embeddings as the model applies them: how the keys of a layer turn with their position.

Scores depend on differences of positions, but the coordinates of a key turn with the position itself: statistics of the
first few hundred keys say little of the thousandth, unless both are taken into the frame of their segment
(:class:`headq_ao.ops.types.SegmentFrame`).
"""

import ast
import copy
import inspect
import sys
import textwrap
from typing import Any

import torch
from torch import Tensor, nn

from headq_ao.ambient import mode_neutral
from headq_ao.codecs.rotation import Rotation
from headq_ao.layer_shape import LayerShape
from headq_ao.statistics.rope_shift import RopeShift

TOLERANCE = 1e-3


def rope_shift(
    embedding: nn.Module | None, attention: nn.Module, shape: LayerShape, shifts: tuple[int, ...]
) -> RopeShift | None:
    """How keys of a layer rotate from position to position; None where that cannot be told.

    The embedding and the function that applies it rotate the unit vectors. The result is used only where it is a
    rotation of pairs, the same after 1 and 2 positions as after 3.

    Args:
        embedding: :func:`headq_ao.integrations.transformers.models.rotary_embedding` of the model; it is not changed.
        attention: of the layer.
        shape: of the layer.
        shifts: the positions, 0 among them.
    """
    apply: Any = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if embedding is None or apply is None or not _always_rotary(attention):
        return None
    positions, head_dim = torch.tensor([1, 2, 3, *shifts], device="cpu"), shape.head_dim
    one = torch.eye(head_dim, dtype=torch.float32, device="cpu")
    try:
        matrices = _rotated_units(copy.deepcopy(embedding), apply, positions, shape)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
        return None  # of another form
    (by_1, by_2, by_3), matrices = matrices[:3], matrices[3:]
    if not torch.allclose(by_1 @ by_2, by_3, atol=TOLERANCE):
        return None
    partner = (matrices.abs().sum(0) * (1 - one)).argmax(0)
    every = torch.arange(head_dim, device="cpu")
    found = RopeShift(matrices[:, every, every], matrices[:, partner, every], partner)
    rebuilt = torch.stack(found.shifted(one))
    return found if torch.allclose(rebuilt, matrices, atol=TOLERANCE) else None


@mode_neutral
def rotation_of(embedding: nn.Module | None, attention: nn.Module, shape: LayerShape) -> Rotation | None:
    """The rotation of a layer's keys at any position; None where it cannot be told."""
    shift = rope_shift(embedding, attention, shape, (0, 1))
    return None if shift is None else Rotation.of_shift(shift)


def _always_rotary(attention: nn.Module) -> bool:
    """Whether the layer applies its rotary embedding whatever happens; some models leave it out in some layers. Those
    that read the keys of another layer have none to apply it to."""
    if getattr(attention, "use_rope", False):
        return True
    try:
        forward = ast.parse(textwrap.dedent(inspect.getsource(type(attention).forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    branches = (branch for branch in ast.walk(forward) if isinstance(branch, ast.If))
    branches = (branch for branch in branches if "is_kv_shared_layer" not in ast.unparse(branch.test))
    names = (node.id for branch in branches for node in ast.walk(branch) if isinstance(node, ast.Name))
    return "apply_rotary_pos_emb" not in names


def _rotated_units(embedding: nn.Module, apply: Any, positions: Tensor, shape: LayerShape) -> Tensor:
    """``[P, D, D]``: the unit vectors, as rows, at each of the positions."""
    plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    embedding = embedding.to("cpu")
    layer_type = "full_attention" if shape.sliding_window is None else "sliding_attention"
    extra = {"layer_type": layer_type} if "layer_type" in inspect.signature(embedding.forward).parameters else {}
    cos, sin = embedding(torch.zeros(1, len(positions), 1, **plain), positions[None], **extra)
    at_0 = positions.tolist().index(0)
    cos, sin = (x.float() / cos[:, at_0 : at_0 + 1, :1].float() for x in (cos, sin))  # some scale what they rotate
    part = cos.shape[-1]
    units = torch.eye(part, **plain)[None, :, None].expand(1, part, len(positions), part)
    whole = torch.eye(shape.head_dim, **plain).repeat(len(positions), 1, 1)
    alone = [*inspect.signature(apply).parameters][1] == "cos"  # of keys or queries, not of both
    turned = apply(units, cos, sin) if alone else apply(units, units, cos, sin)[0]
    whole[:, :part, :part] = turned[0].transpose(0, 1)
    return whole
