import json

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from minisgl.errors import MinisglError
from minisgl.models.config import ModelConfig, RopeConfig

SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
CLASSES = {"Llama": LlamaConfig, "Mistral": MistralConfig, "Qwen2": Qwen2Config, "Qwen3": Qwen3Config}


def parse(family="Llama", **settings):
    return ModelConfig.from_dict({"architectures": [f"{family}ForCausalLM"], **SMALL, **settings})


def saved(folder, family, **settings):
    """What transformers writes for this family and what we read from it."""
    hf = CLASSES[family](architectures=[f"{family}ForCausalLM"], **{**SMALL, **settings})
    hf.save_pretrained(folder)
    return hf, ModelConfig.from_folder(folder)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize(
    "settings",
    [{"num_key_value_heads": 4}, {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}],
)
def test_what_transformers_saves(tmp_path, family, settings):
    hf, config = saved(tmp_path, family, **settings)
    assert config.architecture == f"{family}ForCausalLM"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (100, 64, 96)
    assert (config.num_layers, config.num_heads) == (3, 4)
    assert config.head_dim == (128 if family == "Qwen3" else 16)
    assert config.tie_word_embeddings == hf.tie_word_embeddings
    assert config.rms_norm_eps == hf.rms_norm_eps
    assert config.max_position_embeddings == hf.max_position_embeddings
    assert config.rope == RopeConfig(theta=10000.0)
    assert config.windows == ((4096,) * 3 if family == "Mistral" else (0,) * 3)
    assert config.qk_norm == (family == "Qwen3")
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (family == "Qwen2", False, False)
    assert config.eos_ids == ((2,) if family in ("Llama", "Mistral") else ())
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize("family", CLASSES)
def test_missing_keys_mean_what_transformers_means(family):
    small = {**SMALL, "num_attention_heads": 32, "hidden_size": 512}
    config, hf = parse(family, **small), CLASSES[family](**small)
    assert config.num_kv_heads == hf.num_key_value_heads
    assert config.head_dim == (getattr(hf, "head_dim", None) or 16)
    assert config.max_position_embeddings == hf.max_position_embeddings
    assert config.rms_norm_eps == hf.rms_norm_eps
    assert config.tie_word_embeddings == hf.tie_word_embeddings
    assert config.windows[0] == (getattr(hf, "sliding_window", None) or 0)


def test_null_means_none():
    config = parse("Mistral", num_key_value_heads=None, head_dim=None, sliding_window=None, rope_scaling=None)
    assert (config.num_kv_heads, config.head_dim, config.windows) == (4, 16, (0, 0, 0))


def test_llama_biases(tmp_path):
    _, config = saved(tmp_path, "Llama", attention_bias=True, mlp_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, True)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
@pytest.mark.parametrize(
    "settings",
    [
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 7},
        {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1},
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ],
)
def test_qwen_windows(tmp_path, family, settings):
    hf, config = saved(tmp_path, family, num_key_value_heads=2, **settings)
    assert config.windows == tuple(
        (hf.sliding_window or 0) if kind == "sliding_attention" else 0 for kind in hf.layer_types
    )
    assert parse(family, num_key_value_heads=2, **settings).windows == config.windows  # without saved layer_types


def test_an_old_config():
    """Llama 3.1 8B as published, with the keys of transformers 4."""
    config = ModelConfig.from_dict(
        json.loads("""{
            "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
            "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0.dev0", "use_cache": true, "vocab_size": 128256}""")
    )
    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope=RopeConfig("llama3", 500000.0, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=(0,) * 32,
        dtype="bfloat16",
        eos_ids=(128001, 128008, 128009),
        bos_id=128000,
    )


@pytest.mark.parametrize(
    "settings, dtype",
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "torch.float16"}, "float16"),
        ({}, "bfloat16"),
    ],
)
def test_dtype(settings, dtype):
    assert parse(**settings).dtype == dtype


def test_yarn_stretches_the_context():
    """Qwen's instructions add this to a config.json whose max_position_embeddings is 32768."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = parse("Qwen2", num_key_value_heads=2, max_position_embeddings=32768, rope_scaling=yarn, rope_theta=1e6)
    assert config.max_position_embeddings == 131072
    assert (config.rope.type, config.rope.theta, config.rope.original_len) == ("yarn", 1e6, 32768)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            "GemmaForCausalLM is not supported; supported: LlamaForCausalLM, Mis",
        ),
        ({"architectures": None}, "names no architecture; supported: Llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: 'silu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized with 'fp8' are not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            "rope type 'dynamic' is not supported; supported: default,",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "each kind of layer is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' needs a factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "'llama3' needs low_freq_factor and high_freq_factor"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 KV heads evenly"),
        ({"head_dim": 33}, "head_dim 33 is not supported; it must be a multiple of 8"),
        ({"head_dim": 512}, "head_dim 512 is not supported"),
        ({"hidden_size": 66}, "4 heads do not divide hidden_size 66"),
        ({"vocab_size": None}, "vocab_size is missing; it must be a positive integer"),
        ({"vocab_size": 1 << 31}, "vocab_size is 2147483648; it must be a positive integer below 2.31"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures is 'Qwen3ForCausalLM'; it must be a list of names"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a positive number"),
        ({"rope_theta": 0}, "rope_theta is 0; it must be a positive number"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
            "original_max_position_embeddings is 0; it must be a positive number",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0; it must be a positive number"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'; it must be a positive integer"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported; supported: bfloat16, float16, float32"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(MinisglError, match=message):
        parse(**settings)


def test_bad_layer_types():
    settings = {"num_key_value_heads": 2, "use_sliding_window": True}
    for kinds in (["full_attention"], ["full_attention", "chunked_attention", "full_attention"]):
        with pytest.raises(MinisglError, match="layer_types must hold 3 entries .* full_attention, sliding_attention"):
            parse("Qwen3", layer_types=kinds, **settings)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot read .*config.json: No such file"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "JSON object"),
    ],
)
def test_bad_files(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(MinisglError, match=message):
        ModelConfig.from_folder(tmp_path)
