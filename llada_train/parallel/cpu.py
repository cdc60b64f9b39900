"""megatron-core and DeepSpeed on a machine without CUDA: the only difference between a CPU run and a GPU run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def prepare() -> None:
    """Before anything is built: CUDA's device and random state are the CPU's, and DeepSpeed compiles nothing."""
    import deepspeed.ops
    from megatron.core.tensor_parallel import random

    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # An optional shared-memory all-reduce that would need a C++ compiler on the user's machine; gloo does its work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **(kwargs or {}))


@contextmanager
def standing_in() -> Iterator[None]:
    """While megatron-core's schedules run: what they allocate on "cuda" is allocated on the CPU."""
    with _CudaMeansCpu():
        yield
