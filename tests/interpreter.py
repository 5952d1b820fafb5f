"""Triton's interpreter, without work that it does again and again, and with memory as processes that share it need it.

To run a kernel, the interpreter replaces every function of triton.language by one on numpy arrays. It looks for them
again each time that a kernel calls a helper, where all are replaced already: half of the time of a model's kernels.
"""

from ctypes import c_uint16
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def patch_language_once() -> None:
    """From now on, helpers leave the modules alone that are replaced. A Triton without this step stays as it is."""
    patch_language, nothing = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if patch_language is None or nothing is None:
        return

    def patch_unless_patched(fn: Any) -> Any:
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        is_patched = bool(modules) and not any(tl.core.is_builtin(module.load) for module in modules)
        return nothing() if is_patched else patch_language(fn)

    interpreter._patch_lang = patch_unless_patched


def move_half_words_whole() -> None:
    """From now on, an element of 2 bytes is read and written at once, as on a GPU; the interpreter copies it byte by
    byte, which another process that looks at it may see."""
    native = interpreter._interpreter
    load, store = native.load, native.store

    def load_whole(pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        if np.dtype(dtype).itemsize != 2:
            return load(pointers, mask, other, dtype)
        found = other.copy()
        found.view(np.uint16)[mask] = [c_uint16.from_address(pointer).value for pointer in pointers[mask].tolist()]
        return found

    def store_whole(pointers: Any, values: Any, mask: Any) -> None:
        if values.dtype.itemsize != 2:
            return store(pointers, values, mask)
        for pointer, value in zip(pointers[mask].tolist(), values.view(np.uint16)[mask].tolist(), strict=True):
            c_uint16.from_address(pointer).value = value

    native.load, native.store = load_whole, store_whole
