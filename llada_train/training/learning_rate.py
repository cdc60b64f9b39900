"""Learning-rate phases on the clock of nominal tokens (LLaDA §2.2: a Warmup-Stable-Decay schedule)."""

from collections.abc import Sequence

from llada_train.config.schema import LearningRatePhase


def learning_rate(phases: Sequence[LearningRatePhase], nominal_tokens: int, tokens_per_step: int) -> float:
    """The rate of the step that starts at `nominal_tokens` and consumes `tokens_per_step`.

    A step takes the value that the schedule has at its END: the first step of a warm-up from 0 moves the weights, the
    2000th of 2000 has the full rate, and the last step of a run has the schedule's last value. Within a phase the
    value is linear in tokens; the end of a phase belongs to it, so a drop begins with the step after it. A step past
    the last phase (a run is rounded up to whole steps) keeps the last value.

    Args:
        phases: in order, in tokens, as `OptimizerConfig` checks; at least one.
        nominal_tokens: consumed samples × sequence length before the step.
        tokens_per_step: global batch size × sequence length.
    """
    now = nominal_tokens + tokens_per_step
    begin, rate = 0, 0.0
    for phase in phases:
        start = rate if phase.start is None else phase.start
        if now <= phase.until:
            return start + (phase.end - start) * (now - begin) / (phase.until - begin)
        begin, rate = phase.until, phase.end
    return rate
