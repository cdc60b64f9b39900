"""All layouts that the config's rules let pass on so many GPUs, those that fit, the quickest first."""

import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from llada_train.config.rules import check_world_size, cross_section_problems
from llada_train.config.schema import Config
from llada_train.plan.plan import Machine, Plan, plan_stretches, stretches

LARGEST_MICRO_BATCH = 32


@dataclass(frozen=True)
class Found:
    layouts: int  # that the rules let pass
    fitting: list[Plan]  # by estimated time

    @property
    def best(self) -> list[Plan]:
        """Of each combination of TP, PP, CP and ZeRO stage the quickest, by estimated time."""
        found: dict[tuple[int, ...], Plan] = {}
        for one in self.fitting:
            parallel = one.config.parallel
            sizes = parallel.tensor_parallel, parallel.pipeline_parallel, parallel.context_parallel
            found.setdefault((*sizes, parallel.zero_stage), one)
        return list(found.values())


def search(config: Config, machine: Machine, mfu: float | None, write_rate: float, keep: Collection[str] = ()) -> Found:
    """Every TP within a node, PP, VPP, CP, SP, ZeRO stage, micro-batch size and recomputation.

    `keep`: dotted keys whose values stay as the config has them.
    """
    parts = stretches(config)
    plans = [plan_stretches(one, parts, machine, mfu, write_rate) for one in _legal(config, machine, keep)]
    fitting = [plan for plan in plans if plan.fits]
    return Found(len(plans), sorted(fitting, key=lambda plan: (plan.estimated_seconds, -plan.spare)))


def _legal(config: Config, machine: Machine, keep: Collection[str]) -> Iterator[Config]:
    gpus, layers = machine.gpus, config.model.num_layers
    parallel, training = config.parallel, config.training
    sizes = [2**i for i in range(gpus.bit_length())]
    tensors = [size for size in sizes if size <= machine.gpus_per_node]
    batch = math.gcd(*config.batch_sizes.values())
    sections = {"parallel": parallel, "training": training}
    kept = {f"{name}.{key}": n for name, one in sections.items() for key, n in one if f"{name}.{key}" in keep}
    grid = itertools.product(tensors, sizes, sizes, (False, True), (1, 2, 3))
    for tensor, pipeline, context, sequence, zero in grid:
        together = tensor * pipeline * context
        if gpus % together or pipeline > layers or batch % (gpus // together):
            continue
        rows = batch // (gpus // together)
        virtual = [v for v in sizes if v == 1 or (pipeline > 1 and pipeline * v <= layers)]
        micro = [n for n in range(1, min(rows, LARGEST_MICRO_BATCH) + 1) if rows % n == 0]
        for v, rows_at_once, recompute in itertools.product(virtual, micro, ("none", "selective", "full")):
            layout = {
                "tensor_parallel": tensor,
                "pipeline_parallel": pipeline,
                "virtual_pipeline_parallel": v,
                "context_parallel": context,
                "sequence_parallel": sequence,
                "zero_stage": zero,
            }
            batches = {"micro_batch_size": rows_at_once, "recompute": recompute}
            chosen = {f"parallel.{key}": n for key, n in layout.items()}
            chosen |= {f"training.{key}": n for key, n in batches.items()}
            if any(key in chosen and chosen[key] != given for key, given in kept.items()):
                continue
            one = config.model_copy(
                update={
                    "parallel": parallel.model_copy(update=layout),
                    "training": training.model_copy(update=batches),
                }
            )
            if not cross_section_problems(one) and not check_world_size(one, gpus):
                yield one
