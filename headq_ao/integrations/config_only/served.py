"""What of a model's cache is packed, from its config where that tells, else from the model's code without weights."""

from typing import Any, NamedTuple

from torch import nn

from headq_ao.cache.tiling import STEP, Tiling, storable
from headq_ao.codecs.layer_codec import WIDEST_ROW
from headq_ao.config import HeadQConfig
from headq_ao.integrations.config_only.shapes import latent_rows, layer_configs, layer_shapes
from headq_ao.layer_shape import LayerShape

OTHER_NUMBERS = (  # of heads, sizes or layers, each of which a model's code reads in its own way
    "v_head_dim",
    "swa_head_dim",
    "swa_num_key_value_heads",
    "num_kv_heads",
    "kv_channels",
    "n_recurrent_layers",
)


class Served(NamedTuple):
    """The packed layers.

    Attributes:
        shapes: as codecs see them.
        exact: numbers that transformers' own cache keeps of a token, by layer.
    """

    shapes: list[LayerShape]
    exact: list[int]


def served(model_or_config: Any, config: HeadQConfig) -> Served:
    """What :func:`headq_ao.quantize_` would pack of a model.

    A config is enough for most models, latent attention included. Where it is not (head counts or sizes that differ
    between layers, heads of a size that is not stored, attention that HeadQ does not read), the model's code is run
    without weights, as ``quantize_`` does with them.

    Args:
        model_or_config: a transformers model, or its config.
        config: what would be stored.

    Raises:
        ValueError: where the model is not supported.

    Example:
        >>> from transformers import DeepseekV3Config
        >>> from headq_ao import headq_config
        >>> from headq_ao.integrations.config_only.served import served
        >>> found = served(DeepseekV3Config(), headq_config())
        >>> found.shapes[0].head_dim, found.exact[0], len(found.shapes)
        (576, 576, 61)
    """
    is_model = isinstance(model_or_config, nn.Module)
    model_config: Any = model_or_config.config if is_model else model_or_config
    why: ValueError | None = None
    try:
        found = latents(model_config, config) or plain(model_config, config)
        if found is not None:
            return found
    except ValueError as error:
        why = error
    from headq_ao.integrations.transformers.models import meta_model
    from headq_ao.integrations.transformers.serving import serving_of

    try:
        model = model_or_config if is_model else meta_model(model_config)
        serving = serving_of(model, config.codec is not None, config.one_row)
    except ValueError as error:
        raise why or error from error
    if not serving.tilings:
        return Served(serving.shapes, [exact(shape) for shape in serving.shapes])
    rows = [heads * dim for tiling in serving.tilings for heads, dim in (tiling.keys, tiling.values)]
    return Served(serving.shapes, [k + v for k, v in zip(rows[::2], rows[1::2], strict=True)])


def exact(shape: LayerShape) -> int:
    """Numbers of a token in transformers' own cache of a layer."""
    return shape.head_dim if shape.latent is not None else shape.n_kv_heads * sum(shape.dims)


def plain(config: Any, headq: HeadQConfig) -> Served | None:
    """Keys and values of one number of heads of one size; None: a config that has other numbers too.

    Raises:
        ValueError: where a layer is of a kind that is not stored so.
    """
    shapes = layer_shapes(config)
    if any(getattr(c, name, None) is not None for c in layer_configs(config) for name in OTHER_NUMBERS):
        return None
    if headq.codec is None and not all(map(storable, shapes)):
        return None
    return Served(shapes, [exact(shape) for shape in shapes])


def latents(config: Any, headq: HeadQConfig) -> Served | None:
    """Of multi-head latent attention; None: a config has none, or more than that.

    Raises:
        ValueError: where a layer is of a kind that is not stored so.
    """
    shapes = latent_rows(config)
    if not shapes:
        return None
    row, latent = shapes[0].head_dim, shapes[0].latent
    if headq.one_row and not row % STEP and row <= WIDEST_ROW:
        return Served(shapes, [row] * len(shapes))
    if headq.codec is not None or latent is None:
        return None
    tiling = Tiling.of((1, latent), (1, row - latent))
    return Served([tiling.shape(None)] * len(shapes), [row] * len(shapes))
