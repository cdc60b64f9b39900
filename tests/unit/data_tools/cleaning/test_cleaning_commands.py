"""The commands as a user runs them, in this process where nothing is killed."""

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import zstandard

from data_tools import cli
from data_tools.cleaning.output import whole_file
from data_tools.sources import Sources
from llada_train.config.errors import UserError

Run = Callable[..., tuple[object, str, str]]

GOOD = [
    f"The {name} of " + " and ".join(f"{name}{i} of word{i * i}" for i in range(30))
    for name in ("ab", "cd", "ef", "gh")
]
BAD = ["too short\x1b", "the and # word " * 20, "the and " + "1234 5678 " * 30]


@pytest.fixture
def llada_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["llada-data", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text}) for pair in zip(GOOD, [*BAD, "{"], strict=True) for text in pair]
    path.write_text("\n".join([*lines[:-1], "{", ""]))
    return path


def read(path: Path) -> list[str]:
    return [document.text for document in Sources([path])]


def report_on(output: Path) -> dict:
    return json.loads(output.with_name(f"{output.name}.report.json").read_text())


@pytest.mark.parametrize("workers", [1, 2])
def test_filter(texts: Path, tmp_path: Path, llada_data: Run, workers: int) -> None:
    output = tmp_path / "new" / "out.jsonl"
    code, out, err = llada_data("filter", texts, "--output", output, "--workers", workers)
    assert code == 0, err
    assert read(output) == GOOD
    report = report_on(output)
    assert {rule: removed["documents"] for rule, removed in report["removed"].items()} == {
        "min_words": 1,
        "max_hashes_per_word": 1,
        "min_alphabetic_words": 1,
    }
    assert report["removed"]["min_words"]["samples"] == [{"document": 1, "why": "measured 2", "text": BAD[0]}]
    assert (report["documents"], report["kept_documents"], report["rejected"]) == (7, 4, {"broken JSON": 1})
    assert report["settings"]["rules"]["min_words"] == 50
    assert re.match(r"documents +7  100.00% +0.0 MB\nkept +4   57.14% ", out)
    assert f"left out, broken JSON: 1, the first in {texts}, line 8" in err
    assert "removed, min_words: document 1 (measured 2): too short\n" in err


def test_rules_and_compression(texts: Path, tmp_path: Path, llada_data: Run) -> None:
    (tmp_path / "rules.yaml").write_text("min_words: null\nmin_stop_words: null\nmax_top_ngram_characters: {}\n")
    outputs = [tmp_path / f"{name}.jsonl{suffix}" for suffix in (".gz", ".zst") for name in "ab"]
    for output in outputs:
        assert llada_data("filter", texts, "--output", output, "--rules", tmp_path / "rules.yaml")[0] == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert outputs[0].read_bytes()[4:8] == bytes(4)  # no time
    assert outputs[2].read_bytes() == outputs[3].read_bytes()
    expected = "".join(json.dumps({"text": text}) + "\n" for text in [GOOD[0], BAD[0], *GOOD[1:]])
    assert gzip.decompress(outputs[0].read_bytes()).decode() == expected
    assert zstandard.ZstdDecompressor().decompressobj().decompress(outputs[2].read_bytes()).decode() == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_a_classifier_of_the_user(texts: Path, tmp_path: Path, llada_data: Run, workers: int) -> None:
    (tmp_path / "quality.py").write_text(
        "SCORES = {'ab': 0.9, 'cd': 0.3, 'ef': 0.5}\n"
        "def score(texts):\n    return [SCORES.get(text.split()[1], float('nan')) for text in texts]\n"
    )
    classifier = ("--classifier", f"{tmp_path / 'quality.py'}:score", "--min-score", 0.5)
    output = tmp_path / "out.jsonl"
    code, _, err = llada_data("filter", texts, "--output", output, "--workers", workers, *classifier)
    assert code == 0, err
    assert read(output) == [GOOD[0], GOOD[2]]
    assert report_on(output)["removed"]["quality_score"]["documents"] == 2


def test_dedup_and_decontaminate(texts: Path, tmp_path: Path, llada_data: Run) -> None:
    (tmp_path / "more.txt").write_text(GOOD[1].replace("cd3", "changed", 1))
    output = tmp_path / "unique.jsonl.zst"
    copy = tmp_path / f"copy_of_{texts.name}"
    copy.write_bytes(texts.read_bytes())
    code, out, err = llada_data("dedup", texts, tmp_path / "more.txt", copy, "--output", output)
    assert code == 0, err
    assert [line.split()[:3] for line in out.splitlines()[2:4]] == [
        ["removed,", "exact", "7"],
        ["removed,", "near", "1"],
    ]
    assert report_on(output)["settings"]["found_by_similarity"]["0.8"] == 0.9235  # 1 − (1 − 0.8^8)^14

    (tmp_path / "quiz.jsonl").write_text(
        json.dumps({"q": GOOD[2][7:130].upper(), "a": ["yes"]}) + "\n" + json.dumps({"q": "what?"}) + "\n"
    )
    for workers in (1, 2):
        output = tmp_path / f"clean{workers}.jsonl"
        arguments = (texts, "--against", tmp_path / "quiz.jsonl", "--workers", workers)
        code, out, err = llada_data("decontaminate", *arguments, "--output", output)
        assert code == 0, err
        assert read(output) == [text for text in read(texts) if text != GOOD[2]]
        assert "quiz: in 1 documents; 1 of 2 examples found, 1 too short to look for\n" in out
    code, out, err = llada_data("decontaminate", *arguments, "--report-only", tmp_path / "report.json")
    assert code == 0, err
    assert "contaminated, quiz" in out
    counts = {"documents": 1, "examples": 2, "examples_found": 1, "examples_too_short": 1}
    assert json.loads((tmp_path / "report.json").read_text())["tasks"] == {"quiz": counts}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("filter IN --output out.txt", "out.txt: --output has to end in .jsonl, .jsonl.gz, .jsonl.zst"),
        ("filter IN --output IN --overwrite", "texts.jsonl: is part of the input; give another --output"),
        ("filter IN empty --output empty/out.jsonl", "empty/out.jsonl: lies in empty, which is read"),
        ("dedup IN empty --output empty/out.jsonl", "empty/out.jsonl: lies in empty, which is read"),
        ("decontaminate IN empty --against IN --output empty/out.jsonl", "out.jsonl: lies in empty, which is read"),
        ("decontaminate IN empty --against IN --report-only empty/r.json", "r.json: lies in empty, which is read"),
        ("decontaminate IN --against IN --report-only IN --overwrite", "texts.jsonl: is part of the input; give anoth"),
        ("filter IN --output out.jsonl --min-score 1", "--classifier and --min-score go together"),
        ("filter IN --output out.jsonl --min-score 1 --classifier c.py", "expected FILE.py:FUNCTION"),
        ("filter IN --output out.jsonl --min-score 1 --classifier c.py:none", "c.py: has no function 'none'"),
        ("filter IN --output out.jsonl --min-score 1 --classifier c.py:fails", "failed: KeyError: 'model'"),
        ("filter IN --output out.jsonl --min-score 1 --classifier c.py:fails --workers 2", "failed: KeyError: 'model'"),
        ("filter IN --output out.jsonl --min-score 1 --classifier c.py:one", "returned 1 scores for 4 texts"),
        ("filter IN --output out.jsonl --min-score 1 --classifier c.py:dies --workers 2", "a worker process died"),
        ("filter IN --output out.jsonl --min-score 1 --classifier broken.py:f", "broken.py: fails when it is loaded"),
        ("filter IN --output out.jsonl --rules strict.yaml", "all 7 documents would be removed (min_words: 7)"),
        ("filter empty --output out.jsonl", "empty text: none of the inputs has a document"),
        ("dedup empty --output out.jsonl", "empty text: none of the inputs has a document"),
        ("decontaminate IN --against empty", "give --output to remove contaminated documents, or --report-only"),
        ("decontaminate IN --against no.jsonl --report-only r.json", "no.jsonl: cannot be read: No such file"),
        ("dedup IN --output file/out.jsonl", "file/out.jsonl: cannot be written: File exists"),
    ],
)
def test_errors_are_one_message_and_write_nothing(
    texts: Path, tmp_path: Path, llada_data: Run, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "strict.yaml").write_text("min_words: 10000")
    (tmp_path / "broken.py").write_text("import nothing_like_this")
    (tmp_path / "c.py").write_text(
        "import os\ndef fails(texts): return {}['model']\ndef one(texts): return [1.0]\ndef dies(texts): os._exit(1)\n"
    )
    before = {path.name for path in tmp_path.iterdir()}
    code, out, err = llada_data(*arguments.replace("IN", "texts.jsonl").split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == before


def test_an_input_that_changes_while_it_is_read_is_noticed(
    texts: Path, tmp_path: Path, llada_data: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quiz.txt").write_text(GOOD[2])

    def change(*_: object) -> None:
        with texts.open("a") as file:
            file.write("\n")

    monkeypatch.setattr("llada_train.data.progress.ByteProgress.update", change)
    for command in (("filter",), ("decontaminate", "--against", tmp_path / "quiz.txt")):
        code, _, err = llada_data(*command, texts, "--output", tmp_path / "out.jsonl")
        assert code == 2
        assert "texts.jsonl: changed while it was read; run the command again" in err
        assert not list(tmp_path.glob("*out.jsonl*"))


def test_an_existing_output_is_kept(texts: Path, tmp_path: Path, llada_data: Run) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    for command in ("filter", "dedup"):
        code, _, err = llada_data(command, texts, "--output", output)
        assert (code, output.read_text()) == (2, "precious")
        assert "already there; give another --output, or --overwrite" in err
    assert llada_data("filter", texts, "--output", output, "--overwrite")[0] == 0
    assert read(output) == GOOD


def test_killed_with_9_it_leaves_nothing_and_can_be_run_again(texts: Path, tmp_path: Path, llada_data: Run) -> None:
    output = tmp_path / "out" / "out.jsonl"
    # The classifier is reached when the output is open; then it waits for ever.
    (tmp_path / "slow.py").write_text(
        "import signal\ndef score(texts):\n    print('reached', flush=True)\n    signal.pause()\n"
    )
    classifier = ("--classifier", f"{tmp_path / 'slow.py'}:score", "--min-score", "0")
    arguments = ["filter", str(texts), "--output", str(output), "--workers", "2", *classifier]
    command = [sys.executable, "-m", "data_tools.cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "reached\n"
        code, _, err = llada_data("filter", texts, "--output", output)
        workers = psutil.Process(running.pid).children(recursive=True)
        running.kill()
    assert workers
    assert not psutil.wait_procs(workers, timeout=60)[1], "workers outlive the run"
    assert code == 2
    assert "out.jsonl: another run is writing it" in err
    assert [path.name for path in output.parent.iterdir()] == [".out.jsonl.partial"]
    assert list(Sources([output.parent]).files) == []  # no command takes it for input
    assert llada_data("filter", texts, "--output", output)[0] == 0
    assert read(output) == GOOD
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.jsonl", "out.jsonl.report.json"]


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"new")
        1 / 0  # noqa: B018
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    with whole_file(path) as file:
        file.write(b"new")
        with pytest.raises(UserError, match="another run is writing it"), whole_file(path):
            pass
        assert path.read_text() == "old"
    assert (path.read_text(), list(tmp_path.iterdir())) == ("new", [path])
