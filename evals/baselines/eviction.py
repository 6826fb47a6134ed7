"""Eviction after the prompt: RDKV's allocation of bits and tokens (2605.08317), and tokens left out at random."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from headq_ao.codecs.registry import LayerContext, register
from headq_ao.codecs.tokenwise import Form, Held, TokenCodec
from headq_ao.evals.baselines.bitstream import pack_stream, stream_bytes, unpack_stream
from headq_ao.evals.baselines.codecs import Affine, Frame
from headq_ao.evals.baselines.mixed_rows import CHOICES, choice_bytes, pack_rows, row_bytes, unpack_rows
from headq_ao.ops.types import PagedKV, Visible

# Share of a row's energy that is lost at each of CHOICES' bits, as RDKV ships it.
KEY_LOSS = (1.0, 0.277, 0.011, 6.1e-5, 0.0)
VALUE_LOSS = (1.0, 0.312, 0.0138, 4.8e-5, 0.0)
ROUNDS = 64  # of the bisection
POOL = 5  # tokens over which attention is averaged
INDEX = 3  # bits that tell one of CHOICES


class PerToken(TokenCodec):
    """Tokens min-max per token at ``bits`` (16: half precision), some of the prompt's left out.

    Args:
        layer: its layer.
        bits: of the tokens in pages.
        budget: bits an element that the prompt's tokens may take, those left out counted as elements too.

    Raises:
        ValueError: on other bits, no budget, or a layer with a sliding window, which leaves tokens out by itself.
    """

    prompt, drops = True, True

    def __init__(self, layer: LayerContext, bits: int, budget: float) -> None:
        if bits not in CHOICES[1:]:
            raise ValueError(f"bits of a token must be {', '.join(map(str, CHOICES[1:]))}, got {bits}")
        if not 0 < budget <= 16:
            raise ValueError(f"the budget must be above 0 and at most 16 bits an element, got {budget}")
        if layer.shape.sliding_window is not None:
            raise ValueError("a layer with a sliding window is not evicted from")
        self.codec = None if bits == 16 else Affine(bits, layer.shape.head_dim)
        self.budget = budget

    def forms(self) -> dict[str, Form]:
        """See :class:`TokenCodec`."""
        d = self.shape.head_dim
        one = {"exact": ((d,), torch.float16, 1)} if self.codec is None else self.codec.forms(d)
        return {f"{side}.{name}": Form(side, *form) for side in ("key", "value") for name, form in one.items()}

    def encode(self, k: Tensor, v: Tensor, position: Tensor) -> dict[str, Tensor]:
        """See :class:`TokenCodec`."""
        found: dict[str, Tensor] = {}
        for side, x in (("key", k), ("value", v)):
            packed = [x.half()] if self.codec is None else self.codec.encode(x, Frame())
            names = [name for name in self.forms() if name.startswith(side)]
            found |= dict(zip(names, packed, strict=True))
        return found

    def _decoded(self, side: str, held: Held) -> Tensor:
        packed = [held[name] for name in self.forms() if name.startswith(side)]
        return packed[0].float() if self.codec is None else self.codec.decode(packed, Frame())

    def decode_keys(self, held: Held) -> Tensor:
        """See :class:`TokenCodec`."""
        return self._decoded("key", held)

    def decode_values(self, held: Held) -> Tensor:
        """See :class:`TokenCodec`."""
        return self._decoded("value", held)


class RandomEviction(PerToken):
    """Of the prompt's tokens the first ``head`` stay, and as many others, drawn at random, as the budget has room for.

    The newest ones stay in the cache's window. All heads of a layer keep the same tokens.

    Args:
        layer, bits, budget: see :class:`PerToken`.
        head: first tokens behind the sinks that stay.
        seed: of the draw, with the layer's number.
    """

    def __init__(self, layer: LayerContext, bits: int, budget: float, head: int, seed: int) -> None:
        super().__init__(layer, bits, budget)
        self.head, self.seed = head, seed + 1_000_003 * layer.index

    def read_prompt(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, position: Tensor, packed: Tensor, most: int
    ) -> tuple[TokenCodec, Tensor | None]:
        """See :class:`headq_ao.codecs.protocol.Codec`."""
        heads, d = self.shape.n_kv_heads, self.shape.head_dim
        entry = 2 * heads * row_bytes(d, CHOICES.index(self.codec.bits if self.codec else 16), d) + 4  # and a position
        keep = torch.zeros(len(q), most, dtype=torch.bool)
        for b, n in enumerate(packed.tolist()):
            room = min(int(self.budget * 2 * heads * d * n / 8) // entry, n)
            drawn = torch.rand(n, generator=torch.Generator().manual_seed(self.seed))
            drawn[: self.head] = 2.0
            keep[b, drawn.topk(room).indices] = True
        keep = keep.to(q.device)
        kept = keep.sum(1)
        return self.with_own(key_kept=kept, key_dropped=packed - kept), keep


class RDKV(PerToken):
    """Bits of 0, 2, 4, 8 or 16 for each value token and key channel of the prompt, 0: left out, once after it.

    A value token weighs what the last queries of the prompt attend to it, a key channel what these queries and the
    keys have in it. Of ``w ε(bits) + λ bytes`` each takes the least, λ such that the budget holds: tokens first, of
    ``1 − key_share`` of it, then the channels of the tokens kept, of what is left. The prompt's tokens lie in tensors
    of the sequence, packed, with the choices; tokens of later calls go to pages at ``later_bits``.

    Args:
        layer: its layer.
        budget: bits an element of the prompt's tokens, everything counted.
        later_bits: of tokens of later calls.
        window: last queries of the prompt that weigh tokens.
        key_share: of the budget.
        group: tokens of a channel that share a scale and a zero.
        choices: those of :data:`~.mixed_rows.CHOICES` that it may take; (0, 16): it evicts and codes nothing.
    """

    def __init__(
        self, layer: LayerContext, budget: float, later_bits: int, window: int, key_share: float, group: int,
        choices: Sequence[int] = CHOICES,
    ) -> None:  # fmt: skip
        super().__init__(layer, later_bits, budget)
        if not {0} < set(choices) <= set(CHOICES):
            raise ValueError(
                f"choices must be 0, so that a budget can be kept, and others of {', '.join(map(str, CHOICES))}; got "
                f"{', '.join(map(str, choices))}"
            )
        if not 0 < key_share < 1 or window < 1 or group < 1:
            raise ValueError(
                f"key_share must be between 0 and 1, window and group at least 1; got {key_share}, {window}, {group}"
            )
        self.window, self.key_share, self.group, self.choices = window, key_share, group, tuple(choices)

    def read_prompt(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, position: Tensor, packed: Tensor, most: int
    ) -> tuple[TokenCodec, Tensor | None]:
        """See :class:`headq_ao.codecs.protocol.Codec`."""
        if not most:
            return self, None
        found: dict[str, list[Tensor]] = {name: [] for name in ("key_blob", "key_choice", "value_blob", "value_choice")}
        for b, n in enumerate(packed.tolist()):
            order = position[b].argsort(stable=True)[-int((position[b] >= 0).sum()) :]
            one = self.coded(q[b, :, order].float(), k[b, :, order].float(), v[b, :, order].float(), scaling, n)
            for name, t in one.items():
                found[name].append(t)
        own = {name: padded(ts) for name, ts in found.items()}
        keep = torch.zeros(len(q), most, dtype=torch.bool, device=q.device)
        return self.with_own(**own, key_kept=torch.zeros_like(packed), key_dropped=packed.clone()), keep

    def coded(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, n: int) -> dict[str, Tensor]:
        """The n tokens behind a prompt's sinks, packed; ``q [Hq, T, D]``, ``k``, ``v`` ``[Hkv, T, D]``."""
        heads, d = len(k), k.shape[-1]
        grouped = q[:, -self.window :].unflatten(0, (heads, -1)).flatten(1, 2)
        body = slice(self.n_sink, self.n_sink + n)
        weight = token_weights(q[:, -self.window :], k, scaling)[:, body]
        total = int(self.budget * 2 * d * n / 8) - stream_bytes(n, INDEX) - stream_bytes(d, INDEX)
        tokens = allocate(weight, VALUE_LOSS, choice_bytes(d, d), int((1 - self.key_share) * total), self.choices)
        channel = grouped.square().mean(1) * k[:, body].square().mean(1)
        keys, values, channels = [], [], []
        for h in range(heads):
            values.append(pack_rows(v[h, body], tokens[h], d))
            rows = k[h, body][tokens[h] > 0].T
            left = total - len(values[-1])
            sizes = choice_bytes(rows.shape[1], self.group)
            channels.append(allocate(channel[h : h + 1], KEY_LOSS, sizes, left, self.choices)[0])
            keys.append(pack_rows(rows, channels[-1], self.group))
        return {
            "key_blob": torch.cat(keys),
            "key_choice": pack_stream(torch.stack(channels), INDEX),
            "value_blob": torch.cat(values),
            "value_choice": pack_stream(tokens, INDEX),
        }

    def prompt_tokens(self, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """``k̂``, ``v̂`` ``[Hkv, n, D]`` of a sequence's prompt and which tokens a head has kept ``[Hkv, n]``."""
        own, d = self.own, self.shape.head_dim
        n, at = int(own["key.dropped"][b]), [0, 0]
        tokens = unpack_stream(own["value.choice"][b], INDEX, n)
        channels = unpack_stream(own["key.choice"][b], INDEX, d)
        k, v = (torch.zeros(len(tokens), n, d, device=tokens.device) for _ in range(2))
        for h in range(len(tokens)):
            kept = tokens[h] > 0
            v[h], used = unpack_rows(own["value.blob"][b, at[0] :], tokens[h], d, d)
            rows, used_by_keys = unpack_rows(own["key.blob"][b, at[1] :], channels[h], int(kept.sum()), self.group)
            k[h, kept] = rows.T
            at = [at[0] + used, at[1] + used_by_keys]
        return k, v, tokens > 0

    def extra(self, q: Tensor) -> tuple[Tensor, Tensor] | None:
        """See :class:`TokenCodec`: attention over the prompt's packed tokens."""
        if "key.blob" not in self.own:
            return None
        outs, sums = [], []
        for b in range(len(q)):
            k, v, kept = self.prompt_tokens(b)
            s = (q[b] @ k.to(q.dtype)[:, None].mT).masked_fill(~kept[:, None, None], float("-inf"))
            lse = s.logsumexp(-1)
            outs.append((s - lse[..., None]).exp().nan_to_num(0.0) @ v.to(q.dtype)[:, None])
            sums.append(lse)
        return torch.stack(outs), torch.stack(sums)

    def attend(
        self, q: Tensor, scaling: float, kv: PagedKV, visible: Visible | None, sliding: int, reads: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`headq_ao.codecs.protocol.Codec`; tokens that half of the heads have kept count as read."""
        if reads is not None and "key.blob" in self.own:
            kept = sum(int(self.prompt_tokens(b)[2].float().mean(0).round().sum()) for b in range(len(q)))
            reads += kept * q.shape[2]
        return super().attend(q, scaling, kv, visible, sliding, reads)


def padded(parts: Sequence[Tensor]) -> Tensor:
    """Bytes of several sequences ``[.., n]``, zeros behind the shorter ones: ``[B, .., most]``."""
    most = max(p.shape[-1] for p in parts)
    return torch.stack([pad(p, (0, most - p.shape[-1])) for p in parts])


def token_weights(q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """What the last queries ``[Hq, w, D]`` attend to each key ``[Hkv, T, D]``, summed over the queries of its heads,
    and averaged over neighbours: ``[Hkv, T]``."""
    t, w = k.shape[1], q.shape[1]
    grouped = q.unflatten(0, (len(k), -1)) * scaling
    later = torch.arange(t, device=k.device) > torch.arange(t - w, t, device=k.device)[:, None]
    a = (grouped @ k[:, None].mT).masked_fill(later, float("-inf")).softmax(-1).sum((1, 2))
    reach = min(POOL // 2, t - 1)
    return avg_pool1d(pad(a[None], (reach, reach), mode="reflect"), 2 * reach + 1, 1)[0]


def allocate(
    weight: Tensor, loss: Sequence[float], sizes: Sequence[int], budget: int, choices: Sequence[int] = CHOICES
) -> Tensor:
    """Which of :data:`CHOICES` each item takes, int64 ``[H, m]``: the least ``Σ w ε + λ bytes`` that fits each head's
    budget.

    Args:
        weight: of the items ``[H, m]``.
        loss: ε of each choice.
        sizes: bytes of each choice.
        budget: bytes of a head.
        choices: bits that an item may take.
    """
    size = torch.tensor(sizes, dtype=torch.float64, device=weight.device)
    cost = weight.double()[..., None] * torch.tensor(loss, dtype=torch.float64, device=weight.device)
    barred = torch.tensor([bits not in choices for bits in CHOICES], device=weight.device)
    cost = cost.masked_fill(barred, torch.inf)

    def at(price: Tensor) -> Tensor:
        return (cost + price[:, None, None] * size).argmin(-1)

    low = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    high = low + 2 * weight.double().sum().clamp(min=1e-30)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        fits = size[at(middle)].sum(-1) <= budget
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return at(high)


@register("rdkv")
def rdkv(
    layer: LayerContext, *, bits: float = 2.25, later_bits: int = 4, window: int = 32, key_share: float = 0.5,
    group: int = 128, choices: Sequence[int] = CHOICES,
) -> TokenCodec:  # fmt: skip
    """RDKV-like (2605.08317): the prompt's tokens within ``bits`` an element, later ones at ``later_bits``;
    ``choices`` of bits that tokens and channels may take."""
    return RDKV(layer, bits, later_bits, window, key_share, group, choices)


@register("random_eviction")
def random_eviction(
    layer: LayerContext, *, bits: float = 2.25, kept_bits: int = 4, head: int = 64, seed: int = 0
) -> TokenCodec:
    """The control of an eviction: as many of the prompt's tokens as ``bits`` an element have room for, at random."""
    return RandomEviction(layer, kept_bits, bits, head, seed)


EVICTING = ("rdkv", "random_eviction")
