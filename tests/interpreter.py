"""Triton's interpreter, without work that it does again and again.

To run a kernel, the interpreter replaces every function of triton.language by one on numpy arrays. It looks for them
again each time that a kernel calls a helper, where all are replaced already: half of the time of a model's kernels.
"""

from typing import Any

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
