"""A model's bound on the held-out documents, beside what counting achieves on the same tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from llada_train.config.errors import UserError
from llada_train.config.schema import Config
from llada_train.data.rows import PretrainingData
from llada_train.evaluation.baselines import bigram_cross_entropy, bits_per_byte, unigram_entropy
from llada_train.evaluation.bound import variational_bound
from llada_train.objective.forward_process import validation_noise
from llada_train.sampling.denoiser import Denoiser

COUNTED_TOKENS = 50_000_000  # the bigram model is counted on so many training tokens at most
_CHUNK_BLOCKS = 1024


@dataclass(frozen=True)
class Score:
    nats_per_token: float
    bits_per_byte: float


@dataclass(frozen=True)
class HeldOutReport:
    """`bound` is an upper bound on the model's loss; the baselines are exact. All on the same `tokens`."""

    tokens: int
    text_bytes: int
    bound: Score
    bound_standard_error: float
    bigram: Score
    unigram: Score


def held_out_report(
    denoiser: Denoiser,
    data: PretrainingData,
    config: Config,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOutReport:
    """Measure the model and both baselines on the validation rows of a run.

    Raises:
        UserError: the run holds no documents out.
    """
    rows = data.validation_rows
    if not len(rows):
        raise UserError(
            "data.corpora: no held-out documents to evaluate on; set validation_documents of a corpus, before training"
        )
    text_bytes = sum(len(data.tokenizer.decode(row.tolist()).encode()) for row in rows)
    noise = validation_noise(config.seed, data.validation_counts, data.sequence_length, config.objective.epsilon)
    measured = variational_bound(
        denoiser, rows, noise, data.tokenizer.mask_id, data.document_lengths, batch_size, on_progress
    )

    def score(nats: float) -> Score:
        return Score(nats, bits_per_byte(nats, rows.size, text_bytes))

    return HeldOutReport(
        tokens=rows.size,
        text_bytes=text_bytes,
        bound=score(measured.mean),
        bound_standard_error=measured.standard_error,
        bigram=score(bigram_cross_entropy(_training_rows(data), rows, data.tokenizer.vocab_size)),
        unigram=score(unigram_entropy(rows)),
    )


def _training_rows(data: PretrainingData) -> Iterator[np.ndarray]:
    """One epoch's worth of the run's first blocks, up to COUNTED_TOKENS."""
    count = min(sum(data.blocks_per_corpus), COUNTED_TOKENS // data.block_length)
    for start in range(0, count, _CHUNK_BLOCKS):
        yield data.training_blocks(np.arange(start, min(start + _CHUNK_BLOCKS, count)))
