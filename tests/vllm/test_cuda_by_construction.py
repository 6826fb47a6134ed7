"""What an engine on a GPU would be told and would run, with CUDA tensors that are not there: nothing waits for them."""

import types

import pytest
import torch

from tests.ops.no_sync import fake_cuda
from tests.ops.test_no_sync import engine
from tests.vllm.engines import PLAIN

pytestmark = pytest.mark.skipif(PLAIN, reason="of the plug-in")
WINDOW = 24  # of tests.ops.test_requests


def step_metadata(new, columns):
    """What vLLM's runner hands to the builder of a KV cache group."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    n, tokens = len(new), sum(new)

    def of(*shape, dtype=torch.int32):
        return torch.empty(*shape, dtype=dtype, device="cuda")

    return CommonAttentionMetadata(
        query_start_loc=of(n + 1), query_start_loc_cpu=torch.empty(n + 1, dtype=torch.int32), seq_lens=of(n),
        num_reqs=n, num_actual_tokens=tokens, max_query_len=max(new), max_seq_len=1000,
        block_table_tensor=of(n, columns), slot_mapping=of(tokens, dtype=torch.int64),
    )  # fmt: skip


def builder(most=9):
    from headq_ao.integrations.vllm.backend import HeadQMetadataBuilder

    made = object.__new__(HeadQMetadataBuilder)
    made.window, made.lengths = WINDOW, torch.zeros(4, most, dtype=torch.int64, device="cuda")
    return made


@pytest.mark.parametrize("new", [(1, 1, 1), (1, 4, 2)])
def test_a_step_of_one_layer_waits_for_nothing(new, monkeypatch):
    from headq_ao.integrations.vllm import attention
    from headq_ao.integrations.vllm.metadata import window_name

    layer, _ = engine(monkeypatch, False)
    with fake_cuda() as guard:
        of_group = builder()
        metadata, window = (of_group.build(0, step_metadata(new, columns)) for columns in (5, 20))
        assert metadata.recent == WINDOW - 1 and not metadata.long
        pages = layer()
        impl = object.__new__(attention.HeadQAttention)
        impl.scale, impl.pages = 0.125, pages
        name = "model.layers.0.self_attn.attn"
        context = types.SimpleNamespace(
            no_compile_layers={window_name(name): types.SimpleNamespace(kv_cache=pages.kv.window_k)},
            attn_metadata={window_name(name): window},
        )
        monkeypatch.setattr(attention, "get_forward_context", lambda: context)
        q = torch.empty(sum(new) + 3, 2 * pages.layout.kv_heads, 32, device="cuda")  # padded, as graphs are
        k, out = q[:, : pages.layout.kv_heads], torch.empty_like(q)
        assert impl.forward(types.SimpleNamespace(layer_name=name), q, k, k, pages.raw, metadata, out) is out
    assert guard.calls > 50


def test_lengths_keep_their_addresses():
    """A captured graph reads them where they lay when it was captured."""
    with fake_cuda():
        of_group = builder()
        before = of_group.lengths
        one, two = (of_group.build(0, step_metadata(new, 5)) for new in ((1, 1), (1, 1, 1)))
        assert of_group.lengths is before
        for metadata in (one, two):
            for x in (metadata.start, metadata.held, metadata.packed, metadata.total):
                assert x._base is before
        assert len(two.held) == 3


def test_groups_of_a_step_share_all_but_their_tables():
    with fake_cuda():
        of_group = builder()
        one = of_group.build(0, step_metadata((1, 4), 5))
        first = one.requests(one)
        other = of_group.update_block_table(one, torch.empty(2, 20, dtype=torch.int32, device="cuda"), None)
        assert other.table.shape == (2, 20) and other.total is one.total and one.table.shape == (2, 5)
        assert one.requests(other) is not first and one.requests(other).window_table is other.table
        assert other.joined == {}


def test_what_the_backend_declares(monkeypatch):
    from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
    from vllm.v1.kv_cache_interface import KVCacheLayout

    from headq_ao.integrations.vllm import backend

    made = backend.HeadQBackend
    assert made.get_name() == "CUSTOM" and made.forward_includes_kv_cache_update
    assert set(made.supported_kv_cache_layouts()) == {KVCacheLayout.BLHNC, KVCacheLayout.BLNHC}
    assert [made.supports_head_size(n) for n in (16, 64, 256, 80, 72, 512)] == [True, True, True, True, False, False]
    assert made.supports_attn_type(AttentionType.DECODER) and not made.supports_attn_type(AttentionType.ENCODER)
    support = backend.HeadQMetadataBuilder.get_cudagraph_support
    assert support(None, None) == AttentionCGSupport.NEVER  # on a CPU
    monkeypatch.setattr(backend, "current_platform", types.SimpleNamespace(is_cuda_alike=lambda: True))
    monkeypatch.setattr(backend, "kernels", lambda name, device: None)
    assert support(None, None) == AttentionCGSupport.NEVER  # operators tell long chunks on the host
    monkeypatch.setattr(backend, "kernels", lambda name, device: object())
    assert support(None, None) == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
