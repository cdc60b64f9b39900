"""LLaDA's released sampling algorithm as a plain loop, over all positions, noise for all of them in fp64."""

from collections.abc import Callable

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]


def torch_noise(logits: Tensor, step: int, open_: Tensor) -> Tensor:
    """Uniform numbers for all positions, as the released code draws them."""
    return torch.rand_like(logits, dtype=torch.float64)


def plain_loop(
    model: Logits,
    prompt: Tensor,
    steps: int,
    gen_length: int,
    block_length: int,
    mask_id: int,
    temperature: float = 0.0,
    cfg: float = 0.0,
    remasking: str = "low_confidence",
    eos: int | None = None,
    eot: int | None = None,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    noise: Callable[[Tensor, int, Tensor], Tensor] = torch_noise,
) -> Tensor:
    """[B, P] → [B, P + gen_length]; `noise` gets the logits, the step and which positions may be committed."""
    P, done = prompt.shape[1], 0
    x = torch.full((len(prompt), P + gen_length), mask_id)
    x[:, :P] = prompt
    given = x != mask_id
    for block in range(gen_length // block_length):
        end = P + (block + 1) * block_length
        in_block = (x[:, end - block_length : end] == mask_id).sum(1)
        of_block = steps // (gen_length // block_length)
        for step in range(of_block):
            open_ = x == mask_id
            if cfg:
                conditional, unconditional = model(torch.cat([x, x.masked_fill(given, mask_id)])).chunk(2)
                logits = unconditional + (cfg + 1) * (conditional - unconditional)
            else:
                logits = model(x)
            if logits_eos_inf:
                logits[:, :, eos] = -torch.inf
            noised = logits
            if temperature:
                candidates = open_.clone()
                candidates[:, end:] = False
                gumbel = (-noise(logits, done, candidates).log()) ** temperature
                noised = logits.to(torch.float64).exp() / gumbel
            x0 = noised.argmax(-1)
            if confidence_eos_eot_inf:
                noised[:, :, eos] = logits[:, :, eot] = -torch.inf
            if remasking == "random":
                confidence = torch.rand(x0.shape)
            else:
                confidence = logits.softmax(-1).gather(-1, x0[..., None])[..., 0]
            confidence[:, end:] = -torch.inf
            confidence = torch.where(open_, confidence, -torch.inf)
            for row in range(len(x)):
                count = int(in_block[row]) // of_block + (step < int(in_block[row]) % of_block)
                best = confidence[row].topk(count).indices
                x[row, best] = torch.where(open_[row], x0[row], x[row])[best]
            done += 1
    return x
