"""The stages of a LLaDA transformer that one process holds, composed of megatron-core's blocks."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from llada_train.config.schema import ModelConfig, ParallelConfig, Precision, Recompute
from llada_train.data.batch import Batch
from llada_train.model.attention import AttentionInputs, BidirectionalAttention, rotary_tables
from llada_train.model.head import MaskedHead
from llada_train.model.kernels import TORCH, Kernels
from llada_train.model.layer import GatedMLP, TransformerLayer
from llada_train.model.norm import RMSNorm
from llada_train.model.sizes import layers_of_stages

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": []},  # what it means is in our own layer
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _stages(num_layers: int, stages: int) -> list[list[str]]:
    """What each stage holds, in the order of the forward pass."""
    layers = [["decoder"] * count for count in layers_of_stages(num_layers, stages)]
    return [["embedding", *layers[0]], *layers[1:-1], [*layers[-1], "loss"]]


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, precision: Precision, recompute: Recompute, use_cpu: bool
) -> TransformerConfig:
    """megatron-core's view of the config."""
    dtype = DTYPES[precision]
    interleaved = parallel.virtual_pipeline_parallel > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        pipeline_model_parallel_layout=_stages(model.num_layers, parallel.stages) if parallel.stages > 1 else None,
        # Batched, the messages of the interleaved schedule are mixed up between two ranks that are each other's
        # predecessor and successor.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=parallel.context_parallel,
        sequence_parallel=parallel.sequence_parallel,
        **_RECOMPUTE[recompute],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The loss arrives normalised over the global batch: with this and a three-value loss mcore divides nothing.
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=use_cpu,
        gradient_accumulation_fusion=False,
    )


def layer_spec(kernels: Kernels) -> ModuleSpec:
    """A layer of ours, for megatron-core's blocks to build."""
    params = {"kernels": kernels}
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ModuleSpec(module=RMSNorm, params=params),
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=ModuleSpec(module=BidirectionalAttention, params=params),
                    linear_proj=RowParallelLinear,
                ),
            ),
            pre_mlp_layernorm=ModuleSpec(module=RMSNorm, params=params),
            mlp=ModuleSpec(
                module=GatedMLP,
                params=params,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
        ),
    )


class Stage(MegatronModule):
    """One stage: embedding on the first, head on the last, some of the layers on each.

    Weights are allocated, not initialised; llada_train.model.weights fills them.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, kernels: Kernels, vp_stage: int | None) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder  # megatron-core's schedules ask for it
        self.vp_stage = vp_stage  # which of this process's stages; None: its only one
        self.head_dim, self.rope_theta = model.head_dim, model.rope_theta
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        if first:
            self.embedding = VocabParallelEmbedding(
                model.padded_vocab_size,
                model.hidden_size,
                init_method=torch.nn.Identity(),
                reduce_scatter_embeddings=config.sequence_parallel,
                config=config,
            )
        layers = get_num_layers_to_build(config, vp_stage)
        self.decoder = TransformerBlock(
            config,
            TransformerBlockSubmodules(
                layer_specs=[layer_spec(kernels)] * layers,
                layer_norm=ModuleSpec(module=RMSNorm, params={"kernels": kernels}),
            ),
            pre_process=first,
            post_process=last,
            vp_stage=vp_stage,
        )
        if last:
            self.head = MaskedHead(config, model.padded_vocab_size)

    def set_input_tensor(self, tensor: Any) -> None:
        """Called by megatron-core's schedule with the stage before's hidden states."""
        self.decoder.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states [S, B, H] for the next stage; on the last what its head tells of the masked positions."""
        cos, sin = rotary_tables(batch.position_ids, self.head_dim, self.rope_theta)
        hidden = None
        if hasattr(self, "embedding"):
            hidden = self.embedding(batch.input_ids)
            if not self.config.sequence_parallel:  # the reduce-scatter has already put the sequence first
                hidden = hidden.transpose(0, 1).contiguous()
        hidden = self.decoder(
            hidden,
            attention_mask=None,
            packed_seq_params=AttentionInputs(cos=cos, sin=sin, segments=batch.segments),
        )
        return self.head(hidden, batch) if hasattr(self, "head") else hidden


class LLaDATransformer(torch.nn.Module):
    """All stages of this process: one, or several under the interleaved schedule."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, kernels: Kernels = TORCH) -> None:
        super().__init__()
        chunks = config.virtual_pipeline_model_parallel_size or 1
        self.stages = torch.nn.ModuleList(
            Stage(model, config, kernels, i if chunks > 1 else None) for i in range(chunks)
        )

    def forward(self, batch: Batch, stage: int = 0) -> Tensor:
        """One stage's forward pass; its input tensor is megatron-core's schedule's to set."""
        output: Tensor = self.stages[stage](batch)
        return output
