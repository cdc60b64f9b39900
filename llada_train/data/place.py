"""Which rows and columns of a global batch a process reads. Imports no torch."""

from dataclasses import dataclass

from llada_train.config.schema import ParallelConfig

# Masked positions of a micro-batch are padded to a multiple: few different numbers keep kernels and blocks few.
MASKED_MULTIPLE = 256


@dataclass(frozen=True)
class Place:
    """What one process reads of a global batch: a block of its rows, a slice of their columns, all equally large."""

    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    context_parallel_rank: int = 0
    context_parallel_size: int = 1

    def samples(self, first_sample: int, global_batch_size: int) -> range:
        """The places in the run's order of the rows that it reads of the global batch at `first_sample`."""
        rows = global_batch_size // self.data_parallel_size
        first = first_sample + self.data_parallel_rank * rows
        return range(first, first + rows)


ALONE = Place()


def place_of(rank: int, world_size: int, parallel: ParallelConfig) -> Place:
    """Where megatron-core's order of ranks puts one: tensor-parallel fastest, then context, data, pipeline."""
    tp, cp, pp = parallel.tensor_parallel, parallel.context_parallel, parallel.pipeline_parallel
    dp = world_size // (tp * cp * pp)
    return Place(rank // (tp * cp) % dp, dp, rank // tp % cp, cp)
