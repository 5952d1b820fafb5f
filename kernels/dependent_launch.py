"""Programmatic dependent launch: a kernel starts while the one before it on the stream still runs.

A kernel boundary inside a captured graph costs about a microsecond, of which this hides half: the next kernel's
programs are placed, and what they may read already is asked for, while the last programs of this one finish. Two rules
keep it right:

- Every program of every kernel waits before it reads what the kernel before it wrote and before it writes anything,
  those that have nothing to do included. So a kernel's end implies the end of all before it.
- A program lets the next kernel start only after its own wait. So a kernel that has started may read, before its wait,
  all that earlier kernels than the one just before it wrote: weights, and the lengths and pages of a step.

Norms of few rows and matmuls of few do without the second rule (`start_next_kernel`): the next kernel starts while the
one before them still runs, which leaves it more time to ask for its weights. For it "the one just before" is all of
these and the kernel before them: it may read ahead no more than weights and what a step prepared. Where splits are
combined, or sampling follows its summaries, steps are no shorter so on an H200, or longer.

Knows: NVIDIA GPUs from sm_90 have it. Elsewhere kernels follow each other as always, and the wait is nothing.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from minisgl.kernels.launch import architecture


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Wait for the end of the kernel before, then let the next one start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def start_next_kernel(PDL: tl.constexpr):
    """Let the next kernel start before this one has waited, which it still has to do."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Ask for the cache lines at pointers (any shape) to be brought to the L2 cache. Where PDL is, this is too."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",  # inline assembly must have a result
        "=r,l",
        [pointers.to(tl.int64, bitcast=True)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that takes the constant PDL and calls `wait_for_previous_kernel` in every program."""
    name, _, version = architecture(device).partition("_")
    if name == "sm" and int(version) >= 90:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}  # AMD's backend does not know the option launch_pdl
