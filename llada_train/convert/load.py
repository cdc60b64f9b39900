"""A plain torch model and its tokenizer from wherever a user has one."""

from pathlib import Path

from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from llada_train.checkpoint.reader import open_verified
from llada_train.checkpoint.store import is_hf_folder
from llada_train.config.errors import UserError
from llada_train.convert.plain import plain_model
from llada_train.data.tokenizer import Tokenizer
from llada_train.model.hf.modeling_llada import LLaDAModelLM


def load_plain(path: Path) -> tuple[LLaDAModelLM, Tokenizer]:
    """From a Hugging Face folder, a run folder (its newest checkpoint) or a checkpoint.

    Raises:
        UserError: it is none of them, or damaged.
    """
    if is_hf_folder(path):
        disable_progress_bar()
        try:
            return LLaDAModelLM.from_pretrained(path, use_safetensors=True).eval(), Tokenizer.load(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be loaded as a LLaDA: {error}") from None
    with open_verified(path) as checkpoint:
        model = plain_model(checkpoint, checkpoint.config.model)
        return model, Tokenizer.load(checkpoint.config.data.tokenizer)
