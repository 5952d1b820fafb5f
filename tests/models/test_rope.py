import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minisgl.models.config import ModelConfig
from minisgl.models.rope import attention_factor, cos_sin_table, inverse_frequencies

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
SETTINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": YARN,
    "yarn without truncation": {**YARN, "truncate": False},
    "yarn with its own factor": {**YARN, "attention_factor": 1.5},
    "yarn with mscales": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn with betas": {**YARN, "beta_fast": 20, "beta_slow": 2},
    "yarn without a length": {**YARN, "original_max_position_embeddings": None},
    "yarn that shrinks": {**YARN, "factor": 0.5},
}


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_transformers(name, theta, head_dim):
    settings = {key: value for key, value in SETTINGS[name].items() if value is not None}
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 4 * head_dim,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 16384,
        "rope_theta": theta,
        "rope_scaling": settings,
    }
    rope = ModelConfig.from_dict(raw).rope
    hf = LlamaConfig(**{**raw, "rope_scaling": dict(settings)})
    if name != "default":
        frequencies, factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](hf, torch.device("cpu"))
        torch.testing.assert_close(inverse_frequencies(rope, head_dim), frequencies, rtol=1e-6, atol=0)
        assert attention_factor(rope) == pytest.approx(factor, rel=1e-12)

    max_len = 300
    table = cos_sin_table(rope, head_dim, max_len, torch.device("cpu"))
    assert table.shape == (max_len, head_dim) and table.dtype == torch.float32
    cos, sin = LlamaRotaryEmbedding(hf)(torch.empty(1), torch.arange(max_len)[None])  # [1, max_len, D], halves repeated
    expected = torch.cat((cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]), dim=1)
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-4)  # 300 radians times the fp32 rounding of a frequency
