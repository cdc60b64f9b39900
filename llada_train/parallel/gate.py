"""The last word before the update: a step whose loss or gradient is at fault leaves weights and moments as they are."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

Accepts = Callable[[float, float], bool]  # (loss, gradient norm before clipping) → is the step to be applied?


class Gate:
    """Asks, once in each step, when the norm is known and before Adam reads the gradients; all ranks act alike."""

    def __init__(self, optimizer: Any, device: torch.device) -> None:
        """`optimizer`: DeepSpeed's wrapper, whose own optimizer leaves parameters without a gradient as they are."""
        self._optimizer, self._device = optimizer, device
        self._accepts: Accepts = lambda loss, norm: True
        self._loss, self._norm = 0.0, 0.0
        self._answer: bool | None = None
        self._withheld: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        optimizer.optimizer.register_step_pre_hook(self._before_adam)
        optimizer.optimizer.register_step_post_hook(self._after_adam)

    def apply(self, update: Callable[[], None], accepts: Accepts, loss: float) -> tuple[float, bool]:
        """Run DeepSpeed's `update`: (gradient norm before clipping, was it applied?), equal on all ranks.

        `accepts` has to answer alike on all of them. A gradient that is not finite is never applied: DeepSpeed skips
        it by itself.
        """
        self._accepts, self._loss, self._norm, self._answer = accepts, loss, math.inf, None
        update()
        if self._answer is None:
            # It was not finite. DeepSpeed forgets it, but not the fp32 sums of an offloaded ZeRO 2 in bf16.
            getattr(self._optimizer, "averaged_gradients", {}).clear()
        return self._norm, bool(self._answer)

    def _before_adam(self, adam: torch.optim.Optimizer, *_: Any) -> None:
        if self._answer is None:  # else another partition of the same step
            norm = torch.tensor(float(self._optimizer._global_grad_norm), dtype=torch.float64, device=self._device)
            dist.all_reduce(norm, op=dist.ReduceOp.MAX)  # ranks reduce it in groups and may differ in the last bit
            self._norm = float(norm)
            self._answer = self._accepts(self._loss, self._norm)
        if not self._answer:
            partitions = [partition for group in adam.param_groups for partition in group["params"]]
            self._withheld = [(partition, partition.grad) for partition in partitions]
            adam.zero_grad(set_to_none=True)

    def _after_adam(self, *_: Any) -> None:
        for partition, gradient in self._withheld:  # with an offloaded optimizer DeepSpeed uses them again
            partition.grad = gradient
        self._withheld = []
