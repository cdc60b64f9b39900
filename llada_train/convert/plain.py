"""Our weights as the plain torch model."""

import torch
from torch import Tensor

from llada_train.config.schema import ModelConfig
from llada_train.convert.llada import LLADA
from llada_train.convert.names import GlobalWeights, Piece, SpecialTokens
from llada_train.model.hf.modeling_llada import LLaDAModelLM


def plain_model(weights: GlobalWeights, model: ModelConfig, dtype: torch.dtype = torch.float32) -> LLaDAModelLM:
    """The plain torch model with these weights, on the CPU, in evaluation mode."""
    with torch.device("meta"):
        plain = LLaDAModelLM(LLADA.hf_config(model, SpecialTokens()))
    state: dict[str, Tensor] = {}
    read = {"": torch.empty(0)}  # the one of ours that was read last: theirs come in the same order
    for theirs, piece in LLADA.pieces(model).items():
        if piece.name not in read:
            read = {piece.name: weights.read(piece.name)}
        state[theirs] = part_of(read[piece.name], piece).to(dtype, copy=True)
    plain.load_state_dict(state, assign=True)
    return plain.eval()


def part_of(ours: Tensor, piece: Piece) -> Tensor:
    """Their tensor out of our global one."""
    flat = ours.flatten()
    return torch.cat([flat[start : start + length] for start, length in piece.runs]).view(piece.shape)
