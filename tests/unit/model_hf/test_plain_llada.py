import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hf_folders import RELEASED
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from llada_train.model.hf.configuration_llada import LLaDAConfig
from llada_train.model.hf.modeling_llada import LLaDAModelLM, mask_tokens


def small(**changes: object) -> LLaDAConfig:
    sizes = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 24, "vocab_size": 32}
    ids = {"mask_token_id": 31, "eos_token_id": 0, "pad_token_id": 0}
    return LLaDAConfig(**sizes | ids | changes)


@pytest.fixture
def model() -> LLaDAModelLM:
    torch.manual_seed(0)
    return LLaDAModelLM(small()).eval()


def test_config_has_the_released_keys_and_values(tmp_path: Path) -> None:
    LLaDAConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written.get(key, "absent") for key in RELEASED} == RELEASED
    (tmp_path / "config.json").write_text(json.dumps(RELEASED | {"transformers_version": "4.46.3"}))
    read = LLaDAConfig.from_pretrained(tmp_path)
    assert (read.hidden_size, read.num_hidden_layers, read.tie_word_embeddings) == (4096, 32, False)


def test_parameter_count_of_the_released_8b() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in LLaDAModelLM(LLaDAConfig()).parameters()) == 8_015_581_184


@pytest.mark.parametrize("key", ["weight_tying", "alibi", "use_cache", "include_bias"])
def test_what_llada_does_not_use_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        small(**{key: True})


def test_hidden_states_are_what_blocks_and_head_read(model: LLaDAModelLM) -> None:
    out = model(torch.tensor([[3, 1, 31]]), output_hidden_states=True)
    assert len(out.hidden_states) == 3 and torch.equal(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(torch.tensor([[3, 1, 31]])))


def test_padding_on_the_left_is_invisible(model: LLaDAModelLM) -> None:
    ids = torch.tensor([[3, 1, 31, 7, 0]])
    padded = torch.cat((torch.full((1, 3), 9), ids), dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    expected, got = model(ids).logits, model(padded, attention_mask=mask).logits[:, 3:]
    assert (got - expected).abs().max() < 1e-6  # RoPE is relative: a shift of all positions changes nothing
    assert (model(padded).logits[:, 3:] - expected).abs().max() > 1e-3


def test_processes_that_are_seeded_alike_draw_other_noise() -> None:
    """As Trainer seeds them; if all drew one t, their mean would be as noisy as one row's."""
    labels, ranks = torch.zeros(2, 4096, dtype=torch.long), 16
    shares, masks = [], []
    for rank in range(ranks):
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        torch.manual_seed(0)
        noised, weights = mask_tokens(labels, 31)
        dist.destroy_process_group()
        assert torch.equal(noised == 31, weights > 0)
        shares.append((noised == 31).float().mean(-1))
        masks.append(noised)
        assert (1 / weights.amax(-1) - shares[-1]).abs().max() < 0.04  # p of the paper, within 5σ
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == ranks
    for row in torch.stack(shares, dim=1):  # of each row, over the ranks: spread evenly over [0, 1)
        assert abs(row.mean() - 0.5) < 0.05 and row.sort().values.diff().max() < 0.15


def test_every_position_sees_every_other(model: LLaDAModelLM) -> None:
    ids = torch.tensor([[3, 1, 31, 7, 0]])
    for changed in range(5):
        other = ids.clone()
        other[0, changed] = 20
        assert ((model(other).logits - model(ids).logits).abs().amax(-1) > 1e-6).all()


def test_embeddings_in_place_of_ids(model: LLaDAModelLM) -> None:
    ids = torch.tensor([[3, 1, 31]])
    (got,) = model(inputs_embeds=model.get_input_embeddings()(ids), return_dict=False)
    assert torch.equal(got, model(ids).logits)
    with pytest.raises(ValueError, match="either"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


def test_no_cache_and_no_longer_rows(model: LLaDAModelLM) -> None:
    ids = torch.tensor([[3, 1, 31]])
    with pytest.raises(ValueError, match="cache"):
        model(ids, use_cache=True)
    with pytest.raises(NotImplementedError, match="left to right"):
        model.generate(ids)
    with pytest.raises(ValueError, match="labels need"):
        LLaDAModelLM(small(mask_token_id=None))(ids, labels=ids)
    with pytest.raises(ValueError, match="max_sequence_length 2"):
        LLaDAModelLM(small(max_sequence_length=2))(ids)


def test_initialisation_is_mitchell() -> None:
    torch.manual_seed(0)
    transformer = LLaDAModelLM(small(d_model=64, mlp_hidden_size=96, vocab_size=256)).model.transformer
    block = transformer.blocks[1]
    expected = {
        transformer.wte: 1 / math.sqrt(64),
        block.v_proj: 1 / math.sqrt(64),
        block.attn_out: 1 / math.sqrt(2 * 64 * 2),
        block.ff_out: 1 / math.sqrt(2 * 96 * 2),
        transformer.ff_out: 1 / math.sqrt(64),
    }
    for module, sigma in expected.items():
        assert module.weight.std().item() == pytest.approx(0.9866 * sigma, rel=0.04)  # of a normal cut at ±3σ
        assert module.weight.abs().max() <= 3 * sigma


def test_saved_folder_loads_in_a_fresh_process(model: LLaDAModelLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    ids = torch.tensor([[3, 1, 31, 7, 0]])
    script = f"""
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM
logits = {{}}
for auto in (AutoModel, AutoModelForCausalLM):
    model = auto.from_pretrained("model", trust_remote_code=True).eval()
    logits[auto.__name__] = model(torch.tensor({ids.tolist()})).logits.detach()
assert not any(name.startswith("llada_train") for name in sys.modules)
save_file(logits, "logits.safetensors")
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, env=environment, check=True)
    for logits in load_file(tmp_path / "logits.safetensors").values():
        assert torch.equal(logits, model(ids).logits)
