"""Where this process stands: its rank, its device, its place in the grid of tensor, pipeline and data parallelism."""

import logging
import math
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from llada_train.config.errors import UserError
from llada_train.config.schema import ParallelConfig
from llada_train.data.place import Place
from llada_train.parallel.launch import free_port, world_size

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # torch's own default


@dataclass(frozen=True)
class Topology:
    rank: int
    world_size: int
    place: Place
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Collective: a UserError that any rank raises within is raised on all. None waits for one that has ended."""
        problem: str | None = None
        try:
            yield
        except UserError as error:
            problem = str(error)
        failed = torch.tensor(int(problem is not None), device=self.device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if failed:
            problems: list[str | None] = [None] * self.world_size
            dist.all_gather_object(problems, problem)
            raise UserError(next(found for found in problems if found is not None))


def rank() -> int:
    """This process's number among them, before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def initialize(parallel: ParallelConfig, timeout: timedelta = COLLECTIVE_TIMEOUT) -> Topology:
    """Start the process group (NCCL on GPUs, gloo on CPUs) and megatron-core's groups inside it.

    A collective that waits for longer than `timeout` raises an error.
    """
    import deepspeed

    _complete_environment()
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU: it has {torch.cuda.device_count()}; "
                "start one process for each GPU"
            )
        if parallel.tensor_parallel > 1 and parallel.zero_stage < 3:  # ZeRO 3 gathers on a stream of its own
            # megatron-core overlaps communication with matrix products only if the device runs kernels in their order.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        from llada_train.parallel import cpu

        device = torch.device("cpu")
        cpu.prepare()
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timeout,
    )
    place = initialize_groups(parallel, timeout)
    return Topology(rank=dist.get_rank(), world_size=dist.get_world_size(), place=place, device=device)


def make_deterministic() -> None:
    """From now on, and before the first kernel: the same layout gives the same bits on GPUs, as it does on CPUs."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS picks other kernels if workspaces may come and go
    os.environ["NCCL_ALGO"] = "Ring"  # else the order of a sum follows from what NCCL measures at start
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def initialize_groups(parallel: ParallelConfig, timeout: timedelta = COLLECTIVE_TIMEOUT) -> Place:
    """megatron-core's groups inside the process group that is there; what this process reads of a global batch."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline_parallel if parallel.virtual_pipeline_parallel > 1 else None
        ),
        context_parallel_size=parallel.context_parallel,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout / timedelta(minutes=1)),
    )
    # Nothing on the device draws random numbers, but megatron-core's sequence-parallel regions want their states.
    model_parallel_cuda_manual_seed(0)
    return Place(
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
    )


def _complete_environment() -> None:
    """Defaults for a process that was started alone; of several, each must have been told its place."""
    if world_size() > 1:
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(
                f"WORLD_SIZE is {world_size()}, but {', '.join(missing)} is not set: start with llada-train submit, "
                "under torchrun or with --processes N, or unset WORLD_SIZE to run alone"
            )
        return
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        os.environ.setdefault(name, value)


T = TypeVar("T")


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank; collective."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def any_rank(*flags: bool, device: torch.device) -> list[bool]:
    """Of each flag, whether it is set on any rank; collective, one small reduction for all of them."""
    together = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in together.tolist()]


def gather(values: Sequence[float], device: torch.device) -> list[list[float]]:
    """Each rank's values, by rank, on every rank; collective."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    everyones = mine.new_empty(dist.get_world_size() * len(values))
    dist.all_gather_into_tensor(everyones, mine)
    found: list[list[float]] = everyones.view(-1, len(values)).tolist()
    return found


def device_name(device: torch.device) -> str:
    """As its maker calls it: "NVIDIA H100 80GB HBM3"; "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def hosts() -> list[str]:
    """The host name of each rank; collective."""
    names = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names


def shutdown() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def quiet_engines() -> None:
    """Before either engine is imported: both report on every rank, and a log is one line per interval, from rank 0."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to guess
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed|torch)(\.|$)")
