"""The same corpus for any number of processes and machines, and after any interruption."""

import contextlib
import fcntl
import gzip
import hashlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import tokenizers
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_tools import sources as sources_module
from data_tools.parts import Parts
from data_tools.sources import Sources
from data_tools.tokenize import Shard, tokenize
from data_tools.train_tokenizer import train_tokenizer
from llada_train.config.errors import UserError
from llada_train.data.corpus import Corpus, Manifest
from llada_train.data.corpus_writer import CorpusWriter

WORDS = "the of and to in is that it was for on are as with his they at be this from".split()  # noqa: SIM905
UNIT = 1500  # bytes
PROGRAM = f"""
import data_tools.sources as sources
sources.SMALLEST_UNIT = {UNIT}
from data_tools.cli import main
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text/` with files of several kinds, some of them faulty; `tokenizer/`; `whole`, the corpus of it all."""
    folder = tmp_path_factory.mktemp("text")
    pick = random.Random(0)
    texts = [" ".join(pick.choices(WORDS, k=pick.randrange(1, 80))) for _ in range(300)]
    text = folder / "text"
    (text / "code").mkdir(parents=True)
    for i, document in enumerate(texts[:40]):
        (text / "code" / f"{i:03d}.py").write_text(document)
    lines = [json.dumps({"text": document}) for document in texts[40:]]
    lines[7] = "{"
    (text / "a.jsonl").write_text("\n".join(lines[:150]))
    (text / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[150:]).encode()))
    (text / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": texts[0]}).encode())[:-9])
    (text / "empty\nname.txt").touch()
    train_tokenizer(iter(texts), 300, folder / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_module, "SMALLEST_UNIT", UNIT)
        tokenize(Sources([text]), folder / "tokenizer", folder / "whole")
        assert len(Sources([text]).units()) > 20
    return folder


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "SMALLEST_UNIT", UNIT)


SUFFIXES = (".bin", ".idx", ".json", ".inputs.sha256")


def content(prefix: Path) -> dict[str, bytes]:
    assert not list(prefix.parent.glob(f"{prefix.name}.parts*"))
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES}


def test_what_is_in_a_corpus(folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    documents = [document.text for document in Sources([folder / "text"])]
    expected = [[*backend.encode(text).ids, backend.token_to_id("<|endoftext|>")] for text in documents]
    dataset = IndexedDataset(str(folder / "whole"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == expected
    manifest = Manifest.model_validate_json((folder / "whole.json").read_bytes())
    assert manifest.documents == len(documents) == 299
    assert manifest.rejected == {"broken JSON": 1, "damaged or truncated archive, from there on": 1, "empty": 1}
    assert manifest.text_bytes == sum(map(len, documents))
    assert manifest.checksums is not None
    assert manifest.checksums.bin == hashlib.sha256((folder / "whole.bin").read_bytes()).hexdigest()
    assert manifest.checksums.idx == hashlib.sha256((folder / "whole.idx").read_bytes()).hexdigest()
    # Ours can be read by a tool that is not, names with newlines and all.
    done = subprocess.run(["sha256sum", "--check", str(folder / "whole.inputs.sha256")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == 44


def test_shares_and_processes_do_not_change_the_corpus(folder: Path, tmp_path: Path) -> None:
    inputs, tokenizer = [folder / "text"], folder / "tokenizer"
    tokenize(Sources(inputs), tokenizer, tmp_path / "two", workers=2)
    for index in (2, 0):
        assert tokenize(Sources(inputs), tokenizer, tmp_path / "shares", shard=Shard(index, 3)) is None
    why = r"parts are missing, the first is \d+: run the `llada-data tokenize --shard`"
    with Parts.resume(tmp_path / "shares") as parts, pytest.raises(UserError, match=why):
        parts.merge()
    tokenize(Sources(inputs), tokenizer, tmp_path / "shares", shard=Shard(1, 3))
    with Parts.resume(tmp_path / "shares") as parts:
        parts.merge()
    assert content(tmp_path / "two") == content(tmp_path / "shares") == content(folder / "whole")
    for share in range(4):
        assert [i for index in range(4) for i in Shard(index, 4).of(share)] == list(range(share))


def test_a_killed_run_goes_on(folder: Path, tmp_path: Path) -> None:
    parts = tmp_path / "corpus.parts"
    command = [sys.executable, "-c", PROGRAM, "tokenize", folder / "text", "--tokenizer", folder / "tokenizer"]
    command += ["--output", tmp_path / "corpus", "--workers", "2"]
    finished = 0
    for wanted in (1, random.randrange(2, 20)):
        with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE) as run:
            while run.poll() is None and len(list(parts.glob("[0-9]*.json"))) < max(wanted, finished + 1):
                time.sleep(0.003)
            workers = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
            run.kill()
        assert not psutil.wait_procs(workers, timeout=60)[1], "workers outlive the run"
        finished = len(list(parts.glob("[0-9]*.json")))
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if finished:  # else the last one was killed after the end
        assert f"{finished} of " in done.stderr
    assert content(tmp_path / "corpus") == content(folder / "whole")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("place", ["CorpusWriter.add_file", "CorpusWriter._commit", "Manifest.save", "shutil.rmtree"])
def test_a_killed_merge_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def killed(*_: object) -> None:
        raise Killed

    arguments = (Sources([folder / "text"]), folder / "tokenizer", tmp_path / "c")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(f"data_tools.parts.{place}", killed)
        tokenize(*arguments)
    if place == "shutil.rmtree":  # all was done but the tidying
        with pytest.raises(UserError, match="already there"):
            tokenize(*arguments)
    else:
        tokenize(*arguments)
    assert content(tmp_path / "c") == content(folder / "whole")


def test_finished_parts_are_not_made_again(folder: Path, tmp_path: Path) -> None:
    tokenize(Sources([folder / "text"]), folder / "tokenizer", tmp_path / "c", shard=Shard(0, 2))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c.parts").glob("[0-9]*")}
    (tmp_path / "c.parts" / "00001.json").unlink()  # killed between the two
    lines: list[str] = []
    tokenize(Sources([folder / "text"]), folder / "tokenizer", tmp_path / "c", shard=Shard(0, 2), tell=lines.append)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "c.parts").glob("[0-9]*")}
    assert {path.name for path in before if before[path] != after[path]} == {"00001.bin", "00001.idx", "00001.json"}
    assert "parts were finished before" in lines[0]


def test_a_part_that_does_not_fit_its_report_is_refused(folder: Path, tmp_path: Path) -> None:
    """As when parts are copied together from several machines."""
    tokenize(Sources([folder / "text"]), folder / "tokenizer", tmp_path / "c", shard=Shard(0, 1))
    parts = tmp_path / "c.parts"
    flipped = bytearray((parts / "00002.bin").read_bytes())
    flipped[20] ^= 1  # on the way, or on a disk
    for damaged in (
        {".bin": bytes(flipped)},
        {suffix: (parts / f"00001{suffix}").read_bytes() for suffix in (".bin", ".idx")},
    ):
        for suffix, data in damaged.items():
            (parts / f"00002{suffix}").write_bytes(data)
        why = r"00002: is not what its \.json says"
        with Parts.resume(tmp_path / "c") as resumed, pytest.raises(UserError, match=why):
            resumed.merge()
        assert not (tmp_path / "c.idx").exists()


def test_a_tokenizer_that_changes_while_it_is_used_is_refused(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(["another"]), 280, tmp_path / "new")
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")

    def change(line: str) -> None:
        assert line.startswith("encoding ")
        shutil.copytree(tmp_path / "new", tmp_path / "tokenizer", dirs_exist_ok=True)

    with pytest.raises(UserError, match="tokenizer: changed while it was in use; run the command again"):
        tokenize(Sources([folder / "text"]), tmp_path / "tokenizer", tmp_path / "c", workers=2, tell=change)
    assert not list((tmp_path / "c.parts").glob("[0-9]*"))


def test_parts_of_other_work_are_refused(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("one")
    tokenize(Sources([text]), folder / "tokenizer", tmp_path / "c", shard=Shard(0, 1))
    (text / "a.txt").write_text("another")
    with pytest.raises(UserError, match="holds parts of other work: the inputs"):
        tokenize(Sources([text]), folder / "tokenizer", tmp_path / "c")
    with pytest.raises(UserError, match=r"parts of other work.*remove it to begin again"):
        tokenize(Sources([text]), folder / "tokenizer", tmp_path / "c", shard=Shard(0, 1), overwrite=True)
    manifest = tokenize(Sources([text]), folder / "tokenizer", tmp_path / "c", overwrite=True)
    assert manifest is not None
    assert manifest.text_bytes == len("another")


def test_an_input_that_changes_while_it_is_read_is_noticed(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("one")

    def change(*_: int) -> None:
        (text / "a.txt").write_text("another")

    with pytest.raises(UserError, match=r"a\.txt: changed while it was read"):
        tokenize(Sources([text]), folder / "tokenizer", tmp_path / "c", report=change)
    assert not list(tmp_path.glob("c.[bij]*"))


def test_two_writers_of_one_part_take_turns(tmp_path: Path) -> None:
    """A share that is started twice, or while a killed one's last process is still there."""
    ready, go = threading.Event(), threading.Event()

    def first() -> None:
        with CorpusWriter(tmp_path / "c", "uint16") as writer:
            writer.add_document([1] * 100)
            ready.set()
            go.wait(60)

    def second() -> None:
        with CorpusWriter(tmp_path / "c", "uint16") as writer:
            assert (tmp_path / "c.idx").exists()
            writer.add_document([2] * 9)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        assert ready.wait(60)
        two = pool.submit(second)
        threading.Timer(0.2, go.set).start()
        one.result(60)
        two.result(60)
    assert Corpus(tmp_path / "c").document(0).tolist() == [2] * 9
    assert not list(tmp_path.glob("*.partial"))


def test_two_at_the_same_output_are_refused(folder: Path, tmp_path: Path) -> None:
    tokenize(Sources([folder / "text"]), folder / "tokenizer", tmp_path / "c", shard=Shard(0, 2))
    with (tmp_path / "c.parts" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        tokenize(Sources([folder / "text"]), folder / "tokenizer", tmp_path / "c", shard=Shard(1, 2))
        with pytest.raises(UserError, match="another llada-data is at work"):
            tokenize(Sources([folder / "text"]), folder / "tokenizer", tmp_path / "c")


@pytest.fixture
def no_large_files() -> Iterator[None]:
    """As if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_it_and_it_goes_on(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("no_large_files")
    with pytest.raises(UserError, match=r"File too large.*the same command goes on"):
        tokenize(Sources([folder / "text"]), folder / "tokenizer", tmp_path / "c")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert not [path for path in tmp_path.iterdir() if path.suffix in SUFFIXES]
    tokenize(Sources([folder / "text"]), folder / "tokenizer", tmp_path / "c")
    assert content(tmp_path / "c") == content(folder / "whole")


def test_a_worker_that_is_killed_is_a_user_error(folder: Path, tmp_path: Path) -> None:
    def kill(size: int, documents: int, tokens: int) -> None:
        for child in psutil.Process().children() if documents else ():
            with contextlib.suppress(psutil.NoSuchProcess):  # killed when it was told of another part
                if any("spawn_main" in word for word in child.cmdline()):
                    child.send_signal(signal.SIGKILL)

    with pytest.raises(UserError, match=r"a tokenizing process died.*goes on from what is finished"):
        tokenize(Sources([folder / "text"]), folder / "tokenizer", tmp_path / "c", workers=2, report=kill)
    tokenize(Sources([folder / "text"]), folder / "tokenizer", tmp_path / "c")
    assert content(tmp_path / "c") == content(folder / "whole")
