"""The layouts of the matrix: a few that meet every feature, and all that exist on up to eight processes."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llada_train.config.rules import check_world_size, cross_section_problems
from llada_train.config.schema import Config

GLOBAL_BATCH_SIZE = 48
# If a few tokens weigh very much, bf16 gradient norms scatter by more than 2e-3, however one process splits its batch:
# so fewer rows are cut than in other tests, and none has next to no masks.
OBJECTIVE = {"random_length_probability": 0.1, "epsilon": 0.05}
# Layers that no number of stages divides; grouped-query heads, cut up to the number of key-value heads.
MODEL = {"num_layers": 9, "hidden_size": 128, "num_heads": 8, "num_kv_heads": 4, "ffn_hidden_size": 192}

DEEPSPEED = ("overlap_comm", "reduce_scatter", "reduce_bucket_size", "prefetch_bucket_size", "offload_optimizer")


@dataclass(frozen=True)
class Layout:
    data_parallel: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline_parallel: int = 1
    context_parallel: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 1
    recompute: str = "none"
    micro_batch_size: int | None = None  # None: as few micro-batches as fill the pipeline (interleaved: twice)
    # DeepSpeed's own settings, as parallel's
    overlap_comm: bool | None = None
    reduce_scatter: bool | None = None
    reduce_bucket_size: int = 50_000_000
    prefetch_bucket_size: int = 50_000_000
    offload_optimizer: bool = False

    @property
    def processes(self) -> int:
        return self.data_parallel * self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def _sizes(self) -> dict[str, int]:
        sizes = {
            "dp": self.data_parallel,
            "tp": self.tensor_parallel,
            "pp": self.pipeline_parallel,
            "vpp": self.virtual_pipeline_parallel,
            "cp": self.context_parallel,
        }
        return {name: size for name, size in sizes.items() if size > 1}

    @property
    def name(self) -> str:
        parts = [f"{name}{size}" for name, size in self._sizes.items()]
        parts += ["sp"] * self.sequence_parallel + [f"zero{self.zero_stage}"]
        parts += [self.recompute] * (self.recompute != "none")
        parts += [f"mbs{self.micro_batch_size}"] * (self.micro_batch_size is not None)
        parts += [f"{name}={getattr(self, name)}" for name in DEEPSPEED if getattr(self, name) != getattr(Layout, name)]
        return "-".join(parts)

    @property
    def kind(self) -> str:
        """Which kinds of parallelism it has."""
        return " × ".join(name.upper() for name in self._sizes if name != "vpp") or "one process"

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The sections of the config that make the layout."""
        rows = GLOBAL_BATCH_SIZE // self.data_parallel
        filling = self.pipeline_parallel * (2 if self.virtual_pipeline_parallel > 1 else 1)
        micro_batch_size = self.micro_batch_size or rows // max(2, filling)
        parallel = ("tensor_parallel", "pipeline_parallel", "virtual_pipeline_parallel", "context_parallel")
        parallel += ("sequence_parallel", "zero_stage", *DEEPSPEED)
        return {
            "parallel": {name: getattr(self, name) for name in parallel},
            "training": {"recompute": self.recompute, "micro_batch_size": micro_batch_size},
        }

    @property
    def overrides(self) -> list[str]:
        sections = self.settings.items()
        settings = ((f"{section}.{key}", value) for section, values in sections for key, value in values.items())
        return [f"{key}={'null' if value is None else value}" for key, value in settings]

    @property
    def accepted(self) -> bool:
        """Whether the config's rules let it pass."""
        tree = {
            "run_dir": "unused",
            "model": {**MODEL, "vocab_size": 300},
            "data": {"tokenizer": "unused", "sequence_length": 32, "corpora": [{"path": "unused"}]},
            "optimizer": {"learning_rate": [{"until_tokens": 1, "end": 1}]},
            **self.settings,
        }
        tree["training"]["global_batch_size"] = GLOBAL_BATCH_SIZE
        config = Config.model_validate(tree)
        return not cross_section_problems(config) and not check_world_size(config, self.processes)


CHOSEN = [
    Layout(micro_batch_size=8),
    Layout(recompute="selective"),
    Layout(recompute="full"),
    Layout(2),
    Layout(2, zero_stage=2, micro_batch_size=8),
    Layout(2, zero_stage=3, recompute="selective"),
    Layout(3, zero_stage=2),  # not a power of two: a mean over the ranks would round
    Layout(4, zero_stage=3, micro_batch_size=4),
    Layout(8, zero_stage=2),
    # Single parameters are larger than these buckets, as at 8B.
    Layout(2, zero_stage=2, reduce_bucket_size=5000, offload_optimizer=True, micro_batch_size=8),
    Layout(2, zero_stage=2, reduce_bucket_size=5000, overlap_comm=False, reduce_scatter=True, recompute="selective"),
    Layout(2, zero_stage=3, reduce_bucket_size=5000, prefetch_bucket_size=0, offload_optimizer=True),
    Layout(tensor_parallel=2),
    Layout(tensor_parallel=4, sequence_parallel=True, recompute="selective"),
    Layout(2, tensor_parallel=2, sequence_parallel=True, zero_stage=2),
    Layout(4, tensor_parallel=2, sequence_parallel=True, zero_stage=3, recompute="full"),
    Layout(pipeline_parallel=2, micro_batch_size=4),
    Layout(pipeline_parallel=2, virtual_pipeline_parallel=2),
    Layout(2, pipeline_parallel=2, virtual_pipeline_parallel=4, recompute="full"),
    Layout(pipeline_parallel=4, virtual_pipeline_parallel=2),
    Layout(2, tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True),
    Layout(tensor_parallel=4, pipeline_parallel=2, virtual_pipeline_parallel=2, sequence_parallel=True),
    Layout(context_parallel=2, micro_batch_size=16),
    Layout(context_parallel=4, zero_stage=3),
    Layout(2, tensor_parallel=2, context_parallel=2, sequence_parallel=True, zero_stage=2, recompute="full"),
    Layout(2, pipeline_parallel=2, virtual_pipeline_parallel=2, context_parallel=2),
    Layout(tensor_parallel=2, pipeline_parallel=2, context_parallel=2, sequence_parallel=True, recompute="selective"),
]


PACKED = "sft.rows=packed"
SFT_CHOSEN = [
    (Layout(micro_batch_size=3), ()),
    (Layout(2, zero_stage=2, micro_batch_size=1), ()),
    (Layout(4, zero_stage=3), ()),
    (Layout(2, tensor_parallel=2, sequence_parallel=True, zero_stage=2), ()),
    (Layout(pipeline_parallel=2, virtual_pipeline_parallel=2, context_parallel=2), ()),
    (Layout(2, zero_stage=2, micro_batch_size=6), (PACKED,)),  # fewer rows than these micro-batches hold
    (Layout(pipeline_parallel=2, context_parallel=2, tensor_parallel=2, sequence_parallel=True), (PACKED,)),
]


def every_layout() -> Iterator[Layout]:
    """All that fill 1, 2, 4 or 8 processes and that the config's rules let pass; recomputation is met in turn."""
    powers = (1, 2, 4, 8)
    grid = itertools.product(powers, powers, powers, powers, powers, (False, True), (1, 2, 3))
    accepted = (layout for values in grid if (layout := Layout(*values)).processes in powers and layout.accepted)
    for i, layout in enumerate(accepted):
        yield replace(layout, recompute=("none", "selective", "full")[(i + i // 3) % 3])  # with any ZeRO stage
