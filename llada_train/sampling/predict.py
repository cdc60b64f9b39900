"""From logits to a token for each position, and how sure the model is of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llada_train.sampling.denoiser import Read
from llada_train.sampling.noise import uniforms
from llada_train.sampling.options import SamplingOptions

_CACHED = 1 << 17  # numbers of noise at once on a CPU, which are so in its cache
_MARGIN = 1e-3  # relative, more than fp32 errs


@dataclass(frozen=True)
class Prediction(Read):
    """The token, and its probability under the un-noised logits."""

    options: SamplingOptions
    mask_id: int
    seeds: Tensor | None = None
    """[N] int64, of each position's noise; needed above temperature 0."""

    width = 2

    def __call__(self, logits: Tensor, index: Tensor) -> Tensor:
        options = self.options
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        forbidden = [*options.forbidden_ids, *([self.mask_id] if options.rules == "paper" else [])]
        if forbidden := [id for id in forbidden if id < scores.shape[-1]]:
            scores.index_fill_(-1, torch.tensor(forbidden, device=scores.device), -torch.inf)
        if options.temperature:
            assert self.seeds is not None
            predicted = _draw(scores, options.temperature, self.seeds[index].to(scores.device))
        else:
            predicted = scores.argmax(-1)
        last = torch.tensor(options.last_ids, device=scores.device, dtype=torch.int64)
        if options.rules == "released" and len(last):
            # generate.py names its noised logits and its logits at once; at temperature 0 they are one tensor.
            scores.index_fill_(-1, last[-1:] if options.temperature else last, -torch.inf)
        confidence = (scores.gather(-1, predicted[:, None])[:, 0] - scores.logsumexp(-1)).exp()
        if options.rules == "paper":
            confidence = confidence.where(~torch.isin(predicted, last), 0.0)
        return torch.stack([predicted.double(), confidence.double()], 1)


def _draw(scores: Tensor, temperature: float, seeds: Tensor) -> Tensor:
    """A token from softmax(scores / temperature) for each position, by the Gumbel-max trick in fp64. [n, V] → [n].

    The argmax of exp(score)/(−ln U)^T is that of exp(score/T)/(−ln U). Lower precision distorts the draw
    (arXiv 2409.02908), but since −ln U ≥ 1 − U, most tokens are seen to lose without a logarithm, in fp32.
    """
    size = len(scores) if scores.is_cuda else max(1, _CACHED // scores.shape[-1])
    pieces = zip(scores.split(max(1, size)), seeds.split(max(1, size)), strict=True)
    return torch.cat([_draw_at_once(piece, temperature, some) for piece, some in pieces])


def _draw_at_once(scores: Tensor, temperature: float, seeds: Tensor) -> Tensor:
    uniform, highest = uniforms(seeds, scores.shape[-1]), scores.amax(-1, keepdim=True)

    def weight(row: Tensor, token: Tensor) -> Tensor:
        shifted = scores[row, token].double() - highest[row, 0]
        return shifted.div_(temperature).exp_().div_(uniform[row, token].log_().neg_())

    at_most = (scores - highest).div_(temperature).exp_().div_((1 - uniform).to(scores.dtype))
    every = torch.arange(len(scores), device=scores.device)
    least = weight(every, at_most.argmax(-1))
    row, token = (at_most >= least.mul(1 - _MARGIN).to(scores.dtype)[:, None]).nonzero(as_tuple=True)
    weights = weight(row, token)
    best = least.scatter_reduce(0, row, weights, "amax")
    winner = weights == best[row]
    # Zeros: a row of which nothing can be said, since its logits are NaN, has no winner.
    return row.new_zeros(len(scores)).scatter_(0, row[winner], token[winner])
