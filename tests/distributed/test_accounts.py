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
    Layout(3, zero_stage=2, micro_batch_size=8),  # three parts, which no tensor has
    Layout(3, zero_stage=3, micro_batch_size=8),
    Layout(tensor_parallel=2, context_parallel=2, recompute="full"),
    Layout(2, tensor_parallel=2, sequence_parallel=True, zero_stage=2),
    Layout(tensor_parallel=2, context_parallel=2, sequence_parallel=True),
    Layout(pipeline_parallel=2, micro_batch_size=4),
    Layout(2, pipeline_parallel=2, virtual_pipeline_parallel=2, recompute="selective"),
]

# Position, target, and place in this rank's vocabulary of what is masked, int64; whether it is there.
INDEX_BYTES = 3 * 8 + 1


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


def kept_by_passes(layout: PlannedLayout, pipeline_rank: int) -> int:
    """By one forward pass of each of the rank's chunks, norms unfused."""
    holding = layout.holdings[pipeline_rank]
    kept = holding.layers * memory.kept_by_layer(layout, fused_norm=False)
    if layout.config.training.recompute != "full":  # then layers' closures hold them, and no node of the graph
        kept += len(holding.chunks) * memory.rotary_tables(layout)
    if holding.has_head:
        kept += memory.kept_by_norm(layout, fused=False) + memory.masked_rows(layout) + memory.logits_kept(layout)
        kept += INDEX_BYTES * layout.masked_positions
    return kept + 8 * layout.tokens * holding.has_embedding


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_rank_holds_keeps_and_sends_what_the_plan_says(config: Path, layout: Layout) -> None:
    """State and what is sent to the byte, activations but for a few indices; the most at any moment nearly so."""
    resolved = load_config(config, layout.overrides, layout.processes)
    planned = PlannedLayout(resolved, layout.processes, resolved.data.sequence_length, GLOBAL_BATCH_SIZE)
    ranks = processes.run(layout.processes, accounting.account, config, layout.overrides)
    for rank in ranks:
        holding = planned.holdings[rank.pipeline_rank]
        assert (rank.weights, rank.gradients, rank.optimizer) == memory.state(planned, holding)
        sent: Counter[tuple[str, str]] = Counter()
        for one in traffic(planned, rank.pipeline_rank, rank.masked):
            group = "context" if one.group == "copies" and layout.data_parallel == 1 else one.group  # the same ranks
            sent[group, one.operation] += round(one.bytes * one.count)
        assert rank.sent == {name: size for name, size in sent.items() if size}
        if resolved.parallel.zero_stage < 3:  # there a model alone, without DeepSpeed's hooks, has no weights
            assert rank.kept == pytest.approx(kept_by_passes(planned, rank.pipeline_rank), rel=5e-3)
    assert_most_is_planned(planned, ranks)


def test_a_gradient_on_its_way_takes_what_the_plan_says(config: Path) -> None:
    """Of an embedding that is larger than all else on its stage: bf16, and an fp32 copy."""
    layout = Layout(pipeline_parallel=2)
    wide = ["model.num_layers=2", "model.hidden_size=512", "model.vocab_size=8192", "training.micro_batch_size=4"]
    overrides = [*layout.overrides, *wide]
    resolved = load_config(config, overrides, layout.processes)
    planned = PlannedLayout(resolved, layout.processes, resolved.data.sequence_length, GLOBAL_BATCH_SIZE)
    assert_most_is_planned(planned, processes.run(layout.processes, accounting.account, config, overrides), 0.05)


def assert_most_is_planned(planned: PlannedLayout, ranks: list[accounting.Account], tolerance: float = 0.15) -> None:
    """At any moment of a step. gloo's threads free what was sent when they come to it: of the rank that had least."""
    for pipeline_rank, one in enumerate(memory.memory(planned, fused_norm=False)):
        peak = min(rank.peak for rank in ranks if rank.pipeline_rank == pipeline_rank)
        assert peak == pytest.approx(one.total - memory.RESERVE, rel=tolerance)
