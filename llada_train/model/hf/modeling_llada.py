"""LLaDA in plain PyTorch: a pre-norm transformer without causal mask, in the released model's tensor names.

It needs torch and transformers alone, so an exported folder carries this file and loads with `trust_remote_code=True`.
"""

import math
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_llada import LLaDAConfig


class RMSLayerNorm(nn.Module):
    """x / √(mean(x²) + eps) in fp32, cast back, then times the weight. [..., d_model] → [..., d_model]."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.d_model))

    def forward(self, x: Tensor) -> Tensor:
        normalized = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return normalized.to(x.dtype) * self.weight


def rotary_angles(config: LLaDAConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine, fp32 [length, head_dim/2], of position · θ^(−2i/head_dim), positions 0..length−1 (RoFormer)."""
    head_dim = config.d_model // config.n_heads
    frequencies = config.rope_theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (x_i, x_{i + head_dim/2}) of [B, heads, T, head_dim] by their angles, in fp32."""
    cos, sin = angles
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class ResidualLinear(nn.Linear):
    """A projection back into the residual stream; the deeper its layer, the smaller it starts."""

    def __init__(self, in_features: int, out_features: int, layer: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.init_std = 1 / math.sqrt(2 * in_features * (layer + 1))


class LLaDALlamaBlock(GradientCheckpointingLayer):
    """h += attention(norm(h)); h += SwiGLU(norm(h))."""

    def __init__(self, config: LLaDAConfig, layer: int) -> None:
        super().__init__()
        d, self.head_dim = config.d_model, config.d_model // config.n_heads
        kv_size = config.n_kv_heads * self.head_dim
        self.attn_norm = RMSLayerNorm(config)
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, kv_size, bias=False)
        self.v_proj = nn.Linear(d, kv_size, bias=False)
        self.attn_out = ResidualLinear(d, d, layer)
        self.ff_norm = RMSLayerNorm(config)
        self.ff_proj = nn.Linear(d, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(d, config.mlp_hidden_size, bias=False)
        self.ff_out = ResidualLinear(config.mlp_hidden_size, d, layer)

    def forward(self, h: Tensor, angles: tuple[Tensor, Tensor], visible: Tensor | None) -> Tensor:
        x = self.attn_norm(h)
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, angles), rotate(k, angles)
        attention = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=k.shape[1] != q.shape[1])
        h = h + self.attn_out(attention.transpose(1, 2).flatten(-2))
        x = self.ff_norm(h)
        return h + self.ff_out(F.silu(self.ff_proj(x)) * self.up_proj(x))


class LLaDATransformer(nn.Module):
    """Embedding, blocks, final norm and untied head."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.embedding_size, config.d_model)
        self.blocks = nn.ModuleList(LLaDALlamaBlock(config, layer) for layer in range(config.n_layers))
        self.ln_f = RMSLayerNorm(config)
        self.ff_out = nn.Linear(config.d_model, config.embedding_size, bias=False)

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, states: list[Tensor] | None = None
    ) -> Tensor:
        """Embeddings [B, T, d_model], attention_mask [B, T] → logits [B, T, embedding_size].

        `states` is given what each block reads, and last what the head reads, each [B, T, d_model].
        """
        h = inputs_embeds
        angles = rotary_angles(self.config, h.shape[1], h.device)
        # [B, 1, 1, T]: the same keys for every head and query.
        visible = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        for block in self.blocks:
            if states is not None:
                states.append(h)
            h = block(h, angles, visible)
        h = self.ln_f(h)
        if states is not None:
            states.append(h)
        return self.ff_out(h)


def uniform(shape: tuple[int, ...], device: torch.device, step: float) -> Tensor:
    """u ~ U[0, 1) by torch's global generator, turned by rank · step mod 1: Trainer seeds all processes alike.

    So no two ranks draw the same, and with an irrational `step` all of them together spread evenly over [0, 1).
    """
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return (torch.rand(shape, device=device) + rank * step % 1) % 1


def mask_tokens(labels: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """LLaDA's noise (GUIDELINES.md of ML-GSAI/LLaDA): p = (1 − ε)u + ε with u ~ U[0, 1) for each row, ε = 0.001.

    labels [B, T], −100 where no noise falls → labels with the mask id where a token is masked, which each is with
    probability p, [B, T]; and the weights of their negative log-likelihoods, 1/p at masks and 0 elsewhere, fp32 [B, T].
    """
    p = (1 - 1e-3) * uniform((len(labels), 1), labels.device, (math.sqrt(5) - 1) / 2) + 1e-3
    masked = (uniform(labels.shape, labels.device, math.sqrt(2) - 1) < p) & (labels != -100)
    return labels.masked_fill(masked, mask_token_id), masked / p


def masked_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Σ weight · NLL of each row ÷ its number of labels, mean over the rows (paper Eq. 5); fp32, of [B, T, V]."""
    nll = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return ((weights * nll).sum(-1) / (labels != -100).sum(-1).clamp(min=1)).mean()


class LLaDAModel(nn.Module):
    """The level `model.` in the released tensor names."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.transformer = LLaDATransformer(config)


class LLaDAModelLM(PreTrainedModel):
    """LLaDA's mask predictor p(x₀ | x_t): for every position a distribution over the vocabulary (paper §2.1)."""

    config_class = LLaDAConfig
    base_model_prefix = "model"
    _no_split_modules = ["LLaDALlamaBlock"]  # noqa: RUF012 - accelerate wants a list
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over rows: Trainer averages it over its micro-batches

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        past_key_values: object | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits [B, T, embedding_size] for every position; nothing is shifted.

        Args:
            input_ids: [B, T] token ids, with the mask id where the token is unknown.
            inputs_embeds: [B, T, d_model], in place of input_ids.
            attention_mask: [B, T], 0 where a position is padding, which nothing attends to. Padding counts as a
                position: the first column is position 0 whatever it holds.
            labels: [B, T] tokens to learn, −100 where input_ids are given (a prompt, padding). The model masks some of
                them by torch's global generator, on each process others, and returns LLaDA's loss; logits are those of
                the masked ids.
            past_key_values, use_cache: refused; every position sees every other one, so no key stays valid.
            output_attentions: refused; they are never formed.
            output_hidden_states: [B, T, d_model] each: what the blocks read, and what the head reads.
            return_dict: False for a tuple.

        Raises:
            ValueError: a cache or attentions were asked for; not exactly one of input_ids and inputs_embeds; labels
                without input_ids or without config.mask_token_id; T > max_sequence_length.
        """
        if use_cache or past_key_values is not None:
            raise ValueError("LLaDA attends in both directions: keys and values cannot be cached; set use_cache=False")
        if output_attentions:
            raise ValueError("LLaDA's attention weights are never formed; leave out output_attentions")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        weights = None
        if labels is not None:
            if input_ids is None or self.config.mask_token_id is None:
                raise ValueError("labels need input_ids and config.mask_token_id: the model masks the labelled tokens")
            noised, weights = mask_tokens(labels, self.config.mask_token_id)
            input_ids = torch.where(labels == -100, input_ids, noised)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if inputs_embeds.shape[1] > self.config.max_sequence_length:
            raise ValueError(
                f"{inputs_embeds.shape[1]} tokens are more than the model's max_sequence_length "
                f"{self.config.max_sequence_length}"
            )
        states: list[Tensor] | None = [] if output_hidden_states else None
        logits = self.model.transformer(inputs_embeds, attention_mask, states)
        output = CausalLMOutputWithPast(
            loss=None if labels is None or weights is None else masked_loss(logits, labels, weights),
            logits=logits,
            hidden_states=None if states is None else tuple(states),
        )
        return output if return_dict or (return_dict is None and self.config.return_dict) else output.to_tuple()

    @classmethod
    def can_generate(cls) -> bool:
        return False

    def generate(self, *_: object, **__: object) -> NoReturn:
        """Raises NotImplementedError: `generate` goes from left to right."""
        raise NotImplementedError(
            "LLaDA does not write from left to right, so it has no generate(): begin with mask tokens and fill them in "
            "step by step, as `llada-train sample` does"
        )

    prepare_inputs_for_generation = generate  # peft asks for it

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.transformer.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.transformer.wte = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.model.transformer.ff_out

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.model.transformer.ff_out = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """The released config's init_fn "mitchell": normal, cut at 3σ, σ = 1/√d_in except in ResidualLinear."""
        if isinstance(module, nn.Linear | nn.Embedding):
            std = module.init_std if isinstance(module, ResidualLinear) else 1 / math.sqrt(module.weight.shape[1])
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        elif isinstance(module, RMSLayerNorm):
            nn.init.ones_(module.weight)


# So that `save_pretrained` writes this code beside the weights again.
LLaDAConfig.register_for_auto_class()
LLaDAModelLM.register_for_auto_class("AutoModelForCausalLM")
