"""minisgl: a Triton-kernel-first inference engine for large language models.

    from minisgl import LLM, SamplingParams

    with LLM("path/to/model") as llm:
        for result in llm.generate(["Hello"], SamplingParams(max_tokens=32)):
            print(result.text)

The public names are loaded on first use, so that `import minisgl` costs nothing.
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from minisgl.errors import MinisglError, RequestError
    from minisgl.llm import LLM
    from minisgl.output_text import Delta
    from minisgl.request import Embedding, Result, SamplingParams, Score, TokenLogprobs, Usage
    from minisgl.structured import ResponseFormat

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Delta",
    "Embedding",
    "MinisglError",
    "RequestError",
    "ResponseFormat",
    "Result",
    "SamplingParams",
    "Score",
    "TokenLogprobs",
    "Usage",
    "__version__",
]

_HOME = {
    "Delta": "minisgl.output_text",
    "Embedding": "minisgl.request",
    "LLM": "minisgl.llm",
    "MinisglError": "minisgl.errors",
    "RequestError": "minisgl.errors",
    "ResponseFormat": "minisgl.structured",
    "Result": "minisgl.request",
    "SamplingParams": "minisgl.request",
    "Score": "minisgl.request",
    "TokenLogprobs": "minisgl.request",
    "Usage": "minisgl.request",
}

# In a checkout that is not installed, kernels/, cli/ and bench/ stand beside this folder.
if not (_Path(__file__).parent / "kernels").exists():
    __path__.append(str(_Path(__file__).parent.parent))


def __getattr__(name: str) -> _Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minisgl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
