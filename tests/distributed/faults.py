"""Known ways to get masked diffusion training wrong, each as a context in which the program has the fault."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import deepspeed
import numpy as np
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import functional as F

from llada_train.data import loader, rows
from llada_train.data.batch import Batch
from llada_train.data.training_data import Row
from llada_train.model import attention, head, norm
from llada_train.objective import forward_process
from llada_train.objective.forward_process import Noise


def norm_gradients_of_a_slice() -> AbstractContextManager[Any]:
    """Under sequence parallelism each rank keeps the norms' gradients of its own positions."""
    return patch.object(norm._SumGradientOverTensorParallel, "backward", staticmethod(lambda ctx, gradient: gradient))


def head_gradient_of_a_slice() -> AbstractContextManager[Any]:
    """The head's input gradient is not summed over the slices of the vocabulary."""
    return patch.object(head, "copy_to_tensor_model_parallel_region", lambda x: x)


def own_keys_only() -> AbstractContextManager[Any]:
    """Under context parallelism each rank's queries see the keys of its own columns."""

    def repeated(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        ranks = parallel_state.get_context_parallel_world_size()
        return key.repeat(ranks, 1, 1, 1), value.repeat(ranks, 1, 1, 1)

    return patch.object(attention, "_of_whole_rows", repeated)


def shared_noise() -> AbstractContextManager[Any]:
    """Every data-parallel rank masks its rows as the first one does."""
    mask = Noise.mask

    def of_first_rank(noise: Noise, row: int) -> np.ndarray:
        per_rank = len(noise.lengths) // parallel_state.get_data_parallel_world_size()
        shared = mask(replace(noise, lengths=np.full_like(noise.lengths, noise.lengths.max())), row % per_rank)
        return shared[: noise.lengths[row]]

    return patch.object(Noise, "mask", of_first_rank)


def local_normalization() -> AbstractContextManager[Any]:
    """Each rank divides by its own tokens and the ranks are averaged."""
    training_noise = rows.training_noise

    def local(*arguments: Any) -> Noise:
        noise, ranks = training_noise(*arguments), parallel_state.get_data_parallel_world_size()
        tokens = noise.lengths.reshape(ranks, -1).sum(1).repeat(len(noise.lengths) // ranks)
        return replace(noise, loss_weight=1 / (noise.mask_probability * tokens * ranks))

    return patch.object(rows, "training_noise", local)


def causal_attention() -> AbstractContextManager[Any]:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return patch.object(attention, "_sdpa", causal)


def bf16_on_the_wire() -> AbstractContextManager[Any]:
    """DeepSpeed's default for a bf16 model: gradients are rounded before they are summed over the ranks."""
    return _deepspeed_with({"communication_data_type": "bf16"})


def bf16_sums() -> AbstractContextManager[Any]:
    """The micro-batches' gradients are added up in bf16."""
    return _deepspeed_with({"data_types": {"grad_accum_dtype": "bf16"}})


def _deepspeed_with(settings: dict[str, Any]) -> AbstractContextManager[Any]:
    initialize = deepspeed.initialize

    def changed(*, config: dict[str, Any], **arguments: Any) -> Any:
        return initialize(config={**config, **settings}, **arguments)

    return patch.object(deepspeed, "initialize", changed)


def head_in_pieces() -> AbstractContextManager[Any]:
    """No fault: the logits of a micro-batch are made in dozens of pieces, as those of 8B are in several."""
    return patch.object(head, "CHUNK", 5000)


def own_key_gradients_only() -> AbstractContextManager[Any]:
    """Under context parallelism each rank keeps the gradients that its own queries have for its keys."""
    gather = attention.gather_from_sequence_parallel_region

    def gathered(x: Tensor, **arguments: Any) -> Tensor:
        return gather(x, tensor_parallel_output_grad=False, **arguments)

    return patch.object(attention, "gather_from_sequence_parallel_region", gathered)


def unweighted_loss() -> AbstractContextManager[Any]:
    """The mean over the masked tokens' losses without 1/p: no bound on anything."""
    return patch.object(forward_process, "loss_weight", lambda p, lengths, _: 1 / (lengths * len(lengths)))


def loss_at_every_position() -> AbstractContextManager[Any]:
    """What BERT-like code is written to: the tokens that are still visible are predicted as well."""
    collate = loader.collate

    def everywhere(batch: list[Row], *arguments: Any) -> Batch:
        rows = [tuple(replace(sample, mask=np.ones_like(sample.mask)) for sample in row) for row in batch]
        scored = collate(rows, *arguments)
        return replace(scored, input_ids=collate(batch, *arguments).input_ids)

    return patch.object(loader, "collate", everywhere)


FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    fault.__name__: fault
    for fault in (
        norm_gradients_of_a_slice,
        head_gradient_of_a_slice,
        own_keys_only,
        own_key_gradients_only,
        shared_noise,
        local_normalization,
        causal_attention,
        bf16_on_the_wire,
        bf16_sums,
        head_in_pieces,
        unweighted_loss,
        loss_at_every_position,
    )
}
