"""What Gluon kernels of Hopper (sm_90) share: names that differ between versions of Triton, and descriptors for TMA.

Knows Triton's dialect. Knows nothing of any kernel.
"""

from typing import NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Gluon renames as it settles; first the name in Triton 3.6, then the one in 3.9.
if hasattr(gl, "thread_barrier"):
    async_load = tma.async_copy_global_to_shared
    barrier = gl.thread_barrier
    reinterpret = gl.shared_memory_descriptor._reinterpret
else:
    async_load = tma.async_load
    barrier = gl.barrier
    reinterpret = gl.shared_memory_descriptor.reinterpret


class Address(NamedTuple):
    """All that a descriptor asks of its tensor. Keeping a tensor would keep its memory."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.pointer
