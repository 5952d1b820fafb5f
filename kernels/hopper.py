"""What Gluon kernels of Hopper (sm_90) share: names that differ between versions of Triton, and descriptors for TMA.

Knows Triton's dialect. Knows nothing of any kernel.
"""

from typing import Any, NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma


def first_name(owner: Any, *names: str) -> Any:
    """The attribute of the first name that `owner` has. AttributeError when it has none."""
    found = next((name for name in names if hasattr(owner, name)), names[0])
    return getattr(owner, found)


# Gluon renames as it settles, a name at a time; first the name in Triton 3.9, then those from 3.6 on.
async_load = first_name(tma, "async_load", "async_copy_global_to_shared")
async_store = first_name(tma, "async_store", "async_copy_shared_to_global")
barrier = first_name(gl, "barrier", "thread_barrier")
reinterpret = first_name(gl.shared_memory_descriptor, "reinterpret", "_reinterpret")


class Address(NamedTuple):
    """All that a descriptor asks of its tensor. Keeping a tensor would keep its memory."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.pointer
