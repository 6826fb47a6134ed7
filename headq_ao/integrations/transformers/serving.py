"""How a model's cache is served: natively, its attention reading packed tokens, or by the fallback: packed in memory,
dequantized for the model's own attention."""

from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from headq_ao.cache.tiling import STEP, Tiling, storable
from headq_ao.codecs.layer_codec import WIDEST_ROW
from headq_ao.config import WIDEST_HEAD
from headq_ao.integrations.config_only.shapes import chunked_places, dense_layers, packed_places, shared_places
from headq_ao.integrations.transformers.fallback import Rows, observed_rows, truly_refused
from headq_ao.integrations.transformers.hybrid import packable
from headq_ao.integrations.transformers.latent import is_latent, latent_shape
from headq_ao.integrations.transformers.models import self_attentions, tensor_parallel
from headq_ao.integrations.transformers.probe import supported_layers
from headq_ao.layer_shape import LayerShape


@dataclass
class Serving:
    """What of a model's cache is packed, and how it is read.

    Attributes:
        shapes: of the packed layers, as a codec sees them.
        places: which layers of the cache they are.
        modules: whose attention reads them; of the fallback none.
        tilings: of the fallback's rows.
        fallback: why attention cannot read packed tokens itself; None: it does.
    """

    shapes: list[LayerShape]
    places: list[int]
    modules: list[nn.Module] = field(default_factory=list)
    tilings: list[Tiling] = field(default_factory=list)
    fallback: str | None = None


def serving_of(model: nn.Module, any_dim: bool = False, one_row: bool = True) -> Serving:
    """How a model is served; it is not changed.

    Args:
        model: the whole causal LM.
        any_dim: whether heads may be of any size, as for codecs in plain PyTorch.
        one_row: whether rows that are keys and values can be stored once (:attr:`HeadQConfig.one_row`).

    Raises:
        ValueError: where it cannot be, with what must hold, what there is, and what to do.
    """
    state = vars(model).get("_headq")
    if state is not None:
        served: Serving = state.serving
        return served
    try:
        if one_row and isinstance(model, PreTrainedModel) and (found := latent_serving(model)) is not None:
            return found
        shapes, modules = supported_layers(model)
    except ValueError as error:
        if not isinstance(model, PreTrainedModel) or truly_refused(model):
            raise
        if not any(map(packable, dense_layers(model.config))):
            raise
        why = str(error)
    else:
        if any_dim or all(map(storable, shapes)):
            return Serving(shapes, packed_places(model.config), modules)
        dims = sorted({dim for shape in shapes for dim in shape.dims})
        why = (
            f"{type(model).__name__}: packed tokens are read with a head_dim of a multiple of 16 up to {WIDEST_HEAD}, "
            f"got {dims}"
        )
    try:
        rows = observed_rows(model)
    except ValueError as error:
        raise ValueError(f"{why}; nor can its cache give dequantized rows: {error}") from error
    native, told = as_observed(model, rows)
    return native or fallback(rows, told or why)


def latent_serving(model: PreTrainedModel) -> Serving | None:
    """Native serving of latent attention; None: the model has none, or rows of a size that are not stored.

    Raises:
        ValueError: where it does more with its latents than is known here.
    """
    if tensor_parallel(model)[1] > 1 or getattr(model.config, "is_encoder_decoder", False):
        return None
    found = {int(m.layer_idx): m for m in self_attentions(model).values() if is_latent(m)}  # type: ignore[arg-type]
    places = packed_places(model.config) if found else []
    if not places or not {*places} <= {*found}:
        return None
    shapes = [latent_shape(found[place]) for place in places]
    if any(shape.head_dim % STEP or shape.head_dim > WIDEST_ROW for shape in shapes):
        return None
    shapes, modules = supported_layers(model, shapes)
    return Serving(shapes, places, modules)


def as_observed(model: PreTrainedModel, rows: list[Rows]) -> tuple[Serving | None, str | None]:
    """Native serving of layers whose shapes are not what the config tells, as where they differ; or why it cannot be,
    where that is not their shapes."""
    sharing, chunked = [*shared_places(model.config).values()], chunked_places(model.config)
    shapes = [
        LayerShape(
            r.keys[0], *r.keys, r.sliding_window, other_dim(r), readers=1 + sharing.count(r.place),
            chunked=r.place in chunked,
        )
        for r in rows
    ]  # fmt: skip
    if any(r.keys[0] != r.values[0] for r in rows) or not all(map(storable, shapes)):
        return None, None
    try:
        shapes, modules = supported_layers(model, shapes)
    except ValueError as error:
        return None, str(error)
    return Serving(shapes, [r.place for r in rows], modules), None


def other_dim(row: Rows) -> int | None:
    """Coordinates of a value where a key has others."""
    return None if row.values[1] == row.keys[1] else row.values[1]


def fallback(rows: list[Rows], why: str) -> Serving:
    """Packed in memory, dequantized for the model's own attention."""
    tilings = [Tiling.of(row.keys, row.values) for row in rows]
    shapes = [tiling.shape(row.sliding_window) for tiling, row in zip(tilings, rows, strict=True)]
    return Serving(shapes, [row.place for row in rows], [], tilings, why.replace(" is not supported", ""))
