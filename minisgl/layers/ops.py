"""Which kernels the layers call where there is a choice: those that are fastest for a batch's shape, or those that sum
in one order, so that a request's logits have the same bits whatever runs beside it.

Norms, rotary embedding, gate, token embedding and sampling take each row alone: there is nothing to choose. Knows
kernels. Does not know layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from minisgl.kernels.attention_decode import attention_decode
from minisgl.kernels.attention_prefill import attention_prefill, query_block
from minisgl.kernels.invariant_attention import query_block as invariant_query_block
from minisgl.kernels.invariant_decode import invariant_decode
from minisgl.kernels.invariant_matmul import FEW_ROWS, beats_torch, invariant_matmul, row_borders
from minisgl.kernels.invariant_prefill import invariant_prefill


class Ops(NamedTuple):
    """The functions' arguments are those of the kernels below."""

    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    linear_borders: Callable[[torch.dtype, torch.device], list[int]]  # numbers of rows above which it is compiled anew
    attention_decode: Callable[..., None]
    attention_prefill: Callable[..., None]
    query_block: Callable[[int, torch.device, torch.dtype], int]
    streams: bool  # small batches of decodes may run in fewer kernels, which sum in another order


def _fastest_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if beats_torch(x.shape[0], weight):
        return invariant_matmul(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def _fastest_borders(dtype: torch.dtype, device: torch.device) -> list[int]:
    return [border for border in row_borders(dtype, device) if border < FEW_ROWS] if device.type == "cuda" else []


FASTEST = Ops(
    linear=_fastest_linear,
    linear_borders=_fastest_borders,
    attention_decode=attention_decode,
    attention_prefill=attention_prefill,
    query_block=query_block,
    streams=True,
)
INVARIANT = Ops(
    linear=invariant_matmul,
    linear_borders=row_borders,
    attention_decode=invariant_decode,
    attention_prefill=invariant_prefill,
    query_block=invariant_query_block,
    streams=False,
)
