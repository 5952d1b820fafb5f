"""Rotary position embeddings: the inverse frequencies of each type, and the table of cosines and sines.

    angle[p, j] = p * inv_freq[j]      inv_freq[j] = theta^(-2j / D), then stretched by the type

Legend: D head dim. Frequencies and angles are fp32, as in transformers, so that long positions agree with it.
Sources: Su et al., "RoFormer", arXiv:2104.09864 (default); Chen et al., "Extending Context Window ... via Positional
Interpolation", arXiv:2306.15595 (linear); Peng et al., "YaRN", arXiv:2309.00071 (yarn);
meta-llama/llama-models, models/llama3/model.py, apply_scaling (llama3).
"""

import math

import torch

from minisgl.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions  # [D / 2] fp32, on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    base = 1.0 / (rope.theta**exponents)
    if rope.type == "linear":
        return base / rope.factor
    if rope.type == "llama3":
        return _llama3(base, rope)
    if rope.type == "yarn":
        return _yarn(base, rope, head_dim)
    assert rope.type == "default", rope.type
    return base


def attention_factor(rope: RopeConfig) -> float:
    """What cosines and sines are multiplied by: 1, or YaRN's correction of the softmax temperature (its eq. 22)."""
    if rope.type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:  # DeepSeek's variant
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def cos_sin_table(rope: RopeConfig, head_dim: int, max_len: int, device: torch.device) -> torch.Tensor:
    """Cosines and sines of positions 0..max_len-1  # [max_len, D] fp32: cos in columns [:D/2], sin in [D/2:].

    Both are multiplied by the attention factor.
    """
    frequencies = inverse_frequencies(rope, head_dim).to(device)
    angles = torch.arange(max_len, dtype=torch.float32, device=device)[:, None] * frequencies  # [max_len, D / 2]
    return torch.cat((angles.cos(), angles.sin()), dim=1).mul_(attention_factor(rope))


def _llama3(base: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Keep short wavelengths, divide long ones by the factor, interpolate between."""
    turns = rope.original_len * base / (2 * math.pi)  # rotations over the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = smooth.clamp(0, 1)
    return (1 - keep) * base / rope.factor + keep * base


def _yarn(base: torch.Tensor, rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Keep dimensions that turn more than beta_fast times over the original context, divide by the factor those that
    turn less than beta_slow times, and mix along a ramp between."""

    def dimension_turning(times: float) -> float:
        wavelength = rope.original_len / (times * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return base / rope.factor * ramp + base * (1 - ramp)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
