"""Tiny random models of every supported family, and token windows for them."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from distaya_ext.compress import Calibration
from distaya_ext.recipe import Recipe

VOCAB = 97
WINDOW = 24  # longer than the sliding windows below
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES: dict[str, PreTrainedConfig] = {
    "cohere": CohereConfig(num_hidden_layers=2, logit_scale=0.25, **SIZES),
    "cohere-qk-norm": CohereConfig(num_hidden_layers=2, use_qk_norm=True, **SIZES),
    # four layers: three slide with RoPE, the fourth sees everything without RoPE
    "cohere2": Cohere2Config(num_hidden_layers=4, sliding_window=8, head_dim=16, **SIZES),
    "llama": LlamaConfig(num_hidden_layers=3, **SIZES),
    "llama-bias": LlamaConfig(num_hidden_layers=2, attention_bias=True, mlp_bias=True, **SIZES),
    "mistral": MistralConfig(num_hidden_layers=2, sliding_window=8, **SIZES),
    "gemma": GemmaConfig(num_hidden_layers=2, head_dim=32, **SIZES),
    "gemma2": Gemma2Config(num_hidden_layers=2, head_dim=32, sliding_window=8, **SIZES),
    "gemma3_text": Gemma3TextConfig(
        num_hidden_layers=3,
        head_dim=32,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        **SIZES,
    ),
    "qwen2": Qwen2Config(num_hidden_layers=2, **SIZES),
    "qwen3": Qwen3Config(num_hidden_layers=2, head_dim=16, **SIZES),
}


def make(folder: Path, config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random model of the config, its norms and biases random too, and return its folder."""
    torch.manual_seed(7)
    # A copy: transformers writes the dtype into the configuration it is given.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def windows(count: int = 12, length: int = WINDOW, vocab: int = VOCAB) -> Calibration:
    """Random token windows; the languages alternate."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, vocab, (count, length), generator=generator)
    return Calibration(ids, [("en", "fr")[i % 2] for i in range(count)])


def recipe(method: str = "sparsegpt", **fields: Any) -> Recipe:
    """A recipe with the fields a test cares about."""
    if method in ("sparsegpt", "wanda", "magnitude", "ria", "dass") and "nm" not in fields:
        fields.setdefault("sparsity", 0.5)
    return Recipe(model="tiny", method=method, **fields)
