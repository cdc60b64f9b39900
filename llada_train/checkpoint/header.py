"""The header of a safetensors file: what lies where. Read and written here, so that no file has to be mapped."""

import json
import math
import os
from collections.abc import Mapping
from typing import IO

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from llada_train.checkpoint.manifest import Count

MAX_BYTES = 1 << 26  # a rank of an 8B run that owns all of it has 50 KiB
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}  # of the dtypes that weights of ours are made from
_METADATA = "__metadata__"


class Entry(BaseModel):
    """A tensor in the header. data_offsets: bytes, in the file's header from its end, here from the file's start."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]

    @property
    def start(self) -> int:
        return self.data_offsets[0]


_Header = TypeAdapter(dict[str, Entry])


def read_header(file: IO[bytes]) -> dict[str, Entry]:
    """Every tensor of an open safetensors file, by name.

    Raises:
        ValueError: it is none, it is cut, or its tensors do not fill it one after the other.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_BYTES, size - 8):
        raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
    try:
        content = json.loads(file.read(length))
        if isinstance(content, dict):
            content.pop(_METADATA, None)
        header = _Header.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise ValueError(f"header: {where}{first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"header: {error}") from None
    data, end = 8 + length, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        item = ITEM_BYTES.get(entry.dtype)
        if start != end or stop < start or (item is not None and stop - start != math.prod(entry.shape) * item):
            raise ValueError(f"{name}: its tensors do not follow each other without gaps")
        end = stop
    if data + end != size:
        raise ValueError(f"{size:,} bytes, but its header tells of {data + end:,}")
    return {
        name: entry.model_copy(update={"data_offsets": (data + entry.data_offsets[0], data + entry.data_offsets[1])})
        for name, entry in header.items()
    }


def header_bytes(
    tensors: Mapping[str, tuple[int, ...]], dtype: str = "F32", metadata: Mapping[str, str] | None = None
) -> bytes:
    """The length of the JSON as 8 bytes, then the JSON, padded so that the data starts at a multiple of 8.

    `tensors`: the shape of each, in the order in which their data follows.
    """
    entries: dict[str, object] = {} if metadata is None else {_METADATA: dict(metadata)}
    start = 0
    for name, shape in tensors.items():
        stop = start + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
