"""HeadQ put on a model while transformers loads it."""

import torch
from transformers import AutoModelForCausalLM

from headq_ao import HeadQQuantizationConfig, quantize_
from tests.integrations.transformers.test_hf_quantizer import calibrated, logits_of


def test_put_on_while_loading(tiny, token_ids, tmp_path):
    model, ids = tiny(), token_ids(1, 120)
    model.save_pretrained(tmp_path)
    config = calibrated(model, token_ids)
    quantize_(model, config)
    given = HeadQQuantizationConfig(config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=given)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))


def test_loading_reports_nothing_unexpected(tiny, token_ids, tmp_path):
    model = tiny()
    ignored = model._keys_to_ignore_on_load_unexpected.copy()
    quantize_(model, calibrated(model, token_ids))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert loaded._keys_to_ignore_on_load_unexpected == ignored
