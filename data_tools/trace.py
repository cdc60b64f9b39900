"""Which text a step of a run uses, and which steps use a text: computed from the config, without running it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.config.schema import Config
from llada_train.data.corpus import Corpus
from llada_train.data.place import ALONE, Place, place_of
from llada_train.data.rows import PretrainingData
from llada_train.data.sft import SftData
from llada_train.data.training_data import TrainingData
from llada_train.objective.forward_process import training_noise
from llada_train.training.preflight import check_corpora, open_inputs

CHUNK = 1 << 18  # tokens that are searched at once


@dataclass(frozen=True)
class DocumentPart:
    """A document, or the part of it, that a row holds."""

    number: int  # in its corpus
    first_token: int  # of the part, in the document
    tokens: int


@dataclass(frozen=True)
class TracedSample:
    sample: int
    row: int  # of the step; packed samples share one
    corpus: str
    epoch: int
    documents: list[DocumentPart]
    length: int  # tokens that are trained on: fewer than sequence_length where the row is cut
    t: float  # mask probability
    masked: int  # tokens that are masked
    text: str  # of those `length` tokens


@dataclass(frozen=True)
class DocumentUse:
    """One document that holds a text, and the steps that read some of it, in order."""

    corpus: str
    document: int
    tokens: int
    held_out: bool
    steps: list[int]


def open_run(
    config_file: Path, overrides: Sequence[str] = (), processes: int | None = None
) -> tuple[Config, TrainingData]:
    """The data of a config, in the order of its run: as its newest checkpoint records it, if there is one.

    Raises:
        UserError: config, data or checkpoint are at fault, or they are not those of the run.
    """
    inputs = open_inputs(load_config(config_file, overrides, processes), accept_config_changes=True)
    check_corpora(inputs.run, inputs.data)
    data, progress = inputs.data, inputs.run.progress
    if progress is not None:
        data = data.at(data.timeline_after(progress.phases, progress.consumed_samples))
    return inputs.config, data


def place(config: Config, rank: int | None, processes: int | None) -> Place:
    """Of one rank; None: of all together.

    Raises:
        UserError: there is no such rank.
    """
    if rank is None or processes is None:
        return ALONE
    if rank >= processes:
        raise UserError(f"--rank {rank}: the ranks of {processes} processes are 0 to {processes - 1}")
    return place_of(rank, processes, config.parallel)


def trace(config: Config, data: TrainingData, step: int, where: Place = ALONE) -> Iterator[TracedSample]:
    """The samples that a place reads in step 1, 2, … of the run, row by row.

    Raises:
        UserError: the run has no such step, or a corpus cannot be read.
    """
    timeline = data.timeline
    try:
        first_sample = timeline.first_sample(step)
    except IndexError as error:
        raise UserError(f"--step {step}: {error}") from None
    packing = data.packing(first_sample)
    own, _ = where.rows(len(packing), config)
    rows = {g: row for row in own for g in packing[row]}
    if isinstance(data, SftData):
        yield from _dialogues(data, first_sample, rows)
    elif isinstance(data, PretrainingData):
        yield from _texts(config, data, first_sample, rows)


def _dialogues(data: SftData, first_sample: int, rows: dict[int, int]) -> Iterator[TracedSample]:
    """What is learnt of each stands in ⟦ ⟧; `length` counts the EOS that are learnt after it, too."""
    numbers = list(rows)
    if not numbers:  # of a rank that is left without a packed row
        return
    epochs = data.places(numbers).epoch.tolist()
    found = zip(data.samples(first_sample, numbers), data.examples(numbers), epochs, strict=True)
    for sample, example, epoch in found:
        yield TracedSample(
            sample=sample.sample_index,
            row=rows[sample.sample_index],
            corpus=data.names[example.corpus],
            epoch=epoch,
            documents=[DocumentPart(example.dialogue, 0, example.length)],
            length=len(sample.tokens),
            t=sample.mask_probability,
            masked=int(sample.mask.sum()),
            text=data.rendered(example),
        )


def _texts(config: Config, data: PretrainingData, first_sample: int, rows: dict[int, int]) -> Iterator[TracedSample]:
    phase = data.timeline.phase(first_sample)
    noise = training_noise(config.seed, first_sample, phase.global_batch_size, phase.sequence_length, config.objective)
    numbers = list(rows)
    found = zip(numbers, data.training_stretches(numbers), data.training_rows(numbers), strict=True)
    for sample, stretch, tokens in found:
        i = sample - first_sample
        length = int(noise.lengths[i])
        yield TracedSample(
            sample=sample,
            row=rows[sample],
            corpus=data.names[stretch.corpus],
            epoch=stretch.epoch,
            documents=_documents(data.corpora[stretch.corpus], stretch.start, stretch.start + length),
            length=length,
            t=float(noise.mask_probability[i]),
            masked=int(noise.mask(i).sum()),
            text=data.tokenizer.decode(tokens[:length].tolist(), keep_special=True),
        )


def _documents(corpus: Corpus, start: int, stop: int) -> list[DocumentPart]:
    """Of tokens [start, stop) of a corpus."""
    parts = []
    number = corpus.document_at(start)
    while start < stop:
        first, end = corpus.document_start(number), corpus.document_start(number + 1)
        if end > start:  # not an empty document
            parts.append(DocumentPart(number, start - first, min(end, stop) - start))
            start = min(end, stop)
        number += 1
    return parts


def find(
    config: Config, data: TrainingData, text: str, on_progress: Callable[[int], None] = lambda tokens: None
) -> Iterator[DocumentUse]:
    """The documents of all corpora that hold a text, as each is found; `on_progress` gets the tokens searched so far.

    The text is looked for as the tokenizer normalises it.

    Raises:
        UserError: it is an SFT run, a corpus cannot be read, or the tokens do not tell the text's bytes.
    """
    if not isinstance(data, PretrainingData):
        raise UserError("--find: only pre-training is searched; --step shows the dialogues of an SFT run's steps")
    searched = 0
    wanted = data.tokenizer.normalized(text).encode()
    for c, corpus in enumerate(data.corpora):
        end = 0  # of the last document found
        for token in _search(data, corpus, wanted, partial(_add, on_progress, searched)):
            if token < end:
                continue
            number = corpus.document_at(token)
            start, end = corpus.document_start(number), corpus.document_start(number + 1)
            steps = {data.timeline.step(sample) for sample in _reading(config, data, c, start, end)}
            yield DocumentUse(
                corpus=data.names[c],
                document=number,
                tokens=end - start,
                held_out=number >= data.trained_documents(c),
                steps=sorted(step for step in steps if step is not None),
            )
        searched += corpus.num_tokens


def _reading(config: Config, data: PretrainingData, corpus: int, start: int, stop: int) -> Iterator[int]:
    """The samples that read some of tokens [start, stop) of a corpus: not those whose row is cut before them."""
    for sample in data.uses(corpus, start, stop):
        (stretch,) = data.training_stretches([sample])
        noise = training_noise(config.seed, sample, 1, stretch.stop - stretch.start, config.objective)
        if stretch.start + int(noise.lengths[0]) > start:
            yield sample


def _add(on_progress: Callable[[int], None], before: int, tokens: int) -> None:
    on_progress(before + tokens)


def _search(data: PretrainingData, corpus: Corpus, wanted: bytes, on_progress: Callable[[int], None]) -> Iterator[int]:
    """The token in which each occurrence of some bytes begins, in order; memory does not grow with the corpus."""
    of_token = data.tokenizer.token_bytes
    everything = np.frombuffer(b"".join(of_token), np.uint8)
    sizes = np.array([len(token) for token in of_token])
    offsets = np.cumsum(sizes) - sizes
    start = 0
    while start < corpus.num_tokens:
        # What begins in this chunk may end in the next one.
        tokens = corpus.tokens(start, min(start + CHUNK + len(wanted), corpus.num_tokens)).astype(np.int64)
        if tokens.max() >= len(sizes):
            raise UserError(
                f"{corpus.prefix}: holds token id {tokens.max()}, but the tokenizer has {len(sizes)}; it is damaged or "
                "was made with another tokenizer"
            )
        ends = np.cumsum(sizes[tokens])
        begins = ends - sizes[tokens]
        gather = np.arange(ends[-1]) + np.repeat(offsets[tokens] - begins, sizes[tokens])
        content = everything[gather].tobytes()
        at = content.find(wanted)
        while at >= 0:
            token = int(np.searchsorted(ends, at, side="right"))
            if token >= CHUNK:
                break
            yield start + token
            at = content.find(wanted, at + 1)
        start += CHUNK
        on_progress(min(start, corpus.num_tokens))
