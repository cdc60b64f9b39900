"""Held-out prompts answered by the model in training, in whatever layout it lies."""

from dataclasses import replace

import numpy as np

from llada_train.config.schema import Config
from llada_train.data.batch import Batch
from llada_train.data.loader import micro_batches, place_rows
from llada_train.data.place import Place
from llada_train.data.sft import SftData
from llada_train.data.training_data import Row, Sample
from llada_train.evaluation.answers import STEPS, until
from llada_train.parallel.engine import Engine


class Answers:
    """The first `validation.answers` validation prompts of an SFT run, and what their responses are."""

    def __init__(self, data: SftData, config: Config, place: Place) -> None:
        self._data, self._config, self._place = data, config, place
        examples = data.validation_examples[: config.validation.answers]
        self.count = len(examples)
        tokens = [data.corpora[one.corpus].tokens(one.start, one.stop).tolist() for one in examples]
        self._borders = [one.responses[-1][0] for one in examples]
        self._responses = [row[border:] for row, border in zip(tokens, self._borders, strict=True)]
        room = max(map(len, self._responses), default=0) + 1  # and EOS
        lengths = [min(border + room, data.sequence_length) for border in self._borders]
        self._room = max((length - border for length, border in zip(lengths, self._borders, strict=True)), default=0)
        mask_id = data.tokenizer.mask_id
        self.asked = [  # prompts with masks after them
            np.array(row[:border] + [mask_id] * (length - border), np.int64)
            for row, border, length in zip(tokens, self._borders, lengths, strict=True)
        ]

    def exact_match(self, engine: Engine) -> float:
        """The share of prompts that are answered with the response, token by token, up to EOS; collective.

        Each step keeps equally many of the most probable predictions (paper §2.4, low-confidence remasking, greedy).
        """
        mask_id, eos_id = self._data.tokenizer.mask_id, self._data.tokenizer.eos_id
        rows = [asked.copy() for asked in self.asked]
        steps = min(STEPS, self._room)
        for step in range(steps):
            found, confidence = engine.predict(self.batches(rows), self.count, self._data.sequence_length)
            for row, ids, logs in zip(rows, found.numpy(), confidence.numpy(), strict=True):
                masked = np.flatnonzero(row == mask_id)
                kept = masked[np.argsort(-logs[masked], kind="stable")][: -(-len(masked) // (steps - step))]
                row[kept] = ids[kept]
        answers = [row[border:].tolist() for row, border in zip(rows, self._borders, strict=True)]
        pairs = zip(answers, self._responses, strict=True)
        return sum(until(eos_id, answer) == until(eos_id, response) for answer, response in pairs) / self.count

    def batches(self, tokens: list[np.ndarray]) -> list[Batch]:
        """This rank's micro-batches of all rows; what is masked in them is asked for."""
        mask_id = self._data.tokenizer.mask_id

        def row(i: int) -> Row:
            return (Sample(i, tokens[i], tokens[i] == mask_id, 1.0, 1.0, (len(tokens[i]),)),)

        own, fillers = place_rows(self.count, self._data, self._config, self._place)
        rows = [*map(row, own), *fillers]
        batches = micro_batches(rows, self._data.sequence_length, self._data, self._config, self._place)
        return [replace(batch, targets=None) for batch in batches]
