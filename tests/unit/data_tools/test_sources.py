import json
from pathlib import Path

import pytest

from data_tools.sources import Sources
from llada_train.config.errors import UserError


def texts(sources: Sources) -> list[str]:
    return [document.text for document in sources]


def test_folders_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.txt", "a/y/x.md", "c.jsonl", ".hidden", ".git/config"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if path.suffix == ".jsonl" else name)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    sources = Sources([tmp_path, tmp_path / ".hidden"])
    assert texts(sources) == ["a/y/x.md", "a/z.txt", "b.py", "c.jsonl", ".hidden"]
    assert texts(sources) == texts(sources)
    assert sources.bytes_read == sources.total_bytes
    assert sources.rejected == {"given or linked to more than once": 1, "a link that leads nowhere": 1}


def test_no_document_is_read_twice(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x.txt").write_text("x")
    (tmp_path / "a" / "b" / "y.txt").write_text("y")
    (tmp_path / "a" / "z.txt").symlink_to(tmp_path / "a" / "x.txt")
    for inputs in ([tmp_path, tmp_path / "a" / "b"], [tmp_path / "**"], [tmp_path / "a" / "b" / "y.txt", tmp_path]):
        sources = Sources(inputs)
        assert sorted(texts(sources)) == ["x", "y"]
        assert sources.rejected["given or linked to more than once"] >= 2


def test_an_output_among_the_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    sources = Sources([tmp_path / "text"])
    with pytest.raises(UserError, match=r"lies in .*/text, which is read"):
        sources.refuse_output(tmp_path / "text" / "new" / "corpus")
    sources.refuse_output(tmp_path / "textual")
    Sources([tmp_path / "text" / "a.txt"]).refuse_output(tmp_path / "text" / "corpus")


def test_text_is_kept_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffGrüße\r\n".encode())
    [document] = Sources([tmp_path])
    assert document.text == "\ufeffGrüße\r\n"
    assert document.text_bytes == (tmp_path / "a.txt").stat().st_size


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b" \n")
    (tmp_path / "c.txt").write_bytes(b"a\0b")
    lines = [
        b'{"text": "one"}',
        b'{"text": ',
        b'{"text": "caf\xe9"}',
        b"",
        b'{"text": ""}',
        b'{"body": "x"}',
        b'["text"]',
        b'{"text": 5}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": "tw\\u00f6"}',
    ]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    sources = Sources([tmp_path])
    assert texts(sources) == ["one", "twö"]
    assert sources.rejected == {
        "not valid UTF-8": 3,
        "empty": 2,
        "binary (has NUL characters)": 1,
        "broken JSON": 2,
        "no text under the key 'text'": 3,
    }
    assert sources.first_rejected["broken JSON"] == f"{tmp_path / 'd.jsonl'}, line 2"


def test_another_text_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "x", "text": "y"}')
    assert texts(Sources([tmp_path], text_key="content")) == ["x"]


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file or folder: .*/nowhere"):
        Sources([tmp_path, tmp_path / "nowhere"])
