"""Checkpoints to export and Hugging Face folders to import, small; the released ones are written without ours."""

import json
from pathlib import Path
from typing import Any

import torch
from checkpoint_files import global_tensors, write
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from data_tools.train_tokenizer import train_tokenizer
from llada_train.checkpoint.reader import open_verified
from llada_train.config.schema import Config, ModelConfig
from llada_train.convert.to_hf import to_hf

SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "vocab_size": 300, "num_heads": 4}
MODELS = [ModelConfig(**SIZES, num_kv_heads=kv_heads) for kv_heads in (4, 2)]

RELEASED: dict[str, Any] = {  # GSAI-ML/LLaDA-8B-Instruct, config.json
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}

# Its tokenizer_config.json names neither the mask nor the header tokens; they are in tokenizer.json alone.
SPECIAL = {
    "<|startoftext|>": 126080,
    "<|endoftext|>": 126081,
    "[CLS]": 126082,
    "[gMASK]": 126083,
    **{f"<|reserved_token_{i}|>": 126084 + i for i in range(252)},
    "<|mdm_mask|>": 126336,
    **{f"<|reserved_token_{i}|>": 126337 + i - 252 for i in range(252, 255)},
    "<role>": 126340,
    "</role>": 126341,
    "<|arithmetic_start|>": 126342,
    "<|arithmetic_end|>": 126343,
    "<|number_start|>": 126344,
    "<|number_end|>": 126345,
    "<|start_header_id|>": 126346,
    "<|end_header_id|>": 126347,
    "<|eot_id|>": 126348,
}
CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}{{ content }}{% endfor %}"
)


def checkpoint(folder: Path, model: ModelConfig, tokenizer: Path, tensor_parallel: int = 1) -> dict[str, Tensor]:
    """A run's checkpoint of random weights in `folder`; returns its global tensors by name."""
    config = Config.model_validate(
        {
            "run_dir": "run",
            "model": model,
            "data": {"tokenizer": tokenizer, "sequence_length": 16, "corpora": [{"path": "texts/corpus"}]},
            "optimizer": {"learning_rate": [{"until_tokens": 1000, "end": 4e-4}]},
            "training": {"global_batch_size": 4, "micro_batch_size": 1},
        }
    )
    # Matrices small enough that losses are those of a model, not of noise.
    tensors = {name: t if t.ndim == 1 else t / t.shape[-1] ** 0.5 for name, t in global_tensors(model).items()}
    write(folder, tensor_parallel, lambda n: [n // 3, n // 2], config=config, tensors=tensors)
    return {key.removeprefix("master/"): t for key, t in tensors.items() if key.startswith("master/")}


def released_tensors(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Random tensors with the released names, in the released order."""
    d, rows, ffn = config["d_model"], config["embedding_size"], config["mlp_hidden_size"]
    kv = d // config["n_heads"] * config["n_kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(config["n_layers"]):
        block = {
            "attn_norm": (d,),
            "attn_out": (d, d),
            "ff_norm": (d,),
            "ff_out": (d, ffn),
            "ff_proj": (ffn, d),
            "k_proj": (kv, d),
            "q_proj": (d, d),
            "up_proj": (ffn, d),
            "v_proj": (kv, d),
        }
        shapes |= {f"model.transformer.blocks.{i}.{name}.weight": shape for name, shape in block.items()}
    outside = {"ff_out": (rows, d), "ln_f": (d,), "wte": (rows, d)}
    shapes |= {f"model.transformer.{name}.weight": shape for name, shape in outside.items()}
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype) for name, shape in shapes.items()
    }


def released_folder(folder: Path, **sizes: Any) -> dict[str, Tensor]:
    """LLaDA-8B's folder with other sizes: config keys, ids, rows, six shards with an index; returns its tensors."""
    folder.mkdir()
    small = {"d_model": 16, "n_heads": 4, "n_kv_heads": 4, "n_layers": 4, "mlp_hidden_size": 24}
    config = RELEASED | small | sizes | {"transformers_version": "4.46.3"}
    tensors = released_tensors(config)
    names = list(tensors)
    weight_map = {name: f"model-{1 + 6 * i // len(names):05d}-of-00006.safetensors" for i, name in enumerate(names)}
    for file in dict.fromkeys(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"_from_model_config": True, "bos_token_id": 126080, "eos_token_id": 126081}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    released_tokenizer(folder)
    return tensors


def released_tokenizer(folder: Path) -> None:
    """Bytes as tokens, the released ids of special tokens, and fillers between: 126,349 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    vocab |= {f"filler{i}": i for i in range(len(alphabet), 126080)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    assert {token: backend.token_to_id(token) for token in SPECIAL} == SPECIAL
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "cls_token": "[CLS]",
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def small_tokenizer(folder: Path) -> None:
    train_tokenizer(iter(["def f(x): return x", "the quick brown fox"]), 300, folder)


def export(source: Path, out: Path, dtype: str = "bf16", **options: Any) -> dict[str, Tensor]:
    """The tensors that to_hf writes."""
    with open_verified(source) as weights:
        to_hf(weights, out, dtype, **options)
    return {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}


def exported_folder(folder: Path, tokenizer: Path) -> Path:
    """A small export in two shards, and the checkpoint `run` beside it."""
    checkpoint(folder / "run", MODELS[1], tokenizer)
    export(folder / "run", folder / "small", max_shard_bytes=50_000)
    return folder / "small"
