"""The supported model families: what differs between them, as data. `decoder` is the same code for all.

Knows which config.json keys a family reads and what transformers fills in when one is missing.
Does not know tensors or files. To add a family that is Llama with small changes, add a `Family`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """One architecture. A bias is True, False, or the name of the config.json key that says so."""

    architecture: str  # the name in config.json's `architectures`
    defaults: Mapping[str, Any]  # what a missing key means; null means none
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False  # an RMS norm on each head of q and k, before the rotary embedding
    windows: Literal["none", "all", "by layer"] = "none"  # which layers use `sliding_window`


LLAMA = Family(
    "LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048},
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
)

MISTRAL = Family(
    "MistralForCausalLM",
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    windows="all",
)

_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}

QWEN2 = Family(
    "Qwen2ForCausalLM",
    defaults=_QWEN,
    qkv_bias=True,
    windows="by layer",
)

QWEN3 = Family(
    "Qwen3ForCausalLM",
    defaults={**_QWEN, "head_dim": 128},
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    qk_norm=True,
    windows="by layer",
)

FAMILIES = {family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
