"""Programmatic dependent launch: a kernel starts while the one before it on the stream still runs.

A kernel boundary inside a captured graph costs about a microsecond, of which this hides half: the next kernel's
programs are placed, and constants (weights) asked for, while the last programs of this one finish. The rule that
keeps it right: every program of every kernel waits before it reads what another kernel made and before it writes
anything, those that have nothing to do included. So a kernel's end implies the end of all before it, and
**before the wait only constants may be read: what no kernel of a step writes.**

Knows: NVIDIA GPUs from sm_90 have it. Elsewhere kernels follow each other as always, and the wait is nothing.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from minisgl.kernels.launch import architecture


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Let the next kernel start, and wait for the end of the one before."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that takes the constant PDL and calls `wait_for_previous_kernel` in every program."""
    name, _, version = architecture(device).partition("_")
    if name == "sm" and int(version) >= 90:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}  # AMD's backend does not know the option launch_pdl
