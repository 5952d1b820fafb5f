"""Small random checkpoints of every family on disk, each with a byte-level tokenizer: `make(name, folder)`; and two
whose sizes are multiples of 128, WIDE, for kernels that take no others.

The weights are spread wide enough that greedy tokens have clear winners, biases and norm weights included.
"""

import random
from pathlib import Path

from minisgl.bench.synthetic_tokenizer import SPECIAL_TOKENS, write_bpe

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('this model has no tools') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a")]
VOCAB_SIZE = 256 + len(MERGES) + len(SPECIAL_TOKENS)
EOS_ID = VOCAB_SIZE - 1  # <|im_end|>

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def _heads(query: int, kv: int, head_dim: int) -> dict[str, int]:
    return {
        "num_attention_heads": query,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "hidden_size": 12 * query,
        "intermediate_size": 100,
    }


def _wide_heads(query: int, kv: int, head_dim: int) -> dict[str, int]:
    return {**_heads(query, kv, head_dim), "hidden_size": 256, "intermediate_size": 512}


_MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", _heads(6, 2, 64)),
    "llama-llama3": ("Llama", {**_heads(4, 1, 128), "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-linear": ("Llama", {**_heads(12, 4, 80), "rope_parameters": LINEAR_ROPE}),
    "llama-yarn": ("Llama", {**_heads(4, 4, 96), "rope_parameters": YARN_ROPE}),
    "llama-bias": ("Llama", {**_heads(4, 2, 64), "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**_heads(4, 2, 128), "sliding_window": None}),
    "mistral-window": ("Mistral", {**_heads(8, 2, 64), "sliding_window": 9}),
    "qwen2": ("Qwen2", {**_heads(7, 7, 64), "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {**_heads(6, 2, 80), "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**_heads(5, 1, 128), "tie_word_embeddings": True}),
    "qwen3-yarn": ("Qwen3", {**_heads(4, 2, 96), "rope_parameters": YARN_ROPE, "attention_bias": True}),
}
NAMES: list[str] = list(_MODELS)
WIDE: dict[str, tuple[str, dict[str, object]]] = {
    "wide-qwen3": ("Qwen3", _wide_heads(4, 2, 64)),
    "wide-qwen2": ("Qwen2", _wide_heads(3, 1, 128)),
}


def make(name: str, folder: Path) -> Path:
    """Write the checkpoint `name`, of NAMES or WIDE, in float32 with its tokenizer to `folder`; returns the folder."""
    import torch
    import transformers

    models = _MODELS | WIDE
    family, settings = models[name]
    if "rope_parameters" in settings and transformers.__version__ < "5":
        rope = dict(settings["rope_parameters"])
        settings = {**settings, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        del settings["rope_parameters"]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB_SIZE,
        num_hidden_layers=3,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        **settings,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(list(models).index(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if key.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif key.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Write a byte-level BPE tokenizer of VOCAB_SIZE tokens, so that every id and every text is possible."""
    write_bpe(folder, MERGES, chat_template)


def prompts_of_all_kinds(seed: int = 0) -> list[list[int]]:
    """One token, a few, prompts longer than a step, a group that shares a prefix, and two that are the same."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(VOCAB_SIZE) for _ in range(count)]

    system = ids(48)
    twin = ids(32)
    return [ids(1), ids(7), ids(150), ids(100), system + ids(5), system + ids(20), system + ids(33), twin, list(twin)]
