"""The plan's arithmetic against real engines: bytes of state and activations, and every collective of a step."""

from collections import Counter
from pathlib import Path

import accounting
import processes
import pytest
from conftest import write_config
from layouts import GLOBAL_BATCH_SIZE, MODEL, Layout

from llada_train.config.load import load_config
from llada_train.plan import memory
from llada_train.plan.layout import Layout as PlannedLayout
from llada_train.plan.traffic import traffic

LAYOUTS = [
    Layout(recompute="selective"),
    Layout(3),  # DP that divides no tensor evenly
    Layout(3, zero_stage=2, micro_batch_size=8),
    Layout(3, zero_stage=3, micro_batch_size=8),
    Layout(tensor_parallel=2, recompute="full"),
    Layout(2, tensor_parallel=2, sequence_parallel=True, zero_stage=2),
    Layout(tensor_parallel=2, context_parallel=2, sequence_parallel=True, recompute="full"),
    Layout(2, tensor_parallel=2, sequence_parallel=True, zero_stage=3, recompute="selective"),
    Layout(pipeline_parallel=2, micro_batch_size=4),
    Layout(2, pipeline_parallel=2, virtual_pipeline_parallel=2, recompute="selective"),
]


@pytest.fixture(scope="module")
def config(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = {f"model__{key}": value for key, value in MODEL.items()}
    return write_config(
        tiny_data,
        tmp_path_factory.mktemp("plan"),
        training__global_batch_size=GLOBAL_BATCH_SIZE,
        training__precision="bf16",
        objective={"random_length_probability": 0},
        **model,
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_rank_holds_keeps_and_sends_what_the_plan_says(config: Path, layout: Layout) -> None:
    resolved = load_config(config, layout.overrides, layout.processes)
    planned = PlannedLayout(resolved, layout.processes, resolved.data.sequence_length, GLOBAL_BATCH_SIZE)
    for rank in processes.run(layout.processes, accounting.account, config, layout.overrides):
        holding = planned.holdings[rank.pipeline_rank]
        assert (rank.weights, rank.gradients, rank.optimizer) == memory.state(planned, holding)
        sent: Counter[tuple[str, str]] = Counter()
        for one in traffic(planned, rank.pipeline_rank, rank.masked):
            sent[one.group, one.operation] += round(one.bytes * one.count)
        assert rank.sent == {k: v for k, v in sent.items() if v}
        print(layout.name, rank, rank.peak / (memory.memory(planned)[rank.pipeline_rank].total - memory.RESERVE))
