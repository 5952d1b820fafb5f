"""Which kernels the layers call where there is a choice: those that are fastest for a batch's shape, or those that sum
in one order, so that a request's logits have the same bits whatever runs beside it.

Norms, rotary embedding, gate, token embedding and sampling take each row alone: there is nothing to choose. Knows
kernels. Does not know layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from minisgl.kernels.attention_decode import attention_decode
from minisgl.kernels.attention_prefill import attention_prefill, query_block
from minisgl.kernels.invariant_attention import query_block as invariant_query_block
from minisgl.kernels.invariant_decode import invariant_decode
from minisgl.kernels.invariant_matmul import FEW_ROWS, beats_torch, invariant_matmul, row_borders
from minisgl.kernels.invariant_prefill import invariant_prefill
from minisgl.kernels.launch import hopper_module
from minisgl.kernels.rotary import Rotary, rotary_store
from minisgl.kernels.silu_mul import silu_mul

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]  # of x, weight and bias
AddLinear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor | None]


class Ops(NamedTuple):
    """The functions' arguments are those of the kernels below.

    linear: y = x W^T + b. heads: `rotary_store` of y, which is q, k and v. gated: silu(first half of y) * second half.
    add_linear: add y to the residual, its first argument, in place; or return what the norm that reads both has to add:
    y, or parts of it  # [S, M, N].
    prefill_rows: of the weights of qkv and of gate and up, and of the most rows of a step: numbers of rows with which
    `heads` and `gated` together run all kernels that they have for many rows alone.
    """

    linear: Linear
    heads: Callable[..., torch.Tensor]
    gated: Linear
    add_linear: AddLinear
    linear_borders: Callable[[torch.dtype, torch.device], list[int]]  # numbers of rows above which it is compiled anew
    prefill_rows: Callable[[torch.Tensor, torch.Tensor, int], list[int]]
    attention_decode: Callable[..., None]
    attention_prefill: Callable[..., None]
    query_block: Callable[[int, torch.device, torch.dtype], int]
    streams: bool  # small batches of decodes may run in fewer kernels, which sum in another order


def _on_hopper(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: str) -> torch.Tensor | None:
    """What Hopper's own kernel makes of a matmul that it is fastest for; None where it is not."""
    hopper = hopper_module("matmul_sm90", x.device)
    tile = hopper.find_tile(x, weight, kind) if hopper else None
    return hopper.matmul_sm90(x, weight, bias, tile, kind) if hopper and tile else None


def _fastest_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = _on_hopper(x, weight, bias, "whole")
    if y is not None:
        return y
    if beats_torch(x.shape[0], weight):
        return invariant_matmul(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def _fastest_heads(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rotary: Rotary,
) -> torch.Tensor:
    for name in ("heads_matmul_sm90", "prefill_matmul_sm90"):
        hopper = hopper_module(name, x.device)
        if hopper and hopper.fits_heads(x, weight, k_cache):
            q: torch.Tensor = hopper.heads_matmul(x, weight, bias, positions, slots, k_cache, v_cache, rotary)
            return q
    return rotary_store(_fastest_linear(x, weight, bias), positions, slots, k_cache, v_cache, rotary)


def _fastest_gated(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = _on_hopper(x, weight, bias, "gated")
    if y is not None:
        return y
    hopper = hopper_module("prefill_matmul_sm90", x.device)
    if hopper and hopper.fits_gated(x, weight):
        gated: torch.Tensor = hopper.gated_matmul(x, weight, bias)
        return gated
    return silu_mul(_fastest_linear(x, weight, bias))


def _fastest_added(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    y = _on_hopper(x, weight, bias, "parts")
    if y is not None:
        return y
    if bias is not None or beats_torch(x.shape[0], weight):
        return _fastest_linear(x, weight, bias)
    residual.addmm_(x, weight.t())
    return None


def _invariant_added(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return invariant_matmul(x, weight, bias)


def _invariant_heads(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *stored: Any) -> torch.Tensor:
    return rotary_store(invariant_matmul(x, weight, bias), *stored)


def _invariant_gated(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return silu_mul(invariant_matmul(x, weight, bias))


def _fastest_borders(dtype: torch.dtype, device: torch.device) -> list[int]:
    if device.type != "cuda":
        return []
    borders = {border for border in row_borders(dtype, device) if border < FEW_ROWS}
    hopper = hopper_module("matmul_sm90", device)
    return sorted(borders | set(hopper.row_borders() if hopper else ()))


def _fastest_prefill_rows(qkv: torch.Tensor, gate_up: torch.Tensor, most: int) -> list[int]:
    hopper = hopper_module("prefill_matmul_sm90", qkv.device)
    return sorted(hopper.fewest_rows(qkv, gate_up, most)) if hopper else []


FASTEST = Ops(
    linear=_fastest_linear,
    heads=_fastest_heads,
    gated=_fastest_gated,
    add_linear=_fastest_added,
    linear_borders=_fastest_borders,
    prefill_rows=_fastest_prefill_rows,
    attention_decode=attention_decode,
    attention_prefill=attention_prefill,
    query_block=query_block,
    streams=True,
)
INVARIANT = Ops(
    linear=invariant_matmul,
    heads=_invariant_heads,
    gated=_invariant_gated,
    add_linear=_invariant_added,
    linear_borders=row_borders,
    prefill_rows=lambda qkv, gate_up, most: [],
    attention_decode=invariant_decode,
    attention_prefill=invariant_prefill,
    query_block=invariant_query_block,
    streams=False,
)
