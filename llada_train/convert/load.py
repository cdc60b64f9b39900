"""A plain torch model and its tokenizer from wherever a user has one."""

from pathlib import Path

from llada_train.checkpoint.reader import open_verified
from llada_train.checkpoint.store import is_hf_folder
from llada_train.convert.from_hf import HfWeights
from llada_train.convert.plain import plain_model
from llada_train.data.tokenizer import Tokenizer
from llada_train.model.hf.modeling_llada import LLaDAModelLM


def load_plain(path: Path) -> tuple[LLaDAModelLM, Tokenizer]:
    """From a Hugging Face folder, a run folder (its newest checkpoint) or a checkpoint. fp32.

    Raises:
        UserError: it is none of them, or damaged.
    """
    if is_hf_folder(path):
        tokenizer = Tokenizer.load(path)
        with HfWeights(path, tokenizer=tokenizer) as weights:
            return plain_model(weights, weights.model), tokenizer
    with open_verified(path) as checkpoint:
        return plain_model(checkpoint, checkpoint.model), Tokenizer.load(checkpoint.tokenizer)
