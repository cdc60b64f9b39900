"""What one rank of a real run holds and sends, counted: what the plan's arithmetic is held against."""

import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from kept import Kept
from megatron.core import parallel_state
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from training_run import LEARNING_RATE, initial_engine

from llada_train.config.load import load_config
from llada_train.data.batch import Batch
from llada_train.data.loader import TrainingLoader
from llada_train.data.place import MASKED_MULTIPLE
from llada_train.data.rows import PretrainingData
from llada_train.parallel import topology
from llada_train.parallel.engine import Engine

OPERATIONS = {  # of the dispatcher: name, and which argument holds the whole tensor
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::allgather_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_": ("reduce-scatter", 1),
    "c10d::reduce_": ("reduce", 0),
    "c10d::send": ("send", 0),
}
SMALL = 256  # bytes of norms, losses and the like, which the plan leaves out


@dataclass(frozen=True)
class Account:
    """One rank's."""

    pipeline_rank: int
    weights: int
    gradients: int
    optimizer: int
    kept: int  # by one forward pass of each of its chunks, every token masked
    peak: int  # of all tensors in a step
    masked: float  # that pass the head in a micro-batch, in the mean
    sent: dict[tuple[str, str], int]  # (group, operation) → bytes of whole tensors in a step


def account(config_file: Path, overrides: list[str]) -> Account:
    config = load_config(config_file, overrides, topology.world_size())
    here = topology.initialize(config.parallel)
    engine = initial_engine(config, here)
    loader = TrainingLoader(PretrainingData(config), config, here.place)
    size = config.training.global_batch_size
    engine.train_step(loader.global_batch(0), LEARNING_RATE)  # what the first step alone allocates or gathers
    batches = loader.global_batch(size)
    found: dict[str, int] = {}
    update = engine._engine.step

    def count_and_update() -> None:
        found.update(state_bytes(engine))
        update()

    engine._engine.step = count_and_update
    with CountedCollectives() as counted:
        engine.train_step(batches, LEARNING_RATE)
    engine._engine.step = update
    before = all_bytes()
    growth = most_allocated(lambda: engine.train_step(batches, LEARNING_RATE))
    kept = kept_bytes(engine, batches[0]) if config.parallel.zero_stage < 3 else 0
    result = Account(
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        **found,
        kept=kept,
        peak=before + growth,
        masked=sum(len(batch.masked_positions) for batch in batches) / len(batches),
        sent=counted.by_group(),
    )
    topology.shutdown()
    return result


class CountedCollectives(TorchDispatchMode):
    """Every collective that goes through torch's dispatcher, as all of torch.distributed's do."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[str, tuple[int, ...], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in OPERATIONS:
            operation, place = OPERATIONS[name]
            group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
            ranks = tuple(dist.get_process_group_ranks(group))
            self._calls.append((operation, ranks, sum(t.nbytes for t in _tensors(args[place]))))
        return func(*args, **(kwargs or {}))

    def by_group(self) -> dict[tuple[str, str], int]:
        groups = {
            "tensor": parallel_state.get_tensor_model_parallel_group(),
            "context": parallel_state.get_context_parallel_group(),
            "pipeline": parallel_state.get_pipeline_model_parallel_group(),
            "copies": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        ranks = {name: tuple(dist.get_process_group_ranks(group)) for name, group in groups.items()}
        found: Counter[tuple[str, str]] = Counter()
        for operation, members, size in self._calls:
            if len(members) > 1 and size > SMALL:
                # A message of the pipeline goes through whatever group its schedule was given.
                name = "pipeline" if operation == "send" else next(n for n, r in ranks.items() if r == members)
                found[name, operation] += size
        return dict(found)


def _tensors(holder: Any) -> Iterator[Tensor]:
    if isinstance(holder, Tensor):
        yield holder
    elif isinstance(holder, dict):
        yield from _tensors(list(holder.values()))
    elif isinstance(holder, Iterable) and not isinstance(holder, str):
        for item in holder:
            yield from _tensors(item)


def kept_bytes(engine: Engine, batch: Batch) -> int:
    """By a forward pass of each of this rank's chunks, alone, with every position masked."""
    B, S = batch.input_ids.shape
    masked = torch.arange(-(-B * S // MASKED_MULTIPLE) * MASKED_MULTIPLE) % (B * S)
    rank_of_row = parallel_state.get_context_parallel_rank()
    positions = torch.arange(rank_of_row * S, rank_of_row * S + S).repeat(B, 1)
    everything = Batch(
        input_ids=torch.zeros(B, S, dtype=torch.long),
        position_ids=positions,
        segments=None,
        masked_positions=masked,
        targets=torch.zeros_like(masked),
        loss_weight=torch.ones(len(masked)),
        masked_samples=masked // S,
        sample_index=torch.arange(B),
        t=torch.ones(B),
    )
    config, total = engine.config, 0
    width = S // (config.parallel.tensor_parallel if config.parallel.sequence_parallel else 1)
    for stage in engine.model.stages:
        counted = Kept(engine.model.parameters())
        hidden = torch.zeros(width, B, config.model.hidden_size, dtype=next(stage.parameters()).dtype)
        stage.set_input_tensor(hidden.requires_grad_())
        output = counted.during(lambda stage=stage: stage(everything))
        total += counted.bytes
        del output
    return total


def most_allocated(step: Callable[[], Any]) -> int:
    """By how many bytes this process's tensors grow during a step, at most; every allocation counts."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


# --- weights, gradients, optimizer

# Where DeepSpeed's three wrappers keep gradients: bf16_optimizer.py, zero/stage_1_and_2.py, zero/stage3.py.
GRADIENT_BUFFERS = (
    "fp32_groups_gradients_flat",
    "averaged_gradients",
    "all_grad_tensors",
    "grad_partitions_flat_buffer",
)


def state_bytes(engine: Engine) -> dict[str, int]:
    """By cause; each storage counts once, whole, for the first cause that has it."""
    gc.collect()
    optimizer = engine._engine.optimizer
    adam = optimizer.optimizer
    parameters = [shard.parameter for shard in engine.shards]
    masters = [partition for group in adam.param_groups for partition in group["params"]]
    if engine.config.parallel.zero_stage == 3:  # there Adam's groups hold a partition only while it is updated
        masters += optimizer.fp32_partitioned_groups_flat
    gradients = [getattr(optimizer, name, None) for name in GRADIENT_BUFFERS]
    gradients += [getattr(tensor, name, None) for tensor in parameters + masters for name in ("grad", "grad_accum")]
    held_by = {
        "weights": [parameters, [getattr(parameter, "ds_tensor", None) for parameter in parameters]],
        "optimizer": [masters, [_moments(adam.state.get(master)) for master in masters]],
        "gradients": gradients,
    }
    seen: set[int] = set()
    found = dict.fromkeys(held_by, 0)
    for cause, holders in held_by.items():
        for tensor in _tensors(holders):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[cause] += storage.nbytes()
    return found


def all_bytes() -> int:
    """Of all tensors of this process."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())


def _moments(state: dict[str, Tensor] | None) -> list[Tensor]:
    """Without the number of steps."""
    return [tensor for tensor in (state or {}).values() if tensor.ndim]
