"""One pipeline stage of a LLaDA transformer, composed of megatron-core's blocks."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from llada_train.config.schema import Config, ModelConfig
from llada_train.data.batch import Batch
from llada_train.model.attention import AttentionInputs, BidirectionalAttention, rotary_tables
from llada_train.model.head import MaskedHead
from llada_train.model.norm import RMSNorm

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def transformer_config(config: Config, use_cpu: bool) -> TransformerConfig:
    """megatron-core's view of the config."""
    model, parallel = config.model, config.parallel
    dtype = DTYPES[config.training.precision]
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
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The loss arrives normalised over the global batch: with this and a three-value loss mcore divides nothing.
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=use_cpu,
        gradient_accumulation_fusion=False,
    )


def _layer_spec() -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=BidirectionalAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class LLaDATransformer(MegatronModule):
    """The stage of this pipeline rank: embedding on the first, head on the last, a slice of the layers on each.

    Weights are allocated, not initialised; llada_train.model.weights fills them.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder  # megatron-core's schedules ask for it
        self.head_dim, self.rope_theta = model.head_dim, model.rope_theta
        first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        if first:
            self.embedding = VocabParallelEmbedding(
                model.padded_vocab_size,
                model.hidden_size,
                init_method=torch.nn.Identity(),
                reduce_scatter_embeddings=config.sequence_parallel,
                config=config,
            )
        layers = model.num_layers // config.pipeline_model_parallel_size
        self.decoder = TransformerBlock(
            config,
            TransformerBlockSubmodules(layer_specs=[_layer_spec()] * layers, layer_norm=RMSNorm),
            pre_process=first,
            post_process=last,
        )
        if last:
            self.head = MaskedHead(config, model.padded_vocab_size)

    def set_input_tensor(self, tensor: Any) -> None:
        """Called by megatron-core's schedule with the stage before's hidden states."""
        self.decoder.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states [S, B, H] for the next stage, or on the last [2, K] fp32: log-normaliser, target logit."""
        cos, sin = rotary_tables(batch.position_ids, self.head_dim, self.rope_theta)
        hidden = None
        if hasattr(self, "embedding"):
            hidden = self.embedding(batch.input_ids)
            if not self.config.sequence_parallel:  # the reduce-scatter has already put the sequence first
                hidden = hidden.transpose(0, 1).contiguous()
        hidden = self.decoder(
            hidden,
            attention_mask=None,
            packed_seq_params=AttentionInputs(cos=cos, sin=sin, cu_seqlens=batch.cu_seqlens),
        )
        return self.head(hidden, batch) if hasattr(self, "head") else hidden
