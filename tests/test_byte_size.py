"""Sizes as people write them, and as they read them."""

import pytest

from headq_ao.byte_size import byte_size, bytes_text


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (1, 1), ("7", 7), ("2B", 2), ("1k", 1000), ("1.5MB", 1_500_000), ("2 GiB", 2**31), (" 3kib ", 3072),
        ("1TiB", 2**40), ("0.5Ki", 512),
    ],
)  # fmt: skip
def test_sizes(given, size):
    assert byte_size(given) == size


@pytest.mark.parametrize("given", [0, -1, True, None, 1.5, "", "GiB", "-1MB", "1e9", "8 GiBs", "0.1B", "1.MB"])
def test_what_is_no_size(given):
    with pytest.raises(ValueError, match="must be a size such as 8GiB or 500MB"):
        byte_size(given)


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 * 2**30, "5.0 GiB"),
        (2**41, "2,048.0 GiB"),
    ],
)
def test_text(n, text):
    assert bytes_text(n) == text
