"""Which rows and columns of a global batch a process reads. Imports no torch."""

from dataclasses import dataclass

from llada_train.config.schema import Config, ParallelConfig

# Masked positions of a micro-batch are padded to a multiple: few different numbers keep kernels and blocks few.
MASKED_MULTIPLE = 256


@dataclass(frozen=True)
class Place:
    """What one process reads of a global batch: a block of its rows, a slice of their columns."""

    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    context_parallel_rank: int = 0
    context_parallel_size: int = 1

    def rows(self, total: int, config: Config) -> tuple[range, int]:
        """Which of so many rows it reads, and how many empty ones fill its micro-batches up.

        Every process has equally many micro-batches, as many as the schedule of pipeline stages takes.
        """
        multiple = config.training.micro_batch_size * config.parallel.micro_batch_multiple
        each = -(-total // (self.data_parallel_size * multiple)) * multiple
        first = self.data_parallel_rank * each
        own = range(min(first, total), min(first + each, total))
        return own, each - len(own)


ALONE = Place()


def place_of(rank: int, world_size: int, parallel: ParallelConfig) -> Place:
    """Where megatron-core's order of ranks puts one: tensor-parallel fastest, then context, data, pipeline."""
    tp, cp, pp = parallel.tensor_parallel, parallel.context_parallel, parallel.pipeline_parallel
    dp = world_size // (tp * cp * pp)
    return Place(rank // (tp * cp) % dp, dp, rank // tp % cp, cp)
