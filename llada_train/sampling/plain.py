"""The plain torch model as a denoiser."""

import torch
from torch import Tensor
from torch.nn import functional as F

from llada_train.model.hf.modeling_llada import LLaDAModelLM, LLaDATransformer, rotary_angles
from llada_train.sampling.denoiser import Query, Read, read_logits


class PlainDenoiser:
    """The plain torch model. The head is computed where it is wanted only."""

    def __init__(self, model: LLaDAModelLM, vocab_size: int) -> None:
        """`vocab_size`: the ids that the tokenizer knows; rows that only pad the vocabulary never come out."""
        self.transformer: LLaDATransformer = model.model.transformer
        self._vocab_size = vocab_size

    @torch.no_grad()
    def __call__(self, query: Query, read: Read) -> Tensor:
        transformer = self.transformer
        query = query.doubled().to(transformer.wte.weight.device)
        h = transformer.wte(query.ids)
        angles = rotary_angles(transformer.config, h.shape[1], h.device)
        visible = None if query.visible is None else query.visible[:, None, None, :]
        for block in transformer.blocks:
            h = block(h, angles, visible)
        return self.read(h, query, read)

    def read(self, h: Tensor, query: Query, read: Read) -> Tensor:
        """What `read` makes of the hidden states [B, L, d_model] after the last block."""
        return read_logits(h[query.wanted], self._head, self._vocab_size, read, query.cfg)

    def _head(self, h: Tensor) -> Tensor:
        return F.linear(self.transformer.ln_f(h), self.transformer.ff_out.weight[: self._vocab_size])
