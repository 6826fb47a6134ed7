"""``HeadQCache``: the packed cache that a quantized model reads and writes."""

import copy
import operator
import os
import weakref
from collections import Counter
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from headq_ao.ambient import mode_neutral, neutral_modes
from headq_ao.cache.batch import Batch
from headq_ao.cache.call import CallMetadata
from headq_ao.cache.layer import PackedLayer
from headq_ao.cache.masks import check_positions, custom, hidden_tokens, real_spans
from headq_ao.cache.memory_report import BitsReport, storage_bytes
from headq_ao.cache.schedule import page_tokens, schedule_of
from headq_ao.cache.token_ids import TokenIds
from headq_ao.integrations.config_only.shapes import dense_layers, layer_shapes
from headq_ao.integrations.transformers.cache_layer import HeadQCacheLayer
from headq_ao.integrations.transformers.fallback import FallbackLayer
from headq_ao.integrations.transformers.hybrid import (
    forget_states,
    keeps_states,
    kind,
    packed_layer,
    select_states,
    state_tensors,
    states_bytes,
    states_kind,
)
from headq_ao.integrations.transformers.identity import alike, stamp
from headq_ao.integrations.transformers.latent import LatentLayer
from headq_ao.integrations.transformers.model_state import HeadQState
from headq_ao.integrations.transformers.models import tensor_parallel
from headq_ao.integrations.transformers.prompt_cache import load_cache, save_cache

ANOTHER_STATE = -1  # no stamp of a model is that: its weights or adapters were not the same in all calls


class HeadQCache(Cache):
    """A KV cache of packed tokens for one batch of sequences.

    The model makes one by itself; make one to keep it across calls, to inspect it, or to pass it to a compiled model.

    Args:
        model: a model that :func:`headq_ao.quantize_` has prepared.
        max_length: tokens of a sequence that there is to be room for from the first call on; None: room grows. A
            function that is compiled as a whole, and CUDA graphs, need it.
        batch_size: sequences to make room for at once, before any call; None: the first call's.

    Raises:
        ValueError: when the model has not been quantized with a HeadQ config.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from headq_ao import HeadQCache, headq_config, quantize_
        >>> model = LlamaForCausalLM(
        ...     LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        ... ).eval()
        >>> quantize_(model, headq_config(warmup_tokens=32))
        >>> cache = HeadQCache(model)
        >>> _ = model(torch.arange(200)[None] % 64, cache=cache)
        >>> cache.get_seq_length(), cache.packed_bits_per_element < 3.3
        (200, True)
    """

    is_compileable = False  # only where generate is asked to compile: see headq_ao.integrations.transformers.generation
    keeps_ids = True  # of the tokens, for save

    def __init__(self, model: PreTrainedModel, max_length: int | None = None, batch_size: int | None = None) -> None:
        model, state = quantized_model(model)
        self.config = state.config
        self._model = weakref.ref(model)
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, or None, got {value!r}")
        schedule = schedule_of(self.config, state.codecs)
        expected = self.config.context_length
        self.batch = Batch(schedule, page_tokens(self.config, schedule), max_length, expected)
        self.ids = TokenIds(expected)
        self.keeps_ids = self.keeps_ids and holds_first_heads(model, state)
        self.filled: int | None = None  # the stamp of the model that computed the first tokens, where known
        self.foreign = False  # whether another model than that of this cache has computed tokens
        layers, places = dense_layers(model.config), state.serving.places
        layers += [DynamicLayer() for _ in range(len(layers), max(places) + 1)]  # which a model's loops append
        for i, place in enumerate(places):
            layers[place] = self._new_layer(i, layers[place], state)
        super().__init__(layers=layers)
        self.packed: list[Any] = [layers[place] for place in places]
        self.batch.layers, self.batch.keeps_states = self.packed, any(map(keeps_states, layers))
        self.caller = weakref.ref(state)  # of the model that calls
        if batch_size is not None:
            self.prepare(batch_size)

    def _new_layer(self, number: int, dense: Any, state: HeadQState) -> PackedLayer:
        """The packed layer in place of transformers' own, ``dense``."""
        given = state.shapes[number], state.codecs[number], self.batch, self.config.check_finite
        if state.fallback is None:
            kind_here = HeadQCacheLayer if state.shapes[number].latent is None else LatentLayer
            made: PackedLayer = packed_layer(kind_here, dense, *given)
        else:
            made = packed_layer(FallbackLayer, dense, state.serving.tilings[number], *given)
        return made

    def prepare(self, batch_size: int, layers: int | None = None) -> None:
        """Room for sequences in the first ``layers`` layers before anything comes there: a graph cannot make it."""
        model = self._model()
        if model is None:
            return
        with neutral_modes():
            self.batch.reserve(batch_size)
        state: HeadQState = model._headq
        if state.fallback is not None:
            return
        for i, (place, layer) in enumerate(zip(state.serving.places, self.packed, strict=True)):
            if not layer.is_initialized and (layers is None or place < layers):
                device = state.device(i)
                cast = torch.is_autocast_enabled(device.type)
                layer.initialize(torch.get_autocast_dtype(device.type) if cast else model.dtype, device)

    @property
    def holds_tokens(self) -> bool:
        """Whether any layer holds tokens."""
        self.batch.settle()
        return self.batch.lengths.seen > 0

    @property
    def is_initialized(self) -> bool:
        """Whether a call has brought tokens to a layer: models ask in their first one, when room has been made."""
        lengths = self.batch.lengths
        return not lengths.empty and not (lengths.first and lengths.open)

    def check_made_for(self, state: HeadQState) -> None:
        """Raise ValueError where the cache does not fit the model that ``state`` stands for."""
        if self.config is not state.config and self.config != state.config:
            raise ValueError("this HeadQCache was made with another config; make a new one with HeadQCache(model)")
        if [layer.shape for layer in self.packed] != state.shapes:
            raise ValueError("this HeadQCache was made for another model; make a new one with HeadQCache(model)")
        other = self.caller()
        if other is not state and other is not None and self.get_seq_length() and not same_print(other, state):
            raise ValueError(
                "this HeadQCache holds tokens of another model, of the same shape but with other weights; "
                "make a new one with HeadQCache(model)"
            )

    def expect(
        self, state: HeadQState, batch: int, length: int, mask: Any, position_ids: Any, layers: int | None = None,
        tokens: Tensor | None = None, weights: bool = False, by_slot: bool = False,
    ) -> None:  # fmt: skip
        """Note what the next call brings, from the model of ``state``: ``length`` slots of ``batch`` sequences.

        ``layers``: how many the call runs, from the first on; None: all.

        ``weights``: whether attention weights are wanted; ``by_slot``: as :class:`.CallMetadata` has it.

        ``tokens``: ids ``[B, S]`` or embeddings ``[B, S, C]``, None where they are not known.

        Raises:
            ValueError: when the cache was made for another model, or the mask or positions are not supported.
        """
        self.check_made_for(state)
        self.batch.settle()
        lengths = self.batch.lengths
        run = sum(layers is None or place < layers for place in state.serving.places)
        held = sorted({layer.seen for layer in self.packed[:run]})
        if held != [lengths.seen]:
            raise RuntimeError(
                f"the layers of this cache hold {held[0]} to {held[-1]} tokens: an earlier call failed part-way or ran "
                "fewer layers; call reset() on this cache or start a new one"
            )
        if not lengths.seen:
            forget_states(self.layers)
        if state.fallback is not None:
            return self._expect_slots(state, batch, length, mask, tokens)
        check_positions(position_ids, mask)
        seen, pads = lengths.seen, lengths.trailing_pads()
        spans = real_spans(mask, batch, length, seen)
        if custom(mask) and any(pads):
            raise ValueError(
                "tokens of this call would follow padding on the right of an earlier one, which a 4-D mask cannot "
                "tell; pad on the left"
            )
        whole = spans is None and lengths.tokens is None  # most calls: no padding anywhere
        hidden = None if whole or lengths.batch != batch else hidden_tokens(mask, lengths.totals(), pads, seen)
        if hidden is not None and any(layer.shape.chunked for layer in self.packed):
            raise ValueError(
                "the attention_mask hides tokens that are cached, and in layers of chunked attention others would then "
                "begin a chunk; start a new cache with the tokens that are to be seen"
            )
        self.batch.begin(batch, length, spans, CallMetadata(custom(mask), hidden, weights, by_slot))
        if lengths.first:
            self.prepare(batch, layers)
        self._follow(state)
        self._note_origin(state)
        if self.keeps_ids:
            self.ids.note(tokens, batch, length, seen, spans)

    def _expect_slots(self, state: HeadQState, batch: int, length: int, mask: Any, tokens: Tensor | None) -> None:
        """The same where the model computes attention itself, under its own masks: slots are what is stored."""
        seen = self.batch.lengths.seen
        try:
            spans = real_spans(mask, batch, length, seen)
        except ValueError:  # holes, or another form: the model may take it
            tokens = spans = None
        self.batch.begin(batch, length, None, CallMetadata())
        self._follow(state)
        self._note_origin(state)
        if self.keeps_ids:
            self.ids.note(tokens, batch, length, seen, spans)

    def next_token(self, model: PreTrainedModel, state: HeadQState, tokens: Any, mask: Any, position_ids: Any) -> bool:
        """:meth:`expect` of one token for each sequence, no padding anywhere, by the model that computed the others.

        Returns:
            Whether it was such a call, and has been counted; if not, nothing is changed.
        """
        batch, ids = self.batch, self.ids
        lengths, told, held = batch.lengths, batch.metadata, ids.held
        seen = lengths.seen
        if (
            self._model() is not model
            or self.caller() is not state
            or lengths.empty
            or not lengths.known
            or lengths.tokens is not None
            or batch.unsettled
            or batch.broken
            or told.custom
            or told.weights
            or told.by_slot
            or told.hidden is not None
            or not isinstance(tokens, Tensor)
            or tokens.shape != (lengths.batch, 1)
            or not (position_ids is None or position_ids.shape[-1:] == (1,))
            or (self.keeps_ids and (held is None or ids.count != seen or tokens.is_floating_point()))
        ):
            return False
        if mask is not None and not (
            isinstance(mask, Tensor) and mask.shape == (lengths.batch, seen + 1) and bool(mask.all())
        ):
            return False
        for layer in self.packed:
            if layer.seen != seen:
                return False
        if seen >= batch.room and not batch.grow():
            return False
        if not self.keeps_ids or held is None:
            pass
        elif seen < held.shape[1]:
            held[:, seen : seen + 1].copy_(tokens)
            ids.count = seen + 1
        else:
            ids.note(tokens, lengths.batch, 1, seen, None)
        lengths.begin_token()
        return True

    def _follow(self, state: HeadQState) -> None:
        """Use the codecs of the model that calls."""
        if self.caller() is not state:
            self.caller = weakref.ref(state)
            for layer, source in zip(self.packed, state.codecs, strict=True):
                layer.source, layer.step = source, None

    def _note_origin(self, state: HeadQState) -> None:
        """Remember which model computes what the cache holds, and in which state: a file will name it."""
        model = self._model()
        own = model is not None and vars(model).get("_headq") is state
        if self.batch.lengths.first:
            self.foreign = False
            self.filled = stamp(model) if own and model is not None else None
        elif own and model is not None and self.filled is not None and self.batch.lengths.new > 1:
            # asked of whole chunks only: a single token is not worth it
            self.filled = self.filled if self.filled == stamp(model) else ANOTHER_STATE
        self.foreign |= not own

    def _counting(self, index: int) -> Any:
        """The layer of that place or, where it counts no tokens, the first that does."""
        layer = self.layers[index]
        return layer if isinstance(layer, PackedLayer) else self.packed[0]

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken off again: not where a layer keeps states that cannot step back."""
        return not self.batch.keeps_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots seen; in a traced model a tensor, as from transformers' static caches: those before the call."""
        if torch.compiler.is_compiling():
            layer = self._counting(layer_idx)
            return layer.counts.before[0] if layer.is_initialized else 0
        if self.batch.unsettled or not self.batch.lengths.known:
            self.batch.settle()
        seen: int = self._counting(layer_idx).seen
        return seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Sizes of the mask; in a traced model those of the new tokens, for nothing reads it there but what they see
        of each other. Where that is told by slot, they are the same there as everywhere."""
        layer = self.layers[layer_idx]
        if isinstance(layer, FallbackLayer):
            return layer.get_mask_sizes(query_length)
        if torch.compiler.is_compiling():
            return (self._slots_before(layer_idx) + query_length), 0
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """First position of the new tokens in the mask."""
        return self._slots_before(layer_idx) if torch.compiler.is_compiling() else self.get_seq_length(layer_idx)

    def _slots_before(self, index: int) -> int:
        """Slots before those of a traced call's mask: none, unless what is told by slot counts from the first one."""
        seen: int = self._counting(index).seen if self.batch.metadata.by_slot else 0
        return seen

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens from every layer, or raise before any has changed.

        Removing more than there are empties the cache.

        Raises:
            ValueError: when the number is positive or not whole.
            RuntimeError: when a sliding-window layer no longer holds what it would need, or an earlier call failed
                part-way, so that it is not clear which tokens are the last.
        """
        try:
            tokens_to_remove = operator.index(tokens_to_remove)
        except TypeError:
            raise ValueError(
                f"crop takes a whole number, minus the tokens to remove, got {tokens_to_remove!r}"
            ) from None
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number, the tokens to remove, got {tokens_to_remove}; "
                f"crop(-{tokens_to_remove}) removes the last {tokens_to_remove}"
            )
        self.batch.settle()
        slots = min(-tokens_to_remove, self.batch.lengths.seen)
        if slots and slots < self.batch.lengths.seen and self.batch.keeps_states:
            kinds = sorted({states_kind(layer) for layer in self.layers if keeps_states(layer)})
            raise RuntimeError(
                f"cannot crop {slots} tokens: {', '.join(kinds)} keep states of all tokens, which cannot step back; "
                "start a new cache, or copy.deepcopy one before what may be taken back"
            )
        if slots == self.batch.lengths.seen:
            return self.reset()
        held = sorted({layer.seen for layer in self.packed if layer.is_initialized})
        if len(held) > 1:
            raise RuntimeError(
                f"cannot crop: an earlier call failed part-way and layers hold {held[0]} to {held[-1]} tokens; "
                "call reset() on this cache or start a new one"
            )
        for layer in self.packed:
            layer.check_crop(slots)
        self.batch.crop(slots)
        self.ids.crop(self.batch.lengths.seen)

    def reset(self) -> None:
        """Forget all tokens; the cache can be used again."""
        self.batch.clear()
        for layer in self.packed:
            layer.clear()
        forget_states(self.layers)
        self.ids.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences for beam search; see :meth:`batch_select_indices`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence.

        Raises:
            ValueError: when ``repeats`` is not a whole number of at least 1.
        """
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"repeats must be a whole number of at least 1, got {repeats!r}")
        self.batch_select_indices(torch.arange(self.batch_size or 0, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep those sequences, in that order, or raise before any layer has changed; an empty cache stays empty.

        Args:
            indices: of sequences ``[n]``, some of them more than once, or a mask ``[B]`` of those to keep.

        Raises:
            ValueError: when they are not such, or name no sequence that is held.
        """
        batch = self.batch_size
        if batch is None:
            return
        indices = indices if isinstance(indices, Tensor) else torch.tensor(indices, device="cpu")
        mask = indices.dtype == torch.bool
        whole = mask or not (indices.is_floating_point() or indices.is_complex())
        if indices.ndim != 1 or not whole or (mask and len(indices) != batch):
            got = f"{indices.dtype} {tuple(indices.shape)}"
            raise ValueError(f"indices must be whole numbers [n] or a mask [{batch}] of sequences, got {got}")
        order = (indices.nonzero().flatten() if mask else indices).tolist()
        if not order or not all(0 <= i < batch for i in order):
            raise ValueError(f"indices must name at least one of the sequences 0 to {batch - 1} held, got {order}")
        indices = torch.tensor(order, device="cpu")  # here: layers ask for their numbers, and wait for no device
        if order != list(range(batch)):
            copies = self.batch.select(order)
            for layer in self.packed:
                layer.select(indices, copies.get(layer.table_key, ()))
            select_states(self.layers, indices)
        if order != list(range(batch)):
            self.ids.select(indices)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a HeadQCache cannot be pickled: it belongs to a model. Write it with cache.save(path) and read it with "
            "HeadQCache.load(path, model), which checks that the model is the same; copy.deepcopy(cache) copies it"
        )

    def __copy__(self) -> "HeadQCache":
        made = type(self).__new__(type(self))
        made.__dict__.update(vars(self))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> "HeadQCache":
        made = memo[id(self)] = type(self).__new__(type(self))
        with neutral_modes():  # tensors copied in inference mode could not be written outside it
            made.__dict__.update({name: copy.deepcopy(x, memo) for name, x in vars(self).items()})
        for layer, own in zip(self.packed, made.packed, strict=True):
            if layer.step is not None:  # a step holds addresses
                own.prepare()
        return made

    @mode_neutral
    def save(self, path: str | os.PathLike[str], compress: bool = False) -> None:
        """Write what the cache holds to one safetensors file, so that a prompt need not be computed again.

        The file has the packed tokens as they are, the token ids, and a JSON head with counts, config and what
        identifies the model (see :meth:`load`); it is written whole or not at all, and without unused capacity. Reading
        all weights takes about a second per GB on one CPU core. On a tensor-parallel model each rank saves
        a file of its own.

        Args:
            path: of the file.
            compress: entropy-code all bytes: a tenth smaller (:mod:`headq_ao.compression`), exact when loaded, some
                10 MB/s slower to write.

        Raises:
            ValueError: when the cache holds no tokens, HeadQ has been taken off its model, or weights or adapters of
                the model have changed since the first tokens were computed.
            OSError: when the file cannot be written; an older one of that name is then unchanged.

        Example:
            >>> import os, tempfile, torch
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from headq_ao import HeadQCache, headq_config, quantize_
            >>> config = LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
            >>> model = LlamaForCausalLM(config).eval()
            >>> quantize_(model, headq_config(warmup_tokens=32))
            >>> cache = HeadQCache(model)
            >>> _ = model(torch.arange(200)[None] % 64, cache=cache)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     cache.save(os.path.join(folder, "prompt.safetensors"))
            ...     HeadQCache.load(os.path.join(folder, "prompt.safetensors"), model).get_seq_length()
            200
        """
        model = self._model()
        state = getattr(model, "_headq", None)
        if model is None or not isinstance(state, HeadQState) or state.config != self.config:
            raise ValueError("the model of this cache is gone or no longer has its HeadQ config; save the cache before")
        save_cache(self, model, path, compress)

    @classmethod
    @mode_neutral
    def load(cls, path: str | os.PathLike[str], model: PreTrainedModel) -> "HeadQCache":
        """Read :meth:`save`'s file; the next token's logits are bit for bit those of the cache that was saved.

        What must be the same is whatever decides the keys of the prompt: names and all bytes of every parameter and
        buffer but the output head's, the adapters at work and their scaling (adapters that are off may come and go),
        the entries of the model's config, and of the input embedding the rows of the prompt's token ids: other rows may
        change freely. Where calls passed embeddings nothing of the embedding is compared; where they did not go through
        the model, or on the later ranks of a tensor-parallel one, all of it is. Then the first tokens are computed
        again and compared with the stored sinks, within rounding, unless weights are offloaded. The head of the file
        lists offloaded weights that could not be read and compared.

        Args:
            path: of the file.
            model: with the HeadQ config and calibration that the file was made with, and the same weights and adapters.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is no prompt cache, damaged, of another version, or was made with another model,
                weights, adapters, config or calibration.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"HeadQCache.load takes a path, then the model; got a {type(path).__name__} as the path")
        cache = cls(model)
        load_cache(cache, quantized_model(model)[0], path)
        return cache

    @property
    def batch_size(self) -> int | None:
        """Sequences held, None before the first call."""
        return self.batch.lengths.batch or None

    def get_memory_footprint(self) -> int:
        """Bytes of every tensor held: codes, scales, full-precision tokens, statistics, own bases, ids, spare capacity.

        Not counted: the eight bytes of the handle that compiled code knows the cache by.
        """
        return storage_bytes(self.tensors())

    def tensors(self) -> list[Tensor]:
        """Every tensor held for the sequences."""
        states = [t for layer in self.layers for t in state_tensors(layer).values()]
        states += [t for layer in self.packed for t in layer.tensors()]
        return states + self.batch.tensors() + self.ids.tensors()

    def bits_report(self) -> BitsReport:
        """Body bits per side, bits at the current length, full-precision tokens, bytes by kind; of the tensors held."""
        report = BitsReport.of(self.batch, self.ids)
        report.bytes["states"] = states_bytes(self.layers)
        report.layers = dict(Counter(map(kind, self.layers)))
        report.fallback = getattr(self.caller(), "fallback", None)
        return report

    @property
    def packed_bits_per_element(self) -> float:
        """Mean body bits over the packed sides: stored bytes of packed tokens × 8 / (tokens · heads · head_dim)."""
        return self.bits_report().packed_bits_per_element

    @property
    def rows_read(self) -> tuple[int, int]:
        """Tokens that attention has read so far: packed ones, and all, summed over layers and queries."""
        found = [layer.tokens_read for layer in self.packed]
        return sum(packed for packed, _ in found), sum(every for _, every in found)

    @property
    def packed_fraction(self) -> float:
        """Packed tokens read over all tokens read, 0 before any."""
        packed, total = self.rows_read
        return packed / total if total else 0.0


def quantized_model(model: Any) -> tuple[PreTrainedModel, HeadQState]:
    """The model that has HeadQ, itself or within what wraps it (PEFT, ``torch.compile``), and its state.

    Raises:
        ValueError: when there is none, or no single one.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"a HeadQCache is made for a model that quantize_ was given, got a {type(model).__name__}")
    within = [model] if isinstance(model, PreTrainedModel) else model.modules()
    found = [m for m in within if isinstance(vars(m).get("_headq"), HeadQState)]
    if len(found) != 1 or not isinstance(found[0], PreTrainedModel):
        what = "has no HeadQ config" if not found else f"holds {len(found)} models with a HeadQ config"
        raise ValueError(
            f"{type(model).__name__} {what}; call quantize_(model, headq_config()) first, and pass that model"
        )
    return found[0], vars(found[0])["_headq"]


def holds_first_heads(model: PreTrainedModel, state: HeadQState) -> bool:
    """Whether this process holds the first KV heads: of those that share a tensor-parallel cache, one keeps the ids."""
    rank, size = tensor_parallel(model)
    return size == 1 or rank == 0 or state.shapes[0].n_kv_heads == layer_shapes(model.config)[0].n_kv_heads


def same_print(one: HeadQState, other: HeadQState) -> bool:
    """Whether two states are of models with equal fingerprints, in whatever dtype."""
    a, b = (dict(x.fingerprint) for x in (one, other))
    numbers, others = a.pop("weights", None), b.pop("weights", None)
    return a == b and (None in (numbers, others) or alike(numbers, others, tolerance=5e-3))
