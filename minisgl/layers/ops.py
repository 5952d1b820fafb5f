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
from minisgl.kernels.invariant_matmul import invariant_matmul, row_borders
from minisgl.kernels.invariant_prefill import invariant_prefill


class Ops(NamedTuple):
    """The functions' arguments are those of the kernels below."""

    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    linear_borders: Callable[[torch.dtype, torch.device], list[int]]  # numbers of rows above which it is compiled anew
    attention_decode: Callable[..., None]
    attention_prefill: Callable[..., None]
    query_block: Callable[[int, torch.device, torch.dtype], int]
    streams: bool  # small batches of decodes may run in fewer kernels, which sum in another order


FASTEST = Ops(
    linear=torch.nn.functional.linear,
    linear_borders=lambda dtype, device: [],
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
