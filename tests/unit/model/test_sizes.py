import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_train.config.schema import ModelConfig
from llada_train.model.sizes import (
    TensorSpec,
    layers_of_stages,
    non_embedding_parameter_count,
    parameter_count,
    slice_runs,
    stage_of,
    tensor_specs,
)

LLADA_8B = ModelConfig(
    num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=32, ffn_hidden_size=12288, vocab_size=126464
)
LLADA_1B = ModelConfig(
    num_layers=22, hidden_size=2048, num_heads=32, num_kv_heads=4, ffn_hidden_size=5634, vocab_size=126464
)


@pytest.mark.parametrize(
    ("model", "total", "non_embedding"),
    [(LLADA_8B, 8_015_581_184, 6_979_588_096), (LLADA_1B, 1_487_243_264, 969_246_720)],
)
def test_parameter_counts_are_the_papers(model: ModelConfig, total: int, non_embedding: int) -> None:
    """LLaDA, Tab. 5."""
    assert parameter_count(model) == total
    assert non_embedding_parameter_count(model) == non_embedding


@pytest.mark.parametrize("stages", [1, 4, 8, 22])
def test_stages_follow_each_other_and_the_last_has_the_head(stages: int) -> None:
    counts = layers_of_stages(LLADA_1B.num_layers, stages)
    assert sum(counts) == 22 and counts[-1] == min(counts) and max(counts) - min(counts) <= 1
    found = [stage_of(name, 22, stages) for name in tensor_specs(LLADA_1B)]
    assert found == sorted(found) and (found[0], found[-2], found[-1]) == (0, stages - 1, stages - 1)
    assert [found.count(i) for i in range(1, stages - 1)] == [6 * count for count in counts[1:-1]]


@given(
    shape=st.tuples(*[st.integers(1, 4)] * 3),
    dim=st.integers(0, 2),
    count=st.integers(1, 3),
    data=st.data(),
)
def test_slice_runs_are_the_flat_places_of_a_slice(
    shape: tuple[int, ...], dim: int, count: int, data: st.DataObject
) -> None:
    """Against numpy's split of the numbered global tensor."""
    full = tuple(n * count if axis == dim else n for axis, n in enumerate(shape))
    numbered = np.arange(np.prod(full)).reshape(full)
    index = data.draw(st.integers(0, count - 1))
    flat = np.split(numbered, count, dim)[index].ravel().tolist()
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    runs = slice_runs(TensorSpec(full, dim, 0.1), index, count, start, stop)
    assert [place for begin, length in runs for place in range(begin, begin + length)] == flat[start:stop]
