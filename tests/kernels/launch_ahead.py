"""Launches kernels in and behind `compile_ahead`, on a driver that only counts: `python tests/kernels/launch_ahead.py`.

Prints a dict of what was compiled and launched.
"""

from collections import Counter

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

from minisgl.kernels.compile_ahead import compile_ahead
from tests.kernels.aot_compile import ARCHITECTURES, StubDriver

counts: Counter[str] = Counter()


class CountingDriver(StubDriver):
    """Loads any code, and counts launchers and launches."""

    class utils:
        @staticmethod
        def load_binary(*args):
            return 1, 2, 32, 0, 1024

        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 1 << 16}

    class launcher_cls:
        def __init__(self, *args):
            counts["launchers"] += 1

        def __call__(self, *args):
            counts["launches"] += 1


@triton.jit
def _double(x_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(x_ptr + offsets, 2 * tl.load(x_ptr + offsets))


@triton.jit
def _broken(x_ptr):
    tl.store(x_ptr, tl.nothing_of_this_name(x_ptr))


def count_compiled(**options):
    counts["compiled"] += 1


driver.set_active(CountingDriver(ARCHITECTURES["cuda:90"]))
knobs.runtime.jit_post_compile_hook = count_compiled
x = torch.zeros(64)
_double[(1,)](x, SIZE=64)
with compile_ahead(x.device):
    for size in (16, 32, 64, 16, 32, 32):
        _double[(1,)](x, SIZE=size)
    counts["launches inside"] = counts["launches"] - 1
counts["compiled ahead"], counts["launchers ahead"] = counts["compiled"] - 1, counts["launchers"] - 1
for size in (16, 32, 64):
    _double[(1,)](x, SIZE=size)
for attempt in ("error ahead", "error behind"):
    try:
        if attempt == "error ahead":
            with compile_ahead(x.device):
                _broken[(1,)](x)
        else:
            _broken[(1,)](x)
    except triton.CompilationError:
        counts[attempt] += 1
print(dict(counts))
