import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_train.config.schema import ModelConfig
from llada_train.model.sizes import (
    TensorSpec,
    flops_per_token,
    non_embedding_parameter_count,
    parameter_count,
    slice_runs,
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


def test_flops_count_non_causal_attention_and_no_input_embedding() -> None:
    assert flops_per_token(LLADA_8B, 4096) == 6 * 7_497_584_640 + 12 * 32 * 4096 * 4096


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
