"""Compiles kernels side by side: launches that run nothing say which ones, and threads make them ready.

Knows how Triton compiles and keeps kernels. Knows none of them.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton

from minisgl.kernels.launch import use_device
from minisgl.kernels.threaded_loading import allow_threaded_loading

COMPILE_THREADS = 16  # they wait for assemblers and C compilers much of the time


@contextmanager
def compile_ahead(device: torch.device) -> Iterator[None]:
    """Inside, this thread's launches run nothing; on leaving, what they would have run is compiled and on the device.

    Each kernel is compiled once, however often it is launched. What follows such a launch finds memory as it was
    before. Raises, on leaving, what a compiler raised.
    """
    allow_threaded_loading()
    with ThreadPoolExecutor(COMPILE_THREADS, initializer=use_device, initargs=(device,)) as pool, _Collector(pool):
        yield


class _Collector(triton.AsyncCompileMode):  # type: ignore[misc]
    """Hands kernels to threads as launches ask for them."""

    is_open = True

    def submit(self, key: str, compile_kernel: Callable[[], Any], *callbacks: Callable[..., Any]) -> "_Ahead":
        def make_ready() -> Any:
            kernel = compile_kernel()
            kernel.run  # noqa: B018 - builds the launcher and loads the code, which the first launch would do
            return kernel

        super().submit(key, make_ready, *callbacks)
        return _Ahead(self, self.future_kernels[key].future)

    def __exit__(self, *exception: Any) -> None:
        self.is_open = False
        super().__exit__(*exception)


class _Unlaunched:
    """What a launch reads of a kernel, for a launch of nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *args: Any) -> None:
        pass

    def run(self, *args: Any) -> None:
        pass


class _Ahead:
    """Stands in for a kernel until it is ready; behind that it is the kernel, or raises what its compiler raised, since
    Triton may keep it in the kernel's place."""

    def __init__(self, collector: _Collector, future: "Future[Any]") -> None:
        self._collector, self._future = collector, future

    def __getattr__(self, name: str) -> Any:
        return getattr(_Unlaunched() if self._collector.is_open else self._future.result(), name)
