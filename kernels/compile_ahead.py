"""Compiles kernels side by side: launches that run nothing say which ones, and threads make them ready.

Knows how Triton compiles and keeps kernels. Knows none of them.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from minisgl.kernels.launch import use_device
from minisgl.kernels.threaded_loading import allow_threaded_loading

COMPILE_THREADS = 16  # they wait for assemblers and C compilers much of the time
_one_at_a_time = Lock()


@contextmanager
def compile_ahead(device: torch.device) -> Iterator[None]:
    """Inside, this thread's launches run nothing; on leaving, what they would have run is compiled and on the device.

    Each kernel is compiled once, however often it is launched. What was compiled before does not run either: it would
    read what the others have not written. Raises, on leaving, what a compiler raised.
    """
    allow_threaded_loading()
    run, thread = JITFunction.run, get_ident()

    def run_nothing(kernel: Any, *args: Any, **options: Any) -> Any:
        if get_ident() == thread:
            options["warmup"] = True
        return run(kernel, *args, **options)

    with (
        _one_at_a_time,
        ThreadPoolExecutor(COMPILE_THREADS, initializer=use_device, initargs=(device,)) as pool,
        _Collector(pool),
    ):
        JITFunction.run = run_nothing
        try:
            yield
        finally:
            JITFunction.run = run


class _Collector(triton.AsyncCompileMode):  # type: ignore[misc]
    """Hands kernels to threads as launches ask for them."""

    def submit(self, key: str, compile_kernel: Callable[[], Any], *callbacks: Callable[..., Any]) -> Any:
        def make_ready() -> Any:
            kernel = compile_kernel()
            kernel.run  # noqa: B018 - builds the launcher and loads the code, which the first launch would do
            return kernel

        return super().submit(key, make_ready, *callbacks)
