"""A model split over processes, its weights read from wherever a user has them, each slice alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from torch import Tensor

from llada_train.checkpoint.reader import naming_another
from llada_train.checkpoint.restore import open_together
from llada_train.checkpoint.store import is_hf_folder, resolve
from llada_train.config.schema import ModelConfig, ParallelConfig
from llada_train.data.tokenizer import Tokenizer
from llada_train.model.sizes import MASTER
from llada_train.model.weights import Shard
from llada_train.parallel import topology
from llada_train.parallel.split_model import SplitModel
from llada_train.parallel.topology import Topology
from llada_train.sampling.split import SplitDenoiser

# Rank 0 alone reads tasks, counts bigrams and runs what a task runs, and the others wait for its next question.
PATIENCE = timedelta(hours=6)


@contextmanager
def split_denoiser(
    path: Path, model: ModelConfig, tokenizer: Tokenizer, parallel: ParallelConfig
) -> Iterator[SplitDenoiser]:
    """In bf16 on GPUs, in fp32 on CPUs, in any layout, whatever layout a checkpoint was saved in. Collective.

    Raises:
        UserError: there is no model, it is damaged, or the environment is at fault; on all ranks.
    """
    here = topology.initialize(parallel, PATIENCE)
    try:
        split = SplitModel(model, parallel, here, "bf16" if here.device.type == "cuda" else "fp32")
        with read_slices(path, model, here) as read, here.failing_together():
            split.set_weights(read)
        yield SplitDenoiser(split, tokenizer.mask_id, tokenizer.vocab_size)
    finally:
        topology.shutdown()


@contextmanager
def read_slices(path: Path, model: ModelConfig, here: Topology) -> Iterator[Callable[[Shard], Tensor]]:
    """What reads this rank's slice of a tensor, and no more of it: fp32. Collective.

    Raises:
        UserError: there is no model, it is damaged, or it is another than `model`; on all ranks.
    """
    if is_hf_folder(path):
        from llada_train.convert.from_hf import HfWeights  # transformers takes a fifth of a start's imports

        with here.failing_together():
            weights = HfWeights(path, model)
        with weights:
            yield lambda shard: weights.read_runs(shard.name, shard.runs())
    else:
        with here.failing_together():
            newest = resolve(path) if here.is_main else None
        # Rank 0's: a run that is under way may save another before the last rank has looked.
        folder = topology.broadcast(newest)
        assert folder is not None
        with naming_another(folder), open_together(folder) as checkpoint:
            yield lambda shard: checkpoint.read_runs(shard.name, MASTER, shard.runs())
