"""Appending a call's tokens to a paged cache, as the definition reads: tokens that leave the window are coded into
their pages, the others go to the window. No decision depends on what a tensor holds."""

from collections.abc import Callable

import torch
from torch import Tensor

from headq_ao.ops.layout import PIECES, TOKEN_TILE, _key_pieces, granule
from headq_ao.ops.page_layout import NULL_PAGE, PagedTokens, PageLayout
from headq_ao.ops.rounding import scale_to_byte
from headq_ao.ops.types import PagedKV, SegmentFrame, last_in_slots

# codes [B, h, n, M] uint8, scale and zero ([B, h, n] of keys, [B, h, n, groups] of values) of one head group's tokens
Codes = tuple[Tensor, Tensor, Tensor | None]
Encoder = Callable[[Tensor, slice], Codes]  # of tokens [B, h, n, D] of those KV heads


def cache_update(
    kv: PagedKV, k: Tensor, v: Tensor, packed: Tensor, most: int, encode_keys: Encoder, encode_values: Encoder,
    frame: SegmentFrame | None = None,
) -> None:  # fmt: skip
    """Append ``k``, ``v`` ``[B, Hkv, S, D]``, tokens ``held ≤ p < total``, and pack body tokens up to ``packed``.

    Args:
        kv: the cache before the call; ``new_start`` as there, ``new_k`` and ``new_v`` are not looked at.
        packed: ``[B]`` int64, body tokens that are packed after it; those between are coded here, from the window or
            from ``k`` and ``v``. At most the next multiple of ``P`` above ``most`` new pages are needed in the table.
        most: an upper bound of ``packed − kv.packed`` that the host knows.
        encode_keys, encode_values: of the codec; not called for a side that is not coded.
        frame: that keys are taken into before they are coded.
    """
    layout, start = PageLayout.parse(kv.layout), torch.zeros_like(kv.held) if kv.new_start is None else kv.new_start
    if most:
        j = kv.packed[:, None] + torch.arange(most, device=k.device)  # [B, n]
        live = j < packed[:, None]
        page = kv.table.long().gather(1, (j // layout.page_tokens) % kv.table.shape[1])
        page, offset = torch.where(live, page, NULL_PAGE), j % layout.page_tokens
        leaving = [leaving_tokens(kv, w, x, j, start) for w, x in ((kv.window_k, k), (kv.window_v, v))]
        for group in layout.split(kv.pages):
            part = group.layout.part
            sides = (group.keys, leaving[0], encode_keys), (group.values, leaving[1], encode_values)
            for side, tokens, encode in sides:
                if side.shared:
                    continue
                if side.exact is not None:
                    side.exact[page, :, offset] = tokens[:, part].transpose(1, 2).to(side.exact.dtype)
                    continue
                if side is group.keys and frame is not None:
                    tokens = frame.into(tokens, frame.of(j)[:, None])
                write = write_keys if side is group.keys else write_values
                write(side, page, offset, encode(tokens[:, part], part))
    for window, sinks, x in ((kv.window_k, kv.sink_k, k), (kv.window_v, kv.sink_v, v)):
        if kv.window_table is None:
            append(window, x, kv, start)
        else:
            assert sinks is not None
            append_to_pages(window, sinks, x, kv, start)


def leaving_tokens(kv: PagedKV, window: Tensor, new: Tensor, j: Tensor, start: Tensor) -> Tensor:
    """Body tokens ``j [B, n]`` from the ring, or from the call's own: ``[B, Hkv, n, D]``."""
    position = j + kv.body_start
    if kv.window_table is None:
        of_ring = at(window, kv.n_sink + j % (window.shape[2] - kv.n_sink))
    else:
        page, offset = in_window(kv, position)
        of_ring = window[page, :, offset].transpose(1, 2)
    number = start[:, None] + position - kv.held[:, None]
    of_new = at(new, number.clamp(0, new.shape[2] - 1))
    return torch.where((position < kv.held[:, None])[:, None, :, None], of_ring, of_new.to(of_ring.dtype))


def at(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index [B, n]`` of ``x [B, H, T, D]``."""
    b, h, _, d = x.shape
    return x.gather(2, index[:, None, :, None].expand(b, h, -1, d))


def append(window: Tensor, new: Tensor, kv: PagedKV, start: Tensor) -> None:
    """Give each slot of the window the last token that belongs there, where it is one of the call's."""
    ring, device = window.shape[2] - kv.n_sink, new.device
    body = last_in_slots(kv.total - kv.n_sink, ring)
    position = torch.where(body >= 0, body + kv.n_sink, -1)
    position = torch.cat([torch.arange(kv.n_sink, device=device).expand(len(body), -1), position], 1)
    mine = (position >= kv.held[:, None]) & (position < kv.total[:, None])
    number = (start[:, None] + position - kv.held[:, None]).clamp(0, new.shape[2] - 1)
    window.copy_(torch.where(mine[:, None, :, None], at(new, number).to(window.dtype), window))


def in_window(kv: PagedKV, position: Tensor) -> tuple[Tensor, Tensor]:
    """Page and slot of the window table for positions ``[B, n]``."""
    assert kv.window_table is not None
    table, size = kv.window_table.long(), kv.window_k.shape[2]
    return table.gather(1, (position // size).clamp(max=table.shape[1] - 1)), position % size


def append_to_pages(window: Tensor, sinks: Tensor, new: Tensor, kv: PagedKV, start: Tensor) -> None:
    """Put the call's tokens into the pages of the window table, and the sinks among them into those of the first page;
    what is no token goes to the null page."""
    position = kv.held[:, None] + torch.arange(new.shape[2], device=new.device) - start[:, None]  # [B, S]
    live = (position >= kv.held[:, None]) & (position < kv.total[:, None])
    page, offset = in_window(kv, position.clamp(min=0))
    tokens = new.transpose(1, 2).to(window.dtype)
    window[torch.where(live, page, NULL_PAGE), :, offset] = tokens
    if kv.n_sink:
        page = torch.where(live & (position < kv.n_sink), kv.table[:, :1].long(), NULL_PAGE)
        sinks[page, :, position.clamp(0, kv.n_sink - 1)] = tokens


def write_keys(side: PagedTokens, page: Tensor, offset: Tensor, codes: Codes) -> None:
    """Put key codes into their pages: each token has bytes of its own."""
    found, scale, zero = codes
    for plane, (width, piece) in zip(side.planes, _key_pieces(found, side.bits), strict=True):
        split = piece.unflatten(-1, (-1, 8 // width, 4))  # [B, h, n, g, P, 4]
        byte = split[..., 0, :].clone()
        for i in range(1, 8 // width):
            byte |= split[..., i, :] << (i * width)
        plane[page, :, offset // TOKEN_TILE, :, offset % TOKEN_TILE] = byte.transpose(1, 2)
    write_numbers(side, page, offset, scale, zero)


def write_values(side: PagedTokens, page: Tensor, offset: Tensor, codes: Codes) -> None:
    """Put value codes into their pages: several tokens share a byte, so one piece of the bytes after the other."""
    found, scale, zero = codes
    shift = 0
    for plane, width in zip(side.planes, PIECES[side.bits[0]], strict=True):
        piece = ((found >> shift) & (2**width - 1)).unflatten(-1, (-1, TOKEN_TILE))
        piece = piece.transpose(1, 2)  # [B, n, h, D/16, 16]
        entry, inside = offset // granule(width), offset % granule(width)
        for i in range(8 // width):
            mine = torch.where(inside // 4 == i, page, NULL_PAGE)
            index = (mine, slice(None), entry, slice(None), slice(None), inside % 4)
            kept = plane[index] & (255 ^ ((2**width - 1) << (i * width)))
            plane[index] = kept | (piece << (i * width))
        shift += width
    write_numbers(side, page, offset, scale, zero)


def write_numbers(side: PagedTokens, page: Tensor, offset: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    """Put scales, and zeros where there are any, into their pages."""
    for stored, number in ((side.scale, scale), (side.zero, zero)):
        if stored is not None and number is not None:
            number = scale_to_byte(number) if stored.dtype == torch.uint8 else number.to(stored.dtype)
            stored[page, :, offset] = number.transpose(1, 2)
