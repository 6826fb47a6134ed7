"""A config from a GGUF file, without the lists of its tokenizer, which take seconds to read."""

import contextlib
import struct
from collections.abc import Iterator
from typing import Any
from unittest import mock

LONGEST = 1024  # a config has lists too, of one number for each layer


@contextlib.contextmanager
def without_long_lists() -> Iterator[None]:
    """Within it, transformers finds lists of more than 1024 entries of a GGUF file empty."""
    import gguf

    with mock.patch.object(gguf, "GGUFReader", _reader(gguf)):
        yield


def _reader(gguf: Any) -> Any:
    """The package's reader, which steps over long lists."""
    kinds = gguf.GGUFValueType

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            if raw_type == kinds.ARRAY and self.byte_order == "I":
                kind, count = struct.unpack_from("=IQ", self.data, orig_offs)
                start = orig_offs + struct.calcsize("=IQ")
                if count > LONGEST and kind != kinds.ARRAY:
                    strings = kind == kinds.STRING
                    size = self._strings_size(start, count) if strings else self._numbers_size(kind, count)
                    return start + size - orig_offs, [], [], [kinds.ARRAY, kinds(kind)]
            parts: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return parts

        def _numbers_size(self, kind: int, count: int) -> int:
            return count * int(self.gguf_scalar_to_np[kinds(kind)]().nbytes)

        def _strings_size(self, start: int, count: int) -> int:
            data, length, offset = memoryview(self.data), struct.Struct("=Q"), start
            for _ in range(count):
                offset += length.size + length.unpack_from(data, offset)[0]
            return offset - start

    return Reader
