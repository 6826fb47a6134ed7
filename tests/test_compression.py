"""Tensors in fewer bytes on disk: exactly the same afterwards, and nothing else is made of damaged ones."""

import json

import pytest
import torch

from headq_ao.compression import compress, decompress

G = torch.Generator().manual_seed(0)
KINDS = {
    "floats": torch.randn(3, 40, 5, generator=G),
    "halves": torch.randn(2000, generator=G).half(),
    "bfloat16": torch.randn(7, 11, generator=G).bfloat16(),
    "few codes": (torch.rand(64, 64, generator=G) < 0.02).to(torch.uint8),
    "noise": torch.randint(0, 256, (5000,), dtype=torch.uint8, generator=G),
    "counts": torch.arange(300),
    "not finite": torch.tensor([float("nan"), float("-inf"), -0.0]),
    "not contiguous": torch.randn(20, 30, generator=G).t()[:, ::2],
    "one": torch.tensor(3.5),
    "none": torch.empty(0, 4),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_byte_comes_back(name):
    x = KINDS[name]
    streams, forms = compress({"x": x})
    found = decompress(streams, json.loads(json.dumps(forms)))["x"]
    assert (found.dtype, found.shape) == (x.dtype, x.shape) and streams["x"].dtype == torch.uint8
    assert torch.equal(found.flatten().view(torch.uint8), x.contiguous().flatten().view(torch.uint8))


def test_each_byte_of_an_element_is_coded_by_itself_where_that_is_smaller():
    """Noise as it is; of halves the byte with the exponent; of codes that are mostly 0 nearly an eighth."""
    streams, forms = compress(KINDS)
    assert forms["noise"]["planes"] == [["raw", 5000]]
    assert [kind for kind, _ in forms["halves"]["planes"]] == ["raw", "huffman"]
    assert streams["few codes"].numel() < 0.16 * 64 * 64
    for name, form in forms.items():
        assert sum(n for _, n in form["planes"]) == streams[name].numel() <= KINDS[name].nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, f: (s[:-1], f), r"x must give 2000 bytes a part|x is damaged|do not make up"),
        (lambda s, f: (torch.cat([s, s[:1]]), f), "in 2 parts, which do not make up its elements"),
        (lambda s, f: (s, f | {"planes": f["planes"][:1]}), "which do not make up its elements"),
        (lambda s, f: (s, f | {"shape": [1999]}), "x must give 1999 bytes a part, got 2000 from 'raw'"),
        (lambda s, f: (s, f | {"planes": [["zip", n] for _, n in f["planes"]]}), "got 2000 from 'zip'"),
        (lambda s, f: (torch.full_like(s, 255), f), "x is damaged: "),
    ],
)
def test_damaged_streams(change, message):
    streams, forms = compress({"x": KINDS["halves"]})
    stream, form = change(streams["x"], forms["x"])
    with pytest.raises(ValueError, match=message):
        decompress({"x": stream}, {"x": form})


def test_no_more_is_made_than_a_tensor_has():
    """A stream of a hundred million bytes in a hundred thousand is read as far as the shape goes."""
    streams, forms = compress({"x": torch.zeros(1_000_000, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="must give 10 bytes a part, got 11 from 'huffman'"):
        decompress(streams, {"x": forms["x"] | {"shape": [10]}})
