"""How a fine-tuned model answers held-out prompts: its bound on the true responses, and how many it gives exactly."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_train.config.errors import UserError
from llada_train.data.sft import SftData
from llada_train.sampling.denoiser import every_position
from llada_train.sampling.options import SamplingOptions
from llada_train.sampling.sampler import infill

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


@torch.no_grad()
def answers_report(
    logits_fn: Callable[[Tensor], Tensor],
    data: SftData,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> AnswersReport:
    """Measure a model on the validation examples of a run.

    Answers are as long as the longest response, the most probable tokens first (paper §2.4); what follows the first EOS
    is cut, and the rest has to be the response, token by token.

    Raises:
        UserError: the run holds no examples out.
    """
    examples = data.validation_examples
    if not examples:
        raise UserError("data.corpora: no held-out examples; set validation_documents of a data set, before training")
    tokens = [data.corpora[one.corpus].tokens(one.start, one.stop).tolist() for one in examples]
    borders = [one.responses[-1][0] for one in examples]
    prompts = [row[:border] for row, border in zip(tokens, borders, strict=True)]
    responses = [row[border:] for row, border in zip(tokens, borders, strict=True)]
    room = max(map(len, responses)) + 1  # and EOS
    groups: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[len(prompt)].append(i)
    answers: dict[int, list[int]] = {}
    for length, members in groups.items():
        gen_length = min(room, data.config.model.max_sequence_length - length)
        for start in range(0, len(members), BATCH):
            batch = members[start : start + BATCH]
            ids = torch.tensor([prompts[i] + [data.tokenizer.mask_id] * gen_length for i in batch])
            options = SamplingOptions(steps=min(gen_length, STEPS))
            filled = infill(every_position(logits_fn), ids, options, data.tokenizer.mask_id)
            answers |= {
                i: until(data.tokenizer.eos_id, row[length:]) for i, row in zip(batch, filled.tolist(), strict=True)
            }
            on_progress(len(answers), len(examples))
    matches = sum(answers[i] == until(data.tokenizer.eos_id, response) for i, response in enumerate(responses))
    decode = data.tokenizer.decode
    samples = tuple((decode(prompts[i]), decode(responses[i]), decode(answers[i])) for i in range(min(5, len(tokens))))
    return AnswersReport(len(examples), _bound(logits_fn, data), matches, samples)


def until(eos_id: int, ids: list[int]) -> list[int]:
    """The ids before the first EOS."""
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def _bound(logits_fn: Callable[[Tensor], Tensor], data: SftData) -> float:
    """Σ weight · NLL over the validation rows, whose weights are normalised over all of them."""
    total = 0.0
    for row in data.validation_batch(range(len(data.validation_examples))):
        clean, mask = torch.from_numpy(row.tokens), torch.from_numpy(row.mask)
        if mask.any():
            logits = logits_fn(clean.masked_fill(mask, data.tokenizer.mask_id).unsqueeze(0))[0].float().cpu()
            nll = torch.nn.functional.cross_entropy(logits[mask], clean[mask], reduction="sum")
            total += row.loss_weight * nll.item()
    return total
