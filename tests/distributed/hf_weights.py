"""On one of N processes: weights from a Hugging Face folder into an engine, its logits, and a checkpoint of it."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import training_run  # noqa: F401 - quiets the engines before they are imported

import torch  # isort: skip
from llada_train.checkpoint.manifest import Progress
from llada_train.checkpoint.writer import CheckpointWriter
from llada_train.config.load import load_config
from llada_train.convert.from_hf import HfWeights
from llada_train.data.batch import Batch
from llada_train.parallel import topology
from llada_train.parallel.engine import Engine


class Found(NamedTuple):
    read: set[str]  # tensors that this rank read
    logits: np.ndarray | None  # [S, V], on the ranks that have the head


def import_and_save(config_file: Path, layout: list[str], folder: Path, ids: list[int], checkpoints: Path) -> Found:
    config = load_config(config_file, layout, topology.world_size())
    here = topology.initialize(config.parallel)
    engine = Engine(config, here)
    with HfWeights(folder, config.model) as weights:
        engine.set_weights(lambda shard: weights.read_runs(shard.name, shard.runs()))
    seen: list[torch.Tensor] = []
    with contextlib.suppress(AttributeError):
        engine.model.stages[-1].head.register_forward_hook(lambda _, __, output: seen.append(output[1]))
    S, V = len(ids), config.model.padded_vocab_size
    pairs = torch.cartesian_prod(torch.arange(S), torch.arange(V))  # every token as target of every position
    batch = Batch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.arange(S)[None],
        segments=None,
        masked_positions=pairs[:, 0].contiguous(),
        targets=pairs[:, 1].contiguous(),
        loss_weight=torch.ones(len(pairs)),
        masked_samples=torch.zeros(len(pairs), dtype=torch.long),
        sample_index=torch.zeros(1, dtype=torch.long),
        t=torch.ones(1),
    )
    engine.evaluate([batch], 1)
    CheckpointWriter(checkpoints, engine).save(Progress(step=0, consumed_samples=0))
    read = {shard.name for shard in engine.shards}
    topology.shutdown()
    return Found(read, seen[0].view(S, V).numpy() if seen else None)
