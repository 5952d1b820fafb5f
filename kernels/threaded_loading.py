"""Lets threads make kernels ready at once: Triton's extension modules are loaded one after another.

Up to Triton 3.6, the launcher of a kernel is a C extension, and all of them have one name. CPython keeps one module for
extensions of a name: what is loaded once more is put into the module that the last one left there. So when another
thread loads its launcher before this one has read `launch` from the module, this thread's kernel goes through the
other's launcher: an error about its arguments at best. Seen once in the many starts of a run of all tests.
"""

from functools import cache
from threading import Lock
from types import SimpleNamespace
from typing import Any

from triton.runtime import build


@cache
def allow_threaded_loading() -> None:
    """Have each of Triton's loads in this process give back what that load found, whatever is loaded after it. A Triton
    without the function that is replaced here loads in another way, and is left alone."""
    load, lock = getattr(build, "_load_module_from_path", None), Lock()
    if load is None:
        return

    def load_alone(name: str, path: str) -> Any:
        with lock:
            return SimpleNamespace(**vars(load(name, path)))

    build._load_module_from_path = load_alone
