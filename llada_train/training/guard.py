"""Guards against bad steps: what is not finite, or spikes, is not applied; what goes on being bad is left behind.

All decisions follow from losses and gradient norms that all ranks share and from a state that is part of each
checkpoint, so a run that is killed and goes on decides as one that was not.
"""

import math
from statistics import median

from llada_train.checkpoint.manifest import GuardState
from llada_train.config.schema import GuardConfig


class Guard:
    def __init__(self, config: GuardConfig, state: GuardState) -> None:
        self.config, self.state = config, state

    def objection(self, loss: float, gradient_norm: float) -> str | None:
        """Why a step must not be applied; None: it may be."""
        if not math.isfinite(loss):
            return f"loss {loss}"
        if not math.isfinite(gradient_norm):
            return f"gradient norm {gradient_norm}"
        factor, norms = self.config.spike_factor, self.state.norms
        if factor is not None and len(norms) >= self.config.window_steps:
            usual = median(norms)
            if gradient_norm > factor * usual:
                return f"gradient norm {gradient_norm:.3g}, more than {factor:g} × the median {usual:.3g}"
        return None

    def accepts(self, loss: float, gradient_norm: float) -> bool:
        return self.objection(loss, gradient_norm) is None

    def applied(self, gradient_norm: float) -> None:
        """Remember a step that was applied."""
        window = (*self.state.norms, gradient_norm)[-self.config.window_steps :]
        self._change(norms=window, skips_in_a_row=0, first_skipped_sample=None)

    def skipped(self, first_sample: int) -> bool:
        """Remember a step that was not applied: has it been one too many in a row?"""
        state = self.state
        first = first_sample if state.first_skipped_sample is None else state.first_skipped_sample
        self._change(
            skipped_steps=state.skipped_steps + 1,
            skips_in_a_row=state.skips_in_a_row + 1,
            first_skipped_sample=first,
        )
        return self.state.skips_in_a_row >= self.config.max_skips

    def went_back(self, step: int, skips: int) -> None:
        """Go on from the checkpoint of `step`, whose state this guard was made with, after so many skips in a row."""
        self._change(skipped_steps=self.state.skipped_steps + skips, went_back_to=step)

    def _change(self, **values: object) -> None:
        self.state = self.state.model_copy(update=values)
