"""What one GPU of a layout holds and works on: tensors, layers, tokens of a micro-batch, micro-batches in flight."""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from llada_train.config.schema import Config, ModelConfig
from llada_train.data.place import MASKED_MULTIPLE
from llada_train.model.sizes import CHUNK, layers_of_stages, stage_of, tensor_specs
from llada_train.plan.chips import GPUS_PER_NODE


@dataclass(frozen=True)
class Holding:
    """The parameters of one pipeline rank, as each of its tensor-parallel ranks holds them: elements by tensor."""

    chunks: tuple[int, ...]  # layers of each of its stages
    has_embedding: bool
    has_head: bool
    matrices: tuple[int, ...]  # an optimizer group each: these decay,
    norms: tuple[int, ...]  # these do not

    @property
    def layers(self) -> int:
        return sum(self.chunks)

    @property
    def groups(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.matrices, self.norms

    @property
    def parameters(self) -> int:
        return sum(self.matrices) + sum(self.norms)

    @property
    def largest(self) -> int:
        return max(self.matrices)


@lru_cache(maxsize=512)
def holdings(model: ModelConfig, tensor: int, pipeline: int, virtual: int) -> tuple[Holding, ...]:
    """Of each pipeline rank."""
    stages = pipeline * virtual
    layers = layers_of_stages(model.num_layers, stages)
    elements: list[tuple[list[int], list[int]]] = [([], []) for _ in range(pipeline)]
    for name, spec in tensor_specs(model).items():
        rank = stage_of(name, model.num_layers, stages) % pipeline
        is_norm = spec.init_std is None
        elements[rank][is_norm].append(spec.numel // (tensor if spec.partition_dim is not None else 1))
    return tuple(
        Holding(
            chunks=tuple(layers[rank::pipeline]),
            has_embedding=rank == 0,
            has_head=rank == pipeline - 1,
            matrices=tuple(matrices),
            norms=tuple(norms),
        )
        for rank, (matrices, norms) in enumerate(elements)
    )


@dataclass(frozen=True)
class Layout:
    """A config on so many GPUs, at one sequence length and batch size of its schedule."""

    config: Config
    gpus: int
    sequence_length: int
    global_batch_size: int
    gpus_per_node: int = GPUS_PER_NODE

    @cached_property
    def copies(self) -> int:
        """Ranks that hold the same weights, among which ZeRO splits: data × context parallelism."""
        parallel = self.config.parallel
        return self.gpus // (parallel.tensor_parallel * parallel.pipeline_parallel)

    @cached_property
    def data_parallel(self) -> int:
        return self.gpus // self.config.parallel.processes_per_row

    @cached_property
    def micro_batches(self) -> int:
        """That each rank works on in a step."""
        return self.global_batch_size // (self.data_parallel * self.config.training.micro_batch_size)

    @cached_property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    @cached_property
    def tokens(self) -> int:
        """Of a micro-batch on one rank."""
        return self.config.training.micro_batch_size * self.sequence_length // self.config.parallel.context_parallel

    @cached_property
    def masked_positions(self) -> int:
        """That the head sees of a micro-batch in which every token is masked."""
        return math.ceil(self.tokens / MASKED_MULTIPLE) * MASKED_MULTIPLE

    @cached_property
    def head_rows(self) -> int:
        """Of the head's weights on one rank."""
        return self.config.model.padded_vocab_size // self.config.parallel.tensor_parallel

    @cached_property
    def logits_at_once(self) -> int:
        """With every token masked, elements (llada_train/model/head.py)."""
        return min(self.masked_positions, max(1, CHUNK // self.head_rows)) * self.head_rows

    @cached_property
    def head_pieces(self) -> int:
        return math.ceil(self.masked_positions * self.head_rows / self.logits_at_once)

    @cached_property
    def residual_tokens(self) -> int:
        """Those of which it holds hidden states between the matrix products: fewer under sequence parallelism."""
        parallel = self.config.parallel
        return self.tokens // (parallel.tensor_parallel if parallel.sequence_parallel else 1)

    @cached_property
    def element_bytes(self) -> int:
        return 2 if self.config.training.precision == "bf16" else 4

    @cached_property
    def holdings(self) -> tuple[Holding, ...]:
        parallel = self.config.parallel
        return holdings(
            self.config.model,
            parallel.tensor_parallel,
            parallel.pipeline_parallel,
            parallel.virtual_pipeline_parallel,
        )

    @cached_property
    def bubble(self) -> float:
        """Share of a step in which a pipeline rank waits, if all stages are equal (arXiv 2104.04473, §2.2)."""
        parallel = self.config.parallel
        waiting = (parallel.pipeline_parallel - 1) / parallel.virtual_pipeline_parallel
        return waiting / (self.micro_batches + waiting)

    def chunks_in_flight(self, rank: int) -> list[int]:
        """Layers of each forward pass of a pipeline rank whose backward pass has not begun, at most.

        megatron-core's schedules: 1F1B has p − rank micro-batches of p stages in flight; with v chunks each rank first
        makes 2·(p − rank − 1) + (v − 1)·p forward passes, p micro-batches of a chunk at a time, and one more
        (`get_pp_rank_microbatches`, `get_schedule_table`).
        """
        p, v = self.config.parallel.pipeline_parallel, self.config.parallel.virtual_pipeline_parallel
        first = p - rank - 1 if v == 1 else 2 * (p - rank - 1) + (v - 1) * p
        count = min(self.micro_batches * v, first + 1)
        chunks = self.holdings[rank].chunks
        return [chunks[i % (p * v) // p] for i in range(count)]


def padded(elements: int, ranks: int) -> int:
    """A flat group, in equal parts of an even number of elements (DeepSpeed's `nccl_start_alignment_factor`)."""
    return math.ceil(elements / (2 * ranks)) * 2 * ranks
