"""A step that is refused, or whose gradient is not finite, is applied nowhere and leaves no trace."""

import math
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
from refused_steps import train

BF16 = "training.precision=bf16"


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="fp32"),
        pytest.param([BF16], id="bf16"),
        pytest.param([BF16, "parallel.zero_stage=2"], id="bf16-zero2"),
        pytest.param(["parallel.zero_stage=3"], id="fp32-zero3"),
        pytest.param([BF16, "parallel={zero_stage: 2, offload_optimizer: true}"], id="bf16-zero2-offload"),
        pytest.param([BF16, "parallel={zero_stage: 3, offload_optimizer: true}"], id="bf16-zero3-offload"),
        pytest.param([BF16, "parallel.tensor_parallel=2", "parallel.sequence_parallel=true"], id="bf16-tp2"),
        pytest.param([BF16, "parallel.pipeline_parallel=2"], id="bf16-pp2"),
    ],
)
def test_refused_steps_leave_no_trace(make_config: Callable[..., Path], overrides: list[str]) -> None:
    config = make_config()
    without = processes.run(2, train, config, overrides, [0, 3], None, None)
    found = processes.run(2, train, config, overrides, [0, 1, 2, 3], 1, 2)
    assert [rank.state for rank in found] == [rank.state for rank in without]
    for rank, reference in zip(found, without, strict=True):
        assert rank.applied == [True, False, False, True]
        assert [rank.norms[0], rank.norms[3]] == reference.norms
        assert math.isfinite(rank.norms[1])
        assert rank.norms[2] == math.inf
