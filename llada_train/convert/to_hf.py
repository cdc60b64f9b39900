"""Export to Hugging Face format: a folder that transformers loads with `trust_remote_code=True`."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from llada_train.config.errors import UserError
from llada_train.config.schema import Config
from llada_train.convert.names import GlobalWeights, hf_shapes
from llada_train.convert.plain import hf_tensors, llada_config
from llada_train.data.tokenizer import CONFIG_FILE, SENTENCEPIECE_FILE, TOKENIZER_FILE, Tokenizer
from llada_train.model.hf import configuration_llada, modeling_llada

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_TOKENIZER_FILES = (
    TOKENIZER_FILE,
    SENTENCEPIECE_FILE,
    CONFIG_FILE,
    "special_tokens_map.json",
    "chat_template.jinja",
)


def to_hf(
    weights: GlobalWeights,
    config: Config,
    out: Path,
    dtype: str = "bf16",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    max_shard_bytes: int = 2 * 10**9,
) -> None:
    """Write weights, config, tokenizer and modelling code to the new folder `out`; it appears only when complete.

    `dtype` of the weights: bf16, as LLaDA's release, or fp32.

    Memory holds one shard and one of our tensors at a time. `on_progress` gets (tensors written, tensors in all).

    Raises:
        UserError: `out` exists already or cannot be written, the run's tokenizer cannot be read, or another dtype.
    """
    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r}: give one of {', '.join(_DTYPES)}")
    if out.exists():
        raise UserError(f"{out}: exists already; give a new folder, or remove it first")
    tokenizer = Tokenizer.load(config.data.tokenizer)
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        _write_weights(weights, config, partial, _DTYPES[dtype], on_progress, max_shard_bytes)
        _write_description(config, tokenizer, partial, _DTYPES[dtype])
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_weights(
    weights: GlobalWeights,
    config: Config,
    folder: Path,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None],
    max_shard_bytes: int,
) -> None:
    shapes = hf_shapes(config.model)
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()},
        max_shard_size=max_shard_bytes,
    )
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in plan.filename_to_tensors}
    for done, (name, tensor) in enumerate(hf_tensors(weights, config.model, dtype), start=1):
        file = plan.tensor_to_filename[name]
        waiting[file][name] = tensor
        if len(waiting[file]) == len(plan.filename_to_tensors[file]):
            save_file(waiting.pop(file), folder / file, metadata={"format": "pt"})
        on_progress(done, len(shapes))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_description(config: Config, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype) -> None:
    hf_config = llada_config(config.model, mask_id=tokenizer.mask_id, eos_id=tokenizer.eos_id)
    hf_config.dtype = dtype
    hf_config.save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id).save_pretrained(folder)
    for module in (configuration_llada, modeling_llada):
        source = Path(inspect.getfile(module))
        shutil.copyfile(source, folder / source.name)
    if config.data.tokenizer.is_file():  # a sentencepiece model
        shutil.copyfile(config.data.tokenizer, folder / SENTENCEPIECE_FILE)
        (folder / CONFIG_FILE).write_text("{}\n", encoding="utf-8")
    for name in _TOKENIZER_FILES:
        if (source := config.data.tokenizer / name).exists():
            shutil.copyfile(source, folder / name)
