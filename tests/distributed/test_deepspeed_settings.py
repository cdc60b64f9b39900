"""DeepSpeed's own settings do what they say: which collectives carry the gradients, and in what pieces."""

from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import torch
from deepspeed_traffic import of_one_step

from llada_train.config.load import load_config
from llada_train.model.sizes import parameter_count

EMBEDDING = 384 * 64  # the largest parameter; a bucket of 20,000 holds less


@pytest.mark.parametrize(
    ("parallel", "collective", "overlaps", "offloads"),
    [
        ("{zero_stage: 1}", "all_reduce", False, False),
        ("{zero_stage: 2, reduce_bucket_size: 20000}", "all_reduce", True, False),
        ("{zero_stage: 2, overlap_comm: false}", "all_reduce", False, False),
        ("{zero_stage: 2, overlap_comm: false, reduce_scatter: true}", "reduce", False, False),
        ("{zero_stage: 3, reduce_bucket_size: 20000, offload_optimizer: true}", "reduce_scatter_tensor", True, True),
    ],
)
def test_gradients_travel_as_the_settings_say(
    make_config: Callable[..., Path], parallel: str, collective: str, overlaps: bool, offloads: bool
) -> None:
    """Of bf16 weights, all of them once, as fp32, in pieces of a bucket or one parameter."""
    config = make_config(training__precision="bf16", training__micro_batch_size=8)
    overrides = [f"parallel={parallel}"]
    parameters = parameter_count(load_config(config).model)
    for found in processes.run(2, of_one_step, config, overrides):
        assert found.reduced.keys() == {(collective, torch.float32)}
        assert parameters <= found.reduced.total() <= 1.01 * parameters  # and what rounds up to whole parts
        if "reduce_bucket_size" in parallel:
            assert found.largest <= EMBEDDING < parameters
        assert (found.overlaps, found.offloads) == (overlaps, offloads)


def test_weights_are_gathered_ahead_several_at_a_time(make_config: Callable[..., Path]) -> None:
    config = make_config(training__precision="bf16", training__micro_batch_size=8, training__recompute="selective")
    ahead, one_by_one = (
        processes.run(2, of_one_step, config, [f"parallel={{zero_stage: 3, prefetch_bucket_size: {size}}}"])[0].gathers
        for size in (50_000_000, 0)
    )
    assert 0 < ahead < one_by_one / 2
