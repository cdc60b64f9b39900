"""One of N processes: trains the same run in one layout after another, for test_layouts.py.

    layout_worker.py CONFIG OUTPUT '{"tp2": ["parallel.tensor_parallel=2"], …}'

Writes OUTPUT/NAME.json (loss and gradient norm of each step, validation) and a checkpoint OUTPUT/NAME/.
"""

import json
import sys
from pathlib import Path

from megatron.core import parallel_state

from llada_train.checkpoint.writer import Progress, save
from llada_train.config.load import load_config
from llada_train.data.loader import TrainingLoader, validation_batches
from llada_train.data.rows import PretrainingData
from llada_train.model.weights import initial_tensor
from llada_train.parallel import topology
from llada_train.parallel.engine import Engine

STEPS = 10
LEARNING_RATE = 2e-3


def train(config_file: Path, overrides: list[str], output: Path) -> None:
    config = load_config(config_file, overrides, topology.world_size())
    here = topology.initialize(config.parallel)
    engine = Engine(config, here)
    engine.set_weights(lambda shard: shard.of(initial_tensor(shard.name, shard.spec, config.seed)))
    data = PretrainingData(config)
    place = (here.data_parallel_rank, here.data_parallel_size)
    loader, size = TrainingLoader(data, config, *place), config.training.global_batch_size
    steps = [engine.train_step(loader.global_batch(i * size), LEARNING_RATE) for i in range(STEPS)]
    held_out = engine.evaluate(validation_batches(data, config, *place))
    save(output, engine, config, Progress(STEPS, STEPS * size), keep=1)
    if here.is_main:
        result = {
            "losses": [losses.loss for losses, _ in steps],
            "norms": [norm for _, norm in steps],
            "bounds_by_t": [losses.bound_by_t() for losses, _ in steps],
            "validation": held_out.loss,
        }
        output.with_suffix(".json").write_text(json.dumps(result))
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    for name, overrides in json.loads(sys.argv[3]).items():
        train(Path(sys.argv[1]), overrides, Path(sys.argv[2]) / name)
    topology.shutdown()
