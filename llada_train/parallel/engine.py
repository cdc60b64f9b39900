"""The engine: megatron-core's schedule for forward and backward, DeepSpeed ZeRO for the optimizer step.

The loss that comes in is already normalised over the global batch, so every sum here is a plain sum: over micro-batches
(the schedule), over data and context parallelism (DeepSpeed; ZeRO 3 knows only the mean, so there the loss is
multiplied by the number of ranks). All gradients are accumulated and reduced in fp32. Who adds them up depends on ZeRO:

- bf16 with ZeRO 1: DeepSpeed adds fp32 gradients in each parameter's hook; the schedule drives the model itself.
- fp32 with ZeRO 1: DeepSpeed's forward; all micro-batches' gradients are reduced at once, after the last.
- ZeRO 2 and 3: DeepSpeed's forward; each micro-batch's gradients are reduced and added to the rank's own part.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from llada_train.config.schema import Config
from llada_train.data.batch import Batch
from llada_train.model.kernels import kernels
from llada_train.model.transformer import Stage
from llada_train.model.weights import Shard
from llada_train.parallel.gate import Accepts, Gate
from llada_train.parallel.replicas import check_replicas
from llada_train.parallel.split_model import SplitModel
from llada_train.parallel.topology import Topology
from llada_train.parallel.zero import FlatPartition, Fragment, ParameterPartition

T_BUCKETS = 10  # equal ranges of the mask probability over which the bound is reported


@dataclass(frozen=True)
class Losses:
    """What one global batch cost, summed over all micro-batches and ranks; equal on every rank."""

    loss: float  # Σ weight·NLL: nats per token
    bucket_losses: Tensor  # [T_BUCKETS] Σ of the samples' own bounds (nats per token), by tenths of mask probability
    bucket_samples: Tensor  # [T_BUCKETS] samples in it

    @classmethod
    def none(cls) -> "Losses":
        empty = torch.zeros(T_BUCKETS, dtype=torch.float64)
        return cls(0.0, empty, empty)

    def __add__(self, other: "Losses") -> "Losses":
        return Losses(
            self.loss + other.loss, self.bucket_losses + other.bucket_losses, self.bucket_samples + other.bucket_samples
        )

    def bound_by_t(self) -> list[float | None]:
        """Mean bound (nats per token) of the samples in each tenth; None: there was none."""
        return [
            float(loss / count) if count else None
            for loss, count in zip(self.bucket_losses, self.bucket_samples, strict=True)
        ]


class Step(NamedTuple):
    """What one optimizer step did; equal on every rank, but for the last."""

    losses: Losses
    gradient_norm: float  # before clipping; inf where it is not finite
    applied: bool  # False: the step was refused, weights and moments are as before
    own_seconds: float = 0.0  # of this rank's forwards and backwards, before it waits for all others


def _data_parallel_group() -> dist.ProcessGroup:
    """The ranks that hold the same weights: data × context parallelism."""
    group: dist.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


class _ModelParallelUnit:
    """DeepSpeed asks its client for the process groups; "model parallel" means tensor × pipeline."""

    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_model_parallel_world_size = staticmethod(lambda: parallel_state.get_model_parallel_group().size())
    get_model_parallel_rank = staticmethod(lambda: parallel_state.get_model_parallel_group().rank())
    get_data_parallel_group = staticmethod(_data_parallel_group)
    get_data_parallel_world_size = staticmethod(lambda: _data_parallel_group().size())
    get_data_parallel_rank = staticmethod(lambda: _data_parallel_group().rank())
    get_data_parallel_group_ranks = staticmethod(lambda: dist.get_process_group_ranks(_data_parallel_group()))
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)


class Engine(SplitModel):
    """A model in some layout, its optimizer, and the step that ties them."""

    def __init__(self, config: Config, topology: Topology) -> None:
        training = config.training
        chosen = kernels(training.kernels, topology.device)
        super().__init__(config.model, config.parallel, topology, training.precision, training.recompute, chosen)
        self.config = config
        self.bf16 = config.training.precision == "bf16"
        self._zero_stage = config.parallel.zero_stage
        self._adds_gradients_in_hooks = self.bf16 and self._zero_stage == 1
        for shard in self.shards:  # DeepSpeed's own name for "this rank counts it in the gradient norm"
            shard.parameter.model_parallel = shard.owned  # type: ignore[attr-defined]
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory use on every rank
            self._engine = self._deepspeed_engine()
        self._state = (ParameterPartition if self._zero_stage == 3 else FlatPartition)(self._engine.optimizer)
        self._gate = Gate(self._engine.optimizer, topology.device)
        if not self._adds_gradients_in_hooks:
            self._transformer_config.grad_scale_func = self._engine.scale
        if self._zero_stage > 1:
            self._transformer_config.no_sync_func = self._before_the_last_micro_batch

    def _deepspeed_engine(self) -> Any:
        optimizer, parallel = self.config.optimizer, self.config.parallel
        decayed = [s.parameter for s in self.shards if s.spec.init_std is not None]
        norms = [s.parameter for s in self.shards if s.spec.init_std is None]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": norms, "weight_decay": 0.0}]
        engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=0.0,  # set anew at every step
                betas=optimizer.betas,
                eps=optimizer.eps,
                weight_decay=optimizer.weight_decay,
                fused=True,
            ),
            mpu=_ModelParallelUnit,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": self.config.training.micro_batch_size,
                "gradient_accumulation_steps": 1,  # accumulation is megatron-core's
                "gradient_clipping": optimizer.gradient_clipping,
                "zero_optimization": {
                    "stage": self._zero_stage,
                    "overlap_comm": parallel.overlaps_reduction,
                    # What DeepSpeed's ZeRO 2 calls reduce_scatter is an all-reduce, unless it may not join the messages
                    # to several ranks.
                    "reduce_scatter": True,
                    "use_multi_rank_bucket_allreduce": not parallel.scatters_reduction,
                    "reduce_bucket_size": parallel.reduce_bucket_size,
                    "stage3_prefetch_bucket_size": parallel.prefetch_bucket_size,
                    # Norms alone stay whole under ZeRO 3, at any size of the model.
                    "stage3_param_persistence_threshold": self.config.model.hidden_size,
                    "offload_optimizer": {"device": "cpu" if parallel.offload_optimizer else "none"},
                },
                # torch's fused AdamW is as fast on CPUs as DeepSpeed's own, which has to be compiled on each machine.
                "zero_force_ds_cpu_optimizer": False,
                # ZeRO 2 takes the mean in bf16, which rounds if the ranks are not a power of two.
                "gradient_allreduce_op": "mean" if self._zero_stage == 3 else "sum",
                "bf16": {"enabled": self.bf16, "immediate_grad_update": self._adds_gradients_in_hooks},
                "data_types": {"grad_accum_dtype": "fp32"},
                "communication_data_type": "fp32",  # the default rounds gradients to bf16 on the wire
                "steps_per_print": 10**9,
            },
        )
        return engine

    @property
    def optimizer_steps(self) -> int:
        """Steps that Adam has taken (its bias correction counts them)."""
        return self._state.steps

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        self._state.steps = steps

    def set_weights(self, read: Callable[[Shard], Tensor]) -> None:
        """Fill every parameter, and the fp32 master that this rank holds of it, from `read(shard)` → fp32 slice."""
        for shard in self.shards:
            self._state.write(shard, read(shard))

    def fragments(self) -> Iterator[Fragment]:
        """Views of the optimizer state that this rank owns; writing to them changes the state."""
        return self._state.fragments(self.shards)

    def train_step(
        self,
        batches: list[Batch],
        learning_rate: float,
        accepts: Accepts = lambda loss, norm: True,
        check_replicas_of_step: int | None = None,
    ) -> Step:
        """One optimizer step on this rank's micro-batches of a global batch.

        Every rank of a model copy passes the same batches. `accepts` is asked before the update, on all ranks alike; if
        it says no, or the gradient is not finite, nothing is updated. `check_replicas_of_step`: compare all copies of
        the parameters before the update; the number of the step is for the message.

        Raises:
            UserError: they differ; nothing is updated.
        """
        for group in self._engine.optimizer.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._adds_gradients_in_hooks:
            sample_losses = self._run(batches, self.model, nullcontext())
            self._engine.set_gradient_accumulation_boundary(True)
            # Reduces its two buffers, of matrices and of norms, as they are; a larger bucket would copy them together.
            self._engine.allreduce_gradients(bucket_size=1)
        elif self._zero_stage == 1:
            sample_losses = self._run(batches, self._engine, self._engine.coalesce_grad_reduction())
        else:
            sample_losses = self._run(batches, self._engine, nullcontext())
        losses = self._sum(sample_losses, batches)
        if check_replicas_of_step is not None:
            check_replicas(self.shards, check_replicas_of_step)
        return Step(losses, *self._gate.apply(self._engine.step, accepts, losses.loss), self._own_seconds)

    @contextmanager
    def _before_the_last_micro_batch(self) -> Iterator[None]:
        """The schedule's `no_sync`: tells ZeRO that more gradients of this step follow.

        Not for PP > 1, where forwards and backwards interleave and the schedule leaves this context at another place.
        """
        self._engine.set_gradient_accumulation_boundary(False)
        yield
        self._engine.set_gradient_accumulation_boundary(True)

    def evaluate(self, batches: list[Batch], rows: int) -> Tensor:
        """The bound (nats per token) of each of the `rows` samples 0, 1, … of a global batch: fp64 [rows] on the host.

        Equal on every rank; without gradients.
        """
        with torch.no_grad():
            losses = self._run(batches, self.model, nullcontext(), forward_only=True)
        index = torch.cat([batch.sample_index for batch in batches]).to(losses.device)
        real = index >= 0
        bounds = losses.new_zeros(rows).index_add_(0, index[real], losses[real])
        dist.all_reduce(bounds)
        return bounds.cpu() * rows

    def _run(
        self, batches: list[Batch], module: Any, around: AbstractContextManager[Any], forward_only: bool = False
    ) -> Tensor:
        """This rank's part of each sample's loss, in order of the batches: fp64 [samples], on the device.

        A sample's parts, on the ranks that share its row's columns, add up; ranks that compute no loss have zeros.
        """
        device = self.topology.device

        def step(iterator: Iterator[Batch], stage: Stage) -> tuple[Tensor, Callable[[Tensor], Any]]:
            return self._forward_step(next(iterator).to(device), module, stage)

        reports = self._schedule(batches, step, around, forward_only)
        if reports and self.is_first_slice:
            return torch.cat([report["samples"] for report in reports])
        samples = sum(len(batch.t) for batch in batches)
        return torch.zeros(samples, dtype=torch.float64, device=device)

    def _sum(self, sample_losses: Tensor, batches: list[Batch]) -> Losses:
        """The losses of the global batch, over all ranks."""
        t = torch.cat([batch.t for batch in batches])
        bucket = (t * T_BUCKETS).long().clamp_(0, T_BUCKETS - 1).to(sample_losses.device)
        zeros = sample_losses.new_zeros(T_BUCKETS)
        # Of the ranks that share a row one counts its samples; what only fills up is none.
        real = torch.cat([batch.sample_index for batch in batches]) >= 0
        samples = zeros.index_add(0, bucket, (real * float(self._counts_samples)).to(sample_losses))
        total = torch.cat([sample_losses.sum().unsqueeze(0), zeros.index_add(0, bucket, sample_losses), samples])
        dist.all_reduce(total)
        loss, sums, counts = total.cpu().split([1, T_BUCKETS, T_BUCKETS])
        # A sample's own bound is its part of the loss × the samples of its global batch.
        return Losses(float(loss), sums * counts.sum(), counts)

    @property
    def _counts_samples(self) -> bool:
        return (
            parallel_state.is_pipeline_first_stage(ignore_virtual=True)
            and self.is_first_slice
            and self.topology.place.context_parallel_rank == 0
        )

    def _forward_step(self, batch: Batch, module: Any, stage: Stage) -> tuple[Tensor, Callable[[Tensor], Any]]:
        def loss_func(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            log_normaliser, target_logit = output
            weighted = batch.loss_weight * (log_normaliser - target_logit)
            loss = weighted.sum()
            scale = _data_parallel_group().size() if self._zero_stage == 3 else 1  # against DeepSpeed's mean
            one = torch.ones((), dtype=torch.int, device=loss.device)
            samples = torch.zeros(len(batch.t), dtype=torch.float64, device=loss.device)
            samples.index_add_(0, batch.masked_samples, weighted.detach().double())
            return loss * scale, one, {"samples": samples}

        return module(batch, stage.vp_stage or 0), loss_func
