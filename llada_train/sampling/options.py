"""How masks are filled in, checked before a model is loaded. Imports no torch.

Where the paper and the released generate.py differ, `rules` chooses:

                        paper (default)                             released
tokens by step          ⌊n·k/s⌋ of n are committed after step k     n // s, and one more in the first n % s steps
random remasking        each stays masked with chance s/t (Alg. 4)  so many as by low confidence
the mask id             is never predicted (SUBS)                   may be predicted, and then stays
`last_ids`              their confidence is 0                       their logits are −∞ for the confidence of all, but
                                                                    above temperature 0 only the last one's
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from llada_train.config.errors import UserError

Remasking = Literal["low_confidence", "random"]
Timesteps = Literal["uniform", "cosine"]
Rules = Literal["paper", "released"]
Cache = Literal["none", "prefix", "dual"]


@dataclass(frozen=True)
class SamplingOptions:
    """How to fill in masks.

    Raises:
        UserError: a value out of range, or settings that exclude each other.
    """

    steps: int | None = None
    """Forward passes of a row, over all its blocks, of which this is a multiple; None: one for each mask."""
    block_length: int | None = None
    """Masks that are filled in before the next ones to the right (semi-autoregressive); None: all at once."""
    temperature: float = 0.0
    """0: the most probable token; 1: a draw from the model's distribution."""
    remasking: Remasking = "low_confidence"
    """Which predictions to keep: the most probable ones (Alg. 5), or random ones (Alg. 4)."""
    timesteps: Timesteps = "uniform"
    """The fraction that is still masked after step k of s: 1 − k/s, or cos²(π/2 · k/s) (Fisher-Rao, 2508.04884)."""
    threshold: float | None = None
    """Keep every prediction that is at least so probable, and always the most probable one (Fast-dLLM)."""
    cfg: float = 0.0
    """Classifier-free guidance w: logits u + (w + 1)(c − u), u those with all that was given masked."""
    forbidden_ids: tuple[int, ...] = ()
    """Never predicted; the released `logits_eos_inf` is the end-of-text id."""
    last_ids: tuple[int, ...] = ()
    """Committed after all others of their block; the released `confidence_eos_eot_inf` is EOS and EoT."""
    stop_ids: tuple[int, ...] = ()
    """A row is complete with the first block that holds one; what is left becomes the first of them."""
    rules: Rules = "paper"
    cache: Cache = "none"
    """What is not recomputed within a block: `prefix` all before it, `dual` all outside it. An approximation."""
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            *([] if self.steps is None or self.steps >= 1 else [f"steps is {self.steps}; give at least 1"]),
            *(
                []
                if self.block_length is None or self.block_length >= 1
                else [f"block length is {self.block_length}; give at least 1"]
            ),
            *(
                f"{name} is {value}; give 0 or more"
                for name, value in (("temperature", self.temperature), ("cfg", self.cfg))
                if not (value >= 0 and math.isfinite(value))
            ),
            *(
                f"{name} is {value!r}; give one of {', '.join(get_args(choices))}"
                for name, value, choices in (
                    ("remasking", self.remasking, Remasking),
                    ("timesteps", self.timesteps, Timesteps),
                    ("rules", self.rules, Rules),
                    ("cache", self.cache, Cache),
                )
                if value not in get_args(choices)
            ),
        ]
        if self.threshold is not None:
            if not 0 <= self.threshold <= 1:
                problems.append(f"threshold is {self.threshold}; give a probability")
            if self.remasking == "random":
                problems.append("a threshold needs low_confidence remasking")
            if self.steps is not None:
                problems.append("a threshold takes as many steps as it needs; leave out the steps")
        if self.rules == "released" and self.timesteps != "uniform":
            problems.append("the released code knows uniform timesteps only; leave out its rules")
        if not 0 <= self.seed < 2**64:
            problems.append(f"seed is {self.seed}; give one from 0 to 2^64 - 1")
        if problems:
            raise UserError("sampling: " + "; ".join(problems))

    def steps_per_block(self, masks: int) -> int:
        """Of a row with so many masks.

        Raises:
            UserError: the steps are not a multiple of its blocks.
        """
        length = self.block_length or max(masks, 1)
        blocks = max(-(-masks // length), 1)
        if self.steps is None:
            return length
        if self.steps % blocks:
            raise UserError(
                f"sampling: {self.steps} steps are not a multiple of the {blocks} blocks "
                f"({masks} masks, block length {length}); the next larger number is {-(-self.steps // blocks) * blocks}"
            )
        return self.steps // blocks

    def check_length(self, gen_length: int) -> None:
        """Raises UserError: a continuation of so many tokens cannot be cut into blocks and steps."""
        if gen_length < 1:
            raise UserError(f"sampling: the length is {gen_length}; give at least 1")
        if self.block_length is not None and gen_length % self.block_length:
            raise UserError(f"sampling: length {gen_length} is not a multiple of block length {self.block_length}")
        self.steps_per_block(gen_length)
