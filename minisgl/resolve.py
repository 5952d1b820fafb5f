"""From what was asked to what will run: device, dtype and context length, each decided once.

Knows the machine and the model's config. Allocates nothing.
"""

import os
from dataclasses import replace

import torch

from minisgl.config import EngineConfig
from minisgl.errors import MinisglError
from minisgl.models.config import ModelConfig
from minisgl.processes import is_of_torchrun


def resolve(config: EngineConfig, model_config: ModelConfig) -> EngineConfig:
    """The same config with no "auto" and no max_len of None left. Raises MinisglError for what cannot be."""
    device = resolve_device(config.device)
    num_gpus, needed = torch.cuda.device_count(), config.tp * config.dp
    if is_of_torchrun():
        needed = min(needed, int(os.environ["LOCAL_WORLD_SIZE"]))  # the others are of other machines
    if config.tp * config.dp > 1 and device.type == "cuda" and (device.index or needed > num_gpus):
        raise MinisglError(
            f"tp is {config.tp}, dp {config.dp} and device {device}: the first {needed} of the {num_gpus} GPUs that "
            "CUDA_VISIBLE_DEVICES shows are taken; leave --device out and lower --tp or --dp, or show others"
        )
    room = config.max_running + config.page_size
    if config.max_step_tokens < room:
        raise MinisglError(
            f"max_step_tokens is {config.max_step_tokens}; it must be at least max_running + page_size = {room}: "
            "raise it, or lower max_running"
        )
    return replace(
        config,
        device=str(device),
        dtype=resolve_dtype(config.dtype, model_config.dtype, device),
        max_len=resolve_max_len(config.max_len, model_config.max_position_embeddings),
        cascade=config.cascade and not config.deterministic,  # which requests share a tile changes the order of sums
    )


def resolve_device(name: str) -> torch.device:
    """'auto' is the first GPU, or the CPU where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device == torch.device("cpu"):
        return device
    if device.type != "cuda":
        raise MinisglError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise MinisglError(f"device is {name}, but torch sees no GPU: use --device cpu, or check `minisgl info`")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise MinisglError(
            f"device is {name}, but there are only {torch.cuda.device_count()} GPUs (cuda:0 is the first)"
        )
    return torch.device("cuda", index)


def resolve_dtype(name: str, checkpoint_dtype: str, device: torch.device) -> str:
    """'auto' is the checkpoint's on a GPU, and float32 on a CPU, where narrow types are slower than wide ones."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "float32"
    return checkpoint_dtype if checkpoint_dtype in ("bfloat16", "float16", "float32") else "bfloat16"


def resolve_max_len(max_len: int | None, context: int) -> int:
    """The model's context unless a shorter length is asked for."""
    if max_len is not None and max_len > context:
        raise MinisglError(f"max_len is {max_len}, but the model's context is {context} tokens: lower it")
    return max_len or context
