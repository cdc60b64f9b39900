"""Floating-point operations of training: the model's, by which MFU counts, and those that the hardware really does."""

from dataclasses import dataclass

from llada_train.config.schema import Config, ModelConfig
from llada_train.model.sizes import CHUNK, non_embedding_parameter_count, parameter_count


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Forward and backward model FLOPs of one token: 6·N + 12·L·S·d (PaLM, arXiv 2204.02311, App. B).

    N leaves out the input embedding (a lookup); attention is not causal; the head counts in full although only masked
    positions pass through it, so that figures compare with other trainers'.
    """
    matrices = parameter_count(model) - model.padded_vocab_size * model.hidden_size
    return 6 * matrices + 12 * model.num_layers * sequence_length * model.hidden_size


def utilization(model_flops_per_second: float, peak_flops: float, gpus: int) -> float:
    """MFU: what is left of the peak of all GPUs."""
    return model_flops_per_second / (peak_flops * gpus)


@dataclass(frozen=True)
class HardwareFlops:
    """FLOPs of one token of the matrix products that are done, forward and backward together."""

    layers: float  # of the layers' matrices, once more where they are recomputed
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head


def mean_masked_share(config: Config) -> float:
    """Positions that the head sees: the mean of p = (1 − ε)·u + ε over u ~ U[0,1) (LLaDA, Alg. 1)."""
    return (1 + config.objective.epsilon) / 2


def head_made_again(config: Config, sequence_length: int, masked_share: float | None = None) -> bool:
    """Whether a micro-batch of the mean number of masked positions has more logits than the head holds at once."""
    share = mean_masked_share(config) if masked_share is None else masked_share
    parallel, model = config.parallel, config.model
    tokens = config.training.micro_batch_size * sequence_length / parallel.context_parallel
    return share * tokens * (model.padded_vocab_size // parallel.tensor_parallel) > CHUNK


def hardware_flops_per_token(config: Config, sequence_length: int, masked_share: float | None = None) -> HardwareFlops:
    """Of all ranks together, of rows that are not cut; `masked_share`: of positions; None: its mean.

    A product of a matrix of N elements takes 2·N forward and 4·N backward. Attention's two products take 4·S·d forward;
    its backward pass makes the scores again, five products in all, 10·S·d (FlashAttention, arXiv 2205.14135, Alg. 4).
    Full recomputation does the layers' forward pass once more, but for the last product of each layer, whose result
    nobody needs, and which is done all the same; selective recomputation repeats no product. The head makes logits that
    are too many to keep once more.
    """
    model = config.model
    again = config.training.recompute == "full"
    share = mean_masked_share(config) if masked_share is None else masked_share
    norms = (2 * model.num_layers + 1) * model.hidden_size
    matrices = non_embedding_parameter_count(model) - norms
    scores = model.num_layers * sequence_length * model.hidden_size
    return HardwareFlops(
        layers=(8 if again else 6) * matrices,
        attention=(18 if again else 14) * scores,
        head=(8 if head_made_again(config, sequence_length, share) else 6)
        * share
        * model.padded_vocab_size
        * model.hidden_size,
    )
