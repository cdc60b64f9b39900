"""The run's clock in closed form: sample g → nominal tokens, and what is in force there.

A run is a sequence of phases of constant batch size, sequence length and mixture. What the order permutes are blocks of
`Config.block_length` tokens; a sequence length divides it, so that the samples of a phase walk through one block after
the other, and a phase begins where both a step and a block do. So no token of a block is repeated or skipped, whatever
the phases are, and samples are numbered through, so that no noise comes twice.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from llada_train.config.schema import Config


class Phase(BaseModel):
    """What is in force from a step on."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    first_sample: NonNegativeInt
    first_token: NonNegativeInt
    sequence_length: PositiveInt
    global_batch_size: PositiveInt
    weights: tuple[Annotated[float, Field(ge=0)], ...]  # of the corpora, in the config's order
    end_sample: NonNegativeInt | None = None  # from here on the run passes over the samples before the next phase

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length


class Span(NamedTuple):
    """Where the tokens of each sample lie: int64 arrays of one shape."""

    block: np.ndarray  # of the run, in the run's order
    offset: np.ndarray  # of the first token, within the block
    length: np.ndarray


class Timeline:
    """The phases of a run: at each boundary, where a step and a block begin, the config's values of that time hold.

    A run that goes on keeps the phases that it recorded; from the first boundary at or after `consumed_samples` the
    config holds. If it says what it said before, the phases are those of a run that never stopped.
    """

    def __init__(
        self, config: Config, past: Sequence[Phase] = (), consumed_samples: int = 0, factors: Sequence[float] = ()
    ) -> None:
        """
        Args:
            config: the run's, as `load_config` checks it.
            past: the phases that a run recorded at `consumed_samples`; corpora that were added since have weight 0 in
                them. None: the config has held from the start.
            factors: of the corpora's weights, where they hang on the corpora's sizes; none: 1 each.
        """
        self._config = config
        self._factors = tuple(factors) or (1.0,) * len(config.data.corpora)
        self._block_length = config.block_length
        self._recorded = len(past)
        corpora = len(config.data.corpora)
        self.phases = [
            phase.model_copy(update={"weights": phase.weights + (0.0,) * (corpora - len(phase.weights))})
            for phase in past
        ]
        if not past:
            self.phases.append(self._in_force(0, 0))
        now = self.tokens(consumed_samples) if past else 0
        for time in [now, *(change.from_tokens for change in config.schedule if change.from_tokens > now)]:
            boundary = self._boundary(time)
            phase = self._in_force(self._samples(boundary), boundary)
            places = {"first_sample", "first_token", "end_sample"}
            if phase.model_dump(exclude=places) != self.phases[-1].model_dump(exclude=places):
                self.phases.append(phase)

    def phase(self, sample: int) -> Phase:
        """The phase that the sample belongs to."""
        return self.phases[bisect_right(self.phases, sample, key=lambda phase: phase.first_sample) - 1]

    def tokens(self, samples: int) -> int:
        """Nominal tokens of the run's first so many samples."""
        phase = self.phase(samples)
        return phase.first_token + (samples - phase.first_sample) * phase.sequence_length

    @property
    def end_samples(self) -> int:
        """Samples of the whole run: the learning-rate phases' last end, rounded up to whole steps."""
        until = self._config.optimizer.learning_rate[-1].until
        phase = max((phase for phase in self.phases if phase.first_token < until), key=lambda phase: phase.first_token)
        steps = -(-(until - phase.first_token) // phase.tokens_per_step)
        end = phase.first_sample + steps * phase.global_batch_size
        return end if phase.end_sample is None else min(end, self.next_step(phase.end_sample))

    def next_step(self, consumed_samples: int) -> int:
        """The first sample of the step that follows; `consumed_samples` itself, if the run does not pass over it."""
        phase = self.phase(consumed_samples)
        if phase.end_sample is None or consumed_samples < phase.end_sample:
            return consumed_samples
        return next(later.first_sample for later in self.phases if later.first_sample > consumed_samples)

    def steps(self, consumed_samples: int, end_sample: int) -> Iterator[int]:
        """The first sample of each step from the one that follows `consumed_samples` to before `end_sample`."""
        while (first_sample := self.next_step(consumed_samples)) < end_sample:
            yield first_sample
            consumed_samples = first_sample + self.phase(first_sample).global_batch_size

    def begun(self, samples: int) -> tuple[Phase, ...]:
        """What a run records: the phases of its first so many samples, and those that were recorded before."""
        return tuple(phase for i, phase in enumerate(self.phases) if phase.first_sample < samples or i < self._recorded)

    def passing_over(self, first_sample: int, end_sample: int) -> "Timeline":
        """The same run without the samples [first_sample, end_sample), which are whole steps of it.

        A phase ends before them and one begins after them, so that neither a restart nor a change of what is to come
        moves the steps that follow.
        """
        *before, last = [phase for phase in self.phases if phase.first_sample < first_sample]
        again = self.phase(end_sample).model_copy(
            update={"first_sample": end_sample, "first_token": self.tokens(end_sample)}
        )
        # One that ends before these samples ends there: what lies between them is passed over already.
        cut = last.model_copy(update={"end_sample": min(last.end_sample or first_sample, first_sample)})
        later = [phase for phase in self.phases[: self._recorded] if phase.first_sample > end_sample]
        return Timeline(self._config, (*before, cut, again, *later), end_sample, self._factors)

    def first_sample(self, step: int) -> int:
        """The first sample of the run's step 1, 2, …

        Raises:
            IndexError: the run has no such step.
        """
        before = 0  # steps of the phases so far
        for phase, end in self._stretches():
            steps = -(-(end - phase.first_sample) // phase.global_batch_size)
            if before < step <= before + steps:
                return phase.first_sample + (step - before - 1) * phase.global_batch_size
            before += steps
        raise IndexError(f"the run has the steps 1 to {before}")

    def step(self, sample: int) -> int | None:
        """The step that reads the sample; None: the run passes over it, or ends before."""
        before = 0
        for phase, end in self._stretches():
            if phase.first_sample <= sample < end:
                return before + (sample - phase.first_sample) // phase.global_batch_size + 1
            before += -(-(end - phase.first_sample) // phase.global_batch_size)
        return None

    def samples_of(self, block: int, start: int, stop: int) -> list[int]:
        """The samples that the run trains on and that lie, wholly or in part, in tokens [start, stop) of its block."""
        found: list[int] = []
        for phase, end in self._stretches():
            first, last = (block * self._block_length + place - phase.first_token for place in (start, stop - 1))
            low, high = first // phase.sequence_length, last // phase.sequence_length
            found += range(phase.first_sample + max(low, 0), min(phase.first_sample + high + 1, end))
        return found

    def _stretches(self) -> Iterator[tuple[Phase, int]]:
        """Each phase and the sample that it ends before."""
        last = self.end_samples
        for i, phase in enumerate(self.phases):
            end = self.phases[i + 1].first_sample if i + 1 < len(self.phases) else last
            if phase.end_sample is not None:
                end = min(end, phase.end_sample)
            if phase.first_sample < last:
                yield phase, min(end, last)

    def locate(self, samples: npt.ArrayLike) -> Span:
        """Samples g → the part of a block that each one is."""
        g = np.asarray(samples, dtype=np.int64)
        firsts = np.array([phase.first_sample for phase in self.phases])
        index = np.searchsorted(firsts, g, side="right") - 1
        length = np.array([phase.sequence_length for phase in self.phases])[index]
        start = np.array([phase.first_token for phase in self.phases])[index] + (g - firsts[index]) * length
        block, offset = np.divmod(start, self._block_length)
        return Span(block, offset, length)

    @property
    def mixtures(self) -> list[tuple[int, tuple[float, ...]]]:
        """(first block, weights of the corpora) of each mixture of the run, in order."""
        found: list[tuple[int, tuple[float, ...]]] = []
        for phase in self.phases:
            if not found or found[-1][1] != phase.weights:
                found.append((phase.first_token // self._block_length, phase.weights))
        return found

    def _boundary(self, tokens: int) -> int:
        """The first place at or after `tokens`, and not before the last phase, where a step and a block begin."""
        phase = self.phases[-1]
        grid = math.lcm(phase.tokens_per_step, self._block_length)
        # A phase that begins after passed-over samples may begin within a block, but some step later begins one.
        candidates = range(phase.first_token, phase.first_token + grid, phase.tokens_per_step)
        first = next(place for place in candidates if place % self._block_length == 0)
        return first + max(0, -(-(tokens - first) // grid)) * grid

    def _samples(self, tokens: int) -> int:
        """The sample of the last phase that begins at `tokens`."""
        phase = self.phases[-1]
        return phase.first_sample + (tokens - phase.first_token) // phase.sequence_length

    def _in_force(self, first_sample: int, first_token: int) -> Phase:
        """The config's values at a place, as a phase that begins there."""
        config = self._config
        length, batch_size = config.data.sequence_length, config.training.global_batch_size
        weights = config.data.weights
        for change in config.schedule:
            if change.from_tokens <= first_token:
                length = change.sequence_length or length
                batch_size = change.global_batch_size or batch_size
                weights |= change.weights
        return Phase(
            first_sample=first_sample,
            first_token=first_token,
            sequence_length=length,
            global_batch_size=batch_size,
            weights=tuple(w * factor for w, factor in zip(weights.values(), self._factors, strict=True)),
        )
