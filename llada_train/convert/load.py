"""A model and its tokenizer from wherever a user has them: whole, or split over processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from llada_train.checkpoint.reader import Checkpoint, open_verified
from llada_train.checkpoint.store import is_hf_folder, resolve
from llada_train.config.errors import UserError
from llada_train.config.schema import ModelConfig, ParallelConfig
from llada_train.convert.from_hf import HfWeights
from llada_train.convert.plain import plain_model
from llada_train.data.tokenizer import Tokenizer
from llada_train.model.hf.modeling_llada import LLaDAModelLM
from llada_train.parallel.launch import world_size
from llada_train.parallel.topology import quiet_engines
from llada_train.sampling.denoiser import Denoiser
from llada_train.sampling.plain import PlainDenoiser

if TYPE_CHECKING:
    from llada_train.sampling.split import SplitDenoiser

T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """A model to ask, by its owner: the only process, or rank 0 within `lead`."""

    max_sequence_length: int
    tokenizer: Tokenizer
    sampler: Denoiser
    """Of the ids that the tokenizer knows."""
    scorer: Denoiser
    """Of all rows of the embedding, as the released code takes likelihoods."""
    copies: int = 1
    """Of the model, among which rows are shared."""
    split: "SplitDenoiser | None" = None
    """None: it lies on one process, whole."""

    def lead(self, work: Callable[[], T]) -> T | None:
        """What `work` gives; None on ranks other than 0, which answer meanwhile. Collective.

        Raises:
            UserError: `work` raised it; on all ranks.
        """
        return work() if self.split is None else self.split.lead(work)


def describe(path: Path) -> tuple[ModelConfig, Tokenizer]:
    """The sizes and the tokenizer of what is there, without its weights.

    Raises:
        UserError: it is no model, files are missing or cut, or the tokenizer has no mask token.
    """
    if is_hf_folder(path):
        tokenizer = Tokenizer.load(path)
        with HfWeights(path, tokenizer=tokenizer) as weights:
            return weights.model, tokenizer
    with Checkpoint(resolve(path)) as checkpoint:
        return checkpoint.model, _tokenizer(checkpoint)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    path = checkpoint.tokenizer
    if not path.is_absolute() and not path.exists():
        asked = f"data.tokenizer of {checkpoint.folder}"
        raise UserError(f"{asked}: {path}: no such folder from here; run this where the run was started")
    return Tokenizer.load(path)


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
        return plain_model(checkpoint, checkpoint.model, dtype), _tokenizer(checkpoint)


@contextmanager
def loaded(path: Path, parallel: ParallelConfig | None = None, device: str | None = None) -> Iterator[Loaded]:
    """A model from wherever `load_plain` takes it, in bf16 on GPUs if there are any, else in fp32 on CPUs.

    Of several processes (WORLD_SIZE) each holds its part of the layout `parallel`, whatever layout the checkpoint was
    saved in, and reads no more of it. Collective.

    Raises:
        UserError: there is no model, it is damaged, or the environment is at fault; on all ranks.
    """
    if world_size() == 1:
        best, dtype = best_device()
        plain, tokenizer = load_plain(path, dtype)
        plain = plain.to(best if device is None else torch.device(device))
        sampler, whole = PlainDenoiser(plain, tokenizer.vocab_size), PlainDenoiser(plain, plain.config.embedding_size)
        yield Loaded(plain.config.max_sequence_length, tokenizer, sampler, whole)
        return
    quiet_engines()
    from llada_train.convert.split import split_denoiser  # and with it megatron-core and DeepSpeed

    model, tokenizer = describe(path)
    with split_denoiser(path, model, tokenizer, parallel or ParallelConfig()) as denoiser:
        scorer = denoiser.over(model.padded_vocab_size)
        yield Loaded(model.max_sequence_length, tokenizer, denoiser, scorer, denoiser.copies, denoiser)


def best_device() -> tuple[torch.device, torch.dtype]:
    """A GPU and bf16, or the CPU and fp32."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32
