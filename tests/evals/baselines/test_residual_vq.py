"""Residual VQ: vectors, codebooks, files, and keys that are coded as they were before RoPE."""

import pytest
import torch

from headq_ao import HeadQCache, headq_config, quantize_
from headq_ao.evals.baselines import residual_vq as vq


def test_groups_are_strided_or_contiguous():
    x = torch.arange(64.0)[None]
    assert vq.vectors(x, True)[0, 0].tolist() == list(range(0, 64, 2))
    assert vq.vectors(x, False)[0, 0].tolist() == list(range(32))
    for strided in (True, False):
        assert torch.equal(vq.tokens(vq.vectors(x, strided), strided), x)


def test_each_book_codes_what_the_ones_before_leave():
    generator = torch.Generator().manual_seed(0)
    books, x = torch.randn(3, 8, 32, generator=generator), torch.randn(5, 2, 32, generator=generator)
    codes = vq.encode(x, books)
    rest = x
    for i, book in enumerate(books):
        nearest = torch.cdist(rest.flatten(0, 1), book).argmin(1).view(5, 2)
        assert torch.equal(codes[..., i], nearest)
        rest = rest - book[nearest]
    torch.testing.assert_close(x - vq.decode(codes, books), rest)


def test_training_finds_clusters():
    """Of samples around 16 points the first book is near to these points, and more books leave less."""
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(16, 32, generator=generator) * 3
    x = points.repeat(64, 1) + 0.1 * torch.randn(1024, 32, generator=generator)
    books = vq.fit(x, 3, 64, seed=0)
    left = [(x - vq.decode(vq.encode(x, books[:n]), books[:n])).square().mean() for n in (1, 2, 3)]
    assert left[0] < 0.02 and left[1] < 0.8 * left[0] and left[2] < 0.9 * left[1]


def test_training_needs_samples():
    with pytest.raises(ValueError, match="64 entries need as many samples, got 10"):
        vq.fit(torch.randn(10, 32), 1, 64, 0)


def test_the_position_of_a_key_does_not_change_its_codes(tiny, books, token_ids):
    """A token that is repeated has the same key before RoPE in the first layer, at every position."""
    model = tiny(layers=1)
    options = {"codebooks": books(1), "books": 4}
    quantize_(model, headq_config(codec="residual_vq", codec_options=options, residual_length=16))
    cache = HeadQCache(model)
    ids = token_ids(1, 5).repeat(1, 40)
    model(ids, cache=cache)
    layer = cache.layers[0]
    codes = layer.pool.tensors[0][layer.block_table[0].long()].transpose(1, 2).flatten(0, 1)[:100]
    same = [(codes[:-by] == codes[by:]).float().mean() for by in (5, 1)]
    assert same[0] > 0.9 and same[1] < 0.3  # all but those that rounding of the rotation moves
    k, _ = layer.dequantize()
    assert not torch.allclose(k[:, :, 20:40], k[:, :, 25:45])  # they are rotated when they are read


def test_a_run_that_was_cut_off_goes_on(tiny, token_ids, tmp_path, monkeypatch):
    model, rows, path = tiny(layers=2), list(token_ids(2, 120, seed=4)), tmp_path / "books.safetensors"
    whole = vq.train(model, rows, out=tmp_path / "whole.safetensors", books=2, entries=32, progress=False)
    fit, count = vq.fit, []

    def cut(*arguments):
        count.append(1)
        if len(count) == 3:  # in the second layer
            raise KeyboardInterrupt
        return fit(*arguments)

    monkeypatch.setattr(vq, "fit", cut)
    with pytest.raises(KeyboardInterrupt):
        vq.train(model, rows, out=path, books=2, entries=32, progress=False)
    assert not path.exists() and path.with_name("books.safetensors.partial").exists()
    again = vq.train(model, rows, out=path, books=2, entries=32, progress=False)
    assert len(count) == 5 and path.exists() and not path.with_name("books.safetensors.partial").exists()
    for name, t in whole.tensors.items():
        assert torch.equal(again.tensors[name], t)


def test_another_model_is_refused(tiny, books):
    model = tiny(layers=2, seed=7)
    options = {"codebooks": books(2)}
    with pytest.raises(ValueError, match="was trained on another model: its weights differ"):
        quantize_(model, headq_config(codec="residual_vq", codec_options=options))
    with pytest.raises(ValueError, match="books must be 1 to the 4 that were trained, got 5"):
        quantize_(tiny(layers=2), headq_config(codec="residual_vq", codec_options=options | {"books": 5}))


def test_command(tiny_folder, text_file, tmp_path, capsys):
    path = tmp_path / "books.safetensors"
    arguments = ["train", str(tiny_folder), "-o", str(path), "--text", str(text_file(tokens=2200)), "--tokens", "2048"]
    assert vq.main([*arguments, "--books", "1", "--no-progress"]) == 0
    head, tensors = vq.CODEBOOKS.load(path)
    assert head["settings"] == {"books": 1, "entries": 2048, "tokens": 2048, "seed": 0, "source": "text.txt"}
    assert tensors["1.value"].shape == (1, 2048, 32) and "written: books.safetensors" in capsys.readouterr().err
