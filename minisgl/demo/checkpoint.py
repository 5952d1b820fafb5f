"""The demo model's shape, and its folder on disk: a Qwen3 checkpoint that Hugging Face and minisgl both load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from minisgl.demo.chat_tokenizer import END_OF_TEXT_ID, TURN_END_ID, VOCAB_SIZE, save_tokenizer
from minisgl.demo.data import ExamQuestion

# 5.4 million parameters: 10.8 MB in bfloat16. Written as the published Qwen3 checkpoints write theirs.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 704,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 7,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": TURN_END_ID,
    "pad_token_id": END_OF_TEXT_ID,
}
GENERATION_CONFIG = {
    "do_sample": False,
    "eos_token_id": [TURN_END_ID, END_OF_TEXT_ID],
    "pad_token_id": END_OF_TEXT_ID,
}
MAX_ANSWER_TOKENS = 64


def new_model() -> Any:
    """A Qwen3ForCausalLM with random weights, in float32."""
    config = Qwen3Config.from_dict({**CONFIG, "torch_dtype": "float32"})
    return Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa")


def save_checkpoint(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the weights, rounded to bfloat16, with the tokenizer and the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    # lm_head is the embedding again (tied), which a safetensors file stores once
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG, indent=2) + "\n")
    save_tokenizer(tokenizer, folder)


@torch.inference_mode()
def greedy_answers(
    folder: Path, questions: list[ExamQuestion], dtype: torch.dtype, device: torch.device, batch_size: int = 512
) -> list[str]:
    """Answers of the checkpoint in `folder` by plain transformers generation, in the order of `questions`."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        prompts = [
            tokenizer.apply_chat_template(question.messages, tokenize=False, add_generation_prompt=True)
            for question in questions[start : start + batch_size]
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        output_ids = model.generate(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=inputs["attention_mask"].to(device),
            max_new_tokens=MAX_ANSWER_TOKENS,
        )
        new_ids = output_ids[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    return answers
