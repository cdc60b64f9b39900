"""What the sections share: the sizes, the clock, and what a section hands back."""

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import ROOT

from llada_train.config.load import load_config
from llada_train.config.schema import Config

RECIPE = ROOT / "configs/pretrain/llada_8b.yaml"
# The recipe made small, so that all sections run on a CPU within seconds: a trial of the program, not of the machine.
TINY_MODEL = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 4, "ffn_hidden_size": 128, "max_sequence_length": 128}

FAILED = "failed"
Row = dict[str, str | float | None]


@dataclass(frozen=True)
class Sizes:
    tiny: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.tiny else "cuda")

    @property
    def rounds(self) -> int:
        """Timed calls, of which the median is told."""
        return 1 if self.tiny else 8

    @property
    def micro_batches(self) -> tuple[int, ...]:
        return (1, 2) if self.tiny else (1, 2, 4)

    @property
    def global_batch_size(self) -> int:
        return 2 if self.tiny else 8

    def config(self, data: Path | None = None, **settings: object) -> Config:
        """The 8B recipe on one process, with settings of `section__key`, over the data of `common.make_data`."""
        overrides: dict[str, object] = {"training__global_batch_size": self.global_batch_size}
        if self.tiny:
            overrides |= {f"model__{key}": value for key, value in TINY_MODEL.items()}
            overrides |= {"model__vocab_size": 2048, "data__sequence_length": 128}
        if data is not None:
            overrides |= {"data__tokenizer": data / "tokenizer", "data__corpora": f"[{{path: {data / 'corpus'}}}]"}
        overrides |= settings
        return load_config(RECIPE, [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()], 1)


@dataclass
class Plot:
    """One line for each value of the column `lines`: column `y` over column `x`."""

    x: str
    y: str
    lines: str
    log_x: bool = False


@dataclass
class Section:
    title: str
    note: str  # what was measured, and by which formula
    rows: list[Row] = field(default_factory=list)
    plot: Plot | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # for the JSON alone
    tables: dict[str, list[Row]] = field(default_factory=dict)  # more tables, by title
    problems: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return bool(self.problems) or any(str(row.get("remark")).startswith(FAILED) for row in self.rows)


@dataclass(frozen=True)
class Ceilings:
    """What this chip reached here."""

    flops: float  # FLOP/s of a large bf16 product
    copied: float  # bytes/s read and written


def seconds(function: Callable[[], object], sizes: Sizes, warmup: int = 2) -> float:
    """Median of a call's seconds, by the device's clock."""
    taken = []
    warmup = min(warmup, sizes.rounds)
    for i in range(warmup + sizes.rounds):
        if sizes.tiny:
            began = time.perf_counter()
            function()
            spent = time.perf_counter() - began
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            spent = start.elapsed_time(end) / 1e3
        if i >= warmup:
            taken.append(spent)
    return statistics.median(taken)


class Peak:
    """Bytes that the device's allocator held at most, beyond what there was at first; None on a CPU."""

    beyond: float | None = None
    total: float | None = None


@contextmanager
def peak_memory(sizes: Sizes) -> Iterator[Peak]:
    told = Peak()
    if sizes.tiny:
        yield told
        return
    forget(sizes)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield told
    told.total = torch.cuda.max_memory_allocated()
    told.beyond = told.total - before


def forget(sizes: Sizes) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if not sizes.tiny:
        torch.cuda.empty_cache()


def gib(size: float | None) -> float | None:
    return None if size is None else size / 2**30


def row(label: Row, function: Callable[[], Row], sizes: Sizes) -> Row:
    """What `function` measures, from freshly compiled kernels on; or why it cannot, which ends nothing else.

    A machine is lent for minutes: one side that does not work there must not take the others' numbers with it.
    """
    if not sizes.tiny:  # else kernels for one shape become kernels for any shape, as no run of one shape has them
        torch._dynamo.reset()
    try:
        return label | function()
    except torch.OutOfMemoryError:
        return label | {"remark": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        return label | {"remark": f"{FAILED}: {type(error).__name__}"}
    finally:
        forget(sizes)
