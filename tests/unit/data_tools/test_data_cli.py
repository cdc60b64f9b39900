import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools import cli, tokenize
from llada_train.data.corpus import Corpus
from llada_train.data.tokenizer import Tokenizer

TEXTS = {"a.txt": "the cat sat", "b.py": "x = '<|mdm_mask|>'\n", "c.txt": "Grüße 🙂"}


@pytest.fixture
def llada_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["llada-data", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for name, content in TEXTS.items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


@pytest.fixture
def tokenizer(text: Path, tmp_path: Path, llada_data) -> Path:
    folder = tmp_path / "tokenizer"
    code, out, err = llada_data("train-tokenizer", text, "--output", folder, "--vocab-size", 270)
    assert code == 0, err
    assert out == f"{folder}: 270 tokens\n"
    return folder


def test_text_to_corpus(text: Path, tokenizer: Path, tmp_path: Path, llada_data) -> None:
    (text / "d.txt").write_bytes(b"\xff")
    code, out, err = llada_data("tokenize", text, "--tokenizer", tokenizer, "--output", tmp_path / "corpus")
    assert code == 0, err
    corpus, reader = Corpus(tmp_path / "corpus"), Tokenizer.load(tokenizer)
    documents = [corpus.document(i).tolist() for i in range(corpus.num_documents)]
    assert [reader.decode(document[:-1], keep_special=True) for document in documents] == list(TEXTS.values())
    assert all(document[-1] == reader.eos_id for document in documents)
    assert not any({reader.eos_id, reader.mask_id} & set(document[:-1]) for document in documents)

    manifest = corpus.manifest
    assert manifest is not None
    assert manifest.text_bytes == sum(len(content.encode()) for content in TEXTS.values())
    assert (manifest.tokenizer_fingerprint, manifest.eos_id) == (reader.fingerprint, reader.eos_id)
    assert manifest.dtype == corpus.dtype.name == "uint16"
    assert re.search(rf"documents +3\ntokens +{corpus.num_tokens}\ntext bytes +{manifest.text_bytes}\n", out)
    assert f"left out, not valid UTF-8: 1, the first in {text / 'd.txt'}" in err


def test_the_output_is_the_same_for_any_number_of_workers(
    text: Path, tokenizer: Path, tmp_path: Path, llada_data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "BATCH_BYTES", 20)
    (text / "e.jsonl").write_text("".join(f'{{"text": "{"the cat " * (i % 7 + 1)}{i}"}}\n' for i in range(100)))
    for workers in (1, 2):
        output = tmp_path / f"corpus-{workers}"
        arguments = ("--tokenizer", tokenizer, "--output", output, "--workers", workers)
        assert llada_data("tokenize", text, *arguments)[0] == 0
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"corpus-1{suffix}").read_bytes() == (tmp_path / f"corpus-2{suffix}").read_bytes()


@pytest.mark.parametrize("name", ["tokenize", "train-tokenizer"])
def test_an_existing_output_is_kept(text: Path, tokenizer: Path, tmp_path: Path, llada_data, name: str) -> None:
    command = {
        "tokenize": ("tokenize", text, "--tokenizer", tokenizer, "--output", tmp_path / "corpus"),
        "train-tokenizer": ("train-tokenizer", text, "--output", tokenizer, "--vocab-size", 265),
    }[name]
    llada_data(*command)
    (text / "a.txt").write_text("another text")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = llada_data(*command)
    assert code == 2
    assert "already there" in err
    assert "--overwrite" in err
    assert {path: path.read_bytes() for path in before} == before
    assert llada_data(*command, "--overwrite")[0] == 0
    assert {path: path.read_bytes() for path in before} != before


@pytest.mark.parametrize("workers", [1, 2])
def test_no_document_leaves_no_corpus(tokenizer: Path, tmp_path: Path, llada_data, workers: int) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").touch()
    output = tmp_path / "corpus"
    code, out, err = llada_data("tokenize", empty, "--tokenizer", tokenizer, "--output", output, "--workers", workers)
    assert (code, out) == (2, "")
    assert err == "error: empty text: none of 1 files has a document; empty: 1\n"
    assert not list(tmp_path.glob("corpus*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenize", "nowhere", "--tokenizer", "t", "--output", "c"], "no such file or folder: nowhere"),
        (["tokenize", ".", "--tokenizer", "t", "--output", "c"], "t: no tokenizer"),
        (["train-tokenizer", ".", "--output", "t", "--vocab-size", "300"], "empty text"),
        (["train-tokenizer", "file", "--output", "file/t", "--vocab-size", "300"], "Not a directory: 'file/t'"),
    ],
)
def test_errors_are_one_message(tmp_path: Path, arguments: list[str], message: str) -> None:
    if "file" in arguments:
        (tmp_path / "file").write_text("text")
    program = [sys.executable, "-c", "from data_tools.cli import main; main()", *arguments]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_help_answers_at_once() -> None:
    program = "import sys; from data_tools.cli import app; app(standalone_mode=False); print(*sys.modules)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 5  # about 0.2 s; the margin is for a busy machine
    assert "train-tokenizer" in done.stdout
    modules = set(done.stdout.split())
    assert "typer" in modules
    assert not {"numpy", "tokenizers", "torch"} & modules
