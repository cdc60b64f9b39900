"""On a GPU only: the most memory of a step of layers as the 8B has them, against the plan's arithmetic."""

import os
from unittest import mock

import pytest
import torch

from llada_train.config.schema import Config
from llada_train.data.batch import Batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

B, S = 2, 4096


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_takes_the_memory_that_is_planned(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tenth, every token masked; by torch's attention and kernels, of which the plan speaks."""
    from llada_train.model import attention
    from llada_train.model.weights import InitialWeights
    from llada_train.parallel import topology
    from llada_train.parallel.engine import Engine
    from llada_train.plan.layout import Layout
    from llada_train.plan.memory import RESERVE, memory

    config = Config.model_validate(
        {
            "run_dir": "unused",
            "model": {
                "num_layers": 6,
                "hidden_size": 4096,
                "num_heads": 32,
                "num_kv_heads": 32,
                "ffn_hidden_size": 12288,
                "vocab_size": 32768,
            },
            "data": {"tokenizer": "unused", "sequence_length": S, "corpora": [{"path": "unused"}]},
            "optimizer": {"learning_rate": [{"until_tokens": 1, "end": 1}]},
            "training": {"global_batch_size": 2 * B, "micro_batch_size": B, "recompute": recompute, "kernels": "torch"},
        }
    )
    (planned,) = memory(Layout(config, 1, S, 2 * B))
    if torch.cuda.mem_get_info()[0] < 1.2 * planned.total:
        pytest.skip(f"needs {1.2 * planned.total / 1e9:.0f} GB of free GPU memory")
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    everything = Batch(
        input_ids=torch.zeros(B, S, dtype=torch.long),
        position_ids=torch.arange(S).repeat(B, 1),
        segments=None,
        masked_positions=torch.arange(B * S),
        targets=torch.zeros(B * S, dtype=torch.long),
        loss_weight=torch.full((B * S,), 1 / (B * S)),
        masked_samples=torch.arange(B * S) // S,
        sample_index=torch.arange(B),
        t=torch.ones(B),
    )
    with mock.patch.dict(os.environ):
        topology.quiet_engines()
        here = topology.initialize(config.parallel)
        try:
            engine = Engine(config, here)
            initial = InitialWeights(config.model, config.seed)
            engine.set_weights(lambda shard: shard.of(initial.read(shard.name)))
            engine.train_step([everything] * 2, 1e-4)
            torch.cuda.reset_peak_memory_stats()
            engine.train_step([everything] * 2, 1e-4)
            assert torch.cuda.max_memory_allocated() == pytest.approx(planned.total - RESERVE, rel=0.1)
        finally:
            topology.shutdown()
