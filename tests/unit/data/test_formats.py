"""Every format gives the same documents; whatever is damaged is counted, and never an exception."""

import gzip
import io
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.sources import Sources
from llada_train.data import formats
from llada_train.data.formats import read, split

TEXTS = ["one", "zwei\nlines 🙂", "three " * 50, *(f"number {i}" for i in range(40))]


def texts(sources: Sources) -> list[str]:
    return [document.text for document in sources]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def zst(data: bytes) -> bytes:
    """Two frames, the second without its size."""
    half = len(data) // 2
    stream = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(stream, closefd=False) as writer:
        writer.write(data[half:])
    return zstandard.ZstdCompressor().compress(data[:half]) + stream.getvalue()


def gz(data: bytes) -> bytes:
    """Two members."""
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(data[half:])


def table(texts: list[str], kind: pyarrow.DataType) -> pyarrow.Table:
    return pyarrow.table({"n": list(range(len(texts))), "text": pyarrow.array(texts).cast(kind)})


def parquet(texts: list[str], kind: pyarrow.DataType) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table(texts, kind), stream, row_group_size=7)
    return stream.getvalue()


def arrow(texts: list[str], new: Callable[..., pyarrow.RecordBatchFileWriter], kind: pyarrow.DataType) -> bytes:
    stream = io.BytesIO()
    content = table(texts, kind)
    with new(stream, content.schema) as writer:
        writer.write_table(content, max_chunksize=9)
    return stream.getvalue()


FILES = {
    "a.jsonl": lines(TEXTS),
    "no_newline_at_the_end.jsonl": lines(TEXTS)[:-1],
    "a.jsonl.gz": gz(lines(TEXTS)),
    "a.json.gz": gz(lines(TEXTS)),
    "a.ndjson": lines(TEXTS),
    "a.ndjson.zst": zst(lines(TEXTS)),
    "a.jsonl.zst": zst(lines(TEXTS)),
    "a.parquet": parquet(TEXTS, pyarrow.string()),
    "dictionary.parquet": parquet(TEXTS, pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
    "stream.arrow": arrow(TEXTS, pyarrow.ipc.new_stream, pyarrow.string()),
    "file.arrow": arrow(TEXTS, pyarrow.ipc.new_file, pyarrow.large_string()),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    sources = Sources([path])
    assert texts(sources) == TEXTS
    assert not sources.rejected
    assert sources.bytes_read == sources.total_bytes
    for piece_size in (1, 100, 1000, 10**6):  # a file in pieces is the file
        pieces = split(path, path.stat().st_size, piece_size)
        assert [text for piece in pieces for _, text in read(piece, "text", lambda size: None)] == TEXTS
    if name in ("a.jsonl", "a.ndjson", "a.parquet"):
        assert len(split(path, path.stat().st_size, 100)) > 5


def test_texts_are_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"x = 1\n\ny = 2\n")
    (tmp_path / "a.py.gz").write_bytes(gz(b"x = 1\n\ny = 2\n"))
    (tmp_path / "b.txt.zst").write_bytes(zst(b"x = 1\n\ny = 2\n"))
    assert texts(Sources([tmp_path])) == ["x = 1\n\ny = 2\n"] * 3


def test_folders_that_datasets_wrote(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    train = Dataset.from_dict({"text": TEXTS})
    test = Dataset.from_dict({"text": ["from test"]})
    DatasetDict({"train": train.select(range(3, 43)), "test": test}).save_to_disk(
        str(tmp_path / "both"), num_shards={"train": 12, "test": 1}
    )
    assert texts(Sources([tmp_path / "both"])) == [*TEXTS[3:], "from test"]
    assert texts(Sources([tmp_path / "both" / "train"])) == TEXTS[3:]
    train.to_parquet(str(tmp_path / "a.parquet"))
    assert texts(Sources([tmp_path / "a.parquet"])) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "stream.arrow", "file.arrow"])
def test_what_is_truncated_or_damaged_is_counted(tmp_path: Path, name: str) -> None:
    data, path, pick = FILES[name], tmp_path / name, random.Random(0)
    for cut in [*range(12), *(pick.randrange(len(data)) for _ in range(60))]:
        path.write_bytes(data[:cut])
        sources = Sources([path])
        found = texts(sources)
        assert found == TEXTS[: len(found)]
        # Nothing at all is an empty file; a cut between two parts of an archive cannot be seen.
        assert sources.rejected or not found or (cut and "stream" in name) or _ends_a_part(data, cut), cut
    noticed = 0
    for _ in range(60):
        spoilt = bytearray(data)
        spoilt[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
        path.write_bytes(spoilt)
        sources = Sources([path])
        noticed += bool(texts(sources) != TEXTS or sources.rejected)
    assert noticed or "arrow" in name  # which has no checksums


def _ends_a_part(data: bytes, cut: int) -> bool:
    return data[cut : cut + 4] in (data[:4], data[:2] + data[2:4])


@settings(max_examples=150)
@given(
    data=st.binary(max_size=300), name=st.sampled_from([*FILES, "a.txt", "a.txt.gz", "a.txt.zst"]), real=st.booleans()
)
def test_no_bytes_are_an_exception(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str, real: bool
) -> None:
    path = tmp_path_factory.mktemp("f") / name
    start = FILES.get(name, b"")[:20] if real else b""
    path.write_bytes(start + data)
    for document in Sources([path]):
        assert document.text_bytes == len(document.text.encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a"]), inner, max_size=2),
)
LINE = st.one_of(
    JSON.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")),
    st.just(b""),
)


@given(content=st.lists(LINE, max_size=20), piece_size=st.integers(1, 200))
def test_lines_in_pieces_are_the_lines(
    tmp_path_factory: pytest.TempPathFactory, content: list[bytes], piece_size: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"\n".join(content))
    whole = [text for _, text in read(formats.Piece(path, 0), "text", lambda size: None)]
    pieces = split(path, path.stat().st_size, piece_size)
    assert [text for piece in pieces for _, text in read(piece, "text", lambda size: None)] == whole
    good = []
    for line in content:
        try:
            record = json.loads(line.decode())
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("text"), str):
            good.append(record["text"])
    assert [text for text in whole if isinstance(text, str)] == good


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_line_of_any_length_is_left_out_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(formats, "DOCUMENT_LIMIT", 1 << 20)
    with (tmp_path / name).open("wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        file.seek(256 << 20)  # a hole: takes no disk
        file.write(b'"}\n{"text": "after"}\n')
    sources = Sources([tmp_path])
    tracemalloc.start()
    found = texts(sources)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
    assert sources.rejected == {formats.TOO_LONG: 1}
    if name == "a.jsonl":
        assert found == ["before", "after"]
        assert sources.first_rejected[formats.TOO_LONG] == f"{tmp_path / name}, line 2"


def test_a_long_line_is_not_read_again_by_each_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "DOCUMENT_LIMIT", 1 << 20)
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        file.seek(256 << 20)
        file.write(b'"}\n{"text": "after"}\n')
    size = path.stat().st_size
    start = _bytes_read()
    found = [text for piece in split(path, size, 4 << 20) for _, text in read(piece, "text", lambda size: None)]
    assert _bytes_read() - start < 2 * size
    assert found == ["before", formats.Rejection(formats.TOO_LONG), "after"]


def _bytes_read() -> int:
    """By this process, from anywhere."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_what_a_few_bytes_stand_for_is_read_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "DOCUMENT_LIMIT", 1 << 20)
    with (
        (tmp_path / "a.jsonl.zst").open("wb") as file,
        zstandard.ZstdCompressor().stream_writer(file) as writer,
    ):
        writer.write(b'{"text": "')
        for _ in range(256):
            writer.write(b"a" * (1 << 20))
        writer.write(b'"}\n{"text": "after"}\n')
    sources = Sources([tmp_path])
    tracemalloc.start()
    found = texts(sources)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 << 20
    assert found == ["after"]
    assert sources.rejected == {formats.TOO_LONG: 1}


def test_columns_that_hold_no_text(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "other.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    sources = Sources([tmp_path])
    assert texts(sources) == ["a"]
    assert sources.rejected == {"no text under the key 'text'": 4}


def test_what_is_no_file_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text("{}")
    (tmp_path / "c.parquet").write_bytes(FILES["a.parquet"])
    os.mkfifo(tmp_path / "pipe")
    sources = Sources([tmp_path])
    for path in sources.files[:3]:
        path.unlink()
    assert texts(sources) == []
    assert sources.rejected == {
        "neither a file nor a folder": 1,
        "unreadable": 2,
        "damaged or unreadable .parquet file, from there on": 1,
    }


def test_patterns(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "d/e/f.txt", "g[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(Sources([tmp_path / "*.txt"])) == ["a.txt", "b.txt", "g[1].txt"]
    assert texts(Sources([tmp_path / "**/*.txt"])) == ["a.txt", "b.txt", "d/e/f.txt", "g[1].txt"]
    assert texts(Sources([tmp_path / "g[1].txt"])) == ["g[1].txt"]


def test_a_line_of_a_later_piece_is_named_by_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS))
    piece = split(path, path.stat().st_size, 500)[1]
    assert piece.place(3) == f"{path}, line 3 from byte 500 on"
