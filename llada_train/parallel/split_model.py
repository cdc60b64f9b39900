"""A model in some layout: the stages and slices of it that a process holds, and forward passes through them."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from llada_train.config.schema import ModelConfig, ParallelConfig, Precision, Recompute
from llada_train.data.batch import Batch
from llada_train.model.head import MaskedHead
from llada_train.model.kernels import TORCH, Kernels
from llada_train.model.transformer import LLaDATransformer, Stage, transformer_config
from llada_train.model.weights import Shard, shards
from llada_train.parallel import cpu
from llada_train.parallel.topology import Topology

ForwardStep = Callable[[Iterator[Batch], Stage], tuple[Tensor, Callable[[Tensor], Any]]]
"""megatron-core's: one stage's forward pass of one micro-batch, and what makes the loss of its output."""


class SplitModel:
    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        topology: Topology,
        precision: Precision,
        recompute: Recompute = "none",
        kernels: Kernels = TORCH,
    ) -> None:
        """Weights are allocated, not initialised."""
        self.parallel, self.topology = parallel, topology
        self._transformer_config = transformer_config(
            model, parallel, precision, recompute, topology.device.type == "cpu"
        )
        self.model = LLaDATransformer(model, self._transformer_config, kernels)
        self.shards = list(shards(self.model, model))

    def set_weights(self, read: Callable[[Shard], Tensor]) -> None:
        """Fill every parameter from `read(shard)` → fp32 slice."""
        with torch.no_grad():
            for shard in self.shards:
                shard.parameter.copy_(read(shard).view(shard.shape))

    def hidden(self, batches: list[Batch]) -> list[Tensor]:
        """The last hidden states [K, H] of each micro-batch's masked positions; nothing on stages before the last.

        Of batches without targets. Collective over a model copy, under ZeRO 3 over all ranks; without gradients.
        """

        def step(iterator: Iterator[Batch], stage: Stage) -> tuple[Tensor, Callable[[Tensor], Any]]:
            batch = next(iterator).to(self.topology.device)
            return self.model(batch, stage.vp_stage or 0), lambda rows: (
                rows.sum(),
                torch.ones((), dtype=torch.int),
                {"rows": rows},
            )

        with torch.no_grad():
            return [told["rows"] for told in self._schedule(batches, step, nullcontext(), forward_only=True)]

    def whole_head(self) -> AbstractContextManager[None]:
        """To be entered around `logits`, collective as `hidden`: ZeRO 3 gathers weights for forward passes alone."""
        head = getattr(self.model.stages[-1], "head", None)  # none on stages before the last
        weights = [] if head is None else [head.weight]
        gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(weights)
        return gathered

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        """Hidden states [n, H] → logits [n, V] over the whole vocabulary; collective over the last stage's ranks."""
        head = self.model.stages[-1].head
        assert isinstance(head, MaskedHead)
        return head.logits(rows)

    @property
    def is_first_slice(self) -> bool:
        """Of the ranks that hold the slices of one stage, one tells what all of them know."""
        first: bool = parallel_state.get_tensor_model_parallel_rank() == 0
        return first

    def _schedule(
        self, batches: list[Batch], step: ForwardStep, around: AbstractContextManager[Any], forward_only: bool
    ) -> list[dict[str, Tensor]]:
        """megatron-core's schedule: what the last stage has to say of each micro-batch; nothing on others."""
        device, began = self.topology.device, time.perf_counter()
        stages = list(self.model.stages)
        with around, cpu.standing_in() if device.type == "cpu" else nullcontext():
            reports: list[dict[str, Tensor]] = get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=[iter(batches) for _ in stages],
                model=stages,
                num_microbatches=len(batches),
                seq_length=batches[0].input_ids.shape[1] * self.parallel.context_parallel,
                micro_batch_size=len(batches[0].input_ids),
                forward_only=forward_only,
            )
        if device.type == "cuda":
            torch.cuda.synchronize()  # as reading the losses does in a moment
        self._own_seconds = time.perf_counter() - began  # before it waits for all others
        return reports
