"""`llada-data filter`, `dedup` and `decontaminate` against datatrove's filters and signatures, one process each.

datatrove gets this project's words, since its own come from spaCy, which alone takes longer than all of the rest. What
it decides is the same. CPU seconds, so that other programs on the machine hardly change them.
"""

import sysconfig
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from common import ROOT, machine_and_versions
from datatrove.data import Document
from datatrove.pipeline.decont import n_grams as decont
from datatrove.pipeline.dedup import minhash
from datatrove.pipeline.filters import gopher_quality_filter as quality
from datatrove.pipeline.filters import gopher_repetition_filter as repetition
from datatrove.utils.hashing import HashConfig, create_hash_func
from datatrove.utils.text import ngrams, simplify_text

from data_tools.cleaning.decontaminate import Finder
from data_tools.cleaning.evaluations import Evaluations
from data_tools.cleaning.filter import Judge
from data_tools.cleaning.minhash import Signer
from data_tools.cleaning.rules import Rules
from data_tools.cleaning.words import bare_words, split_words

REPETITIONS = 3
SHA1 = HashConfig(hash_fc="sha1")


class OurWords:
    def word_tokenize(self, text: str) -> list[str]:
        return bare_words(text)


def main() -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    texts = [text for text in texts if text.strip()]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    for module in (quality, repetition):
        module.split_into_words = lambda text, language: split_words(text)
    for module in (minhash, decont):
        module.load_word_tokenizer = lambda language: OurWords()
    with TemporaryDirectory() as folder:
        rows = [rules(texts), signatures(texts), evaluation(texts, Path(folder))]
    lines = [
        f"# Cleaning text, {date.today().isoformat()}",
        "",
        machine_and_versions(),
        f"- datatrove {version('datatrove')} with SHA-1; {len(texts)} files of the Python standard library, "
        f"{megabytes:.1f} MB; one process, CPU time, best of {REPETITIONS}; `python benchmarks/cleaning.py`",
        "",
        "| | llada-data, MB/s | datatrove with the same words, MB/s | ratio |",
        "|---|---|---|---|",
    ]
    for name, ours, theirs in rows:
        lines.append(f"| {name} | {megabytes / ours:.2f} | {megabytes / theirs:.2f} | {theirs / ours:.1f} |")
    report = "\n".join(lines) + "\n"
    print(report)
    (ROOT / f"benchmarks/results/cleaning_{date.today().isoformat()}.md").write_text(report, encoding="utf-8")


def rules(texts: list[str]) -> tuple[str, float, float]:
    judge = Judge(Rules())
    filters = (quality.GopherQualityFilter(), repetition.GopherRepetitionFilter())

    def theirs() -> list[bool]:
        return [all(step.filter(Document(text, "")) is True for step in filters) for text in texts]

    assert [broken is None for broken in judge(texts)] == theirs()
    return "filter: Gopher's rules", seconds(lambda: judge(texts)), seconds(theirs)


def signatures(texts: list[str]) -> tuple[str, float, float]:
    signer = Signer(5, 14, 8)
    step = minhash.MinhashDedupSignature("/nowhere", minhash.MinhashConfig(hash_config=SHA1))

    def theirs() -> None:
        for text in texts:
            if len(shingles := step.get_shingles(text)):
                step.get_signature(shingles)

    return "dedup: keys of 14 bands of 8", seconds(lambda: signer(texts)), seconds(theirs)


def evaluation(texts: list[str], folder: Path) -> tuple[str, float, float]:
    quiz = texts[0][1000:5000]
    (folder / "quiz.txt").write_text(quiz, encoding="utf-8")
    finder = Finder(Evaluations.read([folder / "quiz.txt"], 13))
    hash_ngram = create_hash_func(SHA1)
    hashes = [hash_ngram(" ".join(ngram)) for ngram in ngrams(bare_words(simplify_text(quiz)), 13)]
    (folder / "index").mkdir()
    np.array(hashes, dtype=np.uint64).tofile(folder / "index" / "quiz.index.hashes")
    step = decont.NGramsDecontFilter(str(folder / "index"), decont.NGramsDecontConfig(n_grams=13, hash_config=SHA1))

    def theirs() -> list[bool]:
        return [step.filter(Document(text, "")) is True for text in texts]

    assert [hits is None for hits in finder(texts)] == theirs()
    return "decontaminate: runs of 13 words", seconds(lambda: finder(texts)), seconds(theirs)


def seconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPETITIONS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    main()
