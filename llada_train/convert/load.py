"""A plain torch model and its tokenizer from wherever a user has one."""

from pathlib import Path

import torch

from llada_train.checkpoint.reader import Checkpoint, open_verified
from llada_train.checkpoint.store import is_hf_folder, resolve
from llada_train.config.schema import ModelConfig
from llada_train.convert.from_hf import HfWeights
from llada_train.convert.plain import plain_model
from llada_train.data.tokenizer import Tokenizer
from llada_train.model.hf.modeling_llada import LLaDAModelLM


def describe(path: Path) -> tuple[ModelConfig, Tokenizer]:
    """The sizes and the tokenizer of what `load_plain` loads, without its weights.

    Raises:
        UserError: it is no model, files are missing or cut, or the tokenizer has no mask token.
    """
    if is_hf_folder(path):
        tokenizer = Tokenizer.load(path)
        with HfWeights(path, tokenizer=tokenizer) as weights:
            return weights.model, tokenizer
    with Checkpoint(resolve(path)) as checkpoint:
        return checkpoint.model, Tokenizer.load(checkpoint.tokenizer)


def load_plain(path: Path, dtype: torch.dtype = torch.float32) -> tuple[LLaDAModelLM, Tokenizer]:
    """From a Hugging Face folder, a run folder (its newest checkpoint) or a checkpoint; on the CPU.

    Raises:
        UserError: it is none of them, or damaged.
    """
    if is_hf_folder(path):
        tokenizer = Tokenizer.load(path)
        with HfWeights(path, tokenizer=tokenizer) as weights:
            return plain_model(weights, weights.model, dtype), tokenizer
    with open_verified(path) as checkpoint:
        return plain_model(checkpoint, checkpoint.model, dtype), Tokenizer.load(checkpoint.tokenizer)


def best_device() -> tuple[torch.device, torch.dtype]:
    """A GPU and bf16, or the CPU and fp32."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32
