"""What is counted of a step, and for whom."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="make test-vllm installs it")
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from headq_ao.integrations.vllm import metrics
from headq_ao.integrations.vllm.metrics import PackedCounters


@pytest.fixture
def counters(monkeypatch):
    """``counters(chosen, engines)``, with settings of 12.5 bytes a token."""
    told = SimpleNamespace(bytes_of_token=lambda: 12.5)
    monkeypatch.setattr(metrics, "settings", lambda config: told)

    def make(chosen, engines):
        backend = AttentionBackendEnum.CUSTOM if chosen else None
        made = PackedCounters(SimpleNamespace(attention_config=SimpleNamespace(backend=backend)), engines)
        made.log_engine_initialized()
        return made

    return make


def value(name, *labels):
    return metrics._metrics()[name].labels(*labels)._value.get()


def step(computed, generated):
    return SimpleNamespace(prompt_token_stats=SimpleNamespace(computed=computed), num_generation_tokens=generated)


def test_tokens_and_their_bytes_by_engine(counters):
    made = counters(True, [71, 72])
    made.record(None, step(100, 3), engine_idx=71)
    made.record(None, step(0, 5), engine_idx=71)
    made.record(None, step(0, 1), engine_idx=72)
    made.record(None, None, engine_idx=72)
    assert [value("tokens", str(e)) for e in (71, 72)] == [108, 1]
    assert [value("bytes", str(e)) for e in (71, 72)] == [108 * 12.5, 12.5]


def test_refused_requests_by_reason(counters):
    made = counters(True, [73, 74])
    made.record_admission_rejection("too long")
    made.record_admission_rejection("too long")
    made.record_admission_rejection("other")
    assert [value("rejections", str(e), "too long") for e in (73, 74)] == [2, 2]
    assert value("rejections", "73", "other") == 1


def test_another_backend_is_not_counted(counters):
    made = counters(False, [75])
    made.record(None, step(100, 3), engine_idx=75)
    made.record_admission_rejection("too long")
    assert value("tokens", "75") == value("rejections", "75", "too long") == 0 == made.bytes_of_token
