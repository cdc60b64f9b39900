"""How a fine-tuned model answers held-out prompts: its bound on the true responses, and how many it gives exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from llada_train.config.errors import UserError
from llada_train.data.sft import Example, SftData
from llada_train.evaluation.log_probability import log_probabilities
from llada_train.sampling.denoiser import Denoiser, Query
from llada_train.sampling.options import SamplingOptions
from llada_train.sampling.text import OnProgress, fill_rows

BATCH = 16
STEPS = 32  # at most, of one answer


@dataclass(frozen=True)
class AnswersReport:
    examples: int
    bound: float
    """Upper bound on −ln p(response | prompt), in nats per token of responses with their EOS padding."""
    exact_matches: int
    samples: tuple[tuple[str, str, str], ...]
    """Of the first few: prompt, response, and the model's answer."""

    @property
    def exact_match(self) -> float:
        return self.exact_matches / self.examples


def answers_report(
    denoiser: Denoiser,
    data: SftData,
    batch_size: int = BATCH,
    on_progress: OnProgress = lambda done, total: None,
) -> AnswersReport:
    """Measure a model on the validation examples of a run. `on_progress` gets (tokens done, tokens in all).

    Raises:
        UserError: the run holds no examples out.
    """
    examples = data.validation_examples
    if not examples:
        raise UserError("data.corpora: no held-out examples; set validation_documents of a data set, before training")
    answered = answer(denoiser, data, examples, batch_size, on_progress)
    decode = data.tokenizer.decode
    samples = tuple((decode(one.prompt), decode(one.response), decode(one.answer)) for one in answered[:5])
    return AnswersReport(len(examples), _bound(denoiser, data, batch_size), sum(one.exact for one in answered), samples)


@dataclass(frozen=True)
class Answered:
    """Token ids; the answer up to its EOS."""

    prompt: list[int]
    response: list[int]
    answer: list[int]
    exact: bool
    """Whether the answer is the response, token by token, up to EOS."""


def answer(
    denoiser: Denoiser,
    data: SftData,
    examples: Sequence[Example],
    batch_size: int = BATCH,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Answered]:
    """Answers as long as the longest response, the most probable tokens first (paper §2.4)."""
    prompts, responses = prompts_and_responses(data, examples)
    rows, eos_id = rows_to_fill(data, prompts, responses), data.tokenizer.eos_id
    options = SamplingOptions(steps=min(_room(responses), STEPS), stop_ids=(eos_id,))
    filled = fill_rows(denoiser, rows, options, data.tokenizer.mask_id, batch_size, on_progress=on_progress)
    answers = [until(eos_id, row[len(prompt) :]) for row, prompt in zip(filled, prompts, strict=True)]
    return [
        Answered(prompt, response, found, found == until(eos_id, response))
        for prompt, response, found in zip(prompts, responses, answers, strict=True)
    ]


def prompts_and_responses(data: SftData, examples: Sequence[Example]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids: all before each example's last response, and the response."""
    tokens = [data.corpora[one.corpus].tokens(one.start, one.stop).tolist() for one in examples]
    borders = [one.responses[-1][0] for one in examples]
    cut = list(zip(tokens, borders, strict=True))
    return [row[:border] for row, border in cut], [row[border:] for row, border in cut]


def rows_to_fill(data: SftData, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[list[int]]:
    """Each prompt with masks for the longest of the responses and EOS, if the model takes so many."""
    longest, room = data.config.model.max_sequence_length, _room(responses)
    return [[*prompt, *[data.tokenizer.mask_id] * min(room, longest - len(prompt))] for prompt in prompts]


def _room(responses: Sequence[list[int]]) -> int:
    return max(map(len, responses)) + 1


def until(eos_id: int, ids: list[int]) -> list[int]:
    """The ids before the first EOS."""
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def _bound(denoiser: Denoiser, data: SftData, batch_size: int) -> float:
    """Σ weight · NLL over the validation rows, whose weights are normalised over all of them."""
    total = 0.0
    samples = [one for one in data.validation_samples(range(len(data.validation_examples))) if one.mask.any()]
    samples.sort(key=lambda one: len(one.tokens))
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        clean = pad_sequence([torch.from_numpy(one.tokens) for one in batch], batch_first=True)
        masked = pad_sequence([torch.from_numpy(one.mask) for one in batch], batch_first=True)
        visible = torch.arange(clean.shape[1]) < torch.tensor([[len(one.tokens)] for one in batch])
        query = Query(clean.masked_fill(masked, data.tokenizer.mask_id), masked, None if visible.all() else visible)
        log_p = log_probabilities(denoiser, query, clean).sum(1)
        total -= (log_p * torch.tensor([one.loss_weight for one in batch], dtype=torch.float64)).sum().item()
    return total
