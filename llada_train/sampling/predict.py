"""From logits to a token for each position, and how sure the model is of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llada_train.sampling.options import SamplingOptions


def predict(
    logits: Tensor, sizes: Sequence[int], seeds: Sequence[int], options: SamplingOptions, mask_id: int
) -> tuple[Tensor, Tensor]:
    """Tokens and confidences of N positions.

    Args:
        logits: [N, V], the first sizes[0] of them the first row's, and so on; overwritten.
        seeds: of each row's noise; needed above temperature 0.

    Returns:
        int64 [N], and fp32 [N] or finer, probabilities under the un-noised logits; both on the CPU.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    forbidden = [*options.forbidden_ids, *([mask_id] if options.rules == "paper" else [])]
    if forbidden := [id for id in forbidden if id < scores.shape[-1]]:
        scores.index_fill_(-1, torch.tensor(forbidden, device=scores.device), -torch.inf)
    if options.temperature:
        parts = zip(scores.split(list(sizes)), seeds, strict=True)
        predicted = torch.cat([_draw(part, options.temperature, seed) for part, seed in parts])
    else:
        predicted = scores.argmax(-1)
    last = torch.tensor(options.last_ids, device=scores.device, dtype=torch.int64)
    if options.rules == "released" and len(last):
        # generate.py names its noised logits and its logits in one assignment; at temperature 0 they are one tensor.
        scores.index_fill_(-1, last[-1:] if options.temperature else last, -torch.inf)
    confidence = (scores.gather(-1, predicted[:, None])[:, 0] - scores.logsumexp(-1)).exp()
    if options.rules == "paper":
        confidence = confidence.where(~torch.isin(predicted, last), 0.0)
    return predicted.cpu(), confidence.cpu()


def _draw(scores: Tensor, temperature: float, seed: int) -> Tensor:
    """A token from softmax(scores / temperature) for each position, by the Gumbel-max trick in fp64. [n, V] → [n].

    The argmax of exp(score)/(−ln U)^T is that of exp(score/T)/(−ln U): a logarithm and an exponential for each token.
    Lower precision distorts the draw (arXiv 2409.02908).
    """
    generator = torch.Generator(scores.device).manual_seed(seed)
    uniform = torch.rand(scores.shape, generator=generator, dtype=torch.float64, device=scores.device)
    weights = (scores.double() - scores.amax(-1, keepdim=True)).div_(temperature).exp_()
    return weights.div_(uniform.log_().neg_()).argmax(-1)
