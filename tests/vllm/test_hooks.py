"""Where vLLM is changed, with stand-ins for its classes: only where the backend is chosen."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="make test-vllm installs it")
from headq_ao.integrations.vllm import hooks
from headq_ao.integrations.vllm.backend import HeadQBackend
from headq_ao.ops.page_layout import GroupLayout, PageLayout, Side


def attention(backend):
    class Attention:
        def __init__(self, number=0):
            self.attn_backend, self.number = backend, number

    return Attention


def test_another_version_runs_as_it_is_unless_the_backend_is_asked_for():
    plain, ours = attention(object), attention(HeadQBackend)
    for made in (plain, ours):
        hooks._refuse_version(made, "0.33.1")
    assert plain(3).number == 3 and getattr(plain, hooks.MARK)
    with pytest.raises(ValueError, match=r"serves with vLLM 0.32, got 0.33.1; install vllm==0.32.\*"):
        ours()


def selector(**changes):
    names = (
        "use_mla has_sink use_sparse use_mm_prefix use_per_head_quant_scales use_non_causal use_batch_invariant "
        "use_kv_connector use_pcp use_adaptive_verification use_dcp use_rswa"
    )
    usual = {"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 256}
    usual |= {"attn_type": "decoder"} | dict.fromkeys(names.split(), False)
    return SimpleNamespace(**usual | changes)


@pytest.fixture
def platform():
    class Platform:
        @classmethod
        def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
            return f"{cls.__name__}: {selected_backend}"

    hooks._honour_choice(Platform)
    return Platform


def test_the_choice_is_honoured_on_a_cpu(platform):
    other = SimpleNamespace(name="TORCH_SDPA")
    assert platform.get_attn_backend_cls(None, None) == "Platform: None"
    assert platform.get_attn_backend_cls(other, None) == f"Platform: {other}"
    assert platform.get_attn_backend_cls(SimpleNamespace(name="CUSTOM"), selector()) == hooks.BACKEND


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"use_mla": True}, "MLA"), ({"has_sink": True}, "sink"), ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype")],
)
def test_what_the_backend_cannot_serve_is_named(platform, changes, words):
    with pytest.raises(ValueError, match=f"(?i)HeadQ cannot serve .*{words}.* in vLLM"):
        platform.get_attn_backend_cls(SimpleNamespace(name="CUSTOM"), selector(**changes))


@dataclasses.dataclass
class Spec:
    block_size: int = 16
    num_head_slots: int = 2
    dtype: torch.dtype = torch.bfloat16
    state_content_bytes: int = 0


def layer(backend=HeadQBackend, frame=None):
    layout = PageLayout(64, 32, 32, (GroupLayout(0, 2, Side((2,) * 32), Side((2,))),))
    impl = SimpleNamespace(
        codec=SimpleNamespace(frame=frame),
        page_bytes=lambda tokens, dtype: dataclasses.replace(layout, page_tokens=tokens).bytes_of_page(4, dtype),
    )
    return SimpleNamespace(attn_backend=backend, impl=impl, kv_cache_torch_dtype=torch.bfloat16), layout


def spec_of(made, tokens, before=lambda self, config: Spec()):
    config = SimpleNamespace(cache_config=SimpleNamespace(block_size=tokens))
    return hooks._packed_spec(before)(made, config)


def test_pages_have_the_bytes_of_packed_tokens_and_sinks():
    made, layout = layer()
    found = spec_of(made, 64)
    assert (found.block_size, found.num_head_slots, found.dtype) == (64, 1, torch.uint8)
    size = layout.bytes_of_page(4, torch.bfloat16)
    assert 64 * (found.state_content_bytes - 1) < size <= 64 * found.state_content_bytes


def test_other_layers_keep_their_specs():
    assert spec_of(layer(object)[0], 64) == Spec()
    assert spec_of(layer()[0], 64, lambda self, config: None) is None


@pytest.mark.parametrize(("tokens", "fits"), [(64, True), (256, True), (96, False), (512, False)])
def test_pages_do_not_cut_segments(tokens, fits):
    made, _ = layer(frame=SimpleNamespace(tokens=256))
    if fits:
        assert spec_of(made, tokens).block_size == tokens
        return
    with pytest.raises(ValueError, match=f"--block-size must divide the 256 tokens of a segment .*, got {tokens}"):
        spec_of(made, tokens)
