"""Fine-tuning rows: the dialogues of each data set, one for each sample, and their noise (paper §2.3, Alg. 2).

A sample is a prompt, its response, EOS, and learnt EOS up to the longest of `eos_pad_group` samples. It has a row for
itself or, packed, shares one with others of its global batch, which it does not see; its noise and its weight are the
same. What a micro-batch needs beyond that, to make its rows equally long, is neither learnt nor attended to. Prompts
are never noised. The clock counts data.sequence_length nominal tokens for each example, and one example is one block of
the order, so that order, epochs, mixtures and held-out documents are those of pre-training.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llada_train.config.errors import UserError, under_key
from llada_train.config.schema import Config, CorpusConfig, LearningRatePhase, SftConfig
from llada_train.data.chat import TEMPLATES, ChatTemplate, template_source
from llada_train.data.corpus import CorpusIdentity
from llada_train.data.order import BlockIndex
from llada_train.data.packing import first_fit_decreasing
from llada_train.data.prepared import PreparedSet
from llada_train.data.training_data import Sample, TrainingData
from llada_train.objective.forward_process import Noise, fine_tuning_noise, validation_noise
from llada_train.objective.keyed import Purpose, sample_words, uniform

CACHE = "examples"  # in the run's folder
TOLD_REASONS = 5  # why records were left out


@dataclass(frozen=True)
class Example:
    """Tokens [start, stop) of a data set, with EOS after them or, where it is cut, without."""

    corpus: int
    dialogue: int  # its number among the usable ones of the data set
    start: int
    stop: int
    responses: tuple[tuple[int, int], ...]  # [begin, end) of each within the tokens; the last one's end is theirs
    has_eos: bool

    @property
    def length(self) -> int:
        return self.stop - self.start + self.has_eos

    @property
    def learnt(self) -> int:
        return sum(end - begin for begin, end in self.responses) + self.has_eos


class _Examples:
    """What of a data set can be trained on: dialogues, each with the responses that may be asked of it."""

    def __init__(self, number: int, prepared: PreparedSet, sft: SftConfig, sequence_length: int) -> None:
        self._number, self._bounds, self._length = number, prepared.bounds, sequence_length
        self._from_the_left = sft.too_long == "truncate_prompt"
        turns = np.arange(prepared.first_turn[-1])
        dialogue = np.searchsorted(prepared.first_turn, turns, side="right") - 1
        self._first = prepared.first_turn[dialogue]  # turn of the dialogue
        self._all = sft.dialogues == "all_responses"
        if self._all:
            last = prepared.first_turn[1:] - 1
            turns, dialogue, self._first = last, dialogue[last], self._first[last]
        self._last = turns  # turn whose response is the row's last
        begin, end = self._bounds[2 * self._first], self._bounds[2 * turns + 2]
        too_long = end - begin + 1 > sequence_length
        if sft.too_long == "drop":
            usable = ~too_long
        elif self._from_the_left:  # something of the prompt has to be left
            usable = end - self._bounds[2 * turns + 1] + 1 < sequence_length
        else:  # something of a response has to be left
            first_answered = self._first if self._all else turns
            usable = self._bounds[2 * first_answered + 1] - begin < sequence_length
        self.cut, self.left_out = int((usable & too_long).sum()), int((~usable).sum())
        self._usable = np.flatnonzero(usable)
        kept, firsts = np.unique(dialogue[self._usable], return_index=True)
        self._dialogues = kept
        self.count = len(kept)
        self._first_usable = np.append(firsts, len(self._usable))

    def choices(self, dialogue: int) -> int:
        """How many rows a dialogue can give."""
        return int(self._first_usable[dialogue + 1] - self._first_usable[dialogue])

    def example(self, dialogue: int, choice: int) -> Example:
        """`choice`: -1 is the last."""
        at = self._first_usable[dialogue] + choice % self.choices(dialogue)
        unit = int(self._usable[at])
        first, last = int(self._first[unit]), int(self._last[unit])
        start, end = int(self._bounds[2 * first]), int(self._bounds[2 * last + 2])
        excess = max(0, end - start + 1 - self._length)
        has_eos = self._from_the_left or not excess
        if self._from_the_left:
            start += excess
        stop = end if has_eos else start + self._length
        answered = range(first, last + 1) if self._all else [last]
        spans = ((self._bounds[2 * turn + 1], self._bounds[2 * turn + 2]) for turn in answered)
        within = ((max(int(begin), start) - start, min(int(end), stop) - start) for begin, end in spans)
        responses = tuple(span for span in within if span[0] < span[1])
        return Example(self._number, int(self._dialogues[dialogue]), start, stop, responses, has_eos)


class SftData(TrainingData):
    """Data sets of dialogues, and their rows in the run's order."""

    unit = "examples"

    def __init__(self, config: Config) -> None:
        """
        Raises:
            UserError: the tokenizer or a data set is at fault, or holds too little.
        """
        super().__init__(config)
        assert config.sft is not None
        self._sft = config.sft
        cache = config.sft.cache or config.run_dir / CACHE
        template = ChatTemplate(config.sft.chat_template, self.tokenizer)
        self._prepared: list[PreparedSet] = []
        for number, corpus in enumerate(config.data.corpora):
            with under_key(f"data.corpora.{number}"):
                self._prepared.append(PreparedSet(corpus, config.sft, template, cache, self.tokenizer))
        self.corpora = [prepared.corpus for prepared in self._prepared]
        self._examples = [
            _Examples(c, prepared, config.sft, self.sequence_length) for c, prepared in enumerate(self._prepared)
        ]
        self._held_out = [corpus.validation_documents for corpus in config.data.corpora]
        for settings, examples in zip(config.data.corpora, self._examples, strict=True):
            _check_size(settings, examples, self.sequence_length, config.sft)
        self.config = _resolved(config, config.sft, sum(self.blocks_per_corpus))
        self._follow(self.timeline_after())

    def counted(self, corpus: CorpusIdentity) -> str:
        return f"{corpus.documents // 2:,} responses with {corpus.tokens:,} tokens"  # and as many contexts

    @property
    def blocks_per_corpus(self) -> list[int]:
        return [examples.count - held_out for examples, held_out in zip(self._examples, self._held_out, strict=True)]

    @property
    def _sizes(self) -> list[int]:
        return self.blocks_per_corpus

    @property
    def validation_counts(self) -> list[int]:
        return self._shares(self._held_out)

    def check(self) -> None:
        for phase in self.timeline.phases:
            self._check_batches(phase)

    def places(self, samples: Sequence[int]) -> BlockIndex:
        """Which data set and epoch the samples g of the run are of."""
        return self._order.locate(self.timeline.locate(samples).block)

    def examples(self, samples: Sequence[int]) -> list[Example]:
        """The samples g of the run. Of a dialogue of several responses, one is drawn anew for each."""
        place = self.places(samples)
        found = []
        for g, c, block in zip(samples, place.corpus.tolist(), place.block.tolist(), strict=True):
            draw = uniform(sample_words(self.config.seed, Purpose.RESPONSE, g, 1)[0, :1])[0]
            found.append(self._examples[c].example(block, int(draw * self._examples[c].choices(block))))
        return found

    def packing(self, first_sample: int) -> list[list[int]]:
        if self._sft.rows == "padded":
            return super().packing(first_sample)
        lengths, _ = self._padded(self._global_batch(first_sample))
        rows = first_fit_decreasing(lengths.tolist(), self.sequence_length)
        return [[first_sample + i for i in row] for row in rows]

    def samples(self, first_sample: int, numbers: Sequence[int]) -> list[Sample]:
        examples = self._global_batch(first_sample)
        lengths, learnt = self._padded(examples)
        noise = fine_tuning_noise(self.config.seed, first_sample, lengths, learnt, self.config.objective)
        return [self._sample(examples[g - first_sample], noise, g - first_sample) for g in numbers]

    def _global_batch(self, first_sample: int) -> list[Example]:
        size = self.timeline.phase(first_sample).global_batch_size
        return self.examples(range(first_sample, first_sample + size))

    @cached_property
    def validation_examples(self) -> list[Example]:
        """Of each data set that holds some out, spread evenly over them; of a dialogue the last response."""
        found = []
        for examples, held_out, share in zip(self._examples, self._held_out, self.validation_counts, strict=True):
            first = examples.count - held_out
            found += [examples.example(first + k * held_out // share, -1) for k in range(share)]
        return found

    @cached_property
    def _validation_noise(self) -> Noise:
        lengths, learnt = self._padded(self.validation_examples)
        config = self.config
        return validation_noise(config.seed, self.validation_counts, lengths, config.objective.epsilon, learnt)

    @property
    def validation_t(self) -> np.ndarray:
        return self._validation_noise.mask_probability

    def validation_samples(self, numbers: Sequence[int]) -> list[Sample]:
        return [self._sample(self.validation_examples[i], self._validation_noise, i) for i in numbers]

    def _padded(self, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each sample with its learnt EOS, and how many of them are learnt: int64 [N] each."""
        lengths = np.array([example.length for example in examples], np.int64)
        groups = np.arange(0, len(lengths), self._sft.eos_pad_group)
        longest = np.maximum.reduceat(lengths, groups) if len(lengths) else lengths
        padded = np.repeat(longest, self._sft.eos_pad_group)[: len(lengths)]
        return padded, padded - lengths + np.array([example.learnt for example in examples], np.int64)

    def _sample(self, example: Example, noise: Noise, i: int) -> Sample:
        length = int(noise.lengths[i])
        tokens = np.full(length, self.tokenizer.eos_id, np.int64)
        stored = example.stop - example.start
        tokens[:stored] = self.corpora[example.corpus].tokens(example.start, example.stop)
        self._check_ids(self.corpora[example.corpus], tokens)
        learnt = np.zeros(length, bool)
        learnt[stored:] = True
        for begin, end in example.responses:
            learnt[begin:end] = True
        return Sample(
            sample_index=noise.first_sample + i,
            tokens=tokens,
            mask=noise.mask(i) & learnt,
            mask_probability=float(noise.mask_probability[i]),
            loss_weight=float(noise.loss_weight[i]),
            document_lengths=(length,),
        )

    @property
    def description(self) -> list[str]:
        """What each data set was taken for and what became of it, with its first example as it is trained on."""
        lines = []
        for name, prepared, examples in zip(self.names, self._prepared, self._examples, strict=True):
            summary = prepared.summary
            columns = ", ".join(f"{ours}={theirs}" for ours, theirs in summary.columns.items())
            counts = [f"{summary.dialogues:,} dialogues", f"{examples.count:,} trained on or held out"]
            counts += [f"{examples.cut:,} cut to {self.sequence_length} tokens ({self._sft.too_long})"] * bool(
                examples.cut
            )
            counts += [f"{examples.left_out:,} too long and left out"] * bool(examples.left_out)
            reasons = Counter(summary.unusable)
            counts += [f"{count:,} left out: {reason}" for reason, count in reasons.most_common(TOLD_REASONS)]
            if others := sum(count for _, count in reasons.most_common()[TOLD_REASONS:]):
                counts.append(f"{others:,} left out for other reasons")
            lines += [f"{name}: {columns}; {', '.join(counts)}", self.rendered(examples.example(0, 0))]
        if self._sft.rows == "packed":
            lengths, _ = self._padded(self._global_batch(0))
            rows = len(self.packing(0))
            lines.append(
                f"packed: the first {len(lengths):,} examples share {rows:,} rows of {self.sequence_length:,} tokens, "
                f"{lengths.sum() / (rows * self.sequence_length):.0%} of which they fill"
            )
        return lines

    def rendered(self, example: Example) -> str:
        """Its text with special tokens; what is learnt stands in ⟦ ⟧."""
        tokens = self.corpora[example.corpus].tokens(example.start, example.stop).tolist()
        text, done = "", 0
        spans = list(example.responses) or [(len(tokens), len(tokens))]
        if example.has_eos:
            tokens.append(self.tokenizer.eos_id)
            begin, end = spans.pop()
            spans += [(begin, end + 1)] if end + 1 == len(tokens) else [(begin, end), (end, len(tokens))]
        for begin, end in spans:
            text += self._decode(tokens[done:begin]) + f"⟦{self._decode(tokens[begin:end])}⟧"
            done = end
        return text + self._decode(tokens[done:])

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, keep_special=True)


def _check_size(settings: CorpusConfig, examples: _Examples, sequence_length: int, sft: SftConfig) -> None:
    if not examples.count:
        why = {
            "drop": "all are longer; raise it, or have them cut (sft.too_long=truncate_response)",
            "truncate_response": "the prompts alone fill it; raise it, or have them cut (sft.too_long=truncate_prompt)",
            "truncate_prompt": "the responses alone fill it; raise it, or have them cut "
            "(sft.too_long=truncate_response)",
        }
        raise UserError(
            f"{settings.path}: none of its examples fits into data.sequence_length {sequence_length}: "
            f"{why[sft.too_long]}"
        )
    if settings.validation_documents >= examples.count:
        raise UserError(
            f"{settings.path}: validation_documents {settings.validation_documents} leaves nothing to train on: the "
            f"data set has {examples.count} usable examples; set it lower"
        )


def _resolved(config: Config, sft: SftConfig, examples: int) -> Config:
    """The config with a template of its own as text, and as `phases_in_tokens`.

    Raises:
        UserError: as that.
    """
    if sft.chat_template not in TEMPLATES:
        sft = sft.model_copy(update={"chat_template": template_source(sft.chat_template)})
    return phases_in_tokens(config, examples).model_copy(update={"sft": sft})


def phases_in_tokens(config: Config, examples: int) -> Config:
    """The config of an SFT run of so many training examples, its learning-rate phases in tokens, in whole steps.

    Raises:
        UserError: one does not come after the one before.
    """
    per_step = config.training.global_batch_size
    tokens = per_step * config.data.sequence_length
    phases: list[LearningRatePhase] = []
    for i, phase in enumerate(config.optimizer.learning_rate):
        until = phase.until_tokens
        if until is None:
            # Rounded first: 2.7 × 10 is a little more than 27.
            steps = phase.until_steps or math.ceil(round((phase.until_epochs or 0) * examples / per_step, 6))
            until = steps * tokens
        if phases and until <= phases[-1].until:
            steps = phases[-1].until // tokens
            raise UserError(
                f"optimizer.learning_rate.{i}: ends after {until / tokens:g} steps, no later than the phase before, "
                f"which ends after {steps:,}: {examples:,} examples are {examples / per_step:.4g} steps of {per_step}; "
                "lengthen it, or shorten the one before"
            )
        phases.append(LearningRatePhase(until_tokens=until, end=phase.end, start=phase.start))
    optimizer = config.optimizer.model_copy(update={"learning_rate": phases})
    return config.model_copy(update={"optimizer": optimizer})
