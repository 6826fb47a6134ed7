"""The reference of paged attention, and what serves in its place, against a loop over tokens with known codes."""

import math

import pytest
import torch

from headq_ao.ops import paged_attention
from headq_ao.ops.layout import pack_keys, pack_values
from headq_ao.ops.page_layout import GroupLayout, PageLayout, Side
from headq_ao.ops.paged_attention import reference
from headq_ao.ops.types import PagedKV, Readers

T, P, D, HEADS, SINKS, RING = 75, 32, 32, 2, 2, 16  # packed tokens, ..
FORMS = [
    ((1,) * D, 1, False, False, 1), ((2,) * D, 2, False, True, 2), ((3,) * D, 3, True, False, 1),
    ((4,) * D, 4, True, True, 1), ((5,) * D, 5, False, False, 2), ((6,) * D, 6, False, False, 1),
    ((8,) * D, 8, True, False, 1), ((2,) * D + (4,) * 8, 2, False, False, 1), ((4, 3, 2, 1) * 8, 4, False, False, 1),
]  # fmt: skip


class Loop:
    """Codes, scales and the window of one sequence, in pages and one by one."""

    def __init__(self, bits, value_bits, key_zero, value_zero, groups, scale=1.0):
        self.g = torch.Generator().manual_seed(0)
        self.bits, self.value_bits, self.groups = bits, value_bits, groups
        self.keys = (self.rand(HEADS, 96, len(bits)) * 2.0 ** torch.tensor(bits)).to(torch.uint8)
        self.values = (self.rand(HEADS, 96, D) * 2**value_bits).to(torch.uint8)
        self.sigma, self.zero = ((self.rand(HEADS, 96) + 0.5).half() for _ in range(2))
        self.v_sigma, self.v_zero = ((self.rand(HEADS, 96, groups) + 0.5).half() for _ in range(2))
        self.key_zero, self.value_zero = key_zero, value_zero
        self.window = [self.randn(1, HEADS, SINKS + RING, D) for _ in range(2)]
        self.map = self.randn(1, 1, HEADS, D, len(bits) + 3) / D**0.5
        self.map[..., :-3] *= scale * 3 / 2.0 ** torch.tensor(bits)
        self.read, self.mean = self.randn(1, HEADS, D, D) / D**0.5, self.randn(1, HEADS, D)
        self.held = SINKS + T + 9
        self.q = self.randn(1, HEADS * 3, 2, D)

    def rand(self, *shape):
        return torch.rand(shape, generator=self.g)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.g)

    def cache(self):
        keys, values = Side(self.bits, self.key_zero), Side((self.value_bits,), self.value_zero, self.groups)
        layout = PageLayout(P, D, D, (GroupLayout(0, HEADS, keys, values),))
        stored = [*pack_keys(self.keys, self.bits), self.sigma, *([self.zero] if self.key_zero else [])]
        stored += [
            *pack_values(self.values, self.value_bits),
            self.v_sigma,
            *([self.v_zero] if self.value_zero else []),
        ]
        pages = layout.allocate(5, torch.float32, torch.device("cpu"))
        table = torch.tensor([[3, 1, 4]], dtype=torch.int32)
        for x, tokens in zip(pages, stored, strict=True):
            x[table[0].long()] = tokens.unflatten(1, (3, -1)).transpose(0, 1)
        held, packed = torch.tensor([self.held]), torch.tensor([T])
        kv = PagedKV(pages, layout.spec, table, None, packed, held, held, *self.window, SINKS)
        return kv, Readers(self.map, self.read, self.mean)

    def score(self, q, h, p):
        """Of a scaled query and the token at position p."""
        j = p - SINKS
        if not 0 <= j < T:
            return q @ self.window[0][0, h, p if j < 0 else SINKS + j % RING].double()
        mapped = q @ self.map[0, 0, h].double()
        s = self.sigma[h, j].double() * (mapped[:-3] @ self.keys[h, j].double() + mapped[-3]) + mapped[-1]
        return s + mapped[-2] * self.zero[h, j].double() if self.key_zero else s

    def value(self, h, p):
        j = p - SINKS
        if not 0 <= j < T:
            return self.window[1][0, h, p if j < 0 else SINKS + j % RING].double()
        scale = self.v_sigma[h, j].double().repeat_interleave(D // self.groups)
        zero = self.v_zero[h, j].double().repeat_interleave(D // self.groups)
        centred = -scale * (2**self.value_bits - 1) / 2
        y = self.values[h, j].double() * scale + (zero if self.value_zero else centred)
        return self.read[0, h].double() @ y + self.mean[0, h].double()

    def attention(self, scaling):
        out, lse = (
            torch.zeros(1, HEADS * 3, 2, D, dtype=torch.float64),
            torch.zeros(1, HEADS * 3, 2, dtype=torch.float64),
        )
        for head in range(HEADS * 3):
            for i in range(2):
                q, seen = self.q[0, head, i].double() * scaling, range(self.held - 1 + i)
                s = torch.stack([self.score(q, head // 3, p) for p in seen])
                lse[0, head, i] = torch.logsumexp(s, 0)
                weights = torch.softmax(s, 0)
                out[0, head, i] = sum(w * self.value(head // 3, p) for w, p in zip(weights, seen, strict=True))
        return out, lse


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_against_a_loop(form):
    loop = Loop(*form)
    wanted, wanted_lse = loop.attention(0.3)
    for found in (
        reference.paged_attention(loop.q.double(), 0.3, *loop.cache()),
        paged_attention(loop.q.double(), 0.3, *loop.cache()),
    ):
        torch.testing.assert_close(found, (wanted, wanted_lse))
    out, lse = paged_attention(loop.q, 0.3, *loop.cache())
    assert (out - wanted).norm() <= 1e-3 * wanted.norm()
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-3, atol=2e-3)


def test_scores_past_the_range_of_exp():
    """Weights of 0 and 1: what is read is one token's value."""
    loop = Loop(*FORMS[1], scale=1e4)
    out, lse = paged_attention(loop.q, 1.0, *loop.cache())
    wanted, wanted_lse = loop.attention(1.0)
    assert wanted_lse.abs().max() > 1e3
    torch.testing.assert_close(out.double(), wanted, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-3, atol=2e-3)


def test_many_small_weights_keep_their_sum():
    """One token with nearly all the weight, and others whose weights are below half of an integer each."""
    loop = Loop((2,) * D, 2, False, False, 1)
    loop.sigma.zero_()
    loop.map.zero_()
    loop.map[..., -3] = 1.0  # s = σ · Σ q
    loop.q = torch.full_like(loop.q, math.log(40000.0) / D)  # the others have 1/40000 of its weight
    loop.sigma[:, 0] = 1.0
    loop.window[0].fill_(-100.0)
    loop.values[:] = 3
    loop.values[:, 0] = 0
    loop.v_sigma.fill_(1.0)
    loop.v_sigma[:, 0] = 2.0**-10
    loop.read, loop.mean = torch.eye(D).expand(1, HEADS, D, D), torch.zeros(1, HEADS, D)
    out, _ = paged_attention(loop.q, 1.0, *loop.cache())
    torch.testing.assert_close(out.double(), loop.attention(1.0)[0], rtol=2e-2, atol=1e-6)
