"""The shape of one attention layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """One attention layer: ``n_heads`` query and ``n_kv_heads`` key-value heads, ``sliding_window`` tokens or None.

    ``value_dim``: of values, where it is not ``head_dim``. ``softcap``: of the layer's scores, or None.
    ``readers``: attention modules that read the layer in a call, each with ``n_heads`` query heads: more than one where
    layers share keys and values.
    ``latent``: of multi-head latent attention. A token is then one row of ``head_dim``, its latent and its rotary key,
    that all query heads read; its first ``latent`` coordinates are the value.
    ``chunked``: the window does not slide, it begins again at each multiple of its size (Llama 4).
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    sliding_window: int | None
    value_dim: int | None = None
    softcap: float | None = None
    readers: int = 1
    latent: int | None = None
    chunked: bool = False

    @property
    def dims(self) -> tuple[int, int]:
        """Of a key and of a value, as they are stored."""
        return self.head_dim, self.head_dim if self.value_dim is None else self.value_dim
