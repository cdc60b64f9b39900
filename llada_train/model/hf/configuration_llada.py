"""The configuration of a LLaDA model in Hugging Face format: the keys and values of the released config.json."""

from typing import Any

from transformers import PretrainedConfig

# Switches of the released config.json that this code, and LLaDA's training, implement for one value each.
SWITCHES: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "embedding_dropout": 0.0,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "multi_query_attention": None,
    "residual_dropout": 0.0,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
    "use_cache": False,
    "weight_tying": False,
}
# Keys of the released config.json that change nothing here: they choose kernels, or how training began.
_WITHOUT_EFFECT: dict[str, Any] = {
    "alibi_bias_max": 8.0,
    "attention_layer_norm_with_affine": True,
    "flash_attention": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "precision": "amp_bf16",
}


class LLaDAConfig(PretrainedConfig):
    """Sizes of a LLaDA transformer; the defaults are LLaDA-8B's (paper Tab. 5).

    Raises:
        ValueError: a key of the released format asks for something that LLaDA does not use, such as weight
            tying or a cache; all such keys are named.
    """

    model_type = "llada"
    attribute_map = {  # noqa: RUF012 - transformers reads a plain dict here
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "num_key_value_heads": "n_kv_heads",
        "tie_word_embeddings": "weight_tying",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_layers: int = 32,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        mlp_ratio: int = 4,
        mlp_hidden_size: int | None = 12288,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        max_sequence_length: int = 4096,
        rope_theta: float = 500_000.0,
        rms_norm_eps: float = 1e-5,
        mask_token_id: int | None = 126336,
        eos_token_id: int | None = 126081,
        pad_token_id: int | None = 126081,
        **kwargs: Any,
    ) -> None:
        self.d_model = d_model
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.mlp_ratio = mlp_ratio
        self.mlp_hidden_size = mlp_ratio * d_model if mlp_hidden_size is None else mlp_hidden_size
        self.vocab_size = vocab_size
        self.embedding_size = vocab_size if embedding_size is None else embedding_size
        self.max_sequence_length = max_sequence_length
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.mask_token_id = mask_token_id
        kwargs.setdefault("weight_tying", kwargs.pop("tie_word_embeddings", False))
        for key, default in (SWITCHES | _WITHOUT_EFFECT).items():
            setattr(self, key, kwargs.pop(key, default))
        refused = [
            f"{key}={getattr(self, key)!r} (only {only!r})"
            for key, only in SWITCHES.items()
            if getattr(self, key) != only
        ]
        if refused:
            raise ValueError(f"LLaDAConfig: not supported: {', '.join(refused)}")
        self.auto_map = {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
            "AutoModel": "modeling_llada.LLaDAModelLM",
        }
        kwargs.setdefault("architectures", ["LLaDAModelLM"])
        kwargs.pop("auto_map", None)
        # Said aloud, since transformers 4 ties what does not say it.
        kwargs["tie_word_embeddings"] = self.weight_tying
        super().__init__(eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)
