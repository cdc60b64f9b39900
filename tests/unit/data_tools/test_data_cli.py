import re
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from data_tools import cli
from llada_train.data.corpus import Corpus
from llada_train.data.corpus_writer import CorpusWriter
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
    assert err.endswith("error: empty text: no document in what was given (files: 1); empty: 1\n")
    assert not list(tmp_path.glob("corpus*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenize", "nowhere", "--tokenizer", "t", "--output", "c"], "no such file or folder: nowhere"),
        (["tokenize", ".", "--tokenizer", "t", "--output", "c"], "t: no tokenizer"),
        (["train-tokenizer", ".", "--output", "t", "--vocab-size", "300"], "empty text"),
        (["train-tokenizer", "file", "--output", "file/t", "--vocab-size", "300"], "Not a directory: 'file/t'"),
        (["merge", "c"], "c.parts: no parts; make them with `llada-data tokenize --shard`"),
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


def test_the_ways_of_looking_at_a_corpus(text: Path, tokenizer: Path, tmp_path: Path, llada_data) -> None:
    prefix = tmp_path / "corpus"
    llada_data("tokenize", text, "--tokenizer", tokenizer, "--output", prefix)
    code, out, _ = llada_data("inspect", prefix, "--tokenizer", tokenizer)
    assert code == 0
    assert re.search(r"documents +3\n", out)
    assert "the cat sat<|endoftext|>" in out
    code, out, _ = llada_data("verify", prefix)
    assert (code, "sound" in out) == (0, True)

    (tmp_path / "corpus.json").unlink()
    code, out, err = llada_data("verify", prefix)
    assert (code, out) == (2, "")
    assert "give its --tokenizer" in err
    without = tmp_path / "without"
    with CorpusWriter(without, "uint16") as writer:
        for document in ([5, 6], [7]):
            writer.add_document(document)
    code, out, _ = llada_data("verify", without, "--tokenizer", tokenizer)
    assert code == 1
    assert "2 of 2 documents do not end in EOS" in out
    arguments = ("add-eos", without, "--tokenizer", tokenizer, "--output")
    code, out, _ = llada_data(*arguments, tmp_path / "with")
    assert (code, out) == (0, f"{tmp_path / 'with'}: 2 of 2 documents were given an EOS\n")
    assert llada_data("verify", tmp_path / "with", "--tokenizer", tokenizer)[0] == 0
    assert "already there" in llada_data(*arguments, tmp_path / "with")[2]
    assert "is the corpus that is read" in llada_data(*arguments, without)[2]


def test_a_corpus_of_many_files_in_a_storage(text: Path, tokenizer: Path, tmp_path: Path, llada_data) -> None:
    for name in ("part-1", "part-2"):
        llada_data("tokenize", text, "--tokenizer", tokenizer, "--output", tmp_path / name)
    storage = fsspec.filesystem("memory")
    for path in tmp_path.glob("part-*.*"):
        storage.pipe_file(f"/{tmp_path.name}/{path.name}", path.read_bytes())
    for prefix in (f"{tmp_path}/part-*", f"memory://{tmp_path.name}/part-*"):
        code, out, err = llada_data("inspect", prefix, "--tokenizer", tokenizer, "--samples", 6)
        assert code == 0, err
        assert re.search(r"documents +6\n", out)
        assert out.count("the cat sat<|endoftext|>") == 2
        code, out, err = llada_data("verify", prefix)
        assert (code, "6 documents" in out) == (0, True), err
        code, _, err = llada_data("add-eos", prefix, "--tokenizer", tokenizer, "--output", tmp_path / "new")
        assert (code, "part-*: no corpus" in err) == (2, True)
    data = bytearray((tmp_path / "part-2.bin").read_bytes())
    data[0] ^= 1
    storage.pipe_file(f"/{tmp_path.name}/part-2.bin", bytes(data))
    code, out, _ = llada_data("verify", prefix)
    assert code == 1
    assert re.fullmatch(r"memory://\S+/part-2\.bin: its sha256 is .*\n", out)


def test_text_is_no_command_to_the_terminal(text: Path, tokenizer: Path, tmp_path: Path, llada_data) -> None:
    (text / "a.txt").write_text("\x1b]0;title\x07one\ttwo\n")
    llada_data("tokenize", text, "--tokenizer", tokenizer, "--output", tmp_path / "c")
    _, out, _ = llada_data("inspect", tmp_path / "c", "--tokenizer", tokenizer)
    assert "�]0;title�one\ttwo\n" in out
    assert "\x1b" not in out


def test_shares_by_the_command(
    text: Path, tokenizer: Path, tmp_path: Path, llada_data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.sources.SMALLEST_UNIT", 1)
    arguments = ("tokenize", text, "--tokenizer", tokenizer, "--output", tmp_path / "corpus", "--shard")
    for wrong in ("2/2", "1", "-1/2", "a/b"):
        code, _, err = llada_data(*arguments, wrong)
        assert code == 2
        assert "expected I/N, with I from 0 to N - 1" in err
    code, out, _ = llada_data(*arguments, "1/2")
    assert (code, out.split(": ")[1]) == (0, "share 1/2 is finished; when all are")
    code, _, err = llada_data("merge", tmp_path / "corpus")
    assert code == 2
    assert "1 of 3 parts are missing, the first is 0" in err
    llada_data(*arguments, "0/2")
    code, out, _ = llada_data("merge", tmp_path / "corpus")
    assert re.search(r"documents +3\n", out)


def test_a_tokenizer_without_a_mask(tokenizer: Path, text: Path, tmp_path: Path, llada_data) -> None:
    config = tokenizer / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|mdm_mask|>", "<mask>"))
    code, _, err = llada_data("tokenize", text, "--tokenizer", tokenizer, "--output", tmp_path / "corpus")
    assert code == 2
    advice = re.search(r"`llada-data (add-mask-token \S+ --output) FOLDER`", err)
    assert advice
    code, out, _ = llada_data(*advice[1].split(), tmp_path / "new")
    assert (code, out) == (0, f"{tmp_path / 'new'}: 271 tokens; mask 270, EOS 1; added <mask>\n")
    code, out, _ = llada_data("add-mask-token", tmp_path / "new", "--output", tmp_path / "again")
    assert (code, out) == (0, f"{tmp_path / 'again'}: 271 tokens; mask 270, EOS 1; it had both already\n")
    assert "a tokenizer is already there" in llada_data(*advice[1].split(), tmp_path / "new")[2]
    assert llada_data("tokenize", text, "--tokenizer", tmp_path / "new", "--output", tmp_path / "corpus")[0] == 0
