"""A tiny saved model with a word tokenizer, and a text that it can read."""

import pytest
import tokenizers
import torch
import transformers

VOCAB = 128
WORDS = [f"w{i}" for i in range(VOCAB - 3)]


@pytest.fixture
def tiny_folder(tmp_path, tiny):
    """A folder that transformers loads as model and tokenizer; head_dim 32, two layers."""
    folder = tmp_path / "tiny"
    tiny().save_pretrained(folder)
    words = {"<unk>": 0, "</s>": 1, "<s>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    """``text_file(name, tokens, seed)``: a file of random words."""

    def make(name="text.txt", tokens=1000, seed=0):
        picks = torch.randint(0, len(WORDS), (tokens,), generator=torch.Generator().manual_seed(seed))
        path = tmp_path / name
        path.write_text(" ".join(WORDS[i] for i in picks.tolist()), encoding="utf-8")
        return path

    return make
